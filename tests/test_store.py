"""Packs: what is put is got, by whoever opens the folder, and what is damaged is missing, never another."""

import errno
import hashlib
import io
import shutil
import zipfile

import numpy as np
import pytest

from aha import store
from aha.store import Packs

from . import faults

KEYS = [("a", "maps"), ("b", "000001"), ("c d", "é")]


def arrays(number):
    return {"x": np.arange(5) + number, "names": np.array(["one", f"{number}"]), "y": np.full((2, 3), 0.5, "float16")}


def same(found, expected):
    return found is not None and found.keys() == expected.keys() and all(
        found[name].dtype == array.dtype and np.array_equal(found[name], array) for name, array in expected.items()
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A folder with one pack of three records."""
    packs = Packs(tmp_path / "packs")
    for number, key in enumerate(KEYS):
        packs.put({key: arrays(number)})
    return tmp_path / "packs"


def pack_of(folder):
    (path,) = folder.glob("*.pack")
    return path


def sound(folder):
    """Which of the three records are there; any other content is an error."""
    packs = Packs(folder)
    found = [packs.get(key) for key in KEYS]
    assert all(piece is None or same(piece, arrays(number)) for number, piece in enumerate(found))
    return [piece is not None for piece in found]


def test_what_is_put_is_got(folder):
    assert sound(folder) == [True] * 3
    packs = Packs(folder)
    assert packs.get(("a",)) is None
    packs.put({("a", "maps"): arrays(7), ("new",): arrays(8)})
    for opened in (packs, Packs(folder)):
        assert same(opened.get(("a", "maps")), arrays(7))
        assert same(opened.get(("new",)), arrays(8))
        assert same(opened.get(KEYS[1]), arrays(1))
    assert [path.name for path in folder.iterdir()] == ["0000-0000.pack"]


def test_writers_have_packs_of_their_own(folder):
    one, two = Packs(folder, 0), Packs(folder, 1)
    two.put({("of two",): arrays(2)})
    assert one.get(("of two",)) is None
    one.put({("of one",): arrays(1)})
    one.refresh()
    two.refresh()
    for packs in (one, two):
        assert same(packs.get(("of one",)), arrays(1))
        assert same(packs.get(("of two",)), arrays(2))
    assert sorted(path.name for path in folder.iterdir()) == ["0000-0000.pack", "0001-0000.pack"]


def test_the_later_run_counts_whoever_wrote(folder):
    Packs(folder, 9).put({KEYS[0]: arrays(9)})
    assert same(Packs(folder).get(KEYS[0]), arrays(9))
    Packs(folder, 0).put({KEYS[0]: arrays(0)})  # its pack comes first by name
    assert same(Packs(folder).get(KEYS[0]), arrays(0))


def test_full_packs_are_followed_by_new_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "ROLL", 1500)
    packs = Packs(tmp_path)
    for number in range(12):
        packs.put({(f"{number}",): arrays(number)})
        packs = packs if number % 2 else Packs(tmp_path)
    sizes = [path.stat().st_size for path in sorted(tmp_path.iterdir())]
    assert len(sizes) > 3
    assert all(size >= 1500 for size in sizes[:-1])
    assert all(same(Packs(tmp_path).get((f"{number}",)), arrays(number)) for number in range(12))


def test_a_flipped_bit_costs_one_record(folder):
    path = pack_of(folder)
    whole, lost = path.read_bytes(), 0
    for bit in range(0, 8 * len(whole), 41):
        faults.flipped(path, bit)
        found = sound(folder)
        assert found.count(False) == 1
        lost += 1
        path.write_bytes(whole)
    assert lost > 100


@pytest.mark.parametrize("bit", [3, 90, 8 * 30, 8 * 70, 8 * 200])
@pytest.mark.parametrize("record", [0, 1, 2])
def test_what_a_flipped_bit_has_cost_is_made_again(folder, bit, record):
    path = pack_of(folder)
    size = path.stat().st_size // 3  # about: the records differ by their keys
    faults.flipped(path, 8 * record * size + bit)
    (number,) = [number for number, there in enumerate(sound(folder)) if not there]
    Packs(folder).put({KEYS[number]: arrays(number)})
    assert sound(folder) == [True] * 3


def test_what_is_cut_short_is_made_again(folder):
    path = pack_of(folder)
    whole = path.read_bytes()
    for length in [0, 1, 7, 8, 59, 60, 61, 80, *range(100, len(whole), 97)]:
        for rest in folder.iterdir():
            rest.unlink()
        path.write_bytes(whole[:length])
        found = sound(folder)
        assert found == sorted(found, reverse=True)
        packs = Packs(folder)
        for number, there in enumerate(found):
            if not there:
                packs.put({KEYS[number]: arrays(number)})
        assert sound(folder) == [True] * 3
        assert path.read_bytes()[:length] == whole[:length]  # nothing that was there is written over


def test_anything_between_records_is_passed_over(folder):
    path = pack_of(folder)
    packs, size = Packs(folder), path.stat().st_size
    packs.put({("late",): arrays(5)})
    whole = path.read_bytes()
    noise = np.random.default_rng(0).bytes(2**20 + 3)
    # a mark and half a head among it
    path.write_bytes(noise + whole[:size] + whole[:30] + noise + whole[size:] + whole[:9])
    assert sound(folder) == [True] * 3
    assert same(Packs(folder).get(("late",)), arrays(5))


def record(payload, key=b"evil"):
    head = store._HEAD.pack(store._MARK, 1, len(key), len(payload), hashlib.sha256(payload).digest()) + key
    return head + hashlib.sha256(head).digest()[: store._CHECK] + payload


def payloads():
    pickled, bomb = io.BytesIO(), io.BytesIO()
    np.savez(pickled, x=np.array([print], dtype=object))
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", bytes(2**24))
    huge = io.BytesIO()
    with zipfile.ZipFile(huge, "w") as archive:
        archive.writestr(
            "x.npy", b"\x93NUMPY\x01\x00v\x00{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999999,), }\n"
        )
    return {"pickle": pickled, "bomb": bomb, "huge": huge, "text": io.BytesIO(b"no archive"), "empty": io.BytesIO()}


@pytest.mark.parametrize("name", payloads())
def test_what_nobody_here_has_written_is_missing(tmp_path, name):
    (tmp_path / "0000-0000.pack").write_bytes(record(payloads()[name].getvalue()))
    assert Packs(tmp_path).get(("evil",)) is None


def test_a_run_number_out_of_range_is_no_record(tmp_path):
    head = bytearray(record(b"x")[: store._HEAD.size + 4])
    head[8:16] = b"\xff" * 8
    (tmp_path / "0000-0000.pack").write_bytes(bytes(head) + hashlib.sha256(head).digest()[:8] + b"x")
    Packs(tmp_path).put({("a",): arrays(1)})
    assert same(Packs(tmp_path).get(("a",)), arrays(1))


@pytest.mark.parametrize("what", ["folder", "pack", "bytes"])
@pytest.mark.parametrize("call", ["put", "refresh"])
def test_what_is_removed_meanwhile_is_said(folder, what, call):
    packs = Packs(folder)
    packs.put({("a",): arrays(1)})
    if what == "folder":
        shutil.rmtree(folder)
    elif what == "pack":
        pack_of(folder).unlink()
    else:
        faults.cut(pack_of(folder), 0.5)
    message = "changed by another program" if (what, call) == ("bytes", "put") else "was removed or cut short while"
    with pytest.raises(OSError, match=message) as caught:
        packs.put({("b",): arrays(2)}) if call == "put" else packs.refresh()
    assert "\n" not in str(caught.value)
    if what == "folder":
        assert not folder.exists()
        with pytest.raises(OSError, match="was removed"):
            packs.get(("a",))


def test_two_programs_do_not_write_one_pack(folder):
    one, two, three = Packs(folder), Packs(folder), Packs(folder)
    for number, packs in enumerate((one, two, three)):
        packs.put({(f"{number}",): arrays(number)})
    assert len(list(folder.iterdir())) == 3
    assert all(same(Packs(folder).get((f"{number}",)), arrays(number)) for number in range(3))
    Packs(folder).put({("a",): arrays(1)})  # behind what the last of them has written
    with pytest.raises(OSError, match="changed by another program meanwhile: run one comparison per folder"):
        three.put({("b",): arrays(2)})
    assert same(Packs(folder).get(("a",)), arrays(1))


def put_two(folder):
    packs = Packs(folder)
    for number in (5, 6):
        packs.put({(f"{number}",): arrays(number), (f"{number} too",): arrays(number)})


def test_kills_and_refusals_at_every_change(tmp_path):
    """What was there stays, what was being put is there as a whole or not at all, and putting it again heals."""

    def both(folder, number):
        packs = Packs(folder)
        found = [packs.get((name,)) for name in (f"{number}", f"{number} too")]
        assert all(piece is None or same(piece, arrays(number)) for piece in found)
        return [piece is not None for piece in found]

    planned = faults.changes(lambda: put_two(tmp_path / "plan"), tmp_path)
    assert [change.split()[0] for change in planned].count("write") == 2
    for number, change in enumerate(planned):
        for fault in ("kill", "torn", "full", "read-only"):
            folder = tmp_path / f"{number} {fault}"
            if fault in ("kill", "torn"):
                faults.killed(lambda folder=folder: put_two(folder), folder, number, torn=fault == "torn")
            else:
                reason = errno.ENOSPC if fault == "full" else errno.EROFS
                refused = faults.refused(lambda folder=folder: put_two(folder), folder, number, reason)
                assert isinstance(refused.error, OSError), change
                assert "cannot be written, " in str(refused.error)
            first, second = both(folder, 5), both(folder, 6)
            assert first in ([True] * 2, [False] * 2) or fault == "torn"
            assert first == [True] * 2 or second == [False] * 2
            put_two(folder)
            assert both(folder, 5) == both(folder, 6) == [True] * 2

"""Files are whole or absent, and one that was changed since is refused."""

import contextlib
import errno
import json
import os

import pytest

from aha import files


def test_json_comes_back(tmp_path):
    path = tmp_path / "deep" / "a.json"
    content = {"é": [1, 0.1, None, True, float("nan")], "b": {"z": 1, "a": [{}]}, "p": path}
    files.write_json(path, content)
    assert list(json.loads(path.read_text()))[-1] == "sha256"
    back = files.read_json(path, required=True)
    assert repr(back) == repr({**content, "p": str(path)})
    files.write_json(path, {**back, "sha256": "of an earlier file"})
    assert repr(files.read_json(path)) == repr(back)


def test_a_flipped_bit_of_json_is_refused_or_means_the_same(tmp_path):
    path = tmp_path / "a.json"
    content = {"step": 12, "name": "abc", "rate": 0.25, "of": [1, 2], "on": True}
    files.write_json(path, content)
    whole, meant = path.read_bytes(), 0
    for place in range(0, 8 * len(whole), 3):  # of every byte
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        with contextlib.suppress(files.DamagedError):
            assert files.read_json(path, required=True) == content
            meant += 1
    assert meant < 0.1 * len(whole)  # blanks that became others


def test_a_deliberate_edit(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"step": 12})
    edited = path.read_text().replace("12", "999")
    path.write_text(edited)
    with pytest.raises(files.DamagedError, match=r'was changed or damaged .* on purpose, remove its line "sha256"'):
        files.read_json(path)
    path.write_text('{"step": 999}')
    assert files.read_json(path) == {"step": 999}
    with pytest.raises(files.DamagedError, match=r"checksum differs$"):
        files.read_json(path, required=True)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_no_json_object(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(files.DamagedError, match=r"a\.json ") as caught:
        files.read_json(tmp_path / "a.json")
    assert "\n" not in str(caught.value)


def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*a\.json"):
        files.read_json(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError, match=r"no file .*a\.bin"):
        files.read_checked(tmp_path / "a.bin", "0")


def test_checked_bytes(tmp_path):
    path = tmp_path / "a.bin"
    files.write_atomically(path, b"content")
    assert files.read_checked(path, files.digest(b"content")) == b"content"
    for damaged, message in ((b"Content", "checksum differs"), (b"conten", "checksum differs"), (b"", "is empty")):
        path.write_bytes(damaged)
        with pytest.raises(files.DamagedError, match=message):
            files.read_checked(path, files.digest(b"content"))


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
@pytest.mark.parametrize(("number", "reason"), [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "is read-only")])
def test_a_disk_that_refuses(tmp_path, monkeypatch, call, number, reason):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(files.WriteError) as caught:
            files.write_json(path, {"a": 2})
    assert f"{path} cannot be written, " in str(caught.value) and reason in str(caught.value)
    assert caught.value.errno == number
    assert files.read_json(path, required=True) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_removed(tmp_path):
    files.write_atomically(tmp_path / "a", b"1")
    (tmp_path / ".a.x1y2.partial").touch()
    (tmp_path / ".hidden").touch()
    files.remove_partials(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "a"]
    files.remove_partials(tmp_path / "missing")

"""The long table: what goes in comes out, by both codecs."""

import builtins
import hashlib
import math

import numpy as np
import pytest

from aha.evaluation import Key, Records
from aha.evaluation import records as records_module
from aha.files import DamagedError, read_columns, write_columns

from .. import faults

FIRST = Key("vit | b", "predicted", 'a,"b"', "aha", "black", "deletion")


def table():
    records = Records()
    records.add(FIRST, [4, 7], [0.1, math.nan])
    records.add(FIRST._replace(reference="", metric="seconds_per_image", protocol=""), [4], [1e-300])
    records.add(FIRST, np.array([9]), np.array([1 / 3]))
    return records


@pytest.fixture(params=["parquet", "csv"])
def ending(request, monkeypatch):
    if request.param == "parquet":
        pytest.importorskip("pyarrow")
    else:
        found = builtins.__import__

        def without(name, *rest):
            if name.startswith("pyarrow"):
                raise ImportError(name)
            return found(name, *rest)

        monkeypatch.setattr(builtins, "__import__", without)
    return request.param


def test_what_is_written_is_read(tmp_path, ending):
    records = table()
    path = records.write(tmp_path)
    assert path.name == f"scores.{ending}"
    again = Records.read(tmp_path)
    assert list(again) == list(records)
    assert len(again) == len(records) == 4
    for key, series in records.items():
        assert again[key].images.tolist() == series.images.tolist()
        assert np.array_equal(again[key].values, series.values, equal_nan=True)  # to the last bit
    assert again[FIRST].known() == {4: 0.1, 9: 1 / 3}
    assert Records().write(tmp_path / "empty").is_file()
    assert len(Records.read(tmp_path / "empty")) == 0


def test_a_table_replaces_that_of_the_other_codec(tmp_path, ending):
    for other in ("parquet", "csv"):
        (tmp_path / f"t.{other}").write_bytes(b"old")
    write_columns({"a": [1, 2], "b": ["x", ""]}, tmp_path / "t")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"t.{ending}", f"t.{ending}.sha256"]
    assert [int(value) for value in read_columns(tmp_path / "t")["a"]] == [1, 2]


def test_a_table_is_written_in_parts(tmp_path, ending, monkeypatch):
    monkeypatch.setattr(records_module, "AT_ONCE", 2)
    many = Records()
    for number in range(7):
        many.add(FIRST._replace(method=f"m{number}"), range(number % 3 + 1), np.arange(number % 3 + 1) / 7)
    many.write(tmp_path)
    again = Records.read(tmp_path)
    assert list(again) == list(many)
    assert all(again[key].values.tolist() == series.values.tolist() for key, series in many.items())


def test_a_changed_table_is_refused(tmp_path, ending):
    path = table().write(tmp_path)
    whole, refused = path.read_bytes(), 0
    for bit in range(0, 8 * len(whole), max(1, len(whole) // 20)):
        faults.flipped(path, bit)
        with pytest.raises(DamagedError, match="its checksum differs") as caught:
            Records.read(tmp_path)
        assert "\n" not in str(caught.value)
        refused += 1
        path.write_bytes(whole)
    assert refused > 50
    summed = path.with_name(f"{path.name}.sha256")
    assert summed.read_text() == f"{hashlib.sha256(whole).hexdigest()}  {path.name}\n"  # what sha256sum -c reads
    for share in (0, 0.5):
        faults.cut(path, share)
        with pytest.raises(DamagedError):
            Records.read(tmp_path)
        path.write_bytes(whole)
    summed.unlink()
    assert len(Records.read(tmp_path)) == 4
    for content in (b"", whole[:-20], b"\xff\xfe\x00"):  # without a checksum, what shows is refused
        path.write_bytes(content)
        if content == whole[:-20] and ending == "csv":
            continue
        with pytest.raises((DamagedError, ImportError)):
            Records.read(tmp_path)


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="one value per image"):
        table().add(FIRST, [1, 2], [0.5])
    with pytest.raises(FileNotFoundError, match="run the evaluation first"):
        Records.read(tmp_path)
    assert table()[FIRST._replace(method="none")].known() == {}


def test_tables_are_joined():
    records = table()
    records.extend(table())
    assert records[FIRST].images.tolist() == [4, 7, 9, 4, 7, 9]


@pytest.mark.parametrize("row", ["c,predicted,m,aha,,deletion,0,x", "c,predicted,m,aha,,deletion,first,0.5"])
def test_a_table_of_other_things_is_named(tmp_path, row):
    (tmp_path / "scores.csv").write_text(f"{','.join(Key._fields)},image,value\n{row}\n")
    with pytest.raises(ValueError, match=rf"^{tmp_path}/scores holds an image or value that is no number \(.*\): give"):
        Records.read(tmp_path)


def test_a_table_that_pyarrow_does_not_know_is_damaged(tmp_path, monkeypatch):
    pq = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "scores.parquet").write_bytes(b"PAR1")

    def unknown(_):
        raise NotImplementedError("Integers not in cstdint are not implemented")

    monkeypatch.setattr(pq, "read_table", unknown)
    with pytest.raises(DamagedError, match=r"scores\.parquet cannot be read, .*not in cstdint.*: run"):
        Records.read(tmp_path)

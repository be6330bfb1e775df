"""The long table: what goes in comes out, by both codecs."""

import builtins
import math

import numpy as np
import pytest

from aha.evaluation import Key, Records
from aha.files import read_columns, write_columns

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
    assert [path.name for path in tmp_path.iterdir()] == [f"t.{ending}"]
    assert [int(value) for value in read_columns(tmp_path / "t")["a"]] == [1, 2]


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

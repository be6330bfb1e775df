"""Files that are complete or absent, and tables of columns in them."""

from __future__ import annotations

import csv
import io
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TABLES = (".parquet", ".csv")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that readers see the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def slug(name: str) -> str:
    """``name`` as a folder's name."""
    return re.sub(r"[^A-Za-z0-9._=+-]+", "_", name).strip("_") or "unnamed"


def write_columns(columns: Mapping[str, Sequence[Any] | Any], path: Path) -> Path:
    """Columns of equal length as ``path``.parquet, or ``path``.csv where pyarrow is missing; NaN is empty."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(columns)
        lists = [column.tolist() if hasattr(column, "tolist") else column for column in columns.values()]
        for row in zip(*lists, strict=True):
            writer.writerow(["" if value is None or value != value else value for value in row])
        content, ending = text.getvalue().encode(), ".csv"
    else:
        arrays = {name: pa.array(values, from_pandas=True) for name, values in columns.items()}
        table = pa.table({n: a.dictionary_encode() if a.type == pa.string() else a for n, a in arrays.items()})
        stream = io.BytesIO()
        pq.write_table(table, stream, compression="zstd")
        content, ending = stream.getvalue(), ".parquet"
    file = path.with_name(path.name + ending)
    write_atomically(file, content)
    for other in TABLES:  # of an earlier run with or without pyarrow
        if other != ending:
            path.with_name(path.name + other).unlink(missing_ok=True)
    return file


def read_columns(path: Path) -> dict[str, list]:
    """What `write_columns` wrote: of .csv every value is text."""
    parquet, text = (path.with_name(path.name + ending) for ending in TABLES)
    if parquet.is_file():
        import pyarrow.parquet as pq

        return pq.read_table(parquet).to_pydict()
    if not text.is_file():
        raise FileNotFoundError(f"neither {parquet} nor {text} is there: run the evaluation first")
    with open(text, newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    return {name: [row[i] for row in rows] for i, name in enumerate(header)}

"""Files that are complete or absent and carry a checksum, and tables of columns in them."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

TABLES = (".parquet", ".csv")
CHECKSUM = "sha256"  # the last key of a JSON file: of all the others
PARTIAL = ".partial"  # how the name of a file ends that is being written

_ADVICE = {
    errno.ENOSPC: ("the disk is full", "free some space, or give another folder"),
    errno.EDQUOT: ("the disk quota is used up", "free some space, or give another folder"),
    errno.EROFS: ("the file system is read-only", "give a folder that can be written to"),
    errno.EACCES: ("no permission to write there", "give a folder that can be written to"),
    errno.EPERM: ("no permission to write there", "give a folder that can be written to"),
    errno.ENOTDIR: ("part of its path is a file", "give another folder"),
    errno.EEXIST: ("part of its path is a file", "give another folder"),
    errno.EISDIR: ("a folder has that name", "give another name"),
    errno.EIO: ("the disk reports an error", "look at the disk, or give another folder"),
}


class WriteError(OSError):
    """Something could not be written; the message says what, why and what to do."""


class DamagedError(ValueError):
    """A file is not what was written; the message names it."""


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Errors of the file system come as one line that names ``path``, as `WriteError`."""
    try:
        yield
    except OSError as error:
        if error.errno is None or isinstance(error, WriteError):  # a line of ours already
            raise
        reason, advice = _ADVICE.get(error.errno, (error.strerror or str(error), "give another folder"))
        found = WriteError(f"{path} cannot be written, {reason}: {advice}")
        found.errno = error.errno
        raise found from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that readers see the old one or the new one, never a part, whenever the process is killed.

    Raises:
        WriteError: in one line, for a full disk or a folder that cannot be written to; the old file is still there.
    """
    with replacing(path) as descriptor:
        put(descriptor, content)


def write_summed(path: Path, content: bytes) -> None:
    """`write_atomically`, and beside the file its checksum, as sha256sum writes it.

    Raises:
        WriteError: as of `write_atomically`.
    """
    with writing(path):  # of another content, if the process ends between the two
        _sum_of(path).unlink(missing_ok=True)
    write_atomically(path, content)
    _write_sum(path, digest(content))


@contextmanager
def replacing(path: Path) -> Iterator[int]:
    """A descriptor of a new file, which takes the place of ``path`` when all that was written to it is on the disk.

    Raises:
        WriteError: as of `write_atomically`.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL)
        try:
            try:
                yield descriptor
            finally:
                os.close(descriptor)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        sync_folder(path.parent)


def put(descriptor: int, content: bytes) -> None:
    """Write all of ``content`` to an open file, and to the disk."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
    os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    """The names in ``folder`` are on the disk, where the file system can say so."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # network file systems that sync no folders
            raise
    finally:
        os.close(descriptor)


def remove_partials(folder: Path) -> None:
    """Remove what processes that were killed while they wrote left in ``folder``; nobody else may be writing there."""
    with suppress(OSError):
        for path in folder.glob(f".*{PARTIAL}"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with suppress(OSError):
                    path.unlink()


def digest(content: bytes) -> str:
    """The SHA-256 of ``content``, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object whose last key, "sha256", is the checksum of the others. What JSON has no type for is text.

    Raises:
        WriteError: as of `write_atomically`.
    """
    plain = json.loads(json.dumps(content, default=str))
    plain.pop(CHECKSUM, None)
    text = json.dumps({**plain, CHECKSUM: _of_json(plain)}, indent=2, ensure_ascii=False)
    write_atomically(path, f"{text}\n".encode())


def read_json(path: Path, required: bool = False) -> dict[str, Any]:
    """What `write_json` wrote, without the checksum; a file without one is taken unless it is ``required``.

    Raises:
        FileNotFoundError: if there is no such file.
        DamagedError: in one line, for a file that is no JSON object, or whose checksum is another.
    """
    try:
        content = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no file {path}") from error
    except (ValueError, RecursionError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DamagedError(f"{path} cannot be read, it is empty or damaged ({reason})") from error
    if not isinstance(content, dict):
        raise DamagedError(f"{path} holds a {type(content).__name__}, not a JSON object")
    kept = content.pop(CHECKSUM, None)
    if kept is None and not required:
        return content
    if kept != _of_json(content):
        advice = "" if required else f'; if you edited it on purpose, remove its line "{CHECKSUM}"'
        raise DamagedError(f"{path} was changed or damaged since it was written, its checksum differs{advice}")
    return content


def _of_json(content: Mapping[str, Any]) -> str:
    return digest(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


def tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors by name as a safetensors file holds them."""
    from safetensors.torch import save

    return save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})


def read_checked(path: Path, checksum: str) -> bytes:
    """The content of a file whose checksum was written down elsewhere.

    Raises:
        FileNotFoundError: if there is no such file.
        DamagedError: in one line, if it has another checksum.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no file {path}") from error
    except OSError as error:
        raise DamagedError(f"{path} cannot be read ({error.strerror or error})") from error
    if not content:
        raise DamagedError(f"{path} is empty")
    if digest(content) != checksum:
        raise DamagedError(f"{path} was changed or damaged since it was written, its checksum differs")
    return content


def path_within(folder: Path, name: str) -> Path:
    """The file that a configuration in ``folder`` names: inside the folder, or anywhere by its absolute path.

    Raises:
        ValueError: in one line, for a relative path that leaves the folder.
    """
    if os.path.isabs(name):
        return Path(name)
    inside = os.path.normpath(name)
    if inside.split(os.sep)[0] == os.pardir or "\0" in name:
        raise ValueError(f"path {name[:300]!r} leaves {folder}: give one inside it, or an absolute path")
    return folder / inside


def slug(name: str) -> str:
    """``name`` as a folder's name."""
    return re.sub(r"[^A-Za-z0-9._=+-]+", "_", name).strip("_") or "unnamed"


def write_columns(columns: Mapping[str, Sequence[Any] | Any], path: Path) -> Path:
    """Columns of equal length as ``path``.parquet, or ``path``.csv where pyarrow is missing; NaN is empty."""
    return write_parts([columns], path)


def write_parts(parts: Iterable[Mapping[str, Sequence[Any] | Any]], path: Path) -> Path:
    """A table, a few rows after the others: what `write_columns` writes, without holding all of it.

    Beside it lies its checksum, as sha256sum writes it, which `read_columns` verifies.
    """
    try:
        import pyarrow.parquet as _  # noqa: F401
    except ImportError:
        ending, write = ".csv", _write_csv
    else:
        ending, write = ".parquet", _write_parquet
    file = path.with_name(path.name + ending)
    for old in TABLES:  # also that of an earlier run with or without pyarrow
        with writing(path):
            _sum_of(path.with_name(path.name + old)).unlink(missing_ok=True)
    with replacing(file) as descriptor:
        stream = _Summed(descriptor)
        write(iter(parts), stream)
        os.fsync(descriptor)
    _write_sum(file, stream.digest.hexdigest())
    for other in TABLES:
        if other != ending:
            with writing(path):
                path.with_name(path.name + other).unlink(missing_ok=True)
    return file


class _Summed(io.RawIOBase):
    """An open file that is written from its beginning to its end, with the digest of what was."""

    def __init__(self, descriptor: int):
        self.descriptor, self.digest, self._written = descriptor, hashlib.sha256(), 0

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        rest = memoryview(content).cast("B")
        self.digest.update(rest)
        self._written += (size := len(rest))
        while rest:
            rest = rest[os.write(self.descriptor, rest) :]
        return size

    def tell(self) -> int:
        return self._written


def _write_parquet(parts: Iterator[Mapping[str, Any]], stream: _Summed) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def table(columns: Mapping[str, Any]) -> Any:
        arrays = {name: pa.array(values, from_pandas=True) for name, values in columns.items()}
        return pa.table({n: a.dictionary_encode() if a.type == pa.string() else a for n, a in arrays.items()})

    first = table(next(parts))
    with pq.ParquetWriter(stream, first.schema, compression="zstd") as writer:
        writer.write_table(first)
        for columns in parts:
            writer.write_table(table(columns))


def _write_csv(parts: Iterator[Mapping[str, Any]], stream: _Summed) -> None:
    for number, columns in enumerate(parts):
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        if not number:
            writer.writerow(columns)
        lists = [column.tolist() if hasattr(column, "tolist") else column for column in columns.values()]
        for row in zip(*lists, strict=True):
            writer.writerow(["" if value is None or value != value else value for value in row])
        stream.write(text.getvalue().encode())


def read_columns(path: Path) -> dict[str, list]:
    """What `write_columns` wrote: of .csv every value is text.

    Raises:
        FileNotFoundError: if there is no such table.
        DamagedError: in one line, for one that is not as it was written.
    """
    parquet, text = (path.with_name(path.name + ending) for ending in TABLES)
    if not parquet.is_file() and not text.is_file():
        raise FileNotFoundError(f"neither {parquet} nor {text} is there: run the evaluation first")
    file = parquet if parquet.is_file() else text
    try:
        content = _content(file)
        if file is parquet:
            import pyarrow.parquet as pq

            return pq.read_table(io.BytesIO(content)).to_pydict()
        header, *rows = csv.reader(io.StringIO(content.decode("utf-8"), newline=""))
        return {name: [row[i] for row in rows] for i, name in enumerate(header)}
    except (DamagedError, ImportError):
        raise
    except Exception as error:  # whatever pyarrow says of bytes that nobody here has written
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DamagedError(
            f"{file} cannot be read, it is empty or damaged ({reason}): run the evaluation again"
        ) from error


def _content(file: Path) -> bytes:
    """A file's bytes, which are those that its checksum is of, where that lies beside it."""
    known = _sum_of(file)
    if not known.is_file():
        return file.read_bytes()
    return read_checked(file, known.read_text(encoding="utf-8", errors="replace").partition(" ")[0])


def _write_sum(file: Path, checksum: str) -> None:
    # a name may be bytes that are no text
    write_atomically(_sum_of(file), f"{checksum}  ".encode() + os.fsencode(file.name) + b"\n")


def _sum_of(file: Path) -> Path:
    return file.with_name(f"{file.name}.sha256")

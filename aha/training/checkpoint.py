"""Checkpoints of a training run: complete or absent, checked when they are read, and never executed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from .._version import __version__
from ..files import (
    PARTIAL,
    DamagedError,
    digest,
    put,
    read_checked,
    read_json,
    remove_partials,
    sync_folder,
    tensor_bytes,
    write_json,
    writing,
)

KEEP = 2
_PREFIX, _RECORD, _STATE = "step_", "run.json", "state.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """What a run continues with.

    Attributes:
        run: what tells runs apart: made when a run starts, and kept by all that continue it.
        step: steps made so far.
        made: what a run that continues it must share, in JSON types.
        decoder, optimizer, curves, mean: their state dicts.
        failures: one line for every image that could not be read so far.
        world: how many processes made it; as many, more or fewer can continue it.
        version: of the library.
    """

    run: str
    step: int
    made: dict[str, Any]
    decoder: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    curves: Mapping[str, Any]
    mean: Mapping[str, Any]
    failures: list[str] = field(default_factory=list)
    world: int = 1
    version: str = __version__


def name(step: int) -> str:
    """Of the folder of a checkpoint."""
    return f"{_PREFIX}{step:08d}"


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write ``folder/step_XXXXXXXX`` and remove those of the same run before it, but for the newest `KEEP`.

    The files are made in a hidden folder that is renamed when it is complete and on the disk.

    Raises:
        WriteError: in one line, for a full disk or a folder that cannot be written to; earlier checkpoints are whole.
    """
    final = folder / name(checkpoint.step)
    optimizer = checkpoint.optimizer
    tensors = {f"decoder.{key}": value for key, value in checkpoint.decoder.items()}
    tensors |= {f"mean.{key}": value for key, value in checkpoint.mean["mean"].items()}
    plain: dict[str, dict[str, Any]] = {}
    for index, values in optimizer["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{key}"] = value
            else:
                plain.setdefault(str(index), {})[key] = value
    if (total := checkpoint.curves["total"]) is not None:
        tensors["curves.total"] = total
    content = tensor_bytes(tensors)
    record = {
        "run": checkpoint.run,
        "step": checkpoint.step,
        "aha": checkpoint.version,
        "world": checkpoint.world,
        "made": checkpoint.made,
        "failures": checkpoint.failures,
        "optimizer": {"groups": optimizer["param_groups"], "values": plain},
        "curves": {"images": checkpoint.curves["images"]},
        "mean": {"steps": checkpoint.mean["steps"]},
        "files": {_STATE: digest(content)},
    }
    with writing(final):
        folder.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder, prefix=f".{final.name}.", suffix=PARTIAL))
        try:
            os.chmod(partial, 0o755)
            descriptor = os.open(partial / _STATE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            try:
                put(descriptor, content)
            finally:
                os.close(descriptor)
            write_json(partial / _RECORD, record)
            if final.exists():  # damaged, or this run has gone back: out of the way in one move
                os.replace(final, Path(tempfile.mkdtemp(dir=folder, prefix=f".{final.name}.", suffix=PARTIAL)))
            os.replace(partial, final)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        sync_folder(folder)
    remove_partials(folder)
    earlier = [path for path in available(folder) if path.name < final.name and run_of(path) == checkpoint.run]
    for old in earlier[: 1 - KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def available(folder: Path) -> list[Path]:
    """Checkpoints in ``folder``, oldest first; they may be damaged."""
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if path.is_dir())


def run_of(path: Path) -> str | None:
    """The run that made a checkpoint; None where that cannot be read."""
    try:
        return str(read_json(path / _RECORD, required=True)["run"])
    except (OSError, ValueError, KeyError):
        return None


def load(path: Path) -> Checkpoint:
    """Read a checkpoint, on the CPU.

    Raises:
        FileNotFoundError, DamagedError: in one line, for a missing checkpoint, and for one that is not as it was
            written: cut short, edited, with a flipped bit.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"no checkpoint at {path}: give a folder step_… of a training run")
    try:
        if (path / "state.pt").is_file():
            raise DamagedError("it is of an older version, as a pickle, which is not read")
        record = read_json(path / _RECORD, required=True)
        tensors = _tensors(read_checked(path / _STATE, record["files"][_STATE]))
        return _from_record(record, tensors)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DamagedError(f"checkpoint {path} cannot be used ({reason})") from error


def _tensors(content: bytes) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load as tensors_of

    try:
        return tensors_of(content)
    except SafetensorError as error:
        raise DamagedError(str(error)) from error


def _from_record(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Checkpoint:
    parts: dict[str, dict[str, Tensor]] = {"decoder": {}, "optimizer": {}, "curves": {}, "mean": {}}
    for key, value in tensors.items():
        part, _, inner = key.partition(".")
        parts[part][inner] = value
    state: dict[int, dict[str, Any]] = {
        int(index): dict(values) for index, values in record["optimizer"]["values"].items()
    }
    for key, value in parts["optimizer"].items():
        index, _, inner = key.partition(".")
        state.setdefault(int(index), {})[inner] = value
    groups = [
        {key: tuple(value) if isinstance(value, list) and key != "params" else value for key, value in group.items()}
        for group in record["optimizer"]["groups"]
    ]
    return Checkpoint(
        run=record["run"],
        step=record["step"],
        made=record["made"],
        decoder=parts["decoder"],
        optimizer={"state": state, "param_groups": groups},
        curves={"total": parts["curves"].get("total"), "images": record["curves"]["images"]},
        mean={"mean": parts["mean"], "steps": record["mean"]["steps"]},
        failures=list(record["failures"]),
        world=record["world"],
        version=record["aha"],
    )

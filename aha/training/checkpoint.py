"""Checkpoints of a training run: complete or absent, never half-written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

KEEP = 2
_PREFIX = "step_"


def save(folder: Path, step: int, state: dict[str, Any], config: dict[str, Any], version: str) -> Path:
    """Write ``folder/step_XXXXXXXX`` and remove all but the newest `KEEP`.

    ``config`` is what a resumed run must share, ``version`` that of the library.

    The files are made in a hidden folder that is renamed when it is complete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final, partial = folder / f"{_PREFIX}{step:08d}", folder / f".partial_{step:08d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    with open(partial / "state.pt", "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    (partial / "run.json").write_text(json.dumps({"step": step, "aha": version, "config": config}, indent=2) + "\n")
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    for old in available(folder)[:-KEEP]:
        shutil.rmtree(old)
    return final


def available(folder: Path) -> list[Path]:
    """Complete checkpoints in ``folder``, oldest first."""
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if (path / "run.json").is_file())


def load(path: Path) -> tuple[int, dict[str, Any], dict[str, Any], str]:
    """(step, state, config, version) of a checkpoint.

    Raises:
        FileNotFoundError, ValueError: one line, for a missing or damaged checkpoint.
    """
    if not (path / "run.json").is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: give a folder step_… of a training run")
    try:
        record = json.loads((path / "run.json").read_text())
        state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        return record["step"], state, record["config"], record.get("aha", "unknown")
    except Exception as error:  # a damaged archive raises whatever its reader met first
        reason = str(error).splitlines()[0]
        raise ValueError(f"checkpoint {path} is damaged ({reason}): remove it and resume from an older one") from error

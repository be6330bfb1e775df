"""Weights on disk: state dicts from safetensors files and from checkpoints as training scripts save them.

Nothing that a file holds is executed: checkpoints go through PyTorch's weights-only reader, and what that reader does
not take is named from the file's own opcodes, which are disassembled and not run.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import math
import pickletools
import re
import threading
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .checks import checked
from .kernels.messages import short

# where training scripts put a state dict; an average of the weights is what they evaluate, so it comes first
AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "model_ema_state_dict", "ema_model", "ema")
WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "net",
    "network",
    "weights",
    "params",
    "module",
    "shadow",
)
# what wrapping a module puts before its parameters' names: DataParallel, Lightning, torch.compile, and by hand
PREFIXES = ("module", "model", "_orig_mod", "net", "network", "backbone")
COMPILED = "_orig_mod."
COUNTER = "n_averaged"  # torch.optim.swa_utils.AveragedModel counts its averages in a buffer
DEPTH = 3  # dicts within dicts that are looked into

# plain values that training scripts keep beside the weights; a scalar of NumPy 1 and 2 goes by two names
_scalar = np.float64(0).__reduce__()[0]
_KINDS = "?bhilqBHILQefdgFDGSUMm"
_HARMLESS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
    *dict.fromkeys(type(np.dtype(kind)) for kind in _KINDS),
]
_lock = threading.Lock()  # PyTorch's list of harmless types is one for the process

_LFS = b"version https://git-lfs"
_ZIP, _GZIP, _HDF5, _NUMPY = b"PK\x03\x04", b"\x1f\x8b", b"\x89HDF\r\n\x1a\n", b"\x93NUMPY"
_LEGACY = b"\x8a\nl\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."  # PyTorch's magic number, pickled: files from before 1.6
_AGAIN = "save model.state_dict() alone, with torch.save"


@checked
def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A state dict from a file, whatever its suffix says: safetensors, or what ``torch.save`` wrote.

    In a checkpoint the state dict is looked for under the usual names (`WRAPPERS`), also one dict within another; an
    exponential or stochastic average of the weights (`AVERAGES`) is preferred where both are there.

    Returns:
        Names → tensors on the CPU, floating point ones in float32; and the metadata of a safetensors file, else {}.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: in one line, for a file that holds something else, more than one state dict, or that is damaged.
    """
    path = Path(path)
    if path.is_dir():
        inside = sorted(file.name for file in path.iterdir() if file.suffix in (".safetensors", ".pth", ".pt", ".bin"))
        found = f" (it holds {_some(inside)})" if inside else ""
        raise ValueError(f"{path} is a folder: give a weights file{found}")
    if not path.is_file():
        raise FileNotFoundError(f"no weights file at {path}: give a .safetensors or .pth file")
    try:
        kind = _kind(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error})") from error
    if kind == "safetensors":
        state, metadata = _read_safetensors(path)
    else:
        state, metadata = _find_state(_read_torch(path, kind == "zip"), path), {}
    lost = [name for name, value in state.items() if value.is_meta]
    if lost:
        raise ValueError(f"{path} holds names without values ({_some(lost)}, on the meta device): {_AGAIN}")
    return {
        name: value.detach().float() if value.is_floating_point() else value.detach() for name, value in state.items()
    }, metadata


def load_weights(module: nn.Module, state: Mapping[str, Tensor], path: str | Path, surplus: Sequence[str] = ()) -> None:
    """Load a state dict strictly: every parameter of ``module``, and nothing else.

    Prefixes that wrapping a module leaves behind (`PREFIXES`, one or several) are taken off if that makes the names
    fit.

    Args:
        path: where the state comes from, for the message.
        surplus: beginnings of names that ``module`` may lack, such as a classifier's head for an encoder.

    Raises:
        ValueError: in one line that names the first parameters that are missing, unexpected or of another shape.
    """
    module.load_state_dict(fitting_weights(module, state, path, surplus))


def fitting_weights(
    module: nn.Module, state: Mapping[str, Tensor], path: str | Path, surplus: Sequence[str] = ()
) -> dict[str, Tensor]:
    """``state`` by the names that ``module`` has, which may be on the meta device; see `load_weights`."""
    own = module.state_dict()

    def needed(names: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return (
            {k: v for k, v in names.items() if k in own or not k.startswith(tuple(surplus))} if surplus else {**names}
        )

    candidates = [needed(names) for names in _unwrapped(state)]
    fitting = next((names for names in candidates if names.keys() == own.keys()), None)
    if fitting is None:  # the message is about the names that fit best
        fitting = max(candidates, key=lambda names: len(names.keys() & own.keys()))
    missing, unexpected = sorted(own.keys() - fitting.keys()), sorted(fitting.keys() - own.keys())
    misshaped = sorted(
        f"{key} {tuple(fitting[key].shape)} for {tuple(own[key].shape)}"
        for key in own.keys() & fitting.keys()
        if isinstance(own[key], Tensor) and own[key].shape != fitting[key].shape
    )
    foreign = sorted(
        f"{key} {str(fitting[key].dtype).removeprefix('torch.')}"
        for key in own.keys() & fitting.keys()
        if isinstance(own[key], Tensor) and own[key].is_floating_point() and not fitting[key].is_floating_point()
    )
    parts = [
        f"{len(keys)} {what} ({_some(keys)})"
        for what, keys in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", misshaped),
            ("not floating point", foreign),
        )
        if keys
    ]
    if parts:
        raise ValueError(f"{path} does not fit {type(module).__name__}: parameters {'; '.join(parts)}")
    return fitting


@checked
def numbers(text: str | None, default: Sequence[float]) -> Sequence[float]:
    """Numbers written as a JSON list or separated by commas or blanks; ``default`` for None.

    Raises:
        ValueError: for anything else.
    """
    if text is None:
        return default
    try:
        found = tuple(float(part) for part in text.strip("[]() \n").replace(",", " ").split())
    except ValueError as error:
        raise ValueError(f"{short(text)} is no list of numbers: write them as 0.5, 0.5, 0.5") from error
    if not found or not all(map(math.isfinite, found)):
        raise ValueError(f"{short(text)} is no list of finite numbers: write them as 0.5, 0.5, 0.5")
    return found


def _some(names: Sequence[Any], count: int = 2) -> str:
    """The first names, and a sign of more."""
    return ", ".join(map(str, names[:count])) + (", …" if len(names) > count else "")


def _kind(path: Path) -> str:
    """ "safetensors", "zip" or "legacy", from a file's content; ValueError in one line for anything else."""
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{path} is empty (0 bytes): fetch it again")
    with open(path, "rb") as file:
        head = file.read(4096)
    if head.startswith(_ZIP):
        return "zip"
    if head[:1] == b"\x80" and (head[2:].startswith(_LEGACY) or _LEGACY.startswith(head[2:])):
        return "legacy"
    if len(head) > 8 and head[8:9] == b"{":
        length = int.from_bytes(head[:8], "little")
        if length > size - 8 and length < 2**32:
            raise ValueError(
                f"{path} is a safetensors file that was cut short ({size} bytes, its header alone has {length}): "
                "fetch it again"
            )
        if length <= size - 8:
            return "safetensors"
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith(_LFS):
        raise ValueError(f"{path} is a git-lfs pointer, not the weights: run git lfs pull, or download the file itself")
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")):
        raise ValueError(f"{path} is a web page, probably an error or a login page: download the weights again")
    if start.startswith(b"{") and b'"weight_map"' in head:
        raise ValueError(f"{path} is a list of shards, not weights: merge the shards into one .safetensors file")
    known = {
        _GZIP: "compressed with gzip: decompress it",
        b"BZh": "compressed with bzip2: decompress it",
        b"\xfd7zXZ\x00": "compressed with xz: decompress it",
        _HDF5: "an HDF5 file (Keras): give PyTorch weights",
        _NUMPY: "a NumPy array: give PyTorch weights",
        b"GGUF": "a GGUF file: give PyTorch weights",
    }
    for magic, what in known.items():
        if head.startswith(magic):
            raise ValueError(f"{path} is {what}")
    if head[257:262] == b"ustar":
        raise ValueError(f"{path} is a tar archive, as PyTorch wrote before 0.2, or a packed one: {_AGAIN}")
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        raise ValueError(f"{path} is a pickle that torch.save did not write; pickles can run code: {_AGAIN}")
    if _is_text(head):
        shown = " ".join(head[:40].decode("utf-8", "replace").split())
        raise ValueError(f"{path} is text ({shown!r} …), not weights: give a .safetensors or .pth file")
    raise ValueError(
        f"{path} is neither a safetensors file nor one that torch.save wrote, or its beginning is damaged: fetch it "
        "again, or give a .safetensors or .pth file"
    )


def _is_text(head: bytes) -> bool:
    return not re.search(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]", head)


def _cut_short(path: Path, error: BaseException | str) -> ValueError:
    reason = (str(error).splitlines() or [""])[0].rstrip(".") or type(error).__name__
    return ValueError(f"{path} cannot be read as weights, it is damaged or cut short ({reason[:200]}): fetch it again")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            names = list(file.keys())
            if not names:
                raise ValueError(f"{path} holds no tensors: it is an empty safetensors file")
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise _cut_short(path, error) from error


def _read_torch(path: Path, zipped: bool) -> Any:
    """What ``torch.save`` put into a file, if it is plain data; else ValueError in one line."""
    if zipped:
        _check_archive(path)
    try:
        with _lock, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of another pickle protocol: what it cannot read, it raises
            # leaving the context takes its types off the list: not those that the user put there
            before = torch.serialization.get_safe_globals()
            with torch.serialization.safe_globals([kind for kind in _HARMLESS if kind not in before]):
                return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise nearly anything
        raise _why_not(path, zipped, error) from error


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise _cut_short(path, error) from error
    inside = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inside or any(name.startswith("code/") for name in inside):
        raise ValueError(f"{path} is a TorchScript archive, not a state dict: where it was made, {_AGAIN}")
    if "data.pkl" not in inside:
        if all(name.endswith(".npy") for name in names):
            raise ValueError(f"{path} is an archive of NumPy arrays: give PyTorch weights")
        raise ValueError(f"{path} is a zip archive of {_some(names)}, not a checkpoint: give the weights file itself")


def _why_not(path: Path, zipped: bool, error: Exception) -> ValueError:
    """One line on what a checkpoint holds that is not read, or that it is damaged."""
    text = " ".join(str(error).split())
    # torch.load puts what to do before what happened
    operand = re.search(r"Unsupported operand (\d+)", text)
    refused = re.search(r"(?:GLOBAL|unsupported GLOBAL) ([\w.<>]+)", text)
    if operand is None and refused is None and "weights_only" not in text.lower():
        return _cut_short(path, error)
    try:
        listed, whole = _globals(path, zipped)
    except Exception as damaged:
        return _cut_short(path, damaged)
    if whole:
        return ValueError(
            f"{path} holds a whole model ({whole}), not a state dict: where it was made, save model.state_dict()"
        )
    if refused is None and operand is not None:
        return ValueError(
            f"{path} was saved with another pickle protocol than PyTorch's own, which is not read: save it again "
            "with torch.save's defaults"
        )
    if refused is not None:
        named = [name for name in listed if name == refused[1] or not _allowed(name)]
        return ValueError(
            f"{path} holds pickled objects ({_some(named or [refused[1]], 3)}), which could run code and are not "
            f"loaded: where it was made, {_AGAIN}"
        )
    reason = text.rpartition("WeightsUnpickler error: ")[2][:200]
    return ValueError(f"{path} holds pickled objects that are not loaded ({reason}): where it was made, {_AGAIN}")


def _allowed(name: str) -> bool:
    """Whether a type is likely one of those that are read; only to choose what a message names."""
    harmless = ("collections.", "torch.", "numpy.", "_codecs.", "argparse.Namespace", "builtins.")
    return name.startswith(harmless) and name not in ("builtins.getattr", "builtins.eval", "builtins.exec")


def _globals(path: Path, zipped: bool) -> tuple[list[str], str | None]:
    """The types and functions a checkpoint asks for, in order, and the class of a module among them; nothing is run."""
    names: dict[str, None] = {}
    with contextlib.ExitStack() as stack:
        if zipped:
            archive = stack.enter_context(zipfile.ZipFile(path))
            record = next(name for name in archive.namelist() if name.partition("/")[2] == "data.pkl")
            stream: Any = io.BytesIO(archive.read(record))
            pickles = 1
        else:
            stream, pickles = stack.enter_context(open(path, "rb")), 4  # magic number, protocol, system, then content
        last = None
        for name, text in itertools.chain.from_iterable(_opcodes(stream) for _ in range(pickles)):
            if name is not None:
                names[name] = None
                last = name if name != "collections.OrderedDict" else last
            elif text == "_parameters" and last is not None:
                return list(names), last  # the first entry of a module: what came before it is its class
    return list(names), None


def _opcodes(stream: Any) -> Iterator[tuple[str | None, str | None]]:
    """(type asked for, None) and (None, string) of one pickle, as they come."""
    strings: list[str] = []
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name in ("GLOBAL", "INST"):
            yield str(argument).replace(" ", "."), None
        elif opcode.name == "STACK_GLOBAL":
            yield ".".join(strings[-2:]), None
        elif isinstance(argument, str):
            strings = [*strings[-1:], argument]
            yield None, argument


def _find_state(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict in what a checkpoint holds; ValueError in one line that names what it holds instead."""
    if not isinstance(content, Mapping):
        kind = "one tensor" if isinstance(content, Tensor) else f"a {type(content).__name__}"
        raise ValueError(f"{path} holds {kind}, not a state dict: {_AGAIN}")
    found = _state_in(content, path, DEPTH)
    if found is not None:
        return found
    if not content:
        raise ValueError(f"{path} holds an empty dict, not a state dict: {_AGAIN}")
    if {"state", "param_groups"} <= content.keys():
        raise ValueError(f"{path} holds the state of an optimizer, not of a model: {_AGAIN}")
    held = [f"{key} ({_describe(value)})" for key, value in content.items()]
    raise ValueError(
        f"{path} holds no state dict under a name that is known ({', '.join(WRAPPERS[:5])}, …); it has "
        f"{_some(held, 8)}: {_AGAIN}"
    )


def _state_in(content: Mapping[Any, Any], path: Path, depth: int) -> dict[str, Tensor] | None:
    if depth > 1:
        for known in (AVERAGES, WRAPPERS):
            inside = {key: content[key] for key in known if isinstance(content.get(key), Mapping)}
            states = {key: _state_in(value, path, depth - 1) for key, value in inside.items()}
            held = {key: state for key, state in states.items() if state is not None}
            if len(held) > 1 and not _same(list(held.values())):
                raise ValueError(f"{path} holds several state dicts ({', '.join(held)}): save the one that is meant")
            if held:
                return next(iter(held.values()))
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    nested = any(isinstance(value, Mapping) for value in content.values())
    # a lone tensor beside dicts is a counter; the names of a network's parameters have dots
    plain = bool(tensors) and (not nested or any("." in key for key in tensors))
    return tensors if plain else None


def _same(states: list[dict[str, Tensor]]) -> bool:
    first = states[0]
    return all(s.keys() == first.keys() and all(torch.equal(s[k], first[k]) for k in first) for s in states[1:])


def _describe(value: Any) -> str:
    if isinstance(value, Mapping):
        count = sum(isinstance(inner, Tensor) for inner in value.values())
        return f"dict of {count} tensors" if count else f"dict of {len(value)}"
    return "tensor" if isinstance(value, Tensor) else type(value).__name__


def _unwrapped(state: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The state dict as it is, and with the prefixes that all its names share taken off, one after the other."""
    current = dict(state)
    while True:
        yield current
        plain = {key.replace(COMPILED, ""): value for key, value in current.items()}
        if plain.keys() != current.keys() and len(plain) == len(current):
            yield plain  # parts of a network that were compiled one by one
        named = {key: value for key, value in current.items() if key != COUNTER}
        first = {key.partition(".")[0] for key in named}
        if len(first) != 1 or not first <= set(PREFIXES) or not all("." in key for key in named):
            return
        current = {key.partition(".")[2]: value for key, value in named.items()}

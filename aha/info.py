"""What `aha info` prints: versions, devices, compiled libraries, backends and where weights are looked for.

Every probe stands alone: what fails becomes a line with its error, and the rest is still shown.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PACKAGES = ("torch", "triton", "torchvision", "timm", "transformers", "numpy", "accelerate", "torchmetrics")
EXTRAS = {
    "captum": ("captum",),
    "report": ("matplotlib", "jinja2"),
    "demo": ("captum", "matplotlib", "jinja2", "sklearn", "torchvision"),
}
# beside AHA_*: what changes where we build, look and run; never a token
VARIABLES = (
    "CUDA_HOME",
    "CUDA_PATH",
    "CUDA_VISIBLE_DEVICES",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "MAX_JOBS",
    "OMP_NUM_THREADS",
    "TORCH_CUDA_ARCH_LIST",
    "TRITON_CACHE_DIR",
)
FAT_BINARY = struct.pack("<I", 0xBA55ED50)  # how nvcc marks device code
TOOLKIT_PARTS = ("bin/nvcc", "include/cuda_runtime.h", "lib64/libcudart.so")


def collect() -> dict[str, Any]:
    """Everything as a dict in JSON types, by section. Never raises: a failed probe is "error: …"."""
    sections: dict[str, Callable[[], Any]] = {
        "versions": _versions,
        "cpu": _cpu,
        "gpus": _gpus,
        "libraries": _libraries,
        "cuda toolkit": _toolkits,
        "backends": _backends,
        "extras": _extras,
        "weights": _weights,
        "environment": _environment,
    }
    return {name: _try(probe) for name, probe in sections.items()}


def report() -> str:
    """The same as plain text, one fact per line."""
    lines = []
    for section, facts in collect().items():
        rows = list(_rows(facts)) or [("", "none")]
        width = max(len(name) for name, _ in rows)
        lines += [
            section,
            *(f"  {name:<{width}}  {text}" if name else f"  {text}" for name, text in rows),
            "",
        ]
    return "\n".join(lines).rstrip()


def main(json: bool = False) -> None:
    """Print `report`, in colour on a terminal and plain into a pipe; or `collect` as JSON."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a pipe may be ASCII only
    if json:
        print(dumps(collect(), indent=2, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for line in report().splitlines():
        text = Text(line, style="" if line.startswith(" ") else "bold")
        text.highlight_regex(r"error:.*|not built:.*|failed to load:.*|incomplete:.*|not installed:.*", "yellow")
        text.highlight_regex(r"\bready\b|\busable\b|← auto", "green")
        console.print(text)


def _try(probe: Callable[..., Any], *args: Any) -> Any:
    try:
        return probe(*args)
    except Exception as error:  # a probe meets whatever is broken on the user's machine
        return f"error: {type(error).__name__}: {' '.join(str(error).split())}"


def _rows(facts: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Nested facts as (name, text), in the order of collection."""
    if isinstance(facts, Mapping):
        for key, value in facts.items():
            yield from _rows(value, f"{name} {key}".strip())
    elif isinstance(facts, list) and any(isinstance(value, Mapping) for value in facts):
        for index, value in enumerate(facts):
            yield from _rows(value, f"{name} {index}".strip())
    elif isinstance(facts, list):
        yield name, ", ".join(map(str, facts)) or "none"
    elif facts is None or isinstance(facts, bool):
        yield name, {True: "yes", False: "no", None: "not set"}[facts]
    else:
        yield name, str(facts)


def _versions() -> dict[str, Any]:
    from ._version import __version__

    found: dict[str, Any] = {
        "aha": __version__,
        "python": f"{platform.python_version()} ({platform.platform()})",
    }
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["torch's CUDA"] = _try(_torch_cuda)
    return found


def _torch_cuda() -> str:
    import torch

    return torch.version.cuda or "none: a CPU build of torch"


def _cpu() -> dict[str, Any]:
    import torch

    from .precision import cpu_multiplies, uses_bf16

    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "model": _try(_cpu_model),
        "cores": f"{len(affinity(0)) if affinity else os.cpu_count()} usable of {os.cpu_count()}",
        "threads": torch.get_num_threads(),
        "multiplies bf16 by": ", ".join(way for way, has in cpu_multiplies().items() if has) or "nothing",
        "precision auto": _precision(uses_bf16("auto", torch.device("cpu"))),
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpus() -> Any:
    import torch

    from .precision import uses_bf16

    if torch.version.cuda is None:
        return "none: this torch has no CUDA"
    if not torch.cuda.is_available():
        return "none: torch sees no CUDA device (driver, or CUDA_VISIBLE_DEVICES)"
    found = {}
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        bf16 = uses_bf16("auto", torch.device("cuda", index))
        found[f"cuda:{index}"] = (
            f"{device.name}, sm_{device.major}{device.minor}, {device.total_memory / 2**30:.0f} GiB, "
            f"precision auto is {_precision(bf16)}"
        )
    return found


def _precision(bf16: bool) -> str:
    return "bf16" if bf16 else "fp32"


def _libraries() -> dict[str, Any]:
    from .kernels import native

    found: dict[str, Any] = {}
    for name in ("_C", "_C_cuda"):
        file, reason = native.path(name), _try(native.load, name)
        found[f"aha.{name}"] = "ready" if reason is None else reason
        if file is not None:
            found[f"aha.{name} file"] = str(file)
        if file is not None and name == "_C_cuda":
            found[f"aha.{name} made for"] = _try(architectures, file)
    return found


def architectures(library: Path) -> list[str]:
    """What a CUDA library holds code for, as "sm_90" (machine code) and "compute_100" (PTX)."""
    # device code lies in fat binaries: a header, then entries of kind, header size, size … architecture
    data, kinds = library.read_bytes(), {1: "compute", 2: "sm"}
    found: set[tuple[int, str]] = set()
    start = data.find(FAT_BINARY)
    while start >= 0:
        _, _, header, size = struct.unpack_from("<IHHQ", data, start)
        at, end = start + header, start + header + size
        while at + 32 <= min(end, len(data)):
            kind, _, entry_header, entry_size = struct.unpack_from("<HHIQ", data, at)
            (architecture,) = struct.unpack_from("<I", data, at + 28)
            if kind not in kinds or not entry_header:
                break  # the magic number was a coincidence
            found.add((architecture, kinds[kind]))
            at += entry_header + entry_size
        start = data.find(FAT_BINARY, start + 4)
    return [f"{kind}_{number}" for number, kind in sorted(found)]


def _toolkits() -> dict[str, str]:
    """Whether a toolkit to build aha._C_cuda with is there: the same parts that setup.py asks for."""
    places = {name: os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")}
    if nvcc := shutil.which("nvcc"):
        # may be a wrapper or a link: a dry run names the folder it belongs to
        dry = [nvcc, "--dryrun", "-x", "cu", os.devnull]
        said = subprocess.run(dry, capture_output=True, text=True, timeout=10).stderr
        top = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
        places["nvcc"] = str(Path(top[1].strip() if top else nvcc).resolve())
    places["default"] = "/usr/local/cuda"
    found = {}
    for name, place in places.items():
        if place is None:
            found[name] = "not set"
            continue
        missing = [part for part in TOOLKIT_PARTS if not _has(Path(place), part)]
        found[name] = f"{place}: " + (f"incomplete: no {', '.join(missing)}" if missing else "usable")
    return found


def _has(toolkit: Path, part: str) -> bool:
    elsewhere = part.replace("lib64/", "targets/x86_64-linux/lib/")
    return (toolkit / part).exists() or (toolkit / elsewhere).exists()


def _backends() -> dict[str, Any]:
    """Per operator and device, the backends in the order of preference, or why one cannot run."""
    import torch

    from .kernels import dispatch

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    found: dict[str, Any] = {}
    for operator in dispatch.BACKENDS:
        for device in devices:
            found[f"{operator} ({device})"] = _try(_explained, operator, torch.device(device))
    return found


def _explained(operator: str, device: torch.device) -> dict[str, str]:
    from . import kernels

    examples = _examples(device)
    if operator not in examples:
        return {"": "unknown here: ask aha.kernels.explain"}
    args, kwargs = examples[operator]
    choices = kernels.explain(operator, *args, **kwargs)
    return {c.backend: c.reason or ("ready ← auto" if c.chosen else "ready") for c in choices}


def _examples(device: torch.device) -> dict[str, tuple[tuple, dict]]:
    """Arguments of every operator in the size of a 224 px image on a 14×14 grid; nothing is computed."""
    import torch

    from .kernels import Taps, Upsampler

    cells, side = 14, 224
    scores = torch.zeros(1, cells * cells, device=device)
    square = torch.zeros(1, cells * cells, cells * cells, device=device)
    images = torch.zeros(1, 3, side, side, device=device)
    fractions = torch.linspace(0, 1, 16, device=device)
    index = torch.arange(side, device=device)[:, None] * cells // side
    taps = Taps(index, torch.ones(side, 1, device=device), cells)
    masks = torch.zeros(1, 16, cells * cells, device=device)
    ranks = torch.arange(side * side, dtype=torch.int32, device=device).reshape(1, side, side)
    return {
        "log_sinkhorn": ((square,), {}),
        "gumbel_sinkhorn": ((scores, 0.3), {}),
        "cumulative_masks": ((square, fractions), {}),
        "soft_topk_masks": ((scores, fractions, 0.3), {}),
        "soft_sort": ((scores,), {}),
        "soft_rank": ((scores,), {}),
        "soft_topk": ((scores, cells), {}),
        "perturb": ((images, images, masks, Upsampler(taps, taps)), {}),
        "perturb_by_rank": ((images, images, ranks, [0, side * side]), {}),
    }


def _extras() -> dict[str, str]:
    found = {}
    for extra, modules in EXTRAS.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        command = f"not installed: {', '.join(missing)}; pip install aha-attribution[{extra}]"
        found[extra] = command if missing else "ready"
    return found


def _weights() -> dict[str, Any]:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    models = len(list(cache.glob("models--*"))) if cache.is_dir() else 0
    offline = "yes: only what is in the cache" if constants.HF_HUB_OFFLINE else "no: missing weights are fetched"
    state = f"{models} models" if cache.is_dir() else "does not exist yet"
    return {"Hugging Face cache": f"{cache} ({state})", "offline": offline}


def _environment() -> dict[str, str | None]:
    ours = sorted(name for name in os.environ if name.startswith("AHA_"))
    others = [name for name in VARIABLES if name in os.environ]
    # named also when unset: what a user would set
    shown = dict.fromkeys(["AHA_REAL_DATA", "AHA_BUILD", "AHA_DISABLE_NATIVE", *ours, *others])
    return {name: os.environ.get(name) for name in shown}

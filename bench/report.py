"""Everything in one command: `python -m bench.report [--device cpu|cuda]`.

Each stage is a process of its own, so that a crash, or a corrupted CUDA context, ends that stage only; it is recorded
and the later ones still run. On CUDA the stages begin with the build, the tests that need a GPU and compute-sanitizer.
Results are updated after every size: an interrupted run keeps what it has. The exit code is 1 if a stage failed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from aha import terminal
from aha.files import write_atomically

from . import mda, peers, step, table
from .cases import CASES

ROOT = Path(__file__).parent.parent
TAIL = 40  # lines kept of what a failed stage wrote


def stages(
    device: str, out: Path, sweep: str, seconds: float, only: Sequence[str] = (), install: bool = False
) -> dict[str, list[str]]:
    """Name → command, in order."""
    python = [sys.executable, "-m"]
    common = ["--device", device, "--out", str(out)]
    found: dict[str, list[str]] = {}
    if device == "cuda":
        sanitizer = shutil.which("compute-sanitizer") or str(_toolkit() / "bin/compute-sanitizer")
        found["build"] = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        found["tests"] = [*python, "pytest", "-q", "-m", "gpu", "tests"]
        for tool in ("memcheck", "racecheck"):
            found[tool] = [sanitizer, "--tool", tool, "--error-exitcode", "3", *python, "bench.sweep"]
    found["bandwidth"] = [*python, "bench.timing", device]
    for operator in CASES:
        options = ["--operator", operator, "--sweep", sweep, "--seconds", str(seconds)]
        found[operator] = [*python, "bench.operators", *common, *options]
    found["peers"] = [*python, "bench.peers", *common, *(["--install"] if install else [])]
    # a classifier that keeps a GPU busy, and one that leaves a CPU time for other things
    gpu = ["--model", "vit_base_patch16_224", "--batch", "8", "--fractions", "16"]
    found["step"] = [*python, "bench.step", *common, *(gpu if device == "cuda" else ["--fractions", "6"])]
    found["mda"] = [*python, "bench.mda", *common, *(["--images", "16", "--steps", "8"] if device == "cuda" else [])]
    unknown = set(only) - set(found)
    if unknown:
        raise SystemExit(f"{', '.join(sorted(unknown))}: no such stage; choose among {', '.join(found)}")
    return {name: command for name, command in found.items() if not only or name in only}


def _toolkit() -> Path:
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return Path(named or "/usr/local/cuda")


def run(name: str, command: Sequence[str], timeout: float) -> dict[str, Any]:
    """Run one stage: its command, status, seconds, and the end of its output."""
    start = time.monotonic()
    streams: dict[str, Any] = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    try:
        done = subprocess.run(command, cwd=ROOT, env=_environment(name), timeout=timeout, **streams)
        status, said = ("ok" if done.returncode == 0 else f"failed: exit status {done.returncode}"), done.stdout
    except subprocess.TimeoutExpired as late:
        said = late.output.decode(errors="replace") if isinstance(late.output, bytes) else late.output or ""
        status = f"failed: took longer than {timeout:.0f} s"
    except Exception as error:  # no such program, no GPU to build for
        status, said = f"failed: {' '.join(str(error).split())}", ""
    # results are published: no folder names of the machine that made them
    for folder in (ROOT, Path(sys.prefix), Path(sys.prefix).resolve(), Path.home()):
        said = said.replace(str(folder), "…")
    taken = round(time.monotonic() - start, 1)
    return {"stage": name, "status": status, "seconds": taken, "output": said.splitlines()[-TAIL:]}


def _environment(name: str) -> dict[str, str]:
    found = dict(os.environ)
    found["PYTHONPATH"] = os.pathsep.join(path for path in (str(ROOT), found.get("PYTHONPATH", "")) if path)
    if name == "build":
        found["AHA_BUILD"] = "cuda"
        # for the GPU that is here; code for all that are supported takes several times as long
        found.setdefault("TORCH_CUDA_ARCH_LIST", "{}.{}".format(*torch.cuda.get_device_capability()))
    return found


def pages(out: Path) -> None:
    """Write <device>.md and <device>.png from what was measured, on both kinds of devices."""
    rows = table.read(out / table.CSV)
    for device in ("cpu", "cuda"):
        parts = []
        if table.plot(rows, device, out / f"{device}.png"):
            parts.append(f"![Time against K]({device}.png)\n")
        if steps := _read(out / f"step_{device}.json"):
            parts.append("\n".join(["## Training step", "", *(f"- {step.line(found)}" for found in steps), ""]))
        if found := _read(out / f"mda_{device}.json"):
            parts.append(f"## MDA\n\n- {mda.line(found)}\n")
        if found := _read(out / f"peers_{device}.json"):
            parts.append(peers.section(found))
        if report := _read(out / f"report_{device}.json"):
            parts.append(_stages(report["stages"]))
        write_atomically(out / f"{device}.md", table.markdown(rows, device, "\n".join(parts)).encode())


def _stages(results: list[dict[str, Any]]) -> str:
    lines = ["## The last run", "", "| stage | status | s |", "|---|---|---|"]
    for result in results:
        last = f": {result['output'][-1]}" if result["stage"] == "bandwidth" and result["output"] else ""
        lines.append(f"| {result['stage']} | {result['status']}{last} | {result['seconds']} |")
    return "\n".join([*lines, ""])


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else []


def show(console: Console, device: str, out: Path) -> None:
    """Print the figures the project is judged by, on the device of this run."""
    name = table.device_name(device)
    rows = table.select(table.read(out / table.CSV), device=name, case="the", phase=table.PHASES[1])
    speed = table.ratios(rows)
    view = Table(title=f"forward and backward, {name}")
    for column in ("operator", "row", "ms (p20 to p80)", "× eager", "peak MiB", "memory ÷ eager"):
        view.add_column(column)
    for row in rows:
        eager = table.select(rows, operator=row["operator"], row="eager")
        base = float(eager[0]["peak_mib"] or 0) if eager else 0.0
        share = f"{float(row['peak_mib']) / base:.3f}" if row["peak_mib"] and base else ""
        ratio = speed.get(table.place(row))
        times = f"{row['median_ms']} ({row['p20_ms']} to {row['p80_ms']})" if row["median_ms"] else row["note"][:40]
        view.add_row(row["operator"], row["row"], times, f"{ratio:.2f}" if ratio else "", row["peak_mib"], share)
    console.print(view)
    for found in _read(out / f"step_{device}.json"):
        console.print(step.line(found), highlight=False)


def main(
    device: Literal["cpu", "cuda"] = "cpu",
    out: Path = ROOT / "bench/results",
    sweep: Literal["the", "selection", "all"] | None = None,
    seconds: float | None = None,
    only: tuple[str, ...] = (),
    install: bool = False,
    timeout: float = 3600.0,
) -> int:
    """Measure and report.

    Args:
        device: where.
        out: folder of the results.
        sweep: sizes; default a "selection" on a CPU, "all" on a GPU.
        seconds: time for the rounds of a size and phase; default 1 on a CPU, 0.3 on a GPU.
        only: these stages.
        install: try to install the peers first.
        timeout: seconds that a stage may take.
    """
    out = out.absolute()
    gpu = device == "cuda"
    console = terminal.console()
    sweep = sweep or ("all" if gpu else "selection")
    seconds = seconds if seconds is not None else (0.3 if gpu else 1.0)
    path = out / f"report_{device}.json"
    results: list[dict[str, Any]] = []
    for name, command in stages(device, out, sweep, seconds, only, install).items():
        results.append(run(name, command, timeout))
        console.print(f"{name}: {results[-1]['status']}, {results[-1]['seconds']} s", highlight=False)
        if results[-1]["status"] != "ok":
            console.print("\n".join(results[-1]["output"][-5:]), style="yellow", highlight=False, markup=False)
        content = {
            "device": device,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "made_with": table.made(),
            "stages": results,
        }
        write_atomically(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
    for last in (lambda: pages(out), lambda: show(console, device, out)):
        try:
            last()
        except Exception as error:  # the figures are in the CSV
            results.append({"stage": "pages", "status": f"failed: {type(error).__name__}: {error}"})
            console.print(results[-1]["status"], style="yellow", markup=False)
    return int(any(result["status"] != "ok" for result in results))


if __name__ == "__main__":
    sys.exit(tyro.cli(main))

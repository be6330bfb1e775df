"""Everything in one command: `python -m bench.report [--device cpu|cuda] [--profile full|smoke]`.

Each stage is a process of its own, so that a crash, or a corrupted CUDA context, ends that stage only; it is recorded
and the later ones still run. On CUDA the stages begin with the build, the tests that need a GPU and compute-sanitizer.
What they say is on disk line by line, and the same command goes on with a run that was cut short (bench/stages.py).
The exit code is 1 if a stage failed. `--profile smoke` is nine minutes of a GPU, see bench/smoke.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import ROOT
from .smoke import run as smoke
from .stages import Results, Stage, ending_on_request
from .toolkit import NO_CACHE, tool


def stages(
    device: str,
    out: Path,
    sweep: str,
    seconds: float,
    only: Sequence[str] = (),
    install: bool = False,
    timeout: float = 3600.0,
) -> list[Stage]:
    """All stages, or those that are named, in order."""
    from .cases import CASES

    python = [sys.executable, "-m"]
    common = ["--device", device, "--out", str(out)]
    found: list[Stage] = []

    def add(name: str, *command: str, **settings: Any) -> None:
        found.append(Stage(name, command, timeout, **settings))

    if device == "cuda":
        add("build", *python, "bench.toolkit", lasting=False)
        add("tests", *python, "pytest", "-q", "-m", "gpu", "tests")
        for watch in ("memcheck", "racecheck"):
            sanitizer = [tool("compute-sanitizer"), "--tool", watch, "--error-exitcode", "3"]
            add(watch, *sanitizer, *python, "bench.sweep", environment=NO_CACHE)
    add("bandwidth", *python, "bench.timing", device)
    for operator in CASES:
        options = ["--operator", operator, "--sweep", sweep, "--seconds", str(seconds)]
        add(operator, *python, "bench.operators", *common, *options)
    add("peers", *python, "bench.peers", *common, *(["--install"] if install else []))
    if device == "cpu":  # where every one of them is, and float64 without a matrix
        add("soft_ranks", *python, "bench.soft_ranks", "--out", str(out), "--seconds", str(seconds))
    # a classifier that keeps a GPU busy, and one that leaves a CPU time for other things
    gpu = ["--model", "vit_base_patch16_224", "--batch", "8", "--fractions", "16"]
    add("step", *python, "bench.step", *common, *(gpu if device == "cuda" else []))
    add("mda", *python, "bench.mda", *common, *(["--images", "16", "--steps", "8"] if device == "cuda" else []))
    names = [stage.name for stage in found]
    if unknown := set(only) - set(names):
        raise SystemExit(f"{', '.join(sorted(unknown))}: no such stage; choose among {', '.join(names)}")
    return [stage for stage in found if not only or stage.name in only]


def main(
    device: str = "cpu",
    out: Path = ROOT / "bench/results",
    sweep: str | None = None,
    seconds: float | None = None,
    only: Sequence[str] = (),
    install: bool = False,
    timeout: float = 3600.0,
    again: bool = False,
) -> int:
    """Measure and report; the arguments are those of the command line."""
    # what a plain CUDA image need not have
    from aha import terminal

    from . import pages, table

    gpu = device == "cuda"
    sweep = sweep or ("all" if gpu else "selection")
    seconds = seconds if seconds is not None else (0.3 if gpu else 1.0)
    head = {"device": device, "name": table.device_name(device), "options": {"sweep": sweep, "seconds": seconds}}
    results = Results(out / f"report_{device}.json", head, again)
    with ending_on_request():
        found = [results.run(stage) for stage in stages(device, out, sweep, seconds, only, install, timeout)]
    good = all(result["status"] == "ok" for result in found)
    for last in (lambda: pages.write(out), lambda: pages.show(terminal.console(), device, out)):
        try:
            last()
        except Exception as error:  # the figures are in the CSV
            good = False
            print(f"pages: failed: {type(error).__name__}: {error}")
    return int(not good)


def command_line() -> int:
    """`python -m bench.report`."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where; cpu by default")
    parser.add_argument("--profile", choices=["full", "smoke"], default="full", help="everything, or nine minutes")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results", help="folder of the results")
    parser.add_argument("--again", action="store_true", help="run also what is recorded as ok for these sources")
    full = parser.add_argument_group("of the full profile")
    full.add_argument(
        "--sweep", choices=["the", "selection", "all"], help='sizes; "selection" on a CPU, "all" on a GPU'
    )
    full.add_argument("--seconds", type=float, help="for the rounds of a size and phase; 1 on a CPU, 0.3 on a GPU")
    full.add_argument("--only", nargs="+", default=[], metavar="STAGE", help="these stages")
    full.add_argument("--install", action="store_true", help="try to install the peers first")
    full.add_argument("--timeout", type=float, default=3600.0, help="seconds that a stage may take")
    given = vars(parser.parse_args())
    profile, given["out"] = given.pop("profile"), given["out"].absolute()
    if profile == "full":
        return main(**given)
    for name in ("sweep", "seconds", "only", "install", "timeout"):
        if given[name] != parser.get_default(name):
            parser.error(f"--{name} belongs to the full profile")
    return smoke(given["device"], given["out"], given["again"])


if __name__ == "__main__":
    sys.exit(command_line())

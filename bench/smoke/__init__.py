"""What a GPU does with the compiled operators, in one call of nine minutes: `bench.report --profile smoke`.

Needs what a plain CUDA image has: torch, triton, numpy, a compiler, and the project's folder, installed or not. The
stages are modules of this folder, each a process of its own; the most valuable facts come first, so that a run which is
cut short was worth it. On a CPU it goes the same way with the CPU operators at small sizes, to try the way itself.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Any

from .. import stages
from ..stages import Results, Stage, ending_on_request
from ..toolkit import NO_CACHE, tool

SECONDS = 530  # for all stages
NOTHING_HERE = 2  # exit status where nothing was run
SPARE = 10  # less is not worth beginning a stage with
PLANS = ("dense", "blocks")  # of the noise-free ranking, forced by this variable:
PLAN = "AHA_RANKING_PLAN"


def planned(device: str) -> list[Stage]:
    """All but the first, which says what is there."""

    def stage(name: str, limit: float, module: str, *options: str, plan: str = "", lasting: bool = True) -> Stage:
        command = [sys.executable, "-m", f"bench.{module}", "--device", device, *options]
        return Stage(name, command, limit, {PLAN: plan} if plan else {}, lasting)

    def watched(tool_name: str) -> list[Stage]:
        found = []
        for plan in PLANS:
            once = [sys.executable, "-m", "bench.smoke.once", "--device", device]
            command = [tool("compute-sanitizer"), "--tool", tool_name, "--error-exitcode", "3", *once]
            found.append(Stage(f"{tool_name} {plan}", command, 60, {PLAN: plan, **NO_CACHE}))
        return found

    found = [stage(f"right {plan}", 90, "smoke.right", plan=plan) for plan in PLANS]
    found += [stage(f"fast {plan}", 60, "smoke.fast", "soft_topk_masks", plan=plan) for plan in PLANS]
    found.append(stage("fast pixels", 90, "smoke.fast", "perturb", "perturb_by_rank"))
    if device != "cuda":
        return found
    found = [stage("build", 120, "toolkit", lasting=False), *found]
    found += [*watched("memcheck"), *watched("racecheck")]
    found.append(stage("right triton", 120, "smoke.right", "--backend", "triton"))
    return [*found, *(stage(f"counters {plan}", 60, "smoke.counters", plan=plan) for plan in PLANS)]


def run(device: str, out: Path, again: bool = False) -> int:
    """All stages: 0 if all are ok, 1 if one is not, 2 with one line where there is no such device."""
    end = time.monotonic() + SECONDS
    here = Stage("here", [sys.executable, "-m", "bench.smoke.here", "--device", device], 50, lasting=False)
    with ending_on_request():
        lines: list[str] = []  # only one is wanted where there is nothing
        found = stages.run(here, here.limit, lambda result: None, lines.append)
        device_name, why = _device(found)
        if why:
            print(f"no {device} device here: {why}; nothing was measured", file=sys.stderr, flush=True)
            return NOTHING_HERE
        results = Results(
            out / f"smoke_{device}.json", {"profile": "smoke", "device": device, "name": device_name}, again
        )
        results.stages["here"] = found
        stages.say("\n".join(lines))
        for stage in planned(device):
            left = end - time.monotonic()
            if left < SPARE:
                results.skip(stage, "not run: no time was left")
            elif shutil.which(stage.command[0]) is None:
                results.skip(stage, f"not run: there is no {Path(stage.command[0]).name} here")
            else:
                results.run(stage, left)
    return int(any(result["status"] != "ok" for result in results.stages.values()))


def _device(found: dict[str, Any]) -> tuple[str, str]:
    """The device's name, and why there is none."""
    for record in found["records"]:
        if record["case"] == "device":
            return record.get("name", ""), "" if record["status"] == "ok" else record["status"]
    return "", f"the look for it {found['status']}: {' '.join(found['output'][-1:])}"

"""Measures the operators: every row checked against float64, then timed; `python -m bench.operators --help`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console

from . import memory as peaks
from . import table, timing
from .cases import CASES, HEADLINES, Case, Inputs, Size, sizes, the
from .rows import REFERENCE_ROWS, Run, rows
from .truth import Truth, deviation, truth, why

UNROLLED = ("eager", "torch.compile")


def measure(
    case: Case,
    size: Size,
    device: str,
    competitors: Mapping[str, Run | str],
    with_memory: bool = False,
    seconds: float = 2.0,
    unchecked: Sequence[str] = (),
    forward_only: Sequence[str] = (),
) -> Iterator[table.Record]:
    """All rows of one case at one size, two phases each; a row that cannot run or is wrong has a note, no time.

    Args:
        competitors: see `bench.rows.rows`.
        unchecked: rows whose error is reported and not judged: not the same operator, or not our accuracy.
        forward_only: rows without a gradient.
    """

    def line(row: str, phase: str, **figures: float | str | None) -> table.Record:
        return table.record(case, size, row, device, phase, **figures)

    def notes(row: str, note: str) -> Iterator[table.Record]:
        yield from (line(row, phase, note=note) for phase in table.PHASES)

    inputs = case.inputs(size, device)
    too_big = case.reference_bytes(size) > _memory(device)
    exact = "reference" if case.reference_bytes(size, 8) / size.B <= _memory(device) else case.linear(inputs)
    if exact is None:
        for name in competitors:
            yield from notes(name, "does not fit: no float64 reference")
        return
    true = truth(case, inputs, size, exact)
    runs: dict[str, Run] = {}
    errors: dict[str, float] = {}
    for name, run in competitors.items():
        if isinstance(run, str):
            yield from notes(name, run)
        elif too_big and (name in UNROLLED or (exact != "reference" and name in REFERENCE_ROWS)):
            yield from notes(name, "does not fit")
        else:
            try:
                errors[name] = _error(case, run, inputs, true, name in unchecked, name in forward_only)
                runs[name] = run
            except Exception as error:  # a row that fails is a result, and the others are still measured
                yield from notes(name, why(error))
    forward = {name: one_pass(case, run, inputs, true, backward=False) for name, run in runs.items()}
    both = {n: one_pass(case, run, inputs, true, backward=True) for n, run in runs.items() if n not in forward_only}
    taken = [timing.interleaved(calls, device, seconds) for calls in (forward, both)]
    for name in runs:
        error = {"error": errors[name], "error_reference": true.error}
        yield line(name, table.PHASES[0], **taken[0][name]._asdict(), **error)
        if name in forward_only:
            yield line(name, table.PHASES[1], note="no gradient")
            continue
        peak, note = None, None
        if with_memory:
            try:
                peak = peaks.peak_mib(case, size, name, device)
            except Exception as failure:
                note = f"memory: {why(failure)}"
        yield line(name, table.PHASES[1], **taken[1][name]._asdict(), **error, peak_mib=peak, note=note)


def _error(case: Case, run: Run, inputs: Inputs, true: Truth, unchecked: bool, forward_only: bool) -> float:
    if forward_only:
        with torch.no_grad():
            return deviation(run(inputs), true.outputs)
    outputs, gradients = case.gradients(run, inputs, true.cotangents)
    if unchecked:
        return deviation((*outputs, *gradients), (*true.outputs, *true.gradients))
    return true.check(outputs, gradients)


def one_pass(case: Case, run: Run, inputs: Inputs, true: Truth, backward: bool) -> Callable[[], object]:
    """What is timed: a forward pass without gradients, or forward and backward."""
    if backward:
        return lambda: case.gradients(run, inputs, true.cotangents)
    return torch.no_grad()(lambda: run(inputs))


def _memory(device: str) -> float:
    """Bytes that one case may take."""
    if device == "cuda":
        return 0.8 * torch.cuda.get_device_properties().total_memory
    return 0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def failures(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """The rows that are broken, as opposed to those that cannot run here."""
    bad = ("wrong", "failed", "memory")
    return [f"{r['operator']} {r['case']} {r['row']}: {r['note']}" for r in rows if r["note"].startswith(bad)]


def main(
    operator: str | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    sweep: Literal["the", "selection", "all"] = "selection",
    out: Path = Path("bench/results"),
    seconds: float = 2.0,
    compiled: bool = True,
    memory: bool = True,
) -> int:
    """Measure the operators and update the CSV after every size.

    Args:
        operator: one of them; default all.
        device: where.
        sweep: "the" size that figures are quoted for, a "selection", or "all" of them.
        out: folder of the results.
        seconds: time for the rounds of a size and phase; at least five rounds are run.
        compiled: measure torch.compile, which takes up to minutes, at the sizes called "the".
        memory: measure peak memory, at those sizes and the large ones.
    """
    console, broken = Console(stderr=True), []
    for name in [operator] if operator else CASES:
        for size in sizes(name, device, sweep):
            headline = size == the(device) and name in HEADLINES
            case = CASES[name]
            competitors = rows(case, case.inputs(size, device), compiled and headline)
            if size.name == "temperature":  # for the ratio to the loop
                del competitors["checkpoint"]
            with_memory = memory and (headline or size.name == "large")
            try:
                found = list(measure(case, size, device, competitors, with_memory, seconds))
            except Exception as error:  # a size that does not fit must not end a sweep
                lines = product(competitors, table.PHASES)
                found = [table.record(case, size, row, device, phase, note=why(error)) for row, phase in lines]
            table.upsert(out / table.CSV, found)
            broken += failures(found)
            speed = table.ratios(found)
            for row in found:
                times = f"{row['median_ms']} ms" if row["median_ms"] else f"[yellow]{row['note']}"
                if row["phase"] == table.PHASES[1] and (ratio := speed.get(table.place(row))):
                    times += f", {ratio:.3g} × eager"
                sized = " ".join(f"{c}={row[c]}" for c in ("B", "K", "tau", "noise") if row[c])
                console.print(f"{name} {sized} {row['row']} {row['phase']}: {times}", highlight=False)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))

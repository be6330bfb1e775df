"""Do finer cells pay? `python -m bench.cells` refines the same maps on coarse grids and down to one pixel per cell.

On the demo's classifier, explainer and held-out scenes, or with `--photographs FOLDER --weights FILE` on those of
`bench.faithfulness`, which trains the explainers; its settings, nothing is tuned here. Interrupted, it continues.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from aha import terminal
from aha.attributors import MethodSpec
from aha.evaluation import Evaluation, compare
from aha.files import write_atomically

from .faithfulness import PROTOCOLS, RESULTS, Setting, on_photographs, on_scenes, trained

START = "start"
PIXELS = (16, 8, 4, 2, 1)  # along a cell's side


def rows(explainer: Path, setting: Setting, side: int, steps: list[int]) -> list[MethodSpec]:
    """The maps that refinement starts from, then the refined ones from coarse cells to single pixels."""
    chosen = [MethodSpec("aha", {"explainer": str(explainer)}, START)]
    for taken in steps:
        for pixels in PIXELS:
            if (cells := side // pixels) >= setting.training.cells[0]:
                options = {"steps": taken, "cells": [cells], "fractions": setting.training.fractions}
                chosen.append(MethodSpec("aha", {"explainer": str(explainer), **options}, label(taken, cells)))
    return chosen


def label(steps: int, cells: int) -> str:
    return f"{steps} steps, {cells}×{cells}"


def page(result: Evaluation, setting: Setting) -> str:
    """A table in Markdown: faithfulness of every grid, its gains over the start and the training's grid, and time."""
    summary = result.summary()["methods"]
    kind = "scenes" if setting.source.data == "scenes" else "photographs"
    trained_on = setting.training.cells[1]
    lines = [
        f"Refinement by grid, {len(result.images['index'])} held-out {kind}, "
        f"{setting.training.fractions} points on the curves of the objective; the finest grid of the training is "
        f"{trained_on}×{trained_on}. Made by `python -m bench.cells`.",
        "",
        "| refinement | Deletion ↓ | Insertion ↑ | Ins − Del ↑ | gain over the start | "
        f"over {trained_on}×{trained_on} | s / image |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in result.methods:
        found = summary[method]
        cells = [f"{found[name]:.4f}" for name in ("deletion", "insertion", "ins_minus_del")]
        same = f"{method.split(',')[0]}, {trained_on}×{trained_on}"
        for other in (START, same):
            known = other in result.methods and method not in (START, other)
            cells.append(interval(result.compare(method, other, "ins_minus_del")) if known else "")
        lines.append(" | ".join((f"| {method}", *cells, f"{found['seconds_per_image']:.3g} |")))
    note = "Gains are paired differences of Ins − Del with their 95 % interval, that over the grid at as many steps."
    return "\n".join((*lines, "", note, ""))


def interval(found: dict[str, Any]) -> str:
    low, high = found["ci95"]
    return f"{found['difference']:+.4f} ({low:+.4f} … {high:+.4f})"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cells", description=__doc__)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--steps", type=int, nargs="+", default=[3, 10], help="refinement steps")
    parser.add_argument("--photographs", type=Path, help="folder of labelled photographs, instead of scenes")
    parser.add_argument("--weights", type=Path, help="local weights of ViT-Tiny, for the photographs")
    parser.add_argument("--output", type=Path, default=Path("runs/faithfulness"), help="where the explainers are")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="write bench/results, as the published run does")
    a = parser.parse_args()
    setting = on_photographs(a.photographs, a.weights) if a.photographs else on_scenes(a.images)
    clf = setting.source.load_classifier()
    explainer = trained("ranking", a.output / setting.name, clf, setting, a.seed)
    source = dataclasses.replace(setting.source, limit=a.images)
    output = a.output / setting.name.replace("faithfulness", "refined_cells")
    with terminal.progress() as bar:
        specs = rows(explainer, setting, clf.input_size[0], a.steps)
        done = compare([source], specs, output, PROTOCOLS, batch_size=8, seed=a.seed, progress=bar)
    if done is None:  # another process writes
        return
    (result,) = done.results.values()
    print("\n".join((*done.failures, page(result, setting))))
    if a.keep:
        name = f"{output.name}_{'cuda' if clf.device.type == 'cuda' else 'cpu'}"
        summary = {**result.summary(), "threads": torch.get_num_threads()}
        write_atomically(RESULTS / f"{name}.json", (json.dumps(summary, indent=1, ensure_ascii=False) + "\n").encode())
        write_atomically(RESULTS / f"{name}.md", page(result, setting).encode())


if __name__ == "__main__":
    main()

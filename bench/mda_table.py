"""MDA's own benchmark on photographs: `python -m bench.mda_table FOLDER --weights FILE`, ViT-Tiny, 225 points.

Its preprocessing, images (right with p ≥ 0.6, at most five of a class, hidden by their own blur), references and
metrics, MAS included, for the methods of its tables. TIS and MDA, hundreds and thousands of passes a map, are compared
with all others on fewer images (`--expensive`). Interrupted, it continues;
`torchrun --standalone --nproc-per-node=2 -m bench.mda_table …` shares the work.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import tyro
from torch.utils.data import default_collate

from aha import terminal
from aha.attributors import MethodSpec, count_passes
from aha.evaluation import Comparison, Evaluation, compare
from aha.metrics import PROTOCOLS, endpoints
from aha.report import comparison
from aha.reproduce.catalog import MDA_METHODS
from aha.source import Source

RESULTS = Path(__file__).parent / "results"
MODEL = "vit_tiny_patch16_224"
EXPENSIVE = ("TIS", "MDA")
# the order that the paper reports and that must be found again, best first
ORDER = ("Bi-Att.", "Trans-Att.", "IG")


def measured(
    folder: Path, weights: Path, output: Path, limit: int, methods: list[MethodSpec], seed: int, progress: Any
) -> Comparison | None:
    """The protocol mas, which holds the areas of mda from the same perturbed images."""
    source = Source(MODEL, weights, str(folder), limit=limit)
    return compare([source], methods, output, ("mas",), batch_size=10, seed=seed, progress=progress)


def selection(folder: Path, weights: Path) -> dict[str, float]:
    """How many of the photographs the protocol keeps, and how many blurs it tries for one."""
    protocol = PROTOCOLS["mda"]
    source = Source(MODEL, weights, str(folder))
    clf = source.load_classifier()
    data = source.images(clf.input_size, training=False, preprocessing=protocol.preprocessing)
    sure, kept, tried = 0, 0, 0
    for start in range(0, len(data), 10):
        batch = default_collate([data[i] for i in range(start, min(start + 10, len(data)))])
        with count_passes(clf) as counted:
            ends = endpoints(clf, batch["image"], None, protocol, labels=batch["label"])
        confident = protocol.takes_part(batch["label"], ends.predicted, ends.confidence)
        sure, kept = sure + int(confident.sum()), kept + int(ends.takes_part.sum())
        tried += round(counted.forward) - len(confident) * round(protocol.passes(clf.input_size, blurs=0).shared)
    return {"images": len(data), "right with p >= 0.6": sure, "hidden by their blur": kept, "blurs tried": tried / sure}


def orders(result: Evaluation, metric: str = "insertion") -> list[dict[str, Any]]:
    """Neighbours of `ORDER`: the paired difference of the better and the worse."""
    pairs = itertools.pairwise(ORDER)
    return [{"pair": f"{a} − {b}", "metric": metric, **result.compare(a, b, metric)} for a, b in pairs]


def main(
    folder: tyro.conf.Positional[Path],
    weights: Path,
    images: int = 300,
    expensive: int = 20,
    output: Path = Path("runs/mda_table"),
    seed: int = 0,
    keep: bool = False,
) -> None:
    """Measure and print the table.

    Args:
        folder: of labelled photographs.
        weights: of ViT-Tiny.
        images: of the folder, drawn at random; those that the protocol leaves out cost next to nothing.
        expensive: of these, for TIS and MDA.
        output: results folder.
        seed: of the draw, of methods and of the bootstrap.
        keep: write bench/results, as the published run does.
    """
    specs = [MethodSpec.parse(text) for text in MDA_METHODS]
    cheap = [spec for spec in specs if spec.label not in EXPENSIVE]
    parts = {"all": (images, cheap), "expensive": (expensive, [*specs])}
    found: dict[str, Any] = {"selection": selection(folder, weights)}
    for name, (limit, methods) in parts.items():
        with terminal.progress() as bar:
            done = measured(folder, weights, output / name, limit, methods, seed, bar)
        if done is None:  # another process writes
            continue
        comparison.write(done, output / name, title=f"MDA's protocol, {MODEL}")
        (result,) = done.results.values()
        taking_part = len(result.values(methods[0].label, result.headline))
        found[name] = {"taking part": taking_part, "orders": orders(result), **result.summary()}
        for line in found[name]["orders"]:
            terminal.console().print(line)
        if keep:
            content = (output / name / "tables" / "comparison.md").read_text()
            suffix = "" if name == "all" else f"_{name}"
            (RESULTS / f"mda_table{suffix}_cpu.md").write_text(content)
    if keep and len(found) > 1:
        (RESULTS / "mda_table_cpu.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    tyro.cli(main)

"""The demo: photographs explained without training, then the whole method on scenes, in minutes on two cores."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .. import attributors, terminal
from ..classifier import Classifier, from_name
from ..data import Scenes
from ..evaluation import Evaluation, evaluate
from ..explainer import Explainer
from ..files import write_json, writing
from ..refinement import refine
from ..report import figures, html, tables
from ..training import TrainConfig, Trainer
from ..training.trainer import CONTINUED
from . import photographs, shortcut

TRAINING = TrainConfig(
    steps=100, batch_size=16, fractions=8, targets=1, lr=2e-4, cells=(7, 28), tau=CONTINUED, save_every=0, log_every=20
)
BASELINES = (
    "random",
    "input_x_gradient",
    "integrated_gradients",
    "gradcam_vit",
    "raw_attention",
    "rollout",
    "rise",
)
RISE_MASKS = 500
STEPS = (0, 6)
SHOWN = 6  # scenes in the figures
TRAIL = 5  # refinement steps in the figures and the shortcut experiment


def main(output: Path, scenes: int = 128, steps: int | None = None, seed: int = 0) -> dict[str, Any]:
    """Run the demo and return its summary, which is also written to ``output/summary.json``.

    Args:
        output: folder for the explainer, summary.json, scores and images, figures/ and report.html.
        scenes: held-out scenes of the evaluation.
        steps: training steps; default as tuned on the validation scenes.
        seed: of training, scenes and bootstrap.
    """
    console = terminal.console()
    seconds: dict[str, float] = {}
    with writing(output):
        (output / "figures").mkdir(parents=True, exist_ok=True)
    clf = from_name("scenes").to("cuda" if torch.cuda.is_available() else "cpu")
    console.rule("1/5 photographs, an ImageNet classifier, and the explainer that ships: nothing is trained")
    with _timed(seconds, "photographs"):
        first = photographs.page(clf.device)
        picture = photographs.draw(first, output / "figures" / "photographs.png")
    console.print(f"{picture}: insertion − deletion, mean of {len(first.titles)} photographs")
    for name, values in first.scores.items():
        console.print(f"  {name:18} {float(values.mean()):.3f}   {first.seconds[name]:.1f} s")
    console.rule("2/5 training the explainer further, for the scenes classifier")
    with _timed(seconds, "training"):
        explainer = train(clf, output, steps, seed)
    console.rule(f"3/5 faithfulness on {scenes} held-out scenes")
    data = Scenes("test", size=scenes, seed=seed)
    with _timed(seconds, "evaluation"), terminal.progress() as bar:
        result = evaluate(clf, methods(clf, explainer, seed), data, batch_size=32, seed=seed, progress=bar)
    result.write(output)
    console.rule("4/5 a shortcut, planted and found")
    with _timed(seconds, "shortcut"):
        planted = shortcut.experiment(explainer, clf, steps=TRAIL, seed=seed)
    console.rule("5/5 figures and report")
    summary = {
        **result.summary(),
        "comparisons": compared(result),
        "shortcut": planted.numbers,
        "photographs": first.numbers,
    }
    with _timed(seconds, "figures"):
        draw(output / "figures", clf, explainer, data, result, summary, planted, seed)
    summary["seconds"] = {name: round(value, 1) for name, value in seconds.items()}
    write_json(output / "summary.json", summary)
    page = html.write(output)
    console.print(tables.of(result).to_rich())
    for line in verdict(summary):
        console.print(line)
    console.print(f"report: {page}   ({sum(seconds.values()):.0f} s)")
    return summary


def train(clf: Classifier, output: Path | None, steps: int | None, seed: int) -> Explainer:
    """The universal explainer, trained further on the scenes classifier."""
    import dataclasses

    config = dataclasses.replace(TRAINING, seed=seed, output=str(output) if output else None)
    if steps is not None:
        config = dataclasses.replace(config, steps=steps)
    explainer = Explainer.universal(clf)
    # scenes are made on the fly: training never sees one twice
    # in a folder where this demo has run, what is trained is found again
    return Trainer(explainer, clf, Scenes("train", size=4096, seed=seed), config).fit(resume=output is not None)


def methods(clf: Classifier, explainer: Explainer, seed: int) -> dict[str, attributors.Attributor]:
    """The rows of the table."""
    rows: dict[str, attributors.Attributor] = {}
    for name in BASELINES:
        options = {"n_masks": RISE_MASKS} if name == "rise" else {}
        rows[name] = attributors.create(name, clf, seed=seed, **options)
    for steps in STEPS:
        rows[f"aha T={steps}"] = attributors.AHA(clf, explainer, steps)
    return rows


def compared(result: Evaluation) -> dict[str, Any]:
    """Paired differences of Insertion − Deletion, the claims of the demo."""
    first, refined = (f"aha T={steps}" for steps in STEPS)
    pairs = [(first, name) for name in BASELINES if name in result.methods and name != "rise"]
    pairs += [(refined, first), (refined, "rise")]
    done = [pair for pair in pairs if set(pair) <= set(result.methods)]
    return {f"{a} − {b}": result.compare(a, b, "ins_minus_del") for a, b in done}


def verdict(summary: dict[str, Any]) -> Iterator[str]:
    """The claims in words, with their intervals."""
    for pair, found in summary["comparisons"].items():
        low, high = found["ci95"]
        yield f"Ins−Del ↑  {pair}: {found['difference']:+.3f}  (95 % interval {low:+.3f} … {high:+.3f})"
    planted = summary["shortcut"]
    yield (
        f"shortcut: share of the top 5 % pixels on the circle {planted['share_clean']:.3f} for the classifier without "
        f"it, {planted['share_before']:.3f} for the one with it, {planted['share_after']:.3f} after {TRAIL} steps"
    )


def draw(
    folder: Path,
    clf: Classifier,
    explainer: Explainer,
    data: Scenes,
    result: Evaluation,
    summary: dict[str, Any],
    planted: shortcut.Experiment,
    seed: int,
) -> None:
    """Map grid, refinement, curves, intervals, training and shortcut figures."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = data.batch(range(min(SHOWN, len(data))))
    images = shown["image"].to(clf.device)
    maps = {name: method.attribute(images) for name, method in methods(clf, explainer, seed).items()}
    figures.qualitative(images, maps, folder / "maps.png", masks=shown["mask"])
    trail = refine(explainer, clf, images, steps=TRAIL, every_step=True)
    scores = [_ins_minus_del(clf, images, step) for step in trail]
    figures.refinement(images, trail, folder / "refinement.png", scores=torch.stack(scores))
    figures.curves(result.curves, folder / "curves.png", summary=summary)
    figures.bars(summary, "ins_minus_del", folder / "ins_minus_del.png")
    figures.refinement(planted.images, planted.trail, folder / "shortcut.png")
    log = folder.parent / "log.jsonl"
    if log.is_file():
        figures.training(log, folder / "training.png")


def _ins_minus_del(clf: Classifier, images: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    from ..metrics import DeletionInsertion

    metric = DeletionInsertion(clf)
    metric.update(images, maps)
    return metric.per_image()["ins_minus_del"]


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start

"""`aha plan` against real trainings: `python -m bench.plan`.

Two short trainings of different settings, and an evaluation, are timed whole, in turn with what the plan measures,
which is made with fewer images and fractions: the law is compared as much as the clock. The peak of a training step's
memory, networks and all, is compared with the plan's sum.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
import unittest.mock
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

import torch
import tyro

import aha
from aha import plan
from aha.attributors import MethodSpec
from aha.evaluation import evaluate
from aha.explainer.decoder import DecoderConfig
from aha.files import write_atomically
from aha.memory import peak_bytes

BAR = 0.15


class Setting(NamedTuple):
    """A training: classifier, the explainer's encoder (None: evidence), what differs from the defaults."""

    classifier: str
    encoder: str | None
    changes: dict[str, Any]


SETTINGS = (
    Setting("test_vit", None, {"batch_size": 4, "fractions": 12, "targets": 2, "steps": 5}),
    Setting("test_convnext", "classifier", {"batch_size": 12, "fractions": 8, "targets": 1, "steps": 8}),
)


def _made(setting: Setting) -> tuple[aha.Explainer, aha.Classifier, aha.TrainConfig]:
    clf = plan.untrained(setting.classifier)
    torch.manual_seed(0)
    alone = setting.encoder is None
    decoder = None if alone else DecoderConfig(embedding=64, width=48, head=32)
    explainer = aha.Explainer.build(clf, setting.encoder, pretrained=False, decoder=decoder, evidence=alone)
    return explainer, clf, aha.TrainConfig(**setting.changes)


def _train(setting: Setting, steps: int | None = None, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of the whole training, by ``clock``."""
    explainer, clf, config = _made(setting)
    images: Any = [{"image": torch.rand(3, *clf.input_size)} for _ in range(2 * config.batch_size)]
    config = dataclasses.replace(config, steps=steps or config.steps)
    start = clock()
    aha.Trainer(explainer, clf, images, config).fit(progress=False)
    return clock() - start


def measure(setting: Setting, rounds: int, seconds: float, clock: Callable[[], float]) -> dict[str, Any]:
    """Predicted and measured seconds, and memory of one step."""
    explainer, clf, config = _made(setting)
    _train(setting, steps=1)  # warm
    predicted, taken, steps = [], [], []
    for _ in range(rounds):
        with unittest.mock.patch.object(plan, "now", side_effect=lambda device: clock()):
            step = plan.measure_step(*_made(setting), seconds=seconds)
        made = plan.training(explainer, clf, config, images=2 * config.batch_size, measured=step)
        predicted.append(3600 * made.hours)
        steps.append(step)
        taken.append(_train(setting, clock=clock))
        print(f"{setting.classifier}: planned {predicted[-1]:.2f} s, taken {taken[-1]:.2f} s", file=sys.stderr)
    peak = peak_bytes(lambda: _train(setting, steps=1), clf.device)
    return {
        "classifier": setting.classifier,
        "encoder": setting.encoder or "evidence",
        **setting.changes,
        "measured_batch": steps[0].batch,
        "measured_fractions": steps[0].fractions,
        "predicted_s": [round(value, 2) for value in predicted],
        "taken_s": [round(value, 2) for value in taken],
        "ratio": round(median(predicted) / median(taken), 3),
        "bar": BAR,
        "planned_bytes": made.memory["total"],
        "peak_bytes": peak,
        "memory_ratio": round(made.memory["total"] / peak, 3),
    }


EVALUATED = ("chefer", "aha:steps=1", "rise:n_masks=200")


def measure_evaluation(rounds: int, seconds: float, clock: Callable[[], float], images: int = 8) -> dict[str, Any]:
    """Predicted and measured seconds of an evaluation; RISE is too slow to be timed by the plan, its passes are."""
    clf = plan.untrained("test_vit")
    specs = [MethodSpec.parse(text) for text in EVALUATED]
    data: Any = [{"image": torch.rand(3, *clf.input_size), "label": -1} for _ in range(images)]
    predicted, taken = [], []
    for _ in range(rounds):
        with unittest.mock.patch.object(plan, "now", side_effect=lambda device: clock()):
            made = plan.evaluation(clf, specs, images, seconds=4 * seconds)
        predicted.append(3600 * made.hours)
        methods = {spec.label: spec.create(clf, 0) for spec in specs}
        start = clock()
        evaluate(clf, methods, data, batch_size=4)
        taken.append(clock() - start)
        print(f"evaluation: planned {predicted[-1]:.2f} s, taken {taken[-1]:.2f} s", file=sys.stderr)
    return {
        "classifier": "test_vit",
        "evaluated": [f"{part.what}: {part.how}" for part in made.parts],
        "images": images,
        "predicted_s": [round(value, 2) for value in predicted],
        "taken_s": [round(value, 2) for value in taken],
        "ratio": round(median(predicted) / median(taken), 3),
        "bar": BAR,
    }


def main(
    out: Path | None = None, rounds: int = 2, seconds: float = 0.5, clock: Literal["wall", "process"] = "wall"
) -> int:
    """Measure; 1 where a prediction is off by more than the bar.

    Args:
        out: folder for plan_<device>.json.
        rounds: of plan and training, in turn; medians are compared.
        seconds: that a step of the plan may take.
        clock: wall, or the process's own time: one thread on a machine that others use too, without a GPU.
    """
    count = time.perf_counter if clock == "wall" else time.process_time
    found = [measure(setting, rounds, seconds, count) for setting in SETTINGS]
    found.append(measure_evaluation(rounds, seconds, count))
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    whole = {"device": plan.device_name(torch.device(kind)), "torch": torch.__version__, "clock": clock, "runs": found}
    text = json.dumps(whole, indent=2) + "\n"
    print(text)
    if out is not None:
        write_atomically(out / f"plan_{kind}.json", text.encode())
    return int(any(abs(run["ratio"] - 1) > BAR for run in found))


if __name__ == "__main__":
    sys.exit(tyro.cli(main))

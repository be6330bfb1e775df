"""Whether refinement should stop early, image by image: `python -m bench.early_stop`.

The curves that a step looks at change from step to step, so a loss compares with that of another step only on average:
over six steps every reference has met two grids. The rule: an image stops where the mean loss of its last six steps is
not below that of the six before by more than a margin. It is worth having if the passes it saves cost less insertion −
deletion than as many passes saved by a smaller T for all images.
"""

from __future__ import annotations

import json
import unittest.mock
from pathlib import Path
from typing import Any

import torch
import tyro

import aha
from aha.classifier import from_name
from aha.data import Scenes
from aha.evaluation import evaluate
from aha.files import write_atomically
from aha.objective import Objective

STEPS, WINDOW, EVERY = 24, 6, 4  # the rule looks every fourth step
MARGINS = (0.0, 0.002, 0.005, 0.01, 0.02)


def main(images: int = 24, out: Path | None = None) -> None:
    """Refine scenes, apply the rule with several margins, compare with fixed T.

    Args:
        images: held-out scenes.
        out: folder for early_stop_cpu.json.
    """
    clf = from_name("scenes")
    data = Scenes("test", size=images, seed=0, image_size=clf.input_size[0])
    batch = torch.stack([data[index]["image"] for index in range(images)])
    target = clf(batch).argmax(dim=1)
    losses: list[torch.Tensor] = []
    call = Objective.__call__

    def recorded(self: Objective, *args: Any, **options: Any) -> Any:
        made = call(self, *args, **options)
        losses.append(made.loss.detach())
        return made

    with unittest.mock.patch.object(Objective, "__call__", recorded):
        trail = aha.refine(
            aha.Explainer.universal(clf), clf, batch, target, STEPS, every_step=True, internal_batch_size=images
        )
    loss = torch.stack(losses)  # [T, N]
    fixed = list(range(2 * WINDOW, STEPS + 1, EVERY))
    rows = {t: trail[t] for t in fixed}
    result = evaluate(clf, {f"{t}": _known(batch, maps) for t, maps in rows.items()}, data, batch_size=images)
    values = {t: torch.tensor(list(result.values(f"{t}", "ins_minus_del").values())) for t in fixed}
    found: dict[str, Any] = {
        "images": images,
        "fixed": {t: round(float(v.mean()), 4) for t, v in values.items()},
        "rules": [],
    }
    for margin in MARGINS:
        stops = torch.full((images,), STEPS)
        for t in reversed(fixed):
            better = loss[t - 2 * WINDOW : t - WINDOW].mean(dim=0) - loss[t - WINDOW : t].mean(dim=0)
            stops = torch.where(better <= margin, t, stops)
        reached = torch.stack([values[int(t)][n] for n, t in enumerate(stops)])
        steps = float(stops.double().mean())
        # what the same passes bring where all images get as many
        low = max(t for t in fixed if t <= steps)
        high = min(low + EVERY, STEPS)
        share = (steps - low) / EVERY
        even = (1 - share) * values[low] + share * values[high]
        difference = (reached - even).double()
        half = 1.96 * float(difference.std()) / images**0.5
        found["rules"].append(
            {
                "margin": margin,
                "mean_steps": round(steps, 2),
                "ins_minus_del": round(float(reached.mean()), 4),
                "same_passes_for_all": round(float(even.mean()), 4),
                "difference": round(float(difference.mean()), 4),
                "ci95": [round(float(difference.mean()) + side * half, 4) for side in (-1, 1)],
            }
        )
    text = json.dumps(found, indent=2) + "\n"
    print(text)
    if out is not None:
        write_atomically(out / "early_stop_cpu.json", text.encode())


def _known(images: torch.Tensor, maps: torch.Tensor) -> Any:
    """A method that looks its maps up."""
    return lambda some, _: torch.stack(
        [maps[int((images == image).flatten(1).all(dim=1).nonzero()[0])] for image in some]
    )


if __name__ == "__main__":
    tyro.cli(main)

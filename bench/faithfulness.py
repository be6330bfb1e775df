"""Every method on the demo's classifier: `python -m bench.faithfulness` trains the explainers and compares.

AHA and its amortised peers are trained on scenes with the same steps, batches and decoder; the comparison is on
held-out scenes. Interrupted, it continues; once the explainers are trained,
`torchrun --standalone --nproc-per-node=2 -m bench.faithfulness` shares the rest between two processes, which suits two
cores better than two threads. MDA, which optimises every image, is also measured with as many passes (F + B) as AHA's
refinement takes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from pathlib import Path

import torch

from aha.classifier import Classifier
from aha.data import Scenes
from aha.demo import run as demo
from aha.evaluation import MethodSpec, compare, specs
from aha.explainer import Explainer
from aha.report import comparison
from aha.source import Source
from aha.training import Trainer

RESULTS = Path(__file__).parent / "results"
OBJECTIVES = ("ranking", "fastshap", "vit_shapley")
STEPS = (0, 3)
# the rows that the registry's defaults do not give
VARIANTS = (
    "libragrad, fullgrad_plus@libragrad:base=fullgrad_plus",
    "libragrad, attcam@libragrad:base=attcam",
)
PROTOCOLS = ("aha",)


def trained(objective: str, folder: Path, clf: Classifier, steps: int | None, seed: int) -> Path:
    """The folder of an explainer of the scenes classifier, trained if it is not there."""
    place = folder / "explainers" / objective
    if not (place / "explainer").is_dir():
        torch.manual_seed(seed)
        config = dataclasses.replace(demo.TRAINING, objective=objective, output=str(place), seed=seed)
        if steps is not None:
            config = dataclasses.replace(config, steps=steps)
        explainer = Explainer.build(clf, decoder=demo.DECODER)
        Trainer(explainer, clf, Scenes("train", size=4096, seed=seed), config).fit(resume=True)
    return place / "explainer"


def rows(folder: Path, clf: Classifier, steps: int | None, seed: int) -> list[MethodSpec]:
    """All methods, our own last."""
    chosen, _ = specs.parse((*VARIANTS, "all"))
    chosen = [spec for spec in chosen if spec.name not in ("aha", "fastshap", "vit_shapley")]
    explainers = {name: str(trained(name, folder, clf, steps, seed)) for name in OBJECTIVES}
    for name in OBJECTIVES[1:]:
        chosen.append(MethodSpec(name, {"explainer": explainers[name]}, name))
    ours = [MethodSpec("aha", {"explainer": explainers["ranking"], "steps": t}, f"aha T={t}") for t in STEPS]
    bound = sum(refinement_passes(ours[STEPS.index(3)], clf))
    chosen.append(MethodSpec("mda", {"max_passes": bound}, "mda, passes of aha T=3"))
    return [*chosen, *ours]


def refinement_passes(spec: MethodSpec, clf: Classifier) -> tuple[int, int]:
    """Forward and backward passes that the refinement of one image takes."""
    from aha.attributors import count_passes

    method = spec.create(clf, 0)
    image = torch.rand(1, 3, *clf.input_size, device=clf.device)
    with count_passes(clf) as counted:
        method.attribute(image, 0)
    return counted.forward, counted.backward


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.faithfulness", description=__doc__)
    parser.add_argument("--scenes", type=int, default=256)
    parser.add_argument("--steps", type=int, help="training steps; default: the demo's")
    parser.add_argument("--output", type=Path, default=Path("runs/faithfulness"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="write bench/results, as the published run does")
    a = parser.parse_args()
    source = Source(limit=a.scenes)
    clf = source.load_classifier()
    chosen = rows(a.output, clf, a.steps, a.seed)
    done = compare([source], chosen, a.output, PROTOCOLS, strict=False, seed=a.seed, internal_batch_size=32)
    if done is None:  # another process writes
        return
    comparison.write(done, a.output, title=f"Every method on {a.scenes} scenes")
    (result,) = done.results.values()
    print("\n".join((*done.skipped, *done.failures)))
    for line in claims(result):
        print(line)
    if a.keep:
        device = "cuda" if clf.device.type == "cuda" else "cpu"
        summary = {**result.summary(), "threads": torch.get_num_threads(), "claims": list(claims(result))}
        path = RESULTS / f"faithfulness_{device}.json"
        path.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
        shutil.copy(a.output / "tables" / "comparison.md", RESULTS / f"faithfulness_{device}.md")
        shutil.copy(a.output / "figures" / "tradeoff_passes.png", RESULTS / f"faithfulness_{device}.png")


def claims(result):
    """The refined explainer against every other method: paired difference, interval, p."""
    for method in result.methods:
        if method != "aha T=3":
            found = result.compare("aha T=3", method, "ins_minus_del")
            low, high = found["ci95"]
            yield (
                f"Ins−Del ↑ aha T=3 − {method}: {found['difference']:+.4f} (95 % interval {low:+.4f} … {high:+.4f}, "
                f"p {found['p']:.3g})"
            )


if __name__ == "__main__":
    main()

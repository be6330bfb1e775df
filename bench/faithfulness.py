"""Every method side by side: `python -m bench.faithfulness` trains the explainers and compares.

On the demo's classifier and held-out scenes, or with `--photographs FOLDER --weights FILE` on a ViT-Tiny and 60
photographs kept aside, there the methods of at most 100 passes (F + B) per image. AHA as published and its amortised
peers are trained with the same steps, batches and decoder. Beside them is the explainer that ships, whose map is of
both classifiers the base map, which no training made (docs/patches.md). Interrupted, it continues; once the explainers
are trained, `torchrun --standalone --nproc-per-node=2 -m bench.faithfulness` shares the rest between two processes,
which suits two cores better than two threads. On scenes MDA, which optimises every image, is also measured with as many
passes as AHA's refinement takes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from aha import terminal
from aha.attributors import MethodSpec, specs
from aha.classifier import Classifier
from aha.data import Scenes
from aha.demo import run as demo
from aha.evaluation import compare
from aha.explainer import Explainer
from aha.explainer.decoder import DecoderConfig
from aha.report import comparison
from aha.reproduce.run import SMALL
from aha.source import Source
from aha.training import TrainConfig, Trainer

RESULTS = Path(__file__).parent / "results"
# untrained explainers of the published architecture
TRAINING = dataclasses.replace(demo.TRAINING, steps=400, cells=(7, 16), tau=None)
OBJECTIVES = ("ranking", "fastshap", "vit_shapley")
STEPS = (0, 6)
# the rows that the registry's defaults do not give
VARIANTS = (
    "libragrad, fullgrad_plus@libragrad:base=fullgrad_plus",
    "libragrad, attcam@libragrad:base=attcam",
    "bi_attention, token@bi_attention:level=token",
)
PROTOCOLS = ("aha",)
HELD_OUT = 60  # photographs


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is compared, and how the explainers are trained for it.

    Attributes:
        name: of the results.
        source: classifier and images.
        training, decoder: of all explainers.
        passes: methods that take more per image are left out; None keeps all.
    """

    name: str
    source: Source
    training: TrainConfig
    decoder: DecoderConfig
    passes: int | None = None

    def training_images(self, clf: Classifier, seed: int) -> Any:
        if self.source.data == "scenes":
            return Scenes("train", size=4096, seed=seed)
        return self.source.images(clf.input_size, training=True, augment=True, seed=seed)


def on_scenes(count: int) -> Setting:
    return Setting("faithfulness", Source(limit=count), TRAINING, SMALL)


def on_photographs(folder: Path, weights: Path | None) -> Setting:
    source = Source("vit_tiny_patch16_224", weights, str(folder), holdout=HELD_OUT)
    training = dataclasses.replace(TRAINING, steps=150, batch_size=8, fractions=6, cells=(7, 14))
    return Setting("faithfulness_photographs", source, training, DecoderConfig(128, 64, 32), passes=100)


def trained(objective: str, folder: Path, clf: Classifier, setting: Setting, seed: int) -> Path:
    """The folder of an explainer of the classifier, trained if it is not there."""
    place = folder / "explainers" / objective
    if not (place / "explainer").is_dir():
        torch.manual_seed(seed)
        config = dataclasses.replace(setting.training, objective=objective, output=str(place), seed=seed)
        explainer = Explainer.build(clf, decoder=setting.decoder, evidence=False)
        Trainer(explainer, clf, setting.training_images(clf, seed), config).fit(resume=True)
    return place / "explainer"


def rows(folder: Path, clf: Classifier, setting: Setting, seed: int) -> list[MethodSpec]:
    """All methods, our own last."""
    chosen, _ = specs.parse((*VARIANTS, "all"))
    chosen = [spec for spec in chosen if spec.name not in ("aha", "fastshap", "vit_shapley")]
    explainers = {name: str(trained(name, folder, clf, setting, seed)) for name in OBJECTIVES}
    for name in OBJECTIVES[1:]:
        chosen.append(MethodSpec(name, {"explainer": explainers[name]}, name))
    published = {"explainer": explainers["ranking"]}
    ours = [MethodSpec("aha", {**published, "steps": t}, f"aha, published, T={t}") for t in STEPS]
    ours += [MethodSpec("aha", {"steps": t}, f"aha T={t}") for t in STEPS]
    if setting.passes is None:
        bound = round(passes(ours[-1], clf) or 0)
        chosen.append(MethodSpec("mda", {"max_passes": bound}, f"mda, passes of aha T={STEPS[-1]}"))
        return [*chosen, *ours]
    return [spec for spec in (*chosen, *ours) if (taken := passes(spec, clf)) is None or taken <= setting.passes]


def passes(spec: MethodSpec, clf: Classifier) -> float | None:
    """Forward and backward passes per image; None for a method that does not accept the classifier."""
    image = torch.rand(1, 3, *clf.input_size, generator=torch.Generator().manual_seed(0)).to(clf.device)
    try:
        taken = spec.create(clf, 0).passes(image)
    except (ValueError, ImportError, OSError):
        return None
    return taken.forward + taken.backward


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.faithfulness", description=__doc__)
    parser.add_argument("--scenes", type=int, default=256)
    parser.add_argument("--photographs", type=Path, help="folder of labelled photographs, instead of scenes")
    parser.add_argument("--weights", type=Path, help="local weights of ViT-Tiny, for the photographs")
    parser.add_argument("--steps", type=int, help="training steps; default: the demo's")
    parser.add_argument("--output", type=Path, default=Path("runs/faithfulness"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="write bench/results, as the published run does")
    a = parser.parse_args()
    setting = on_photographs(a.photographs, a.weights) if a.photographs else on_scenes(a.scenes)
    if a.steps is not None:
        setting = dataclasses.replace(setting, training=dataclasses.replace(setting.training, steps=a.steps))
    output = a.output / setting.name
    clf = setting.source.load_classifier()
    chosen = rows(output, clf, setting, a.seed)
    with terminal.progress() as bar:
        done = compare(
            [setting.source],
            chosen,
            output,
            PROTOCOLS,
            strict=False,
            batch_size=12,
            seed=a.seed,
            internal_batch_size=32,
            progress=bar,
        )
    if done is None:  # another process writes
        return
    (result,) = done.results.values()
    comparison.write(done, output, title=f"Every method on {len(result.images['index'])} {setting.source.data}")
    print("\n".join((*done.skipped, *done.failures)))
    ours = next(name for name in reversed(result.methods) if name.startswith("aha"))
    for line in claims(result, ours):
        print(line)
    if a.keep:
        device = "cuda" if clf.device.type == "cuda" else "cpu"
        summary = {**result.summary(), "threads": torch.get_num_threads(), "claims": list(claims(result, ours))}
        path = RESULTS / f"{setting.name}_{device}.json"
        path.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
        shutil.copy(output / "tables" / "comparison.md", RESULTS / f"{setting.name}_{device}.md")
        shutil.copy(output / "figures" / "tradeoff_passes.png", RESULTS / f"{setting.name}_{device}.png")


def claims(result, ours):
    """Our explainer against every other method: paired difference, interval, p."""
    for method in result.methods:
        if method != ours:
            found = result.compare(ours, method, "ins_minus_del")
            low, high = found["ci95"]
            yield (
                f"Ins−Del ↑ {ours} − {method}: {found['difference']:+.4f} (95 % interval {low:+.4f} … {high:+.4f}, "
                f"p {found['p']:.3g})"
            )


if __name__ == "__main__":
    main()

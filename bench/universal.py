"""The explainer that ships, on classifiers and photographs it was not trained for: `python -m bench.universal`.

It is trained as `aha train --universal` does it, on all classifiers and with each family left out in turn, and measured
on photographs kept aside (insertion − deletion, 21 points, mean of three references, predicted class) beside every
method of one forward and one backward pass. Explainers that are in --explainers already are not trained again. Their
rows are of their networks, also for a classifier of which the explainer that ships is the base map (docs/patches.md).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from aha import terminal
from aha.attributors import AHA, Attributor, MethodSpec
from aha.classifier import Classifier, from_name
from aha.data import ImageFolder, Part, hold_out
from aha.evaluation import Evaluation, evaluate
from aha.explainer import Explainer
from aha.structure import transformer
from aha.training import universal

METRIC = "ins_minus_del"
FAMILIES = {"ViT": "vit_", "DeiT": "deit_", "CNN": "tf_"}
TRANSFORMER_METHODS = (
    *("gradcam_vit", "raw_attention", "rollout", "attcam", "legrad", "chefer", "transition_attention", "bi_attention"),
    *("input_x_gradient", "fullgrad_plus"),
    *(f"libragrad:base={base}" for base in ("fullgrad_plus", "attcam", "gradcam_vit", "chefer")),
)
CNN_METHODS = ("gradcam", "gradcam_pp", "hirescam", "input_x_gradient", "libragrad:base=input_x_gradient")


def folds() -> dict[str, tuple[str, ...]]:
    """Name of an explainer → what it is trained on."""
    names = universal.CLASSIFIERS
    left_out = {
        f"without {family}": tuple(n for n in names if not n.startswith(start)) for family, start in FAMILIES.items()
    }
    return {"all": names, **left_out}


def methods(clf: Classifier, explainers: Mapping[str, Path]) -> dict[str, Attributor]:
    """The rows: every single pass of the registry, the base map alone, and the explainers."""
    names = TRANSFORMER_METHODS if transformer(clf.module) else CNN_METHODS
    rows: dict[str, Attributor] = {name: MethodSpec.parse(name).create(clf, 0) for name in names}
    rows["base map, untrained"] = AHA(clf, Explainer.build(clf))
    rows["universal, as it ships"] = AHA(clf, Explainer.universal(clf))
    for name, path in explainers.items():  # their networks, also where the one that ships adds nothing
        rows[f"universal, {name}"] = AHA(clf, Explainer.from_pretrained(path, clf))
    return rows


def compared(result: Evaluation, peers: Sequence[str]) -> dict[str, Any]:
    """Means, and paired differences to the best of ``peers`` with their intervals, of `Evaluation.compare`."""
    means = {name: row[METRIC] for name, row in result.summary()["methods"].items()}
    best = max(peers, key=means.__getitem__)
    found: dict[str, Any] = {"images": len(result.values(best, METRIC)), "best single pass": best, "methods": {}}
    for name, mean in means.items():
        pair = result.compare(name, best, METRIC)
        found["methods"][name] = {
            METRIC: round(mean, 4),
            "difference": round(pair["difference"], 4),
            "ci95": [round(value, 4) for value in pair["ci95"]],
        }
    return found


def table(results: Mapping[str, Any]) -> str:
    """Markdown: a part per classifier."""
    lines = []
    for name, found in results.items():
        lines += [f"\n**{name}**, {found['images']} photographs; difference to {found['best single pass']}, paired\n"]
        lines += ["| method | insertion − deletion | difference | 95 % |", "|---|---|---|---|"]
        for method, row in sorted(found["methods"].items(), key=lambda item: -item[1][METRIC]):
            low, high = row["ci95"]
            difference = f"{row['difference']:+.4f} | {low:+.4f} … {high:+.4f}"
            lines.append(f"| {method} | {row[METRIC]:.4f} | {difference} |".replace("-0", "−0"))
    return "\n".join(lines).strip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.universal", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of photographs to measure on")
    parser.add_argument("--holdout", type=int, default=60, help="how many of them; 0 takes all")
    parser.add_argument("--weights", type=Path, help="folder of the classifiers' weights, instead of the hub")
    parser.add_argument("--photographs", type=Path, default=Path("runs/photographs"))
    parser.add_argument("--explainers", type=Path, default=Path("runs/universal"))
    parser.add_argument("--folds", nargs="+", default=list(folds()), choices=list(folds()))
    parser.add_argument("--classifiers", nargs="+", default=[n for n in universal.CLASSIFIERS if n != "scenes"])
    parser.add_argument("--methods", nargs="+", help="only these of the registry")
    parser.add_argument("--output", type=Path, default=Path("runs/universal/results.json"))
    a = parser.parse_args()
    explainers = {}
    for name in a.folds:
        place = a.explainers / name.replace(" ", "_")
        if not (place / "explainer").is_dir():
            universal.train(place, a.photographs, a.weights, folds()[name], resume=True)
        explainers[name] = place / "explainer"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = {}
    for name in a.classifiers:
        clf = from_name(name, universal.weights_file(a.weights, name)).to(device)
        data: Any = ImageFolder(a.data, clf.input_size[0], labels=False)
        if a.holdout:
            data = Part(data, hold_out(len(data), a.holdout)[1])
        rows = methods(clf, explainers)
        peers = [row for row in rows if not row.startswith(("universal", "base")) and row in (a.methods or rows)]
        rows = {row: method for row, method in rows.items() if row in peers or row.startswith(("universal", "base"))}
        with terminal.progress() as bar:
            result = evaluate(clf, rows, data, protocol="aha", batch_size=20, progress=bar)
        results[name] = compared(result, peers)
        a.output.parent.mkdir(parents=True, exist_ok=True)
        a.output.write_text(json.dumps(results, indent=1) + "\n")
        print(table({name: results[name]}))


if __name__ == "__main__":
    main()

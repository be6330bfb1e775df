"""The benchmark of the universal explainer: which methods are measured beside it, and how they are compared."""

import numpy as np
import pytest

from aha.data import Scenes
from aha.demo.classifier import scenes
from aha.evaluation import evaluate
from bench import universal

from ..attributors.architectures import make


@pytest.mark.parametrize(("kind", "names"), [("vit", universal.TRANSFORMER_METHODS), ("resnet", universal.CNN_METHODS)])
def test_every_single_pass_of_the_architecture_stands_beside_it(kind, names):
    assert list(universal.methods(make(kind), {})) == [*names, "base map, untrained", "universal, as it ships"]


def test_differences_are_to_the_best_peer():
    clf = scenes()
    rows = universal.methods(clf, {})
    rows = {name: rows[name] for name in ("attcam", "rollout", "base map, untrained")}
    result = evaluate(clf, rows, Scenes("val", size=4, image_size=clf.input_size[0]), protocol="aha", batch_size=4)
    found = universal.compared(result, ["attcam", "rollout"])
    each = {name: np.array(list(result.values(name, universal.METRIC).values())) for name in rows}
    best = max(("attcam", "rollout"), key=lambda name: each[name].mean())
    assert found["best single pass"] == best and found["images"] == 4
    for name, row in found["methods"].items():
        assert row["difference"] == pytest.approx((each[name] - each[best]).mean(), abs=1e-4)
        assert row["ci95"][0] <= row["difference"] <= row["ci95"][1]
    assert universal.table({"scenes": found}).count("\n|") == 2 + len(rows)

"""The measurements of large K: their rows, and that what they time is right."""

import pytest
import torch

import aha
from aha.evaluation import evaluate
from bench import cells, faithfulness, large_k

from ..toys import TINY_DECODER, pictures, tiny_classifier


def test_grids_go_from_patches_to_pixels(tmp_path):
    setting = faithfulness.on_photographs(tmp_path, None)
    specs = cells.rows(tmp_path, setting, 224, [3])
    assert [spec.label for spec in specs] == ["start", *(f"3 steps, {n}×{n}" for n in (14, 28, 56, 112, 224))]
    # cells of 16 px are coarser than any that the scenes' explainer was trained on
    found = cells.rows(tmp_path, faithfulness.on_scenes(4), 64, [3, 10])
    assert [spec.options["cells"] for spec in found[1:]] == 2 * [[8], [16], [32], [64]]


def test_the_page_compares_with_the_start_and_the_grid_of_the_training(tmp_path, coarse):
    clf = tiny_classifier()
    torch.manual_seed(1)
    explainer = aha.Explainer.build(clf, evidence=False, decoder=TINY_DECODER)
    setting = faithfulness.on_scenes(2)
    grids = (8, setting.training.cells[1])
    methods = {cells.START: aha.attributors.AHA(clf, explainer, 0)}
    for n in grids:
        methods[cells.label(1, n)] = aha.attributors.AHA(clf, explainer, 1, cells=[n], fractions=4)
    data = [{"image": image, "label": 0} for image in pictures(2)]
    result = evaluate(clf, methods, data)
    lines = [line.split(" | ") for line in cells.page(result, setting).splitlines() if line.startswith("| ")]
    head, start, other, same = lines
    assert {len(line) for line in lines} == {7} and "over 16×16" in head
    means = [sum(result.values(name, "ins_minus_del").values()) / 2 for name in result.methods]
    assert [line[3] for line in (start, other, same)] == [f"{mean:.4f}" for mean in means]
    assert start[4:6] == ["", ""] and same[5] == ""
    assert float(other[5].split()[0]) == pytest.approx(means[1] - means[2], abs=1e-4)


@pytest.mark.parametrize("name", large_k.OPERATORS)
def test_a_pass_is_measured(name):
    row = large_k.measure(name, 2000)
    assert row["forward_s"] > 0 and row["backward_s"] > 0


def test_the_pages_hold_every_row():
    distances = large_k.distances(2000, 1e-3)
    assert distances["even"] < distances["random"] < 0.02
    row = {"operator": "soft_sort", "K": 2000, "forward_s": 0.5, "backward_s": 0.25, "peak_mib": None}
    text = large_k.page({"threads": 1, "operators": [row], "distances": [distances]})
    assert "| soft_sort | 2,000 | 0.5 | 0.25 | not measured |" in text
    assert "| 2,000 | 0.001 |" in text

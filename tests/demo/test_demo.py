"""The demo from end to end, on a few scenes: everything it promises to write is written, and says what it should."""

import json
import os
import subprocess
import sys

import pytest

METRICS = [
    *("deletion", "insertion", "ins_minus_del", "positive", "negative", "neg_minus_pos"),
    *("adp", "pic", "pointing_game", "seconds_per_image"),
]
METHODS = ("random", "input_x_gradient", "integrated_gradients", "gradcam_vit", "raw_attention", "rollout", "rise")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "aha.cli", "demo", "--output", folder, "--scenes", "4", "--steps", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_summary(demo):
    folder, _ = demo
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary["methods"]) == {*METHODS, "aha T=0", "aha T=3"}
    for row in summary["methods"].values():
        assert all(isinstance(row[metric], float) for metric in METRICS)
        for low, high in row["ci95"].values():
            assert low <= high
    assert set(summary["references"]) == {"black", "mean", "blur"}
    assert 0 <= summary["classifier"]["accuracy"] <= 1
    assert summary["protocol"]["points"] == 21
    assert {"seed", "versions", "shortcut", "comparisons", "seconds"} <= set(summary)
    planted = summary["shortcut"]
    assert len(planted["per_step"]) == 6
    assert planted["shortcut_rate"] >= 0.8


def test_mean_of_the_references(demo):
    summary = json.loads((demo[0] / "summary.json").read_text())
    for name, row in summary["methods"].items():
        parts = [summary["references"][reference][name]["insertion"] for reference in ("black", "mean", "blur")]
        assert row["insertion"] == pytest.approx(sum(parts) / 3, abs=1e-6)


def test_report_and_figures(demo):
    folder, printed = demo
    figures = {path.stem for path in (folder / "figures").glob("*.png")}
    assert {"maps", "refinement", "curves", "ins_minus_del", "shortcut", "training"} <= figures
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64") == len(figures)
    assert "Ins−Del ↑" in printed
    assert (folder / "explainer" / "decoder.safetensors").is_file()

"""Checks on real weights and photographs: the folder that AHA_REAL_DATA names; skipped without it."""

import csv
import os
from pathlib import Path

import pytest
import torch

import aha

REAL = os.environ.get("AHA_REAL_DATA")
pytestmark = pytest.mark.skipif(not REAL, reason="AHA_REAL_DATA names no folder of real weights and photographs")
WEIGHTS = {
    "vit_tiny_patch16_224": "vit_tiny_patch16_224_augreg_in21k_ft_in1k.fp16.safetensors",
    "deit_tiny_patch16_224": "deit_tiny_patch16_224_fb_in1k_ln8bit.fp16.safetensors",
}


@pytest.mark.parametrize(
    ("name", "column"), [("vit_tiny_patch16_224", "vit_tiny"), ("deit_tiny_patch16_224", "deit_tiny")]
)
def test_predictions_are_the_recorded_ones(name, column):
    root = Path(REAL)
    clf = aha.Classifier.from_timm(name, weights=root / WEIGHTS[name])
    data = aha.data.ImageFolder(root / "images_dev", image_size=224)
    with open(root / "images_dev" / "labels.csv", newline="") as file:
        recorded = {row["file"]: row for row in csv.DictReader(file)}
    items = [data[i] for i in range(0, len(data), 10)]
    with torch.no_grad():
        probability, predicted = clf.probabilities(torch.stack([item["image"] for item in items])).max(dim=1)
    rows = [recorded[Path(item["path"]).name] for item in items]
    same = [int(row[f"{column}_top1"]) == int(p) for row, p in zip(rows, predicted, strict=True)]
    assert sum(same) >= 0.95 * len(same)
    close = [abs(float(row[f"{column}_conf"]) - float(p)) < 0.05 for row, p in zip(rows, probability, strict=True)]
    assert sum(close) >= 0.9 * len(close)


def test_attention_beats_chance_on_photographs():
    root = Path(REAL)
    name = "vit_tiny_patch16_224"
    clf = aha.Classifier.from_timm(name, weights=root / WEIGHTS[name])
    data = aha.data.ImageFolder(root / "images_dev", image_size=224)
    images = torch.stack([data[i]["image"] for i in range(0, 300, 30)])
    scores = {}
    for method in ("random", "raw_attention"):
        metric = aha.metrics.DeletionInsertion(clf, aha.metrics.Protocol("quick", points=11))
        metric.update(images, aha.attributors.create(method, clf)(images))
        scores[method] = metric.compute()["ins_minus_del"]
    assert scores["raw_attention"] > scores["random"] + 0.05

"""Checks on real weights and photographs: the folder that AHA_REAL_DATA names; skipped without it."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import aha
from tests.attributors.by_hand import forward_by_hand

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


@pytest.fixture(scope="module")
def photographs():
    """A ViT-Tiny, four photographs and what it sees in them."""
    root, name = Path(REAL), "vit_tiny_patch16_224"
    clf = aha.Classifier.from_timm(name, weights=root / WEIGHTS[name])
    data = aha.data.ImageFolder(root / "images_dev", image_size=224)
    images = torch.stack([data[i]["image"] for i in (0, 70, 140, 210)])
    with torch.no_grad():
        return clf, images, clf(images).argmax(dim=1)


def enlarged(maps):
    return F.interpolate(maps.view(1, -1, 14, 14), (224, 224), mode="bilinear", align_corners=False)[0]


def assert_alike(method, image, target, expected):
    maps = method.attribute(image[None], target)[0, 0]
    assert (maps - expected).abs().max() < 1e-4 * expected.abs().max(), method.name


def test_integrated_attention_by_its_formulas(photographs):
    clf, images, targets = photographs
    create = aha.attributors.create
    for image, target in zip(images, targets.tolist(), strict=True):
        pixels = (image[None] - clf.mean[:, None, None]) / clf.std[:, None, None]
        mean = 0
        for k in range(1, 21):
            seen = forward_by_hand(clf.module, k / 20 * pixels)
            mean = mean + torch.stack(torch.autograd.grad(seen["logits"][0][target], seen["attention_heads"][-1])) / 20
        integrated = mean.clamp(min=0).mean(dim=0)[0, 1:]
        # of the image itself, the last point of the path
        attention = [torch.stack(heads).detach() for heads in seen["attention_heads"]]
        state = attention[-1].mean(dim=0)[0]
        for block in range(10, -1, -1):
            state = state + state @ attention[block].mean(dim=0)
        joint = torch.eye(197)
        for block in range(5, 12):
            values = torch.cat(list(seen["values"][block].detach()), dim=1)
            projected = values @ clf.module.blocks[block].attn.proj.weight.T
            ratio = projected.norm(dim=1) / seen["entering"][block].detach().norm(dim=1)
            joint = joint + attention[block].mean(dim=0) * ratio @ joint
        assert_alike(create("attention_ig", clf), image, target, enlarged(integrated)[0])
        assert_alike(create("transition_attention", clf), image, target, enlarged(state[1:] * integrated)[0])
        by_token = create("bi_attention", clf, level="token")
        assert_alike(by_token, image, target, enlarged(joint[0, 1:] * integrated)[0])


@torch.no_grad()
def test_vit_cx_by_its_formulas(photographs):
    hierarchy, distance = pytest.importorskip("scipy.cluster.hierarchy"), pytest.importorskip("scipy.spatial.distance")
    clf, images, targets = photographs
    method = aha.attributors.create("vit_cx", clf, noise=0.0)
    for image, target in zip(images, targets.tolist(), strict=True):
        pixels = (image[None] - clf.mean[:, None, None]) / clf.std[:, None, None]
        normed = forward_by_hand(clf.module, pixels)["normed"][-1]
        maps = enlarged(normed[1:].T).flatten(1).double().numpy()
        low, high = maps.min(axis=1, keepdims=True), maps.max(axis=1, keepdims=True)
        maps = (maps - low) / (high - low)
        clusters = hierarchy.fcluster(hierarchy.linkage(distance.pdist(maps, "cosine"), "complete"), 0.1, "distance")
        total, coverage = 0, 0
        for label in np.unique(clusters):
            mask = torch.tensor(maps[clusters == label].mean(axis=0)).view(224, 224)
            mask = (mask - mask.min()) / (mask.max() - mask.min())
            # without noise the second pass is that of the image: what is left is the masked one
            score = clf.forward_normalized(pixels * mask.float()).softmax(dim=1)[0, target]
            total, coverage = total + score * mask, coverage + mask
        assert_alike(method, image, target, total / coverage)
        assert method.passes(image[None]) == aha.attributors.Passes(1 + 2 * len(np.unique(clusters)))

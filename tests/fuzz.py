"""Odd values in place of an argument or two of every public function: what comes of it.

Run by tests/test_fuzz.py in a process of its own, under limits of memory and time, or by hand:

    AHA_FUZZ=1000 python -m tests.fuzz [CASE …]

prints one line of JSON for every call that is answered by neither a result nor an error of one clear line, and what all
calls came to at the end. A call comes from its case and its number alone: `answer(World(folder), case, number)`.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import faulthandler
import importlib
import inspect
import io
import json
import os
import resource
import signal
import sys
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import aha
from aha import kernels, plan, processes, weights
from aha.terminal import CommandError

from .fuzz_files import readers, shard
from .kernels import fuzz as kernel_calls
from .kernels.fuzz import Draw, spoil_tensor
from .toys import TINY_DECODER, pictures, tiny_classifier

MEMORY = 4 << 30  # bytes that calls may ask for beyond what the process has before the first
SECONDS = 20  # of one call
ERRORS = (ValueError, OSError, ImportError, kernels.BackendError, CommandError)  # of one line, all of them
LONGEST = 2000  # characters of it


class Own(Tensor):
    """A tensor of somebody else's class."""


# what may come in place of anything; made anew for every call, for a function may write to it
ODD: dict[str, Callable[[Draw], Any]] = {
    "None": lambda draw: None,
    "bool": lambda draw: draw.one(True, False),
    "text": lambda draw: draw.one("", "x", "3", "0.1", "auto", "\0", "x" * 1000, "nowhere/none.pt", "é🙂"),
    "bytes": lambda draw: draw.one(b"", b"x"),
    "integer": lambda draw: draw.one(0, 1, 2, 3, -1, -7, 1000, 10**9, 2**31, 2**32 + 1, 2**63, 2**64, 2**70, -(2**63)),
    "number": lambda draw: draw.one(0.0, 0.5, -0.5, 1.5, 1e-300, 1e30, 1e308, -1e308, np.float32(0.5), np.float64(2)),
    "not finite": lambda draw: draw.one(float("nan"), float("inf"), float("-inf"), np.float32("nan")),
    "NumPy": lambda draw: draw.one(np.int64(3), np.bool_(True), np.zeros((2, 2)), np.array("x"), np.array(None)),
    "complex": lambda draw: draw.one(1j, torch.zeros(2, 3, dtype=torch.complex64)),
    "list": lambda draw: draw.one([], (), [1], [[1]], [1, 2, 3], [0.5, 0.5], ["x"], [None], [float("nan")], range(4)),
    "nested": lambda draw: draw.one([[1, 2], [3]], {"a": {"b": 1}}, {1, 2}, {}, {"a": 1}, {1: "b"}),
    "object": lambda draw: draw.one(object(), float, print, lambda *given: None, ..., NotImplemented),
    "path": lambda draw: draw.one(Path("nowhere"), Path("/"), Path("/dev/null")),
    "scalar": lambda draw: draw.one(torch.tensor(1), torch.tensor(0.5), torch.tensor(torch.nan), torch.tensor(True)),
    "tensor": lambda draw: draw.one(
        torch.zeros(0),
        torch.zeros(2),
        torch.zeros(2, 0, 3),
        torch.ones(2, 3, 32, 32),
        torch.full((2, 1, 32, 32), torch.nan),
        torch.arange(12).view(3, 4),
        torch.zeros(1).expand(10**6, 10**6),
        torch.rand(2, 3, 32, 32).bfloat16(),
        torch.rand(2, 3, 32, 32, dtype=torch.float64, requires_grad=True),
    ),
    "strange tensor": lambda draw: draw.one(
        torch.eye(3).to_sparse(),
        torch.zeros(2, 3, device="meta"),
        torch.quantize_per_tensor(torch.rand(2, 3, 32, 32), 0.1, 0, torch.quint8),
        torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
        torch.zeros(4, dtype=torch.float8_e4m3fn),
        torch.rand(2, 3, 32, 32).as_subclass(Own),
        nn.Parameter(torch.rand(2, 3)),
    ),
    "torch": lambda draw: draw.one(torch.float32, torch.device("meta"), torch.Generator(), nn.Linear(3, 2), nn.ReLU()),
}


class Case(NamedTuple):
    """A function and arguments that it takes.

    Attributes:
        call: the function.
        given: its arguments, made for one call.
        share: of the number of calls that functions get, for those that take long.
        nan: whether NaN may come of finite arguments, as the function's documentation says.
        also: an error that it raises besides `ERRORS`, as its documentation says.
        spoil: of a file, whose ``content`` is the argument: how other content is made of it.
        named: whether a refusal of such a file must name it.
        same: whether what is read of other content must be what was written, for a checksum shows the rest.
    """

    call: Callable[..., Any]
    given: Callable[[], dict[str, Any]]
    share: float = 1.0
    nan: bool = False
    also: tuple[type[Exception], ...] = ()
    spoil: Callable[[Draw, bytes], bytes] | None = None
    same: bool = False
    named: bool = False


class World:
    """Small things to call with, and the cases."""

    def __init__(self, folder: Path):
        self.folder = folder
        processes.join()  # before a variable says otherwise
        self.clf = tiny_classifier()
        torch.manual_seed(0)
        self.explainer = aha.Explainer.build(self.clf, evidence=False, decoder=TINY_DECODER)
        self.images = pictures()[:2]
        self.maps = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
        self.masks = self.maps > 0.7
        self.grid = aha.regions.grid(32, 32, 4)
        self.data = folder / "data"
        for name in ("a/1.png", "a/2.png", "b/3.png"):
            file = self.data / name
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.arange(40 * 36 * 3, dtype=np.uint8).reshape(40, 36, 3)).save(file)
        self.file = self.data / "a/1.png"
        self.shards = folder / "shards"
        self.shards.mkdir()
        (self.shards / "0.tar").write_bytes(shard())
        self.weights = folder / "weights.pt"
        torch.save(self.clf.module.state_dict(), self.weights)
        self.numbered = 0
        self._intact: dict[str, Any] = {}
        self.cases = _cases(self)

    def new(self) -> Path:
        """A folder that is not there yet."""
        self.numbered += 1
        return self.folder / f"out{self.numbered}"

    def intact(self, name: str) -> Any:
        """What is read of a file as it was written."""
        if name not in self._intact:
            case = self.cases[name]
            self._intact[name] = case.call(**case.given())
        return self._intact[name]


def _cases(w: World) -> dict[str, Case]:
    clf, explainer, images, maps, grid = w.clf, w.explainer, w.images, w.maps, w.grid
    rare, rarest = 0.1, 0.02
    seen = {"images": images.clone(), "target": [1, 2]}
    shown = {"clf": clf, "images": images.clone(), "target": [1, 2]}
    curve = torch.linspace(0, 1, 5).repeat(2, 1)
    zero = torch.zeros(3)
    objective, game = aha.Objective(clf), aha.ShapleyObjective(clf, players=(2, 3))
    photograph = aha.data.Photograph(w.file)
    view = photograph.view(24, "tile")
    folder = aha.data.ImageFolder(w.data, 24)
    squares = {
        "image_size": 24,
        "preprocessing": aha.data.Preprocessing(),
        "augment": False,
        "class_names": None,
        "split": None,
        "seed": 0,
    }
    scenes = aha.data.Scenes("val", 4, image_size=32)
    records = aha.evaluation.Records()
    key = aha.evaluation.Key("c", "predicted", "m", "aha", "", "deletion")
    records.add(key, [0, 1], [0.5, 0.25])
    records.write(w.folder)
    saved = explainer.save_pretrained(w.folder / "explainer")
    response = aha.calibration.measure(clf, images, maps, [1, 2])
    evaluation = aha.evaluation
    suite = aha.metrics.Suite(clf, _quick("aha"), 8)
    facts = {"labels": torch.tensor([1, 2]), "predicted": torch.tensor([1, 3]), "confidence": torch.tensor([0.9, 0.2])}

    shared = aha.calibration.Response(response.shares, response.values[0]).to_json()
    knowing = aha.Explainer(explainer.encoder, explainer.decoder, clf, {**explainer.settings, "response": shared})

    step = plan.StepTime(
        "cpu", "fp32", "2", clf.name, plan._encoder_of(explainer), 4, 3, 2, 1e-3, 2.0, 1e-3, 1e-3, (0.1, 0.2), 0.1
    )

    def trained_for(what: str) -> aha.Explainer:
        return aha.Explainer(explainer.encoder, explainer.decoder, clf, {**explainer.settings, "objective": what})

    def entered(manager: Callable[..., Any]) -> Callable[..., Any]:
        def call(**given: Any) -> None:
            with manager(**given):
                pass

        return call

    def made(of: Callable[..., Any], method: str, **how: Any) -> Callable[..., Any]:
        """A method of an object made for the call."""
        return lambda **given: getattr(of(**how), method)(**given)

    def case(call: Callable[..., Any], share: float = 1.0, nan: bool = False, also: Any = (), **given: Any) -> Case:
        return Case(call, lambda: {name: _again(value) for name, value in given.items()}, share, nan, also)

    def operator(name: str) -> Case:
        def call(number: int, **given: Any) -> Any:
            return getattr(kernels, name)(**given)

        return Case(getattr(kernels, name), dict, 1.0)

    found = {
        # the classifier
        "aha.Classifier": case(
            aha.Classifier,
            module=clf.module,
            mean=(0.5,) * 3,
            std=(0.5,) * 3,
            input_size=(32, 32),
            num_classes=5,
            class_names=list("abcde"),
            mean_colour=(0.5,) * 3,
            source={"kind": "module", "name": "x"},
        ),
        "aha.Classifier.wrap": case(
            aha.Classifier.wrap,
            module=clf.module,
            mean=(0.5,) * 3,
            std=(0.5,) * 3,
            input_size=32,
            num_classes=5,
        ),
        "aha.Classifier.from_timm": case(
            aha.Classifier.from_timm,
            rare,
            name="test_vit",
            weights=None,
            pretrained=False,
            class_names=None,
            num_classes=5,
        ),
        "aha.Classifier.check": case(clf.check, images=images),
        "aha.Classifier.probabilities": case(clf.probabilities, images=images),
        "aha.Classifier.resolve_target": case(clf.resolve_target, **seen, internal_batch_size=1),
        "aha.Classifier.require": case(clf.require, who="x", gradients=True, inside=True),
        # the explainer
        "aha.Explainer.build": case(
            aha.Explainer.build,
            rare,
            classifier=clf,
            encoder=None,
            encoder_weights=None,
            pretrained=False,
            decoder=TINY_DECODER,
            image_size=(32, 32),
            evidence=False,
        ),
        "aha.Explainer.universal": case(aha.Explainer.universal, rare, classifier=clf),
        "aha.Explainer.of": case(explainer.of, classifier=clf),
        "aha.Explainer.attribute": case(explainer.attribute, **seen, internal_batch_size=2, scale="raw"),
        "aha.Explainer.save_pretrained": Case(explainer.save_pretrained, lambda: {"path": w.new()}, rare),
        "aha.Explainer.from_pretrained": case(
            aha.Explainer.from_pretrained, rare, path_or_hub_id=saved, classifier=clf
        ),
        "aha.attribute": case(
            aha.attribute,
            rarest,
            model=clf.module,
            **seen,
            mean=(0.5,) * 3,
            std=(0.5,) * 3,
            preset=None,
        ),
        "aha.refine": case(
            aha.refine,
            rarest,
            explainer=explainer,
            classifier=clf,
            **seen,
            steps=1,
            lr=0.1,
            references=("black",),
            cells=(4,),
            fractions=3,
            chunk=8,
            precision="fp32",
            every_step=False,
            internal_batch_size=2,
            preset="fast",
        ),
        # objectives and training
        "aha.Objective": case(
            aha.Objective,
            classifier=clf,
            fractions=4,
            weight_deletion=1.0,
            weight_insertion=1.0,
            weight_regularizer=0.1,
            scores="free",
            n_iters=3,
            chunk=8,
            precision="fp32",
            backend="auto",
            ends=True,
            smooth=1.0,
        ),
        "aha.Objective.regions": case(objective.regions, height=32, width=32),
        "aha.Objective.diagnose": case(objective.diagnose, maps=maps, regions=grid, tau=0.3),
        "aha.Objective.region_scores": case(objective.region_scores, maps=maps, regions=grid),
        "aha.ShapleyObjective": case(
            aha.ShapleyObjective,
            classifier=clf,
            absence="pixels",
            coalitions=4,
            players=(2, 3),
            surrogate=None,
            chunk=8,
            precision="fp32",
            backend="auto",
        ),
        "aha.ShapleyObjective.regions": case(game.regions, height=32, width=32),
        "aha.ShapleyObjective.diagnose": case(game.diagnose, maps=maps, regions=game.regions(32, 32), tau=0.3),
        "aha.ShapleyObjective.shares": case(game.shares, maps=maps, regions=game.regions(32, 32)),
        "aha.TrainConfig": Case(
            aha.TrainConfig,
            lambda: {
                field.name: getattr(aha.TrainConfig(), field.name) for field in dataclasses.fields(aha.TrainConfig)
            },
            3.0,
        ),
        "aha.Trainer": case(
            aha.Trainer,
            rarest,
            explainer=explainer,
            classifier=clf,
            data=aha.data.Scenes("train", 4, image_size=32),
            config=aha.TrainConfig(steps=1),
            objective=None,
            beside=(),
        ),
        # attributors
        "aha.attributors.create": case(
            aha.attributors.create, name="rise", clf=clf, n_masks=4, internal_batch_size=2, seed=0
        ),
        "aha.attributors.find": case(aha.attributors.find, name="rise"),
        "aha.attributors.Attributor.attribute": case(aha.attributors.create("input_x_gradient", clf).attribute, **seen),
        "aha.attributors.Attributor.passes": case(aha.attributors.create("gradcam", clf).passes, images=images),
        "aha.attributors.MethodSpec": case(aha.attributors.MethodSpec, name="rise", options={"n_masks": 3}, label="x"),
        "aha.attributors.MethodSpec.parse": case(aha.attributors.MethodSpec.parse, text="x@rise:n_masks=4"),
        "aha.attributors.MethodSpec.create": case(aha.attributors.MethodSpec("rise").create, clf=clf, seed=0),
        "aha.attributors.MethodSpec.key": case(aha.attributors.MethodSpec("rise").key, seed=0),
        "aha.attributors.AHA": case(
            aha.attributors.AHA,
            rare,
            clf=clf,
            explainer=explainer,
            steps=0,
            internal_batch_size=2,
            seed=0,
            scale=None,
        ),
        "aha.attributors.FastSHAP": case(
            aha.attributors.FastSHAP, rare, clf=clf, explainer=trained_for("fastshap"), internal_batch_size=2, seed=0
        ),
        "aha.attributors.ViTShapley": case(
            aha.attributors.ViTShapley,
            rare,
            clf=clf,
            explainer=trained_for("vit_shapley"),
            internal_batch_size=2,
            seed=0,
        ),
        "aha.attributors.full_gradient": case(aha.attributors.full_gradient, rare, **shown),
        "aha.attributors.count_passes": case(entered(aha.attributors.count_passes), clf=clf),
        "aha.attributors.libra": case(entered(aha.attributors.libra), module=clf.module),
        "aha.attributors.undisturbed": case(entered(aha.attributors.undisturbed), module=clf.module, unfused=True),
        # metrics
        **{
            f"aha.metrics.{name}": case(getattr(aha.metrics, name), clf=clf, protocol=None, internal_batch_size=8)
            for name in ("ConfidenceChange", "DeletionInsertion", "MagnitudeAlignment", "Monotonicity")
        },
        **{
            f"aha.metrics.{name}.update": Case(
                made(getattr(aha.metrics, name), "update", clf=clf, protocol=_quick(protocol)),
                lambda: {
                    "images": images.clone(),
                    "maps": maps.clone(),
                    "target": [1, 2],
                    "index": [0, 1],
                    "labels": [1, 2],
                },
                rare,
            )
            for name, protocol in (
                ("ConfidenceChange", "aha"),
                ("DeletionInsertion", "aha"),
                ("MagnitudeAlignment", "mas"),
                ("Monotonicity", "monotonicity"),
            )
        },
        "aha.metrics.Localization": case(aha.metrics.Localization, tolerance=1.0),
        "aha.metrics.Localization.update": case(
            made(aha.metrics.Localization, "update"), maps=maps, masks=w.masks, index=[0, 1]
        ),
        "aha.metrics.Protocol": case(
            aha.metrics.Protocol,
            3.0,
            name="x",
            points=5,
            references=("black",),
            metrics=("deletion",),
            deletion=("black",),
            insertion=("black",),
            span=(0.0, 1.0),
            monotone=False,
            scored="target",
            confidence=0.5,
            per_class=2,
            preprocessing=aha.data.Preprocessing(),
            about="x",
        ),
        "aha.metrics.Protocol.counts": case(aha.metrics.PROTOCOLS["aha"].counts, height=32, width=32),
        "aha.metrics.Protocol.passes": case(aha.metrics.PROTOCOLS["aha"].passes, size=32, blurs=1.0),
        "aha.metrics.Protocol.takes_part": case(aha.metrics.PROTOCOLS["mda"].takes_part, **facts),
        "aha.metrics.Protocol.select": case(aha.metrics.PROTOCOLS["mda"].select, **facts),
        "aha.metrics.Suite.begin": case(suite.begin, rare, images=images, target=[1, 2], labels=[1, 2], masks=w.masks),
        "aha.metrics.Suite.measure": case(suite.measure, rare, batch=suite.begin(images), maps=maps),
        "aha.metrics.Suite": case(aha.metrics.Suite, clf=clf, protocol="aha", internal_batch_size=8),
        "aha.metrics.area": case(aha.metrics.area, curve=curve),
        "aha.metrics.arrow": case(aha.metrics.arrow, metric="deletion"),
        "aha.metrics.endpoints": case(
            aha.metrics.endpoints, rare, **shown, protocol=_quick("aha"), internal_batch_size=8, labels=[1, 2]
        ),
        "aha.metrics.monotone_response": case(aha.metrics.monotone_response, nan=True, curve=curve, rising=True),
        "aha.metrics.pixel_counts": case(aha.metrics.pixel_counts, pixels=100, points=5, span=(0.0, 1.0)),
        "aha.metrics.rank_pixels": case(aha.metrics.rank_pixels, maps=maps[:, 0]),
        "aha.metrics.sweep": case(
            aha.metrics.sweep,
            rare,
            clf=clf,
            images=images,
            maps=maps[:, 0],
            target=torch.tensor([1, 2]),
            reference=torch.zeros_like(images),
            points=3,
            chunk=8,
        ),
        # calibration
        "aha.calibration.Response": case(
            aha.calibration.Response,
            shares=response.shares,
            values=response.values,
        ),
        "aha.calibration.Response.apply": case(response.apply, maps=maps),
        "aha.calibration.Response.from_curves": case(
            aha.calibration.Response.from_curves, deletion=1 - curve, insertion=curve, fractions=curve[0]
        ),
        "aha.calibration.Response.from_json": case(
            aha.calibration.Response.from_json, kept={"shares": [0.0, 1.0], "values": [0.0, 0.5]}
        ),
        "aha.calibration.calibrated": case(
            aha.calibration.calibrated,
            rare,
            classifier=clf,
            explainer=knowing,
            **seen,
            maps=maps,
            scale="calibrated",
            internal_batch_size=8,
        ),
        "aha.calibration.measure": case(
            aha.calibration.measure, rare, classifier=clf, **seen, maps=maps, internal_batch_size=8
        ),
        "aha.calibration.best_scale": case(aha.calibration.best_scale, explainer=explainer),
        "aha.calibration.check_scale": case(aha.calibration.check_scale, scale="raw", explainer=explainer),
        "aha.calibration.learnt": case(aha.calibration.learnt, explainer=explainer),
        "aha.calibration.passes": case(aha.calibration.passes, height=32, width=32),
        # references and regions
        "aha.references.black": case(aha.references.black, images=images),
        "aha.references.mean": case(aha.references.mean, images=images, colour=zero),
        "aha.references.blur": case(aha.references.blur, images=images, kernel=5, sigma=2.0),
        "aha.references.published_blur": case(
            aha.references.published_blur, images=images, zero=zero, kernel=5, sigma=2.0
        ),
        "aha.references.gaussian": case(aha.references.gaussian, kernel=5, sigma=2.0),
        "aha.references.impulse_response": case(aha.references.impulse_response, kernel=5, sigma=2.0),
        "aha.references.adaptive_blur": case(
            aha.references.adaptive_blur,
            rare,
            images=images,
            confidence=lambda blurred, which: blurred.mean(dim=(1, 2, 3)),
            zero=zero,
            threshold=0.5,
            start=3,
            largest=7,
            step=2,
        ),
        "aha.references.make": case(aha.references.make, name="blur", images=images, colour=zero, zero=zero),
        "aha.regions.grid": case(aha.regions.grid, 3.0, height=32, width=24, cells=(4, 3), offset=(0.25, 0.0)),
        "aha.regions.draw": case(
            aha.regions.draw, height=32, width=32, cells=(2, 4), generator=torch.Generator(), offset=True
        ),
        "aha.regions.default_cells": case(aha.regions.default_cells, height=32, width=24),
        "aha.regions.Regions": case(
            aha.regions.Regions, row_index=grid.row_index, col_index=grid.col_index, rows=4, cols=4
        ),
        "aha.regions.Regions.pool": case(grid.pool, maps=maps),
        "aha.regions.Regions.upsampler": case(grid.upsampler, sigma=1.0, kernel=7, device="cpu"),
        # data
        "aha.data.ImageFolder": case(aha.data.ImageFolder, root=w.data, labels=None, **squares),
        "aha.data.ImageFolder.identity": case(folder.identity, content=True, indices=[0, 1]),
        "aha.data.Scenes": case(aha.data.Scenes, split="val", size=4, seed=0, image_size=32),
        "aha.data.Scenes.identity": case(scenes.identity, content=True),
        "aha.data.Scenes.batch": case(scenes.batch, also=(IndexError,), indices=[0, 1]),
        "aha.data.Scenes.backgrounds": case(scenes.backgrounds, also=(IndexError,), indices=[0, 1]),
        "aha.data.Preprocessing": case(aha.data.Preprocessing, crop_pct=0.9, interpolation="bilinear"),
        "aha.data.Preprocessing.resize": case(aha.data.Preprocessing().resize, image_size=32),
        "aha.data.Preprocessing.describe": case(aha.data.Preprocessing().describe, image_size=32),
        "aha.data.load_image": case(
            aha.data.load_image, path=w.file, image_size=24, preprocessing=aha.data.Preprocessing()
        ),
        "aha.data.find_images": case(lambda path: aha.data.find_images(path), path=w.data),
        "aha.data.Shards": case(aha.data.Shards, root=w.shards, labels=True, **squares),
        "aha.data.images_in": case(aha.data.images_in, root=w.shards, labels=True, masks=None, **squares),
        "aha.data.workers_for": case(aha.data.workers_for, data=folder, asked=2),
        "aha.data.output_names": case(aha.data.output_names, files=["a/x.png", "b/x.png"]),
        "aha.data.fit_labels": case(aha.data.fit_labels, data=scenes, clf=tiny_classifier(10)),
        "aha.data.label_note": case(aha.data.label_note, data=folder),
        "aha.data.identity": case(aha.data.identity, data=scenes, content=True),
        "aha.data.hold_out": case(aha.data.hold_out, size=10, count=3),
        "aha.data.Part": case(aha.data.Part, data=scenes, indices=[0, 1]),
        "aha.data.Readable": case(aha.data.Readable, data=scenes),
        "aha.data.readable": case(aha.data.readable, data=scenes),
        "aha.data.Photograph": case(aha.data.Photograph, path=w.file),
        "aha.data.Photograph.view": case(
            photograph.view, image_size=24, fit="pad", preprocessing=aha.data.Preprocessing(), colour=(0.5,) * 3
        ),
        "aha.data.Photograph.picture": case(photograph.picture, longest=16),
        "aha.data.View.to_photograph": case(
            view.to_photograph,
            nan=True,
            maps=torch.rand(len(view.inputs), 1, 24, 24),
            size=(40, 36),
            weights=[1.0] * len(view.inputs),
        ),
        "aha.data.View.to_inputs": case(view.to_inputs, heat=torch.rand(40, 36)),
        # results
        "aha.evaluation.evaluate": case(
            evaluation.evaluate,
            rarest,
            clf=tiny_classifier(10),
            methods={"x": lambda images, target: images.mean(dim=1, keepdim=True)},
            data=scenes,
            target="predicted",
            protocol=_quick("aha"),
            batch_size=2,
            limit=2,
            seed=0,
            progress=None,
            internal_batch_size=8,
        ),
        "aha.evaluation.mean_interval": case(evaluation.mean_interval, rare, values=torch.rand(5), seed=0),
        "aha.evaluation.Records.add": case(made(evaluation.Records, "add"), key=key, images=[0, 1], values=[0.5, 1.0]),
        "aha.evaluation.Records.read": case(evaluation.Records.read, folder=w.folder),
        "aha.evaluation.Records.write": Case(records.write, lambda: {"folder": w.new()}),
        "aha.evaluation.Records.extend": case(made(evaluation.Records, "extend"), other=records),
        # evidence
        "aha.evidence.standardize": case(aha.evidence.standardize, maps=maps),
        # not reached by `aha` itself, and read or written by those who use it
        "aha.weights.read_weights": case(weights.read_weights, path=w.weights),
        "aha.weights.numbers": case(weights.numbers, text="0.5, 0.5", default=(0.5,)),
        "aha.overlays.overlay": case(_overlays().overlay, image=images[0], map=maps[0], scale=None),
        "aha.overlays.limits": case(_overlays().limits, map=maps[0]),
        "aha.processes.join": case(_started, WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", RANK="0", LOCAL_RANK="0"),
        "aha.plan.training": case(
            plan.training,
            0.5,
            explainer=explainer,
            clf=clf,
            config=aha.TrainConfig(steps=2, batch_size=4, fractions=3),
            images=10,
            gpus=2,
            price=1.5,
            link=10.0,
            read_seconds=0.01,
            measured=step,
        ),
        "aha.plan.evaluation": case(
            plan.evaluation,
            rarest,
            clf=clf,
            methods=[aha.attributors.MethodSpec("input_x_gradient")],
            images=10,
            protocols=("aha",),
            targets=1,
            gpus=1,
            price=None,
            batch_size=2,
            seconds=0.01,
            crops=1,
        ),
        # kernels: their own arguments come from tests/kernels/fuzz.py
        "aha.kernels.Taps": case(
            kernels.Taps, cell=torch.zeros(3, 2, dtype=torch.int64), weight=torch.ones(3, 2), size=4
        ),
        "aha.kernels.Taps.to": case(kernels.Taps(torch.zeros(3, 2).long(), torch.ones(3, 2), 4).to, device="cpu"),
        "aha.kernels.Taps.dense": case(
            kernels.Taps(torch.zeros(3, 2).long(), torch.ones(3, 2), 4).dense, dtype=torch.float64
        ),
        "aha.kernels.explain": case(
            lambda operator, **given: kernels.explain(operator, **given),
            operator="soft_topk_masks",
            scores=torch.rand(2, 5),
            fractions=[0.5],
            tau=0.3,
        ),
    }
    # masks beyond [0, 1] may overflow, as the arithmetic that is documented does
    operators = {name: Case(getattr(kernels, name), dict, nan=name == "perturb") for name in kernel_calls.PUBLIC}
    read = {
        name: Case(of.read, lambda of=of: {"content": of.content}, of.share, True, (), of.spoil, of.same, of.named)
        for name, of in readers(w).items()
    }
    return {**found, **{f"aha.kernels.{name}": of for name, of in operators.items()}, **read}


def _started(**variables: Any) -> None:
    """Join, as a launcher started this process with these variables."""
    with mock.patch.dict(os.environ, {name: str(value).replace("\0", "0") for name, value in variables.items()}):
        processes.join()


def _overlays() -> types.ModuleType:
    return importlib.import_module("aha.overlays")


def _quick(protocol: str) -> Any:
    return dataclasses.replace(aha.metrics.PROTOCOLS[protocol], points=3)


def _again(value: Any) -> Any:
    return value.clone() if type(value) is Tensor else value


# not called with odd values, and why
EXCLUDED = {
    "aha.__version__": "a text",
    "aha.Classifier.from_hf": "reads transformers' files, or asks the hub: tests/test_entries.py",
    "aha.Classifier.normalize": "trusts its caller, as it says",
    "aha.Classifier.forward": "trusts its caller, as it says",
    "aha.Classifier.forward_normalized": "trusts its caller, as it says",
    "aha.Explainer.features": "trusts its caller, as it says",
    "aha.Explainer.forward": "trusts its caller, as it says",
    "aha.Classifier.own_answer": "trusts its caller: what a network returned",
    "aha.Classifier.read": "trusts its caller: what a network returned",
    "aha.Classifier.watched": "for callers that hold the lock",
    "aha.Classifier.train": "that of torch.nn.Module",
    "aha.Explainer": "made by build, universal and from_pretrained",
    "aha.Explainer.prepare_for": "by the trainer, before it begins",
    "aha.Explainer.turn_to": "by the trainer, between classifiers",
    "aha.Objective.settings": "takes nothing",
    "aha.ShapleyObjective.settings": "takes nothing",
    "aha.ShapleyObjective.values": "by the trainer, with what it has checked",
    "aha.ShapleyObjective.game": "by the trainer, with what it has checked",
    "aha.Trainer.fit": "trains: tests/training",
    "aha.attributors.Attributor": "abstract: attribute and passes are called of its classes",
    "aha.attributors.FullGradient": "what full_gradient returns",
    "aha.attributors.Metadata": "what available returns",
    "aha.attributors.Passes": "what count_passes returns",
    "aha.attributors.available": "takes nothing",
    "aha.attributors.register": "a decorator: tests/test_plugins.py",
    "aha.calibration.MeanCurves": "by the trainer",
    "aha.data.ImageFolder.relabelled": "by fit_labels",
    "aha.data.ImageMissingError": "an error",
    "aha.data.ImageReadError": "an error",
    "aha.data.View": "what Photograph.view returns",
    "aha.data.Part.identity": "takes what identity takes",
    "aha.data.Readable.identity": "takes what identity takes",
    "aha.evaluation.RESAMPLES": "a number",
    "aha.evaluation.TARGETS": "names",
    "aha.evaluation.compare": "writes and resumes: tests/evaluation/test_compare.py",
    "aha.evaluation.versions": "takes nothing",
    "aha.evaluation.Records.items": "takes nothing",
    **{
        f"aha.evaluation.{name}": "what evaluate and compare return"
        for name in ("Column", "Comparison", "Evaluation", "Failure", "Key", "Records")
    },
    "aha.evaluation.MethodSpec": "that of aha.attributors",
    "aha.evidence.Evidence": "what Evident returns",
    "aha.evidence.Evident": "by the explainer",
    "aha.kernels.BackendError": "an error",
    "aha.kernels.Choice": "what explain returns",
    "aha.kernels.Upsampler": "a pair of Taps, checked by perturb",
    "aha.metrics.PROTOCOLS": "a table",
    **{f"aha.metrics.{name}": "a result" for name in ("Cost", "Endpoints", "Response", "Scores", "Sweep")},
    "aha.metrics.Protocol.references_of": "for rows of the catalogue",
    "aha.attributors.AHA.passes": "that of Attributor",
    "aha.calibration.Response.slopes": "takes nothing",
    "aha.calibration.Response.to_json": "takes nothing",
    "aha.regions.Regions.check": "for those who have checked the rest",
    "aha.metrics.catalog": "a table: tests/metrics/test_catalog.py",
    "aha.regions.Regions.cell_index": "takes nothing",
    "aha.terminal.CommandError": "an error",
    "aha.terminal.console": "takes nothing",
    "aha.terminal.progress": "draws on a terminal",
    "aha.terminal.failed": "for messages of commands",
    **{
        f"aha.data.index.Index.{name}": "by listing, with what it has read"
        for name in ("record", "kept", "extend", "save")
    },
    "aha.data.index.cache_folder": "takes nothing",
    "aha.data.tar.Member": "what members returns",
    "aha.data.tar.TarError": "an error",
    "aha.data.tar.members": "by Shards, whose shards are damaged here",
    **{
        f"aha.evaluation.pieces.Pieces.{name}": "of the pieces of an engine, which are damaged here"
        for name in ("facts", "place", "maps_of", "cost", "scores", "peak", "reasons", "maps", "result")
    },
    "aha.evaluation.pieces.scored": "by the engine, with what a suite returned",
    "aha.evaluation.pieces.failed": "by the engine",
    "aha.explainer.config.ExplainerConfig": "what from_json returns",
    "aha.explainer.config.portable": "by save_pretrained, with what a classifier knows of itself",
    **{f"aha.files.{name}": "an error" for name in ("WriteError", "DamagedError")},
    **{
        f"aha.files.{name}": "writes what its caller made: tests/test_files.py, tests/test_faults.py"
        for name in (
            "writing",
            "write_atomically",
            "write_summed",
            "replacing",
            "put",
            "sync_folder",
            "remove_partials",
            "write_json",
        )
    },
    **{
        f"aha.files.{name}": "as write_json"
        for name in ("write_columns", "write_parts", "tensor_bytes", "digest", "slug")
    },
    "aha.files.path_within": "by ExplainerConfig.from_json, with a text",
    "aha.launcher.told": "by processes.join",
    "aha.lock.FolderInUseError": "an error",
    **{f"aha.plan.{name}": "a result" for name in ("StepTime", "Part", "Plan")},
    **{
        f"aha.plan.{name}": "by training and evaluation, with what they were given"
        for name in (
            "of_training",
            "of_protocols",
            "time_of_a_pass",
            "measure_step",
            "training_memory",
            "flops_of_a_pass",
            "device_name",
            "now",
        )
    },
    **{f"aha.plan.{name}": "by the command: tests/test_plan.py" for name in ("untrained", "read_time", "command")},
    **{
        f"aha.processes.{name}": "takes nothing, a list, or a signal that was noticed: tests/training/test_processes.py"
        for name in ("together", "main_first", "wait", "gathered", "alone", "any_asked")
    },
    "aha.store.Store": "a protocol",
    "aha.store.Memory": "holds what it is given",
    "aha.store.Place": "where a piece lies",
    **{f"aha.store.Packs.{name}": "of damaged packs, see Packs" for name in ("get", "put", "refresh")},
    **{f"aha.store.{name}": "of a method's maps, checked" for name in ("pack_maps", "unpack_maps")},
    "aha.training.checkpoint.Checkpoint": "what load returns",
    **{
        f"aha.training.checkpoint.{name}": "by the trainer: tests/training/test_faults.py"
        for name in ("name", "save", "available", "run_of")
    },
    **{
        f"aha.signals.{name}": "not for arguments but for signals: tests/training/test_faults.py"
        for name in ("Interrupted", "Asked", "noticed", "ending", "ignored")
    },
    **{
        f"aha.training.trainer.{name}": "by the trainer, with what it has checked"
        for name in ("make_objective", "Subject", "places", "StepSampler", "Log")
    },
    "aha.training.trainer.TrainingObjective": "a protocol",
    "aha.weights.fitting_weights": "by load_weights",
    **{f"aha.report.{name}": "draws a result: tests/report" for name in ("figures", "html", "tables")},
}


# modules that ``aha`` does not name, which read files, write them, or meet other processes
BEHIND = (
    "data.index",
    "data.tar",
    "evaluation.pieces",
    "explainer.config",
    "files",
    "launcher",
    "lock",
    "plan",
    "processes",
    "store",
    "training.checkpoint",
    "signals",
    "training.trainer",
    "weights",
)


def public() -> set[str]:
    """Names of all that can be called from outside: the modules of ``aha``, their functions, and methods of classes.

    And those of `BEHIND`.
    """
    found = {f"aha.{name}" for name in aha.__all__} - {f"aha.{name}" for name in aha._MODULES}
    for module_name in aha._MODULES:
        module = getattr(aha, module_name)
        own = [name for name, value in vars(module).items() if _made_in(value, module) and not name.startswith("_")]
        found |= {f"aha.{module_name}.{name}" for name in getattr(module, "__all__", own)}
    values = {
        name: getattr(getattr(aha, path[0]) if path else aha, last)
        for name in found
        for *path, last in [name.split(".")[1:]]
    }
    for module_name in BEHIND:
        module = importlib.import_module(f"aha.{module_name}")
        own = {name: of for name, of in vars(module).items() if _made_in(of, module) and not name.startswith("_")}
        values |= {
            f"aha.{module_name}.{name}": of for name, of in own.items() if of not in (aha.Trainer, aha.TrainConfig)
        }
    found |= values.keys()
    for name, value in values.items():
        if not inspect.isclass(value) or issubclass(value, (tuple, Exception)):
            continue
        found |= {
            f"{name}.{method}"
            for method, of in vars(value).items()
            if not method.startswith("_") and isinstance(of, (types.FunctionType, classmethod, staticmethod))
        }
    return found


def unlisted(cases: Mapping[str, Case]) -> set[str]:
    """What is public, and neither called nor excluded, itself or with its class."""
    listed = {*(name.partition("(")[0] for name in cases), *EXCLUDED}
    return {name for name in public() if name not in listed and name.rpartition(".")[0] not in EXCLUDED}


def _made_in(value: Any, module: types.ModuleType) -> bool:
    return getattr(value, "__module__", None) == module.__name__ and (inspect.isclass(value) or callable(value))


def _call(world: World, name: str, number: int) -> tuple[Case, dict[str, Any], dict[str, Any]]:
    """A case, its arguments for this call, and those of them that are odd."""
    case, draw = world.cases[name], Draw(name, number)
    operator = name.removeprefix("aha.kernels.")
    given = kernel_calls.PUBLIC[operator](draw) if operator in kernel_calls.PUBLIC else case.given()
    if case.spoil is not None:
        odd = {"content": case.spoil(draw, given["content"])}
        return case, odd, odd
    odd = {}
    for at in draw.random.sample(list(given), min(draw.one(1, 1, 2), len(given))):
        value = given[at]
        if type(value) is Tensor and draw.chance(0.5):
            odd[at] = spoil_tensor(draw, value)
        else:
            odd[at] = ODD[draw.one(*ODD)](draw)
    return case, {**given, **odd}, odd


def answer(world: World, name: str, number: int) -> tuple[str, str]:
    """What comes of a call: "result", "refused", or what is wrong with it; and a line about it."""
    case, given, odd = _call(world, name, number)
    finite = all(_finite(value) for value in given.values())
    torch.set_default_dtype(torch.float32)
    try:
        with _time_limit(), contextlib.redirect_stdout(io.StringIO()):
            result = case.call(**given)
    except (*ERRORS, *case.also) as error:
        text = str(error)
        if not text.strip() or "\n" in text or len(text) > LONGEST:
            return "many lines" if "\n" in text else "no line" if not text.strip() else "long", text
        about_values = case.spoil is None and isinstance(error, ERRORS) and not isinstance(error, OSError)
        if about_values and not _names(text, given, odd):
            return "vague", text
        if case.named and str(world.folder) not in text:
            return "vague", text
        return "refused", text
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        kind = "hang" if isinstance(error, TimeoutError) else type(error).__name__
        where = traceback_line(error)
        return kind, f"{error} ({where})"
    if case.same and not _equal(result, world.intact(name)):
        return "wrong", repr(result)[:200]
    if finite and not case.nan and not _finite(result):
        return "not finite", repr(result)[:200]
    return "result", ""


def traceback_line(error: BaseException) -> str:
    """The last line of the library that an error passed."""
    frames = []
    step = error.__traceback__
    while step is not None:
        frames.append(f"{step.tb_frame.f_code.co_filename}:{step.tb_lineno}")
        step = step.tb_next
    own = [frame for frame in frames if "/aha/" in frame or "/kernels/" in frame]
    return (own or frames)[-1].rpartition("/aha/")[2]


def _names(text: str, given: Mapping[str, Any], odd: Mapping[str, Any]) -> bool:
    """Whether a message says what it is about: an argument by its name, or what came by its value or its kind."""
    lower = text.lower()
    about = [part for at in given for part in (at, at.rstrip("s"), at.replace("_", " "))]
    about += [type(value).__name__ for value in odd.values()]
    tensors = [value for value in odd.values() if isinstance(value, Tensor) and not value.is_nested]
    about += [str(tuple(value.shape)) for value in tensors]
    others = [value for value in odd.values() if not isinstance(value, Tensor)]
    about += [" ".join(written.split())[:20] for value in others for written in (repr(value), str(value))]
    about += [str(value.item()) for value in tensors if value.numel() == 1 and not value.is_meta]
    # what is wrong, what is accepted
    advised = any(
        word in text for word in (": give ", ": choose ", ": resize ", ": train ", ": take ", ": make ", "cannot read ")
    )
    return advised or any(part.lower() in lower for part in about if part)


def _equal(one: Any, other: Any) -> bool:
    """Whether two values are the same, NaN for NaN."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and _equal(one.numpy(), other.numpy())
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return type(one) is type(other) and one == other


def _finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        plain = value.layout == torch.strided and not value.is_meta and not value.is_nested and not value.is_quantized
        if not plain or not (value.is_floating_point() or value.is_complex()) or value.numel() > 10**7:
            return True
        return bool(torch.isfinite(value.detach().to(torch.complex64 if value.is_complex() else torch.float64)).all())
    if isinstance(value, np.ndarray):
        return value.dtype.kind not in "fc" or bool(np.isfinite(value).all())
    if isinstance(value, float):
        return value == value and abs(value) != float("inf")
    if isinstance(value, Mapping):
        return all(map(_finite, value.values()))
    return not isinstance(value, (list, tuple)) or all(map(_finite, value))


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    def late(*_: Any) -> None:
        raise TimeoutError(f"takes more than {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def main(names: list[str]) -> None:
    calls = int(os.environ.get("AHA_FUZZ") or 100)
    warnings.simplefilter("ignore")  # of prototypes in PyTorch, and of iterations that have not converged
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        world = World(Path(folder))
        os.chdir(folder)
        before = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (before + MEMORY, before + MEMORY))
        sums: dict[str, int] = collections.Counter()
        for name, case in world.cases.items():
            if names and not any(name.startswith(part) for part in names):
                continue
            for number in range(max(1, round(calls * case.share))):
                # what a crash or a hang that Python cannot end leaves to be read
                faulthandler.dump_traceback_later(6 * SECONDS, exit=True)
                print(f"\r{name} {number}", end="", file=sys.stderr)
                kind, text = answer(world, name, number)
                sums[kind] += 1
                if kind not in ("result", "refused"):
                    print(json.dumps({"case": name, "number": number, "kind": kind, "text": text}), flush=True)
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps({"calls": sum(sums.values()), **sums}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

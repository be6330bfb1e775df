"""What is measured for every table and figure: classifiers, methods, protocol, training.

Settings are the papers' where they are known, else they are decided here, and `Experiment.decided` says which.
The numbers of tables 2 to 7 follow this catalogue: each holds what its title says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VIT_B16 = "vit_base_patch16_224.orig_in21k_ft_in1k"
VIT_B32 = "vit_base_patch32_224.augreg_in21k_ft_in1k"
VIT_T16 = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
CONVNEXT_S = "convnext_small.fb_in22k_ft_in1k"
ENCODER = "vit_large_patch16_dinov3.lvd1689m"

# rows as the papers call them, @ the method and its options
VIT_METHODS = (
    "Grad-CAM@gradcam_vit",
    "IG@attention_ig",
    "Trans-Att.@transition_attention",
    "Bi-Att.@bi_attention",
    "T-Attr@chefer",
    "Rollout@rollout",
    "LeGrad@legrad",
    "TIS@tis",
    "ViT-CX@vit_cx",
    "MDA@mda",
    "CAAP@caap",
    "LibraGrad@libragrad:base=fullgrad_plus",
    "RISE@rise:n_masks=4000",
)
CNN_METHODS = (
    "Grad-CAM@gradcam",
    "Grad-CAM++@gradcam_pp",
    "HiResCAM@hirescam",
    "Score-CAM@scorecam",
    "Ablation-CAM@ablationcam",
    "IG@integrated_gradients",
    "MDA@mda",
    "RISE@rise:n_masks=4000",
)
MDA_METHODS = (
    "Grad-CAM@gradcam_vit:weights=element",
    "IG@attention_ig",
    "Trans-Att.@transition_attention",
    "Bi-Att.@bi_attention",
    "T-Attr@chefer",
    "TIS@tis",
    "ViT-CX@vit_cx",
    "MDA@mda",
)
# with --scale small: options that keep every method's path and cut its passes
SMALL_OPTIONS: dict[str, dict[str, Any]] = {
    **{key: {"n_steps": 2} for key in ("attention_ig", "transition_attention", "bi_attention", "integrated_gradients")},
    "tis": {"n_masks": 8},
    "rise": {"n_masks": 8},
    "mda": {"window": 1, "prior": "input_x_gradient", "cells": 4},
}
IMAGES = 5000


@dataclass(frozen=True)
class Variant:
    """One explainer of an ablation.

    Attributes:
        name: in tables.
        training: settings of `aha.TrainConfig` that differ from the paper's.
        x: position on the figure's axis, where it has one.
    """

    name: str
    training: Mapping[str, Any] = field(default_factory=dict)
    x: float | None = None


@dataclass(frozen=True)
class Experiment:
    """A table or figure.

    Attributes:
        name: on the command line.
        title: what it shows.
        kind: "table", "ablation" or "shortcut".
        classifiers: timm names.
        methods: rows, see `aha.evaluation.MethodSpec.parse`.
        steps: T of the explainer's rows; () leaves the explainer out.
        protocols, targets: see `aha.evaluation.compare`.
        images: of the validation set, drawn at random; None is all.
        masks: needs a folder of masks.
        variants: of an ablation, each trained and measured.
        axis: what the variants' x is.
        decided: which settings are ours because the paper's are not known.
    """

    name: str
    title: str
    kind: str = "table"
    classifiers: tuple[str, ...] = (VIT_B16,)
    methods: tuple[str, ...] = VIT_METHODS
    steps: tuple[int, ...] = (0, 3)
    protocols: tuple[str, ...] = ("aha",)
    targets: tuple[str, ...] = ("predicted",)
    images: int | None = IMAGES
    masks: bool = False
    variants: tuple[Variant, ...] = ()
    axis: str = ""
    decided: str = "number of images"

    @property
    def published(self) -> Mapping[str, Mapping[str, Mapping[str, float]]]:
        """Classifier → row → metric → the paper's figure, to be shown beside ours."""
        return PUBLISHED.get(self.name, {})

    @property
    def explainers(self) -> tuple[Variant, ...]:
        """The explainers to train: the variants, or the one with the paper's settings."""
        return self.variants or ((Variant(""),) if self.steps or self.kind == "shortcut" else ())


# experiment → classifier → row → metric → the figure of its paper
PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))

_ALL = (
    Experiment(
        "table1",
        "ViT-B/16, predicted class, mean of the three references",
    ),
    Experiment("table2", "ViT-B/16, true class, mean of the three references", targets=("true",)),
    Experiment(
        "table3",
        "ViT-B/32, predicted and true class",
        classifiers=(VIT_B32,),
        targets=("predicted", "true"),
        decided="number of images; weights",
    ),
    Experiment(
        "table4",
        "ConvNeXt-S, predicted and true class",
        classifiers=(CONVNEXT_S,),
        methods=CNN_METHODS,
        targets=("predicted", "true"),
        decided="number of images; weights",
    ),
    Experiment("table5", "ViT-B/16, predicted class, every reference by itself (tables/references)"),
    Experiment(
        "table6",
        "Localisation against masks of the object, ViT-B/16",
        protocols=("localisation",),
        images=None,
        masks=True,
        decided="the images are those of the folder of masks",
    ),
    Experiment(
        "table7",
        "The other papers' protocols, ViT-B/16",
        # mas measures what mda does on the same perturbed images
        protocols=("rise", "chefer", "mas", "monotonicity"),
    ),
    Experiment(
        "fig3",
        "Ablation of the fractions S and of the refinement steps T, ViT-B/16",
        kind="ablation",
        methods=(),
        steps=(0, 1, 2, 3, 4, 5),
        axis="fractions S",
        variants=tuple(Variant(f"S={s}", {"fractions": s}, x=s) for s in (4, 8, 16, 32)),
    ),
    Experiment("fig5", "A shortcut, planted and found by refinement, ViT-B/16", kind="shortcut", methods=()),
    Experiment(
        "ablations",
        "Decisions of this library, one changed at a time, ViT-B/16",
        kind="ablation",
        methods=(),
        steps=(0, 3),
        variants=(
            Variant("default"),
            Variant("τ linear", {"tau_schedule": "linear"}),
            Variant("noise 0.05", {"noise": 0.05}),
            Variant("scores free, as published", {"scores": "free"}),
            Variant("nearest upsampling", {"smooth": 0.0}),
            Variant("no offset", {"offset": False}),
            Variant("no end points", {"ends": False}),
            Variant("one map for all targets", {"shared_map": True}),
        ),
        decided="all",
    ),
    Experiment(
        "mda-table1",
        "MDA's protocol: ViT-B/16, ViT-Ti/16, ViT-B/32",
        classifiers=(VIT_B16, VIT_T16, VIT_B32),
        methods=MDA_METHODS,
        steps=(),
        protocols=("mas",),
    ),
)
EXPERIMENTS = {experiment.name: experiment for experiment in _ALL}


def get(name: str) -> Experiment:
    """The experiment of that name; ValueError for an unknown one."""
    if name not in EXPERIMENTS:
        raise ValueError(f"{name!r} is not in the catalogue: choose one of {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[name]

"""What is measured for every table and figure: classifiers, methods, protocol, training.

Settings are the papers' where they are known, else they are decided here, and `Experiment.decided` says which.
The numbers of tables 2 to 7 follow this catalogue: each holds what its title says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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
    "attention_ig": {"n_steps": 2},
    "transition_attention": {"n_steps": 2},
    "bi_attention": {"n_steps": 2},
    "integrated_gradients": {"n_steps": 2},
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
        published: classifier → row → metric → the paper's figure, to be shown beside ours.
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
    published: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)

    @property
    def explainers(self) -> tuple[Variant, ...]:
        """The explainers to train: the variants, or the one with the paper's settings."""
        return self.variants or ((Variant(""),) if self.steps or self.kind == "shortcut" else ())


def _row(*figures: float) -> dict[str, float]:
    names = (
        "deletion",
        "insertion",
        "ins_minus_del",
        "positive",
        "negative",
        "neg_minus_pos",
        "adp",
        "pic",
        "seconds_per_image",
    )
    return dict(zip(names, figures, strict=True))


_PUBLISHED_B16 = {
    "Grad-CAM": _row(0.2858, 0.4982, 0.2124, 0.3346, 0.5788, 0.2442, 84.33, 4.36, 0.014),
    "IG": _row(0.1857, 0.5544, 0.3686, 0.2248, 0.6347, 0.4099, 22.93, 33.44, 0.251),
    "Trans-Att.": _row(0.1654, 0.5833, 0.4178, 0.2022, 0.6654, 0.4633, 25.70, 30.85, 0.254),
    "Bi-Att.": _row(0.1600, 0.5958, 0.4358, 0.1961, 0.6789, 0.4828, 28.46, 28.26, 0.254),
    "TIS": _row(0.1420, 0.6381, 0.4961, 0.1731, 0.7222, 0.5492, 11.25, 45.57, 1.167),
    "ViT-CX": _row(0.1750, 0.5714, 0.3964, 0.2149, 0.6478, 0.4328, 12.55, 43.50, 0.860),
    "MDA": _row(0.1556, 0.6112, 0.4556, 0.1933, 0.6983, 0.5050, 48.67, 13.27, 13.645),
    "LeGrad": _row(0.1666, 0.5666, 0.4000, 0.2036, 0.6461, 0.4425, 20.39, 34.34, 0.006),
    "AHA T=0": _row(0.1381, 0.6112, 0.4731, 0.1714, 0.6947, 0.5233, 15.87, 36.82, 0.016),
    "AHA T=3": _row(0.1215, 0.6485, 0.5271, 0.1491, 0.7378, 0.5887, 12.47, 42.27, 0.547),
}
_PUBLISHED_B32 = {
    "AHA T=0": {"deletion": 0.1471, "insertion": 0.5649},
    "AHA T=3": {"deletion": 0.1261, "insertion": 0.6080},
}
_PUBLISHED_CONVNEXT = {
    "Grad-CAM": {"deletion": 0.2748, "insertion": 0.6267},
    "AHA T=0": {"deletion": 0.1741, "insertion": 0.5911},
    "AHA T=3": {"deletion": 0.1576, "insertion": 0.6079},
}
_PUBLISHED_MDA = {
    "MDA": {"insertion": 0.856, "deletion": 0.232, "mas_insertion": 0.775, "mas_deletion": 0.279},
    "IG": {"insertion": 0.741, "deletion": 0.222},
    "Bi-Att.": {"insertion": 0.760, "deletion": 0.218},
    "TIS": {"insertion": 0.761, "deletion": 0.196},
}

_ALL = (
    Experiment(
        "table1",
        "ViT-B/16, predicted class, mean of the three references",
        published={VIT_B16: _PUBLISHED_B16},
    ),
    Experiment("table2", "ViT-B/16, true class, mean of the three references", targets=("true",)),
    Experiment(
        "table3",
        "ViT-B/32, predicted and true class",
        classifiers=(VIT_B32,),
        targets=("predicted", "true"),
        decided="number of images; weights",
        published={VIT_B32: _PUBLISHED_B32},
    ),
    Experiment(
        "table4",
        "ConvNeXt-S, predicted and true class",
        classifiers=(CONVNEXT_S,),
        methods=CNN_METHODS,
        targets=("predicted", "true"),
        decided="number of images; weights",
        published={CONVNEXT_S: _PUBLISHED_CONVNEXT},
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
        published={VIT_B16: _PUBLISHED_MDA},
    ),
)
EXPERIMENTS = {experiment.name: experiment for experiment in _ALL}


def get(name: str) -> Experiment:
    """The experiment of that name; ValueError for an unknown one."""
    if name not in EXPERIMENTS:
        raise ValueError(f"{name!r} is not in the catalogue: choose one of {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[name]

"""Attribution methods to compare with, behind one interface and one registry.

>>> maps = aha.attributors.create("rollout", clf).attribute(images)
"""

from ..full_gradient import FullGradient, full_gradient
from ..libra import libra
from ..protection import undisturbed
from . import (
    attcam,
    attention,
    attention_gradients,
    caap,
    cam,
    chefer,
    fullgrad,
    gradient,
    legrad,
    libragrad,
    mda,
    perturbation,
    surrogate,
    tis,
    vit_cx,
)
from .base import Attributor, Metadata, available, create, find, register
from .learned import AHA, FastSHAP, ViTShapley
from .passes import Passes, count_passes
from .specs import MethodSpec

__all__ = [
    "AHA",
    "Attributor",
    "FastSHAP",
    "FullGradient",
    "Metadata",
    "MethodSpec",
    "Passes",
    "ViTShapley",
    "available",
    "count_passes",
    "create",
    "find",
    "full_gradient",
    "libra",
    "register",
    "undisturbed",
]

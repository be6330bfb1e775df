"""Attribution methods to compare with, behind one interface and one registry.

>>> maps = aha.attributors.create("rollout", clf).attribute(images)
"""

from . import attention, gradient, perturbation
from .base import Attributor, Metadata, available, create, register, undisturbed
from .learned import AHA

__all__ = ["AHA", "Attributor", "Metadata", "available", "create", "register", "undisturbed"]

"""Attribution methods to compare with, behind one interface and one registry.

>>> maps = aha.attributors.create("rollout", clf).attribute(images)
"""

from . import attention, gradient, perturbation
from .base import Attributor, Metadata, available, create, register, undisturbed
from .learned import AHA
from .passes import Passes, count_passes

__all__ = ["AHA", "Attributor", "Metadata", "Passes", "available", "count_passes", "create", "register", "undisturbed"]

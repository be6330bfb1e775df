"""Fixtures of every room: a tiny classifier with its explainer, images, and a poison for uninitialised memory."""

import dataclasses
import functools

import pytest
import torch

import aha

from .toys import TINY_DECODER, pictures, tiny_classifier

# tiny tensors: one thread each, so that tests running side by side do not wait for one another
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Files with many slow tests come first, so that at the end no process waits for another's long file."""
    slow = {}
    for item in items:
        slow[item.path] = slow.get(item.path, 0) + (item.get_closest_marker("slow") is not None)
    items.sort(key=lambda item: -slow[item.path])  # stable: within a file, and among equals, the order stays


@pytest.fixture(autouse=True)
def poison_empty_memory():
    """Memory from ``torch.empty`` starts as NaN, so an element that nobody wrote shows up."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture
def coarse(monkeypatch):
    """The protocol aha in 5 points, refinement on 4: for tests of what is written, not of how exact it is."""
    # here, for the tests of the operators need none of it
    from aha import shortcut
    from aha.attributors import learned
    from aha.metrics import PROTOCOLS
    from aha.refinement import refine

    monkeypatch.setitem(PROTOCOLS, "aha", dataclasses.replace(PROTOCOLS["aha"], points=5))
    for module in (learned, shortcut):
        monkeypatch.setattr(module, "refine", functools.partial(refine, fractions=4))


@pytest.fixture
def classifier() -> aha.Classifier:
    return tiny_classifier()


@pytest.fixture
def explainer(classifier) -> aha.Explainer:
    torch.manual_seed(1)
    return aha.Explainer.build(classifier, evidence=False, decoder=TINY_DECODER)


@pytest.fixture
def images() -> torch.Tensor:
    return pictures()

"""Classifiers that the tests of attribution methods share."""

import functools

import pytest

from .architectures import make


@pytest.fixture(scope="session")
def models():
    """kind → its classifier, made once: a test that changes one makes its own."""
    return functools.cache(make)

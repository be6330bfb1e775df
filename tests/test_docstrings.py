"""Everything public says what it is for: the first line in words, before shapes and formulas."""

import importlib
import inspect
import re

import pytest

MODULES = (
    "aha",
    "aha.attributors",
    "aha.calibration",
    "aha.data",
    "aha.evaluation",
    "aha.kernels",
    "aha.metrics",
    "aha.references",
    "aha.regions",
    "aha.report",
    "aha.training",
)
# the house's own words for pages that exist elsewhere
ELSEWHERE = re.compile(r"\(method §|kernels\.md|design\.md|method\.md")


def public():
    for name in MODULES:
        module = importlib.import_module(name)
        names = getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]
        for attribute in names:
            value = getattr(module, attribute)
            if (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__.startswith("aha"):
                yield f"{name}.{attribute}", value
                if inspect.isclass(value):
                    for method, function in vars(value).items():
                        if inspect.isfunction(function) and not method.startswith("_"):
                            yield f"{name}.{attribute}.{method}", function


@pytest.mark.parametrize(("name", "value"), dict(public()).items())
def test_it_begins_with_what_it_is_for(name, value):
    text = inspect.getdoc(value)
    assert text, f"{name} has no docstring"
    first = text.splitlines()[0]
    assert re.match(r"[\"`A-Za-z↑]", first), first
    assert not re.match(r"\w+ = ", first), first
    assert not ELSEWHERE.search(text)

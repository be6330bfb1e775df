"""What CONTRIBUTING.md shows runs, and holds: its Python, section by section, on tiny models."""

import re
from pathlib import Path

import pytest
import torch

from aha.attributors import base
from aha.kernels import dispatch, functional
from aha.metrics import catalog, protocols

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
SECTIONS = dict(zip(*[iter(re.split(r"^## (.+)$", PAGE, flags=re.MULTILINE)[1:])] * 2, strict=True))
ADDED = ["Add a method", "Add a metric", "Add a protocol", "Add an operator", "Add a backend"]


def blocks(section):
    """The section's Python, each block on the lines it has in the file, so that a traceback points there."""
    for found in re.finditer(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL):
        if PAGE.rfind(f"## {section}\n", 0, found.start()) == PAGE.rfind("\n## ", 0, found.start()) + 1:
            yield "\n" * PAGE.count("\n", 0, found.start(1)) + found[1]


@pytest.fixture
def registries(monkeypatch):
    """Whatever a section registers is gone afterwards."""
    tables = (base._REGISTRY, dispatch.BACKENDS, functional.OPERATORS, catalog.METRICS, protocols.PROTOCOLS)
    before = [dict(table) for table in tables]
    monkeypatch.setattr(dispatch, "NAMES", dispatch.NAMES)
    yield
    for table, kept in zip(tables, before, strict=True):
        table.clear()
        table.update(kept)


def test_every_section_with_code_is_run():
    assert [name for name in SECTIONS if "```python" in SECTIONS[name]] == ADDED


@pytest.mark.parametrize("section", ADDED)
def test_section(registries, classifier, images, section):
    torch.manual_seed(0)
    namespace = {"clf": classifier, "images": images}
    found = list(blocks(section))
    assert found
    for block in found:
        exec(compile(block, "CONTRIBUTING.md", "exec"), namespace)
    if "library" in namespace:
        namespace["library"]._destroy()


def test_every_file_that_is_named_is_there():
    linked = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", PAGE)
    named = re.findall(r"`((?:aha|kernels|csrc|tests|docs|bench)/[\w/.]+)`", PAGE)
    assert {name for name in (*linked, *named) if not (ROOT / name).exists()} == set()


@pytest.mark.parametrize("target", ["quick", "test", "lint"])
def test_every_target_that_is_named_is_there(target):
    assert f"make {target}" in PAGE
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)

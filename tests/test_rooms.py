"""Rooms, the packages and modules right under aha/, import one another in one direction only."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# kernels/ installs as aha.kernels
FLOORS = {"aha": ROOT / "aha", "aha.kernels": ROOT / "kernels"}
# each imports from those before it
ORDER = (
    "kernels",
    "checks",
    "recipes",
    "structure",
    "classifier",
    "data",
    "explainer",
    "attributors",
    "metrics",
    "evaluation",
    "report",
    "demo",
    "reproduce",
    "cli",
)


def imports(code, package):
    """Absolute names of the modules that ``code`` of the ``package`` imports, also inside functions.

    Of ``from package import name`` it is package.name; what is for type checkers alone does not count.
    """
    tree = ast.parse(code)
    unseen = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            unseen.update(id(part) for line in node.body for part in ast.walk(line))
    for node in ast.walk(tree):
        if id(node) in unseen:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: -(node.level - 1) or None] if node.level else []
            start = ".".join([*base, *filter(None, [node.module])])
            yield from (f"{start}.{alias.name}" for alias in node.names)


def room_of(name, rooms):
    """The room of a module or of a name in it; "aha" for the package itself and what it defines."""
    parts = name.split(".")
    if parts[0] != "aha":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in rooms else "aha"


def modules():
    """(path, package that relative imports start from, name) of every module."""
    for floor, folder in FLOORS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [floor, *path.relative_to(folder).with_suffix("").parts]
            package = ".".join(parts[:-1])
            yield path, package, package if parts[-1] == "__init__" else ".".join(parts)


@pytest.fixture(scope="module")
def graph():
    """Room → the rooms that it imports."""
    found = list(modules())
    rooms = {name.split(".")[1] for *_, name in found if "." in name}
    graph = {room: set() for room in ("aha", *rooms)}
    for path, package, name in found:
        room = room_of(name, rooms)
        graph[room] |= {room_of(used, rooms) for used in imports(path.read_text(), package)} - {None, room}
    return graph


def test_no_room_is_in_a_cycle(graph):
    assert len(graph) > 30
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(f"rooms import in a circle: {' ← '.join(error.args[1])}")


def test_imports_point_down(graph):
    for place, room in enumerate(ORDER):
        below, waiting = set(), [room]
        while waiting:
            for used in graph[waiting.pop()] - below:
                below.add(used)
                waiting.append(used)
        assert not below.intersection(ORDER[place:]), room
        assert "aha" not in below, room  # the package is the top


def test_kernels_import_nothing_of_the_library(graph):
    assert graph["kernels"] == set()


def test_imports_are_found_wherever_they_are():
    code = """
import aha.files, os.path
from . import one
from .two import a
from ... import geometry
from ...classifier import b
if typing.TYPE_CHECKING:
    from ..unseen import c
else:
    from ..seen import c
def late():
    from aha import metrics
"""
    found = set(imports(code, "aha.report.parts"))
    here = {"aha.report.parts.one", "aha.report.parts.two.a", "aha.report.seen.c"}
    assert found == here | {"aha.files", "os.path", "aha.geometry", "aha.classifier.b", "aha.metrics"}
    assert [room_of(name, {"files"}) for name in ("aha.files", "aha.files.write", "aha.__version__", "os")] == [
        "files",
        "files",
        "aha",
        None,
    ]

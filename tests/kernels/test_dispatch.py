"""Calls and who runs them: what the checks hand over, what is explained, and that no module imports in a circle."""

import ast
import inspect
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch

import aha.kernels
from aha import kernels
from aha.kernels import dispatch, functional, operators, reference
from aha.kernels.dispatch import Backend, Call

ROOM = Path(aha.kernels.__file__).parent
SCORES = torch.zeros(2, 9)
IMAGES = torch.zeros(1, 3, 4, 4)
TAPS = kernels.Taps(torch.arange(4)[:, None] // 2, torch.ones(4, 1), 2)
EXAMPLES = {
    "log_sinkhorn": (torch.zeros(1, 3, 3),),
    "gumbel_sinkhorn": (SCORES, 0.3),
    "cumulative_masks": (torch.zeros(1, 3, 3), [0.5]),
    "soft_topk_masks": (SCORES, [0.5], 0.3),
    "soft_sort": (SCORES,),
    "soft_rank": (SCORES,),
    "soft_topk": (SCORES, 3),
    "perturb": (IMAGES, IMAGES, torch.zeros(1, 2, 4), kernels.Upsampler(TAPS, TAPS)),
    "perturb_by_rank": (IMAGES, IMAGES, torch.zeros(1, 4, 4, dtype=torch.int32), [1]),
}


def imports(file: Path) -> set[str]:
    """Modules of the room that ``file`` imports, at its top or inside a function; a package is its ``__init__``."""
    found = set()
    package = file.relative_to(ROOM).parent.parts
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            assert not (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("aha"))
            continue
        start = ROOM.joinpath(*package[: len(package) - node.level + 1])
        origin = start.joinpath(*(node.module or "").split(".")) if node.module else start
        for name in node.names:
            target = next(
                (c for c in (origin / f"{name.name}.py", origin / name.name / "__init__.py") if c.exists()), None
            )
            target = target or (
                origin.with_suffix(".py") if node.module and not origin.is_dir() else origin / "__init__.py"
            )
            assert target.exists(), (file, target)
            found.add(str(target.relative_to(ROOM)))
    return found


def test_no_module_imports_in_a_circle():
    graph = {str(file.relative_to(ROOM)): imports(file) for file in ROOM.rglob("*.py")}
    assert "dispatch.py" in graph["functional.py"] and "triton/noise.py" in graph["triton/sinkhorn.py"]
    done: set[str] = set()
    while left := graph.keys() - done:
        leaves = {module for module in left if graph[module] <= done}
        assert leaves, f"a circle among {sorted(left)}"
        done |= leaves


def test_every_operator_has_checks_and_backends():
    assert functional.OPERATORS.keys() == dispatch.BACKENDS.keys() == EXAMPLES.keys()
    assert {*EXAMPLES, "Taps", "Upsampler", "Choice", "BackendError", "explain"} == set(kernels.__all__)


@pytest.mark.parametrize("operator", EXAMPLES)
def test_a_call_is_run_and_explained(operator):
    function, check = functional.OPERATORS[operator]
    given = inspect.signature(function).bind(*EXAMPLES[operator])
    given.apply_defaults()
    del given.arguments["backend"]
    call = check(*given.arguments.values())
    assert call.operator == operator
    assert kernels.explain(operator, *EXAMPLES[operator]) == dispatch.explain(call)
    expected = function(*EXAMPLES[operator])
    actual = dispatch.run(call, "auto")
    for got, true in zip(*(x if isinstance(x, tuple) else (x,) for x in (actual, expected)), strict=True):
        assert torch.equal(got, true)
    if hasattr(reference, operator):
        assert set(inspect.signature(getattr(reference, operator)).parameters) == set(call.arguments)
        assert set(inspect.signature(getattr(operators.Operators("aha"), operator)).parameters) == set(call.arguments)


def test_a_call_does_not_change():
    call = Call("log_sinkhorn", {"logits": torch.zeros(1, 3, 3), "n_iters": 2})
    with pytest.raises(FrozenInstanceError):
        call.operator = "soft_rank"
    assert call.first is call.arguments["logits"]


def test_explain_takes_the_arguments_of_the_operator_and_no_backend():
    rows = kernels.explain("soft_topk_masks", SCORES, fractions=[0.5], tau=0.3, noise=0.1)
    assert [row.backend for row in rows] == [backend.name for backend in dispatch.BACKENDS["soft_topk_masks"]]
    with pytest.raises(TypeError, match="missing a required argument: 'tau'"):
        kernels.explain("soft_topk_masks", SCORES, [0.5])
    with pytest.raises(TypeError, match="unexpected keyword argument 'backend'"):
        kernels.explain("soft_rank", SCORES, backend="cpu")
    with pytest.raises(ValueError, match="choose one of log_sinkhorn, "):
        kernels.explain("softmax", SCORES)


def test_explain_is_not_a_backend():
    with pytest.raises(ValueError, match="backend='explain' is not known: choose one of auto, "):
        kernels.soft_rank(SCORES, backend="explain")


def test_the_first_backend_without_a_reason_runs(monkeypatch):
    said = []

    def backend(name, reason):
        return Backend(name, lambda call: reason, lambda **given: said.append((name, list(given))))

    row = backend("cuda", "no card"), backend("cpu", None), backend("reference", None)
    monkeypatch.setitem(dispatch.BACKENDS, "log_sinkhorn", row)
    kernels.log_sinkhorn(torch.zeros(1, 3, 3))
    kernels.log_sinkhorn(torch.zeros(1, 3, 3), backend="reference")
    assert said == [("cpu", ["logits", "n_iters"]), ("reference", ["logits", "n_iters"])]
    with pytest.raises(kernels.BackendError, match="'cuda' cannot run log_sinkhorn here: no card"):
        kernels.log_sinkhorn(torch.zeros(1, 3, 3), backend="cuda")
    with pytest.raises(kernels.BackendError, match=r"'triton' has no log_sinkhorn: .* by cuda, cpu, reference"):
        kernels.log_sinkhorn(torch.zeros(1, 3, 3), backend="triton")
    expected = [("cuda", False, "no card", None), ("cpu", True, None, None), ("reference", False, None, None)]
    assert kernels.explain("log_sinkhorn", torch.zeros(1, 3, 3)) == expected


def test_why_not_reads_metadata_alone():
    # on meta there are no values
    for operator, first in (("gumbel_sinkhorn", "scores"), ("perturb", "images")):
        call = Call(operator, {first: torch.zeros(1, 3, 4, 4, device="meta"), "dtype": torch.float32})
        assert [row.reason is None for row in dispatch.explain(call)] == [False, False, False, True]

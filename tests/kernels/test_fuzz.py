"""Random calls: each is answered with results that fit the reference, or with one line; none may crash.

A short run by default. AHA_FUZZ=10000 makes as many calls of every operator; with `make sanitize`, on a build that
reports what the processor lets pass. A failure names its call, which `check_public` or `check_raw` makes again.
"""

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from aha.kernels import native

from .fuzz import COMPILED, PUBLIC, Draw, differentiable, floats, public_call, raw_call

pytestmark = [
    pytest.mark.skipif(native.load("_C") is not None, reason=f"aha._C: {native.load('_C')}"),
    pytest.mark.filterwarnings("ignore"),  # of iterations that have not converged, and of deterministic algorithms
]
CALLS = int(os.environ.get("AHA_FUZZ") or 600)
PLAN = "AHA_RANKING_PLAN"
FIRST = 25  # iterations that the convergent operators make before they look whether more are needed
ROUNDINGS = 16  # errors of a result, beyond those of the reference
# why a call that is as documented may be refused
REFUSALS = ("resolves to", "is not a number that float", "does not mix in float64")


@pytest.fixture(autouse=True)
def either_plan(monkeypatch):
    """What `_choose_plan` sets is taken back."""
    monkeypatch.setenv(PLAN, "")


def _choose_plan(draw: Draw) -> None:
    """Without noise, half of the rankings by blocks also where the matrix would be faster, as it is for few regions."""
    os.environ[PLAN] = draw.one("", "blocks")


@pytest.mark.parametrize("operator", PUBLIC)
def test_public_calls(operator):
    answered = 0
    for number in range(CALLS):
        try:
            answered += check_public(operator, number)
        except Exception as error:
            raise AssertionError(f"check_public({operator!r}, {number}): {error}") from error
    assert answered > CALLS / 3


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("operator", COMPILED)
def test_raw_calls(operator, backward):
    answered = 0
    for number in range(CALLS):
        try:
            answered += check_raw(operator, backward, number)
        except Exception as error:
            raise AssertionError(f"check_raw({operator!r}, {backward}, {number}): {error}") from error
    assert answered > CALLS / 10


def check_public(operator: str, number: int) -> bool:
    """Whether the call was as documented, and answered with results; they and their gradients fit the reference."""
    draw = Draw(operator, number)
    given, documented = public_call(draw, operator)
    _choose_plan(draw)
    try:
        outputs, inputs = differentiable(operator, given, draw.one("cpu", "auto"))
    except (ValueError, RuntimeError) as error:
        text = str(error)
        assert text and "\n" not in text, text
        assert not documented or any(reason in text for reason in REFUSALS), text
        return False
    upstream = [floats(draw, tuple(out.shape), out.dtype, ("ties", "equal")) for out in outputs]
    gradients = _gradients(outputs, inputs, upstream)
    if documented:
        _compare(operator, given, outputs, gradients, upstream)
    return documented


def check_raw(operator: str, backward: bool, number: int) -> bool:
    """Whether the call was answered with results: the same by three threads, of the sizes of the fake's."""
    draw = Draw(operator, backward, number)
    _choose_plan(draw)
    call = raw_call(draw, operator, backward)
    if call is None:
        return False
    func, args = call
    on_meta = any(isinstance(x, Tensor) and x.is_meta for x in args)
    # the latter from Python, before the operator is reached; fake kernels check nothing
    errors = (RuntimeError, TypeError, ValueError, IndexError) if on_meta else (RuntimeError, TypeError)
    try:
        results = _tuple(func(*args))
    except errors as error:
        first, *more = str(error).split("\n")
        assert first
        assert not more or ", aha/csrc/" not in first, "the operator's own error has several lines"
        return False
    if not on_meta and draw.chance(0.2):
        torch.set_num_threads(3)
        try:
            again = _tuple(func(*args))
        finally:
            torch.set_num_threads(1)
        torch.testing.assert_close(again, results, rtol=0, atol=0, equal_nan=True)
        fakes = _tuple(func(*(x.to("meta") if isinstance(x, Tensor) else x for x in args)))
        assert [(x.shape, x.dtype) for x in results] == [(x.shape, x.dtype) for x in fakes]
    return True


def _tuple(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def _gradients(outputs: list[Tensor], inputs: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    gradients = torch.autograd.grad(outputs, inputs, upstream, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, inputs, strict=True)]


def _compare(
    operator: str, given: dict[str, Any], outputs: list[Tensor], gradients: list[Tensor], upstream: list[Tensor]
) -> None:
    """Shapes and types are those of the reference, and values too, where they are defined by more than rounding."""
    single, truth = _reference(operator, given, upstream), _reference(operator, _doubled(given), _doubled(upstream))
    rounding = _rounding(operator, given, upstream)
    comparable = given.get("n_iters", 0) <= FIRST and all(x.isfinite().all() for x in _tensors(given))
    computed = torch.float32 if given.get("noise") else outputs[0].dtype  # the noise is in float32
    names = ["output"] * len(outputs) + ["gradient"] * len(gradients)
    for name, actual, alike, exact in zip(names, [*outputs, *gradients], single, truth, strict=True):
        assert (actual.shape, actual.dtype) == (alike.shape, alike.dtype)
        if comparable and actual.numel() and alike.isfinite().all():
            error, reference = ((x.double() - exact).abs().max().item() for x in (actual, alike))
            eps = max(torch.finfo(dtype).eps for dtype in (actual.dtype, computed))
            allowed = 8 * reference + ROUNDINGS * eps * rounding[name]
            # more than the type holds: it may overflow on the way
            vacuous = allowed >= torch.finfo(actual.dtype).max
            assert error <= allowed or vacuous, f"{name}: error {error:.1e}, allowed {allowed:.1e}"


def _reference(operator: str, given: dict[str, Any], upstream: list[Tensor]) -> list[Tensor]:
    outputs, inputs = differentiable(operator, given, "reference")
    return [*outputs, *_gradients(outputs, inputs, upstream)]


def _doubled(value: Any) -> Any:
    """Floating point in float64, throughout."""
    if isinstance(value, dict):
        return {name: _doubled(x) for name, x in value.items() if name != "dtype"}
    if isinstance(value, list):
        return [_doubled(x) for x in value]
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _tensors(given: dict[str, Any]) -> list[Tensor]:
    return [x for x in given.values() if isinstance(x, Tensor)]


def _size(*tensors: Any) -> float:
    return max(float(x.abs().max()) if isinstance(x, Tensor) and x.numel() else 0.0 for x in tensors)


def _rounding(operator: str, given: dict[str, Any], upstream: list[Tensor]) -> dict[str, float]:
    """How large the numbers are whose rounding the outputs and the gradients show: logits, divided by tau, and sums."""
    above = _size(*upstream)
    if operator.startswith("perturb"):
        size = 1 + _size(given["images"].double(), given["references"].double(), given.get("mean"))
        if "std" in given and given["std"].numel():
            size /= float(given["std"].abs().min())
            above /= float(given["std"].abs().min())
        if operator == "perturb_by_rank":
            return {"output": 0.0, "gradient": above * upstream[0].shape[1]}
        rows, cols = (taps.weight.abs().sum(dim=1) for taps in given["upsampler"])
        masks = _size(given["masks"].double()) * _size(rows) * _size(cols)
        sums = 2 * upstream[0].numel() * (1 + _size(rows) * _size(cols))
        return {"output": size * (1 + masks), "gradient": above * (1 + masks + size) * sums}
    k = _tensors(given)[0].shape[-1]
    if operator == "cumulative_masks":
        return {"output": k * _size(given["permutation"]), "gradient": above * k}
    if operator == "log_sinkhorn":
        size = 1 + _size(given["logits"])
        return {"output": size, "gradient": above * size * k**2}
    tau, slope, unit = float(given["tau"]), 1.0, 1.0
    largest = 0.5 + k**0.5
    if "values" in given:
        values = given["values"].double()
        spread = values.std(dim=1, correction=0)
        slope = 1 / max(float(spread[spread > 0].min()) if (spread > 0).any() else 0, 1e-30)
        unit = {"soft_sort": _size(values), "soft_rank": k, "soft_topk": 1}[operator]
    else:
        largest = 0.5 + _size(given["scores"].double())
    reach = 1 + (max(largest, largest**2) + 17 * given.get("noise", 0)) / tau
    return {"output": unit * reach, "gradient": above * k * (1 + unit * max(slope, 1) * reach**2 / min(tau, 1))}

"""pytest-benchmark over the same cases: `pytest bench`, on a GPU if there is one; -k perturb, --benchmark-compare …

Every row is compared with the float64 reference before it is timed. For ratios between rows use
`python -m bench.report`, whose rounds are interleaved; pytest-benchmark times one row after the other.
"""

import pytest
import torch

from . import operators, timing
from .cases import CASES, sizes
from .rows import DEVICE_ROWS, rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PHASES = ("forward", "forward+backward")


@pytest.fixture(scope="module", params=list(CASES))
def problem(request):
    case = CASES[request.param]
    (size,) = sizes(case.operator, DEVICE, "the")
    inputs = case.inputs(size, DEVICE)
    return case, inputs, operators.truth(case, inputs, size)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("row", DEVICE_ROWS[DEVICE])
def test_operator(problem, row, phase, benchmark):
    case, inputs, true = problem
    run = rows(case, inputs, compiled=row == "torch.compile")[row]
    if isinstance(run, str):
        pytest.skip(run)
    error = true.check(*case.gradients(run, inputs, true.cotangents))
    call = operators.one_pass(case, run, inputs, true, backward=phase == PHASES[1])
    benchmark.group = f"{case.operator}, {phase}"
    benchmark.extra_info.update(error=error, error_reference=true.error)
    if DEVICE == "cuda":
        benchmark.extra_info["events"] = timing.interleaved({row: call}, DEVICE)[row]._asdict()
    benchmark.pedantic(timing.finished(call, DEVICE), rounds=timing.MIN_ROUNDS, warmup_rounds=1)

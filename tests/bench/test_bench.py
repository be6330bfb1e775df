"""The benchmark suite: complete, honest about what it did not measure, and right about what it did."""

import csv
import importlib.metadata
import json
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

import aha
from aha import kernels
from aha.evaluation import MethodSpec
from aha.kernels import dispatch
from bench import (
    cases,
    faithfulness,
    mda,
    memory,
    metrics,
    operators,
    pages,
    peers,
    report,
    rows,
    soft_ranks,
    step,
    table,
    timing,
)
from bench.cases import CASES, TINY
from bench.stages import Stage


def measured(operator, size=TINY, only=("eager", "checkpoint"), **options):
    case = CASES[operator]
    competitors = rows.rows(case, case.inputs(size), compiled=False)
    return list(
        operators.measure(case, size, "cpu", {name: competitors[name] for name in only}, seconds=0.0, **options)
    )


def test_every_public_operator_has_a_case():
    assert set(CASES) == set(dispatch.BACKENDS)
    public = {name for name in kernels.__all__ if name.islower() and name != "explain"}
    assert set(CASES) == public


@pytest.mark.parametrize("operator", list(CASES))
def test_a_case_calls_its_operator_and_the_checkpointed_reference_is_the_same(operator):
    case = CASES[operator]
    inputs = case.inputs(TINY)
    assert {choice.backend for choice in case.explain(inputs)} == {"cuda", "triton", "cpu", "reference"}
    true = operators.truth(case, inputs, TINY)
    competitors = rows.rows(case, inputs, compiled=False)
    for name in ("eager", "checkpoint"):
        assert true.check(*case.gradients(competitors[name], inputs, true.cotangents)) <= 2 * true.error + 1e-6
    assert true.error < 1e-5


@pytest.mark.parametrize("operator", ["soft_topk_masks", "perturb", "perturb_by_rank"])
def test_the_first_images_do_not_depend_on_the_others(operator):
    size = replace(TINY, B=3, noise=1.0)
    case = CASES[operator]
    inputs = case.inputs(size)
    whole = case.call(inputs, "reference")
    for all_images, first in zip(whole, case.call(case.first(inputs, 2), "reference"), strict=True):
        assert torch.equal(all_images[:2], first)


def test_sizes_are_different_and_grow_with_the_sweep():
    for operator, case in CASES.items():
        for device in ("cpu", "cuda"):
            counts = []
            for sweep in cases.SWEEPS:
                found = cases.sizes(operator, device, sweep)
                keys = {tuple(getattr(size, field) for field in case.fields) for size in found}
                assert len(keys) == len(found)
                counts.append(len(found))
            assert counts == sorted(counts) and counts[0] == 1
    grid = {(s.K, s.B, s.tau, s.noise) for s in cases.sizes("soft_topk_masks", "cuda", "all")}
    assert len(grid) == 8 * 4 * 4 * 2
    with pytest.raises(ValueError, match="choose one of"):
        cases.sizes("perturb", "cpu", "everything")


def test_a_wrong_row_is_refused_and_not_timed():
    case = CASES["perturb_by_rank"]

    def wrong(inputs):
        return tuple(1.001 * out for out in case.call(inputs, "reference"))

    def broken(inputs):
        raise RuntimeError("no such kernel\nand more")

    found = list(
        operators.measure(case, TINY, "cpu", {"off": wrong, "broken": broken, "absent": "not written"}, seconds=0.0)
    )
    notes = {row["row"]: row["note"] for row in found}
    assert notes["off"].startswith("wrong: error 0.001")
    assert notes["broken"] == "failed: RuntimeError: no such kernel"
    assert notes["absent"] == "not written"
    assert not any(row["median_ms"] for row in found)
    assert len(operators.failures(found)) == 4  # two phases each; what cannot run here is no failure


def test_what_does_not_fit_has_a_reason(monkeypatch):
    case = CASES["soft_topk_masks"]
    one_image = case.reference_bytes(TINY, 8) / TINY.B
    monkeypatch.setattr(operators, "_memory", lambda device: one_image - 1)
    assert {row["note"] for row in measured("soft_topk_masks")} == {"does not fit: no float64 reference"}
    # the truth of one image in float64 fits, the unrolled float32 of four images does not
    large = replace(TINY, B=4)
    monkeypatch.setattr(operators, "_memory", lambda device: one_image)
    found = measured("soft_topk_masks", large)
    assert {row["note"] for row in table.select(found, row="eager")} == {"does not fit"}
    assert all(row["median_ms"] for row in table.select(found, row="checkpoint"))
    assert not operators.failures(found)


def test_what_no_matrix_fits_is_compared_with_the_float64_blocks(monkeypatch):
    case, size = CASES["soft_topk_masks"], replace(TINY, B=1, K=400, tau=0.05)
    if case.linear(case.inputs(size)) is None:
        pytest.skip("aha._C is not built")
    exact = case.truth(case.inputs(size), [torch.ones(1, size.S - 2, size.K)])
    blocks = case.truth(case.inputs(size), [torch.ones(1, size.S - 2, size.K)], "cpu")
    assert operators.deviation((*blocks[0], *blocks[1]), (*exact[0], *exact[1])) < 1e-9
    monkeypatch.setattr(operators, "_memory", lambda device: 0)
    found = measured("soft_topk_masks", size, ("cpu", "eager", "checkpoint"))
    assert all(row["note"] == "does not fit" for row in found if row["row"] != "cpu")
    lines = table.select(found, row="cpu")
    assert all(row["median_ms"] and float(row["error"]) < 1e-6 and not row["error_reference"] for row in lines)
    assert f"| {lines[1]['error']} |" in table.markdown(found, "cpu")


def test_nan_is_an_error():
    exact = torch.ones(3, dtype=torch.float64)
    assert not operators.deviation([torch.tensor([1.0, float("nan"), 1.0])], [exact]) <= 1.0
    assert operators.deviation([torch.tensor([1.0, 1.5, 1.0])], [exact]) == 0.5


def test_times_are_interleaved():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times = timing.interleaved(calls, "cpu", seconds=0.0, rounds=5, steady=False)
    assert order == ["a", "b", *"ab", *"ba", *"ab", *"ba", *"ab"]  # untimed, then five rounds
    assert all(t.p20_ms <= t.median_ms <= t.p80_ms for t in times.values())
    assert timing.summary([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == (3.5, 2.0, 5.0)


def test_short_calls_are_timed_in_a_steady_state(monkeypatch):
    now, calls_made = 0.0, []

    def call(name):
        nonlocal now
        cold = calls_made[-1:] != [name]
        now += 1e-3 * (50 if name == "long" else 9 if cold else 2)
        calls_made.append(name)

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    times = timing.interleaved({n: partial(call, n) for n in ("short", "long")}, "cpu", seconds=0.0, rounds=5)
    assert times["short"].median_ms == pytest.approx(2.0)
    assert times["long"].median_ms == pytest.approx(50.0)
    assert calls_made.count("long") == 6  # untimed, then once a round


def test_from_a_measurement_to_the_pages(tmp_path, monkeypatch):
    path = tmp_path / table.CSV
    sizes = [replace(TINY, name="the"), replace(TINY, name="sweep", K=16)]
    for size in sizes:
        table.upsert(path, measured("soft_topk_masks", size))
    table.upsert(path, measured("perturb_by_rank", replace(TINY, name="the"), ("eager",)))
    with path.open() as file:
        assert tuple(next(csv.reader(file))) == table.COLUMNS
    found = table.read(path)
    assert len(found) == 10
    for row in found:
        assert float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert float(row["error"]) <= 2 * float(row["error_reference"]) + 1e-6
        assert row["torch"] == torch.__version__
    assert {row["K"] for row in found if row["operator"] == "perturb_by_rank"} == {""}
    pages.write(tmp_path)
    page = (tmp_path / "cpu.md").read_text()
    eager = table.select(found, operator="soft_topk_masks", case="the", row="eager", phase="forward+backward")[0]
    assert f"{eager['median_ms']} ({eager['p20_ms']} to {eager['p80_ms']}) | 1.00 |" in page
    assert "| perturb | cpu | not measured | not measured |" in page
    assert "not measured" in (tmp_path / "cuda.md").read_text()
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "cuda.png").exists()


def test_a_rerun_replaces_its_rows_and_keeps_the_others(tmp_path):
    path = tmp_path / table.CSV
    case = CASES["soft_topk_masks"]
    line = [table.record(case, TINY, "eager", "cpu", phase, median_ms=1.0) for phase in table.PHASES]
    other = table.record(case, replace(TINY, tau=0.1), "eager", "cpu", "forward", median_ms=5.0)
    table.upsert(path, [*line, other])
    again = table.record(case, TINY, "eager", "cpu", "forward", median_ms=2.0)
    table.upsert(path, [again])
    found = table.read(path)
    assert [row["median_ms"] for row in found] == ["2", "1", "5"]
    with pytest.raises(ValueError, match="no column"):
        table.record(case, TINY, "eager", "cpu", "forward", mean_ms=1.0)


def test_ratios_compare_one_size_only():
    case = CASES["soft_topk_masks"]

    def line(row, size, ms):
        return table.record(case, size, row, "cpu", "forward+backward", median_ms=ms)

    large = replace(TINY, name="large", K=16)
    found = [line("eager", TINY, 6.0), line("cpu", TINY, 2.0), line("cpu", large, 1.0)]
    assert table.ratios(found) == {table.place(found[0]): 1, table.place(found[1]): 3}


@pytest.mark.slow
@pytest.mark.skipif(not memory.CLEAR.exists(), reason="needs /proc")
def test_peak_memory_is_that_of_the_tensors():
    # the reference keeps two (B,K,K) matrices an iteration, checkpoints keep none of them
    case, size = CASES["soft_topk_masks"], replace(TINY, B=2, K=400, T=20)
    matrix = size.B * size.K**2 * 4 / 2**20
    eager, checkpoint = (memory.peak_mib(case, size, row, "cpu") for row in ("eager", "checkpoint"))
    assert 2 * size.T * matrix < eager < 5 * size.T * matrix
    assert matrix < checkpoint < eager / 2
    with pytest.raises(RuntimeError):
        memory.peak_mib(case, size, "no such row", "cpu")


def test_a_missing_peer_is_a_row(monkeypatch, tmp_path):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert peers.main("cpu", tmp_path) == 0
    found = json.loads((tmp_path / "peers_cpu.json").read_text())
    assert {facts["peer"]: facts["status"] for facts in found} == dict.fromkeys(peers.PEERS, "not installed")
    assert peers.section(found).count("not installed") == len(peers.PEERS)
    assert not (tmp_path / table.CSV).exists()


def test_another_operator_is_in_no_table_of_ours():
    case = CASES["soft_rank"]
    lines = [table.record(case, TINY, "eager", "cpu", "forward+backward", median_ms=1.0)]
    lines.append(table.record(case, TINY, "torchsort", "cpu", "forward+backward", median_ms=0.1, note=table.ANOTHER))
    page = table.markdown(lines, "cpu")
    assert "| eager | not measured | 1 ( to ) |" in page and "torchsort" not in page


def test_a_peer_that_cannot_be_imported_says_why(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0")
    monkeypatch.setitem(sys.modules, "torchsort", None)
    assert peers.PEERS["torchsort"].why_not("cpu").startswith("cannot run: ModuleNotFoundError")


def test_a_peer_is_held_to_the_operator():
    case = CASES["soft_topk_masks"]
    right = replace(peers.PEERS["POT"], run=lambda inputs: case.call(inputs, "reference"))
    assert right.verify("cpu") < 1e-12
    fewer = replace(right, run=lambda inputs: case.call({**inputs, "n_iters": inputs["n_iters"] - 1}, "reference"))
    with pytest.raises(AssertionError, match="not the same operator"):
        fewer.verify("cpu")


@pytest.mark.parametrize("name", [name for name, peer in peers.PEERS.items() if not peer.gpu])
def test_installed_peers_run(name):
    peer = peers.PEERS[name]
    if name == "KeOps":
        pytest.skip("compiles for a minute: checked by bench.peers")
    if reason := peer.why_not("cpu"):
        pytest.skip(reason)
    case = CASES[peer.operator]
    inputs = case.inputs(TINY)
    (out,) = peer.run(inputs)
    assert out.shape == case.call(inputs, "reference")[0].shape
    if peer.same:
        assert peer.verify("cpu") < 1e-10


@pytest.fixture
def a_method(monkeypatch):
    """Linear ranks 1 + 3/4·(hard − 1) of three values at the smoothing ¼, with a gradient of their own."""

    def rank(values, smoothing):
        hard = values.argsort(descending=True).argsort().to(values)
        if smoothing < 1e-3:
            hard = hard / 0
        off = smoothing * 1e-3 if values.dtype == torch.float32 else 0
        return 1 + (1 - smoothing) * (hard - 1) + (2 + off) * (values - values.detach())

    method = soft_ranks.Method(None, rank, "nothing")
    monkeypatch.setattr(soft_ranks, "METHODS", {"aha": method, "large": method._replace(matrices=(1, 10**12))})
    return method


def test_errors_of_soft_ranks_by_hand(a_method):
    values, weights = torch.tensor([[2.0, 3.0, 1.0]]), torch.tensor([[1.0, -1.0, 0.0]])
    # two of three ranks are ¼ off, of 3
    assert soft_ranks.rank_errors(a_method, values, 0.25) == pytest.approx((0.5 / 9, 0.25 / 3))
    figures = soft_ranks.gradient_figures(a_method, values, weights, 0.25)
    # 2 + ¼·1e-3 times the weights against 2; two of three values carry it, alike
    assert figures == pytest.approx({"gradient_error": 0.25e-3 / 2, "carried": 2 / 3}, rel=1e-3)
    assert soft_ranks.smallest(a_method, values, weights) == 1e-3
    assert soft_ranks.smallest(a_method._replace(converged=lambda v, s: s >= 0.1), values, weights) == 0.1
    assert soft_ranks.smallest(a_method._replace(converged=lambda v, s: False), values, weights) is None
    level = soft_ranks.matched(a_method, values)
    assert soft_ranks.rank_errors(a_method, values, level)[0] == pytest.approx(soft_ranks.MATCHED, rel=1e-3)


def test_soft_ranks_reach_the_page(a_method, monkeypatch, tmp_path):
    monkeypatch.setattr(soft_ranks, "values_and_weights", lambda k: (torch.randn(1, k), torch.randn(1, k)))
    assert soft_ranks.main(tmp_path, (50,), seconds=0.0) == 0
    pages.write(tmp_path)
    page = (tmp_path / "cpu.md").read_text()
    row = json.loads((tmp_path / "soft_ranks_cpu.json").read_text())["rows"][0]
    times = "{median_ms:.4g} ({p20_ms:.4g} to {p80_ms:.4g})"
    assert f"| 50 | aha | 0.001, smallest | {times.format(**row['forward'])} |" in page
    # what it cannot hold has no time
    assert " | a gradient needs 10000000 GB | " in page


@pytest.mark.parametrize("name", soft_ranks.METHODS)
def test_methods_of_soft_ranks(name):
    method = soft_ranks.METHODS[name]
    if method.peer and (reason := peers.PEERS[method.peer].why_not("cpu")):
        pytest.skip(reason)
    values, weights = soft_ranks.values_and_weights(100)
    level = 1.0 if name.startswith("torchsort") else 0.01
    assert method.converged(values, level)
    smoothed = soft_ranks.rank_errors(method, values, level)
    assert 0 < smoothed[0] < smoothed[1] < 0.6
    assert soft_ranks.gradient_figures(method, values, weights, level)["gradient_error"] < 1e-4
    if name == "POT":  # the limit that ours goes to as well
        ours = soft_ranks.METHODS["aha"].rank(values, level)
        torch.testing.assert_close(method.rank(values, level), ours, rtol=0, atol=0.2)


def test_recorded_calls_replay():
    images = torch.rand(2, 9).requires_grad_()
    with step.recorded() as calls:
        masks = kernels.soft_topk_masks(images * 2, [0.5], 0.3, 4, backend="reference")
    assert kernels.soft_topk_masks is step.kernels.soft_topk_masks and not hasattr(kernels.soft_topk_masks, "calls")
    (call,) = calls
    assert call.operator == "soft_topk_masks" and torch.equal(call.outputs[0], masks)
    assert call.args[0].is_leaf and call.args[0].requires_grad  # cut off from what made it
    call.replay()
    assert images.grad is None


def test_the_classifier_alone_sees_the_images_of_the_objective():
    made, data = step.trainer("test_vit.r160_in1k", batch=2, fractions=4, device="cpu", backend="reference")
    seen = []
    forward = made.classifier.forward_normalized
    with step.recorded() as calls:
        made._train_step(data)
    assert [call.operator for call in calls] == ["soft_topk_masks", "perturb"]
    passes = step._Passes(made, data, calls)
    made.classifier.forward_normalized = lambda pixels: seen.append(len(pixels)) or forward(pixels)
    passes.objective()
    of_objective = sorted(seen)
    seen.clear()
    passes.classifier()
    assert sorted(seen) == of_objective == [2, 2, 8]


def test_shares_of_a_training_step_and_a_refinement_step_by_operator(monkeypatch):
    clocks = {}

    def one_ms_a_call(calls, device, seconds, steady):
        clocks.update(calls)
        return {name: timing.Times(100.0 if name in ("step", "refinement") else 1.0, 0.0, 0.0) for name in calls}

    monkeypatch.setattr(timing, "interleaved", one_ms_a_call)
    found = step.measure("test_vit.r160_in1k", batch=1, fractions=4)
    # of one refinement step one reference
    assert found["calls"] == {
        "step": {"soft_topk_masks": 1, "perturb": 1},
        "refinement": {"soft_topk_masks": 1, "perturb": 1},
    }
    assert found["shares"] == {key: {"soft_topk_masks": 0.01, "perturb": 0.01} for key in ("step", "refinement")}
    line = step.line(found)
    assert "2.00 % of a training step (bar 0.2 %: soft_topk_masks 1.00 %, perturb 1.00 %); 2.00 % of a ref" in line
    with step.recorded() as replayed:
        clocks["perturb of refinement"]()
    assert [call.operator for call in replayed] == ["perturb"]


def test_a_failed_stage_is_recorded_and_the_next_one_runs(tmp_path, monkeypatch):
    commands = {
        "bad": [sys.executable, "-c", f"print('in {report.ROOT}'); raise SystemExit(4)"],
        "late": [sys.executable, "-c", "import time; time.sleep(60)"],
        "gone": [str(tmp_path / "no such program")],
        "good": [sys.executable, "-c", "print('fine')"],
    }
    monkeypatch.setattr(report, "stages", lambda *_: [Stage(name, command, 2.0) for name, command in commands.items()])
    assert report.main("cpu", tmp_path) == 1
    found = json.loads((tmp_path / "report_cpu.json").read_text())["stages"]
    assert [stage["status"].partition(":")[0] for stage in found] == ["failed", "failed", "failed", "ok"]
    assert found[0]["status"].endswith("exit status 4") and found[0]["output"] == ["in …"]
    assert found[3]["output"] == ["fine"]


def test_stages_of_a_gpu_begin_with_the_build(tmp_path):
    names = [stage.name for stage in report.stages("cuda", tmp_path, "all", 0.3)]
    assert names[:4] == ["build", "tests", "memcheck", "racecheck"]
    on_cpu = {stage.name for stage in report.stages("cpu", tmp_path, "the", 1.0)}
    assert set(CASES) < set(names) and not {"build", "memcheck"} & on_cpu
    with pytest.raises(SystemExit, match="no such stage"):
        report.stages("cpu", tmp_path, "the", 1.0, ["everything"])


def test_mda_in_batches_against_one_by_one():
    """Asserts inside that both find the same order in the same number of passes."""
    found = mda.measure("test_vit", images=2, steps=3, window=4, seconds=0, rounds=2)
    assert found["passes"] == 2 * 3 * 4
    assert found["ratio"] > 0
    assert "the same order" in mda.line(found)


def test_the_share_of_the_forward_pass_is_measured(tmp_path):
    metrics.main("test_vit", ("aha", "localisation"), points=4, out=tmp_path / "shares.json")
    rows = json.loads((tmp_path / "shares.json").read_text())["protocols"]
    assert 0 < rows["aha"]["share"] <= 1
    assert rows["aha"]["forward_passes_per_image"] == 3 * (2 * 2 + 1)
    assert rows["localisation"]["share"] is None


def test_the_passes_of_a_refinement_are_those_it_takes(explainer, tmp_path):
    explainer.save_pretrained(tmp_path)
    spec = MethodSpec("aha", {"explainer": str(tmp_path), "steps": 2})
    clf = explainer.classifier
    # features, and two steps with 2·4 perturbed images forward and backward
    assert faithfulness.passes(spec, clf) == 1 + 2 * 2 * (2 * 4)


def test_photographs_leave_out_what_takes_more_passes(monkeypatch, tmp_path):
    clf = aha.Classifier.from_timm("test_vit", pretrained=False)
    setting = faithfulness.on_photographs(tmp_path, None)
    monkeypatch.setattr(faithfulness, "trained", lambda objective, *_: tmp_path / objective)
    shown = {spec.label for spec in faithfulness.rows(tmp_path, clf, setting, 0)}
    assert {"rollout", "attention_ig", "bi_attention, token", "aha T=0", "aha T=6"} <= shown
    assert not {"rise", "lime", "mda", "tis"} & shown

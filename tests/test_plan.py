"""The plan: its passes are counted ones, its law holds where a clock is exact, what is not measured is refused."""

import dataclasses
import json
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import aha
from aha import attributors, cli, plan
from aha.attributors import MethodSpec, count_passes
from aha.evaluation import evaluate

from .toys import TINY_DECODER, pictures, tiny_classifier

CONFIG = aha.TrainConfig(steps=4, batch_size=3, fractions=5, n_iters=3, precision="fp32", save_every=0, log_every=2)
STEP = plan.StepTime("a card", "fp32", "2.11", "tiny", "evidence", 2, 4, 2, 0.001, 2.0, 0.05, 0.2, (1.0, 0.9, 1.3))


def named():
    clf = tiny_classifier()
    clf.source["name"] = "tiny"
    assert clf.name == "tiny"
    return clf


@pytest.mark.parametrize("encoder", [None, "classifier"])
@pytest.mark.parametrize("changes", [{}, {"targets": 1}, {"shared_map": True}, {"accumulate": 3, "ends": False}])
def test_passes_of_a_training_are_those_that_are_counted(encoder, changes):
    clf, config = tiny_classifier(), dataclasses.replace(CONFIG, **changes)
    explainer = aha.Explainer.build(clf, encoder, decoder=TINY_DECODER if encoder else None, evidence=encoder is None)
    data = [{"image": image} for image in pictures(6)]
    trainer = aha.Trainer(explainer, clf, data, config)
    with count_passes(clf) as counted:
        trainer.fit(progress=False)
    told = 12 * plan.of_training(config, clf, explainer)
    assert (counted.forward, counted.backward) == pytest.approx((told.forward, told.backward))


def test_hours_follow_the_law():
    clf = named()
    explainer = aha.Explainer.build(clf)
    config = dataclasses.replace(CONFIG, steps=None, epochs=2, batch_size=8, fractions=10, accumulate=2, log_every=10)
    alone = plan.training(explainer, clf, config, 160, price=3.0, measured=STEP)
    # 2 maps of 2·8 + 2 forward and 2·8 backward passes, which take twice as long; half an image more is diagnosed
    seconds = 8 * (2 * (18 + 2 * 16) * 0.001 + 0.05) + 0.2 + 0.4 * 0.05
    assert alone.step == pytest.approx({"compute": seconds, "all_reduce": 0, "data_wait": 0})
    assert alone.hours == pytest.approx(40 * seconds / 3600) and alone.cost == pytest.approx(3 * alone.hours)
    (part,) = alone.parts
    assert (part.images, part.low, part.high) == (320, pytest.approx(0.9 * part.hours), pytest.approx(1.3 * part.hours))
    # as many perturbed images at a time as on the GPU that this share was measured on
    gpu, many = dataclasses.replace(STEP, excess=0.5), dataclasses.replace(config, chunk=128)
    wider = plan.training(explainer, clf, config, 160, measured=gpu).memory
    assert wider == plan.training(explainer, clf, many, 160, measured=gpu).memory
    here = plan.training(explainer, clf, many, 160, measured=STEP).memory
    extra = 0.5 * (here["total"] - here["weights"])
    assert wider["operations"] == pytest.approx(extra) and wider["total"] == pytest.approx(here["total"] + extra)
    fixed = plan.training(explainer, clf, config, 160, measured=dataclasses.replace(STEP, scratch=1e6)).memory
    assert fixed["operations"] == 1e6 and fixed["total"] == pytest.approx(alone.memory["total"] + 1e6)
    # of four processes each takes an image of both parts of a step, and all move 1.5 × the gradients
    many = plan.training(explainer, clf, config, 160, gpus=4, price=3.0, link=1e-3, read_seconds=0.5, measured=STEP)
    gradients = sum(4 * value.numel() for value in explainer.decoder.parameters())
    assert many.step["all_reduce"] == pytest.approx(1.5 * gradients / 1e6)
    assert many.step["data_wait"] == pytest.approx(2 * 0.5)  # without workers
    assert many.step["compute"] == pytest.approx(2 * (2 * (18 + 2 * 16) * 0.001 + 0.05) + 0.2 + 0.2 * 0.05)
    assert many.hours == pytest.approx(40 * sum(many.step.values()) / 3600)
    assert many.cost == pytest.approx(3 * 4 * many.hours)
    busy = dataclasses.replace(config, workers=4)
    waiting = plan.training(explainer, clf, busy, 160, read_seconds=1.0, measured=STEP).step["data_wait"]
    assert waiting == pytest.approx(8 * 1.0 / 4 - seconds)
    assert plan.training(explainer, clf, busy, 160, read_seconds=0.1, measured=STEP).step["data_wait"] == 0
    assert any(
        "not counted: give --link" in note for note in plan.training(explainer, clf, config, 9, 2, measured=STEP).notes
    )
    with pytest.raises(ValueError, match="less than one image for 9 processes"):
        plan.training(explainer, clf, config, 9, 9, measured=STEP)


def test_a_step_is_measured_smaller_where_it_takes_long():
    clf = named()
    config = dataclasses.replace(CONFIG, batch_size=6, accumulate=3, fractions=12)
    whole = plan.measure_step(aha.Explainer.build(clf), clf, config, seconds=60)
    assert (whole.batch, whole.fractions, whole.maps, len(whole.seconds)) == (6, 12, 2, plan.ROUNDS)
    assert 0 < whole.per_pass < whole.per_image and whole.encoder == "evidence"
    small = plan.measure_step(aha.Explainer.build(clf), clf, config, seconds=1e-6)
    assert (small.batch, small.fractions) == (1, 4)
    assert whole.excess is None and (whole.scratch is None or whole.scratch >= 0)
    # and it adds up to what was taken
    made = plan.training(aha.Explainer.build(clf), clf, config, 6, measured=whole)
    assert made.step["compute"] == pytest.approx(sorted(whole.seconds)[1], rel=0.5)


def test_flops_are_those_of_the_counter_of_torch():
    clf = tiny_classifier()
    for module in clf.module.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    pixels = pictures(1).requires_grad_()
    with FlopCounterMode(display=False) as counted:
        out = clf(pixels)
    forward = counted.get_total_flops()
    with FlopCounterMode(display=False) as counted:
        torch.autograd.grad(out.sum(), pixels)
    assert plan.flops_of_a_pass(clf) == (forward, counted.get_total_flops())
    assert forward > 2 * 17 * 2 * 12 * 32 * 32  # two blocks of 17 tokens


def test_memory_of_graphs_grows_with_what_they_hold():
    clf = tiny_classifier()
    explainer = aha.Explainer.build(clf)
    one, more = (
        plan.training_memory(explainer, clf, dataclasses.replace(CONFIG, batch_size=8, chunk=chunk))
        for chunk in (8, 16)
    )
    assert more["graph of the classifier"] == 2 * one["graph of the classifier"]
    parts = plan.training_memory(explainer, clf, dataclasses.replace(CONFIG, batch_size=8, chunk=8, accumulate=4))
    assert one["graph of the decoder"] == 4 * parts["graph of the decoder"] > 0
    assert one["gradients and moments"] == 12 * sum(value.numel() for value in explainer.decoder.parameters())
    assert one["total"] == sum(value for name, value in one.items() if name != "total")


def test_an_evaluation_counts_what_evaluate_takes():
    clf = tiny_classifier()
    specs = [MethodSpec.parse(text) for text in ("rollout", "slow@rise:n_masks=40")]
    made = plan.evaluation(clf, specs, 4, gpus=2, price=1.0, seconds=0.02)
    data = [{"image": image, "label": -1} for image in pictures(4)]
    with count_passes(clf) as counted:
        evaluate(clf, {spec.label: spec.create(clf, 0) for spec in specs}, data)
    assert sum(part.images * part.forward for part in made.parts) == counted.forward
    assert [part.what for part in made.parts] == ["what all methods share", "rollout", "slow"]
    assert made.parts[0].how == "passes"
    for part in made.parts:
        assert 0 < part.low <= part.hours <= part.high
    assert made.cost == pytest.approx(2 * made.hours)
    twice = plan.evaluation(clf, specs, 4, targets=2, seconds=0.02)
    assert [part.images for part in twice.parts] == [8, 8, 8]


def test_the_command_prints_a_table_and_its_json_serves_another_machine(tmp_path, capsys):
    fast = [
        "plan",
        "--classifier",
        "test_vit",
        "--images",
        "100",
        "--batch-size",
        "2",
        "--fractions",
        "4",
        "--n-iters",
        "3",
    ]
    assert cli.main([*fast, "--json"]) == 0
    text = capsys.readouterr().out
    found = json.loads(text)
    assert found["parts"][0]["images"] == 100 and found["hours"] > 0 and found["cost"] is None
    assert found["memory"]["total"] > 0 and found["not_counted"]
    found["measured"]["device"] = "another card"
    (tmp_path / "card.json").write_text(json.dumps(found))
    elsewhere = [*fast, "--measured", str(tmp_path / "card.json"), "--gpus", "2", "--price", "4"]
    assert cli.main(elsewhere) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for part in ("2 × another card", "training", "all-reduce of", "not counted: fetching"):
        assert part in printed
    assert cli.main([*elsewhere, "--targets", "1"]) == 1
    assert "not measured: the step is of test_vit with evidence, 2 maps an image" in capsys.readouterr().err
    assert cli.main([*elsewhere, "--methods", "rollout"]) == 1
    assert "not measured: an evaluation on another card" in capsys.readouterr().err
    for broken in (
        "{}",
        "[]",
        "not json",
        json.dumps({"measured": {"seconds": [1]}}),
        text.replace('"per_pass": ', '"per_pass": -'),
    ):
        (tmp_path / "card.json").write_text(broken)
        assert cli.main(elsewhere) == 1
        assert "holds no measured step" in capsys.readouterr().err
    assert cli.main([*fast, "--objective", "fastshap"]) == 1
    assert "plans are of the objective 'ranking'" in capsys.readouterr().err


def test_bad_numbers_are_one_line():
    clf = named()
    explainer = aha.Explainer.build(clf)
    for options in ({"images": 0}, {"gpus": 0}, {"price": -1.0}, {"link": 0.0}, {"link": math.nan}):
        with pytest.raises(ValueError, match=next(iter(options))):
            plan.training(explainer, clf, CONFIG, **{"images": 5, "measured": STEP, **options})
    assert attributors.available()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("device", "a\ncard"),
        ("classifier", 3),
        ("batch", 0),
        ("maps", 1.5),
        ("per_pass", -1.0),
        ("backward", "x"),
        ("per_step", float("nan")),
        ("seconds", []),
        ("seconds", [0.0, 0.0]),
        ("excess", {}),
        ("scratch", -1.0),
        ("more", 1),
    ],
)
def test_a_measured_step_that_is_none(tmp_path, name, value):
    file = tmp_path / "step.json"
    file.write_text(json.dumps({"measured": {**dataclasses.asdict(STEP), "excess": 0.1, name: value}}))
    with pytest.raises(
        ValueError, match=f"holds no measured step \\(.*{name}.*: give the output of aha plan"
    ) as caught:
        plan.step_from_json(file)
    assert "\n" not in str(caught.value)
    file.write_text(json.dumps({"measured": {**dataclasses.asdict(STEP), "excess": 0.1}}))
    assert plan.step_from_json(file) == dataclasses.replace(STEP, excess=0.1)

"""Training: it learns, resumes bit for bit, and meets bad input at the door."""

import dataclasses
import json
import math
import shutil
import time

import pytest
import torch

import aha
from aha.regions import default_cells
from aha.training import checkpoint
from aha.training.schedule import learning_rate, temperature
from aha.training.trainer import StepSampler, places

from .. import faults
from ..toys import TINY_DECODER, tiny_classifier

CONFIG = aha.TrainConfig(
    steps=6, batch_size=4, accumulate=2, fractions=5, n_iters=5, save_every=0, log_every=2, precision="fp32"
)
# these biases only shift the map, which changes no ranking: their gradient is rounding noise
SHIFTS = ("head.6.bias", "head.7.bias")


class Images(torch.utils.data.Dataset):
    """Random images, one of them bad on request."""

    def __init__(self, size=10, bad=None):
        self.size, self.bad = size, bad

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(index))
        if index == self.bad:
            image[0, 0, 0] = float("nan")
        return {"image": image, "label": index % 5}


class SlowImages(Images):
    """Images that take 30 ms each to read."""

    def __getitem__(self, index):
        time.sleep(0.03)
        return super().__getitem__(index)


def fresh():
    clf = tiny_classifier()
    torch.manual_seed(3)
    return aha.Explainer.build(clf, evidence=False, decoder=TINY_DECODER), clf


def fit(config, data=None, **options):
    explainer, clf = fresh()
    aha.Trainer(explainer, clf, data or Images(), config).fit(progress=False, **options)
    return explainer.decoder.state_dict()


@pytest.mark.parametrize("scores", ["standardized", "free"])
def test_resumed_is_uninterrupted_bit_for_bit(tmp_path, scores):
    config = dataclasses.replace(CONFIG, scores=scores, output=str(tmp_path / "whole"), save_every=3)
    whole = fit(config)
    first = tmp_path / "whole" / "checkpoints" / "step_00000003"
    resumed = fit(dataclasses.replace(config, output=str(tmp_path / "again")), resume=first)
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())
    # and the run did depend on the checkpoint: from the start of the data it would end elsewhere
    other = fit(dataclasses.replace(config, output=None, seed=7))
    assert any(not torch.equal(value, other[key]) for key, value in whole.items())


def test_resume_finds_the_newest_and_a_killed_run_loses_nothing(tmp_path):
    config = dataclasses.replace(CONFIG, output=str(tmp_path), save_every=2)
    explainer, clf = fresh()
    trainer = aha.Trainer(explainer, clf, Images(), config)
    step = trainer._train_step

    def interrupted(batch):
        if trainer.step == 5:
            raise KeyboardInterrupt
        return step(batch)

    trainer._train_step = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(progress=False)
    assert [path.name for path in checkpoint.available(tmp_path / "checkpoints")] == [
        "step_00000002",
        "step_00000004",
    ]
    resumed = fit(config, resume=True)
    whole = fit(dataclasses.replace(config, output=None))
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


@pytest.mark.parametrize(("average", "steps"), [(None, 4), (0.5, 3), (1, 6), (0, 0)])
def test_the_explainer_gets_the_mean_of_the_last_weights(tmp_path, average, steps):
    clf = tiny_classifier()
    config = dataclasses.replace(CONFIG, average=average, output=str(tmp_path), save_every=4)
    trainer = aha.Trainer(aha.Explainer.build(clf), clf, Images(), config)
    step, path = trainer._train_step, []

    def followed(batch):
        record = step(batch)
        state = trainer.explainer.decoder.state_dict()
        path.append({name: value.double() for name, value in state.items() if value.is_floating_point()})
        return record

    trainer._train_step = followed
    made = trainer.fit(progress=False).decoder.state_dict()
    last = path[-max(1, steps) :]
    for name in path[0]:
        torch.testing.assert_close(made[name].double(), torch.stack([of[name] for of in last]).mean(dim=0))
    # a run goes on from where it is, not from the mean, before and after its last step
    kept = checkpoint.load(tmp_path / "checkpoints" / "step_00000006")
    assert all(torch.equal(kept.decoder[name].double(), value) for name, value in path[-1].items())
    for number in (4, 6):
        again = aha.Trainer(aha.Explainer.build(clf), clf, Images(), dataclasses.replace(config, output=None))
        resumed = again.fit(resume=tmp_path / f"checkpoints/step_{number:08d}", progress=False).decoder.state_dict()
        assert all(torch.equal(value, resumed[name]) for name, value in made.items())


def test_with_an_encoder_the_last_weights_are_taken_as_published():
    explainer, clf = fresh()
    trainer = aha.Trainer(explainer, clf, Images(), CONFIG)
    trainer.fit(progress=False)
    assert not trainer.mean.steps


def test_accumulation_is_the_mean_over_the_parts():
    # the head's batch norm sees smaller parts, so only the objective's own averaging can be compared: freeze it
    def run(accumulate):
        explainer, clf = fresh()
        for module in explainer.decoder.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.train = lambda mode=True: None
                module.training = False
        config = dataclasses.replace(CONFIG, steps=1, accumulate=accumulate, clip=1e9, lr=1e-3)
        trainer = aha.Trainer(explainer, clf, Images(), config)
        gradients = {}
        original = trainer.optimizer.step
        trainer.optimizer.step = lambda: (
            gradients.update({n: p.grad.clone() for n, p in explainer.decoder.named_parameters()}),
            original(),
        )
        trainer.fit(progress=False)
        return gradients

    whole, parts = run(1), run(4)
    for name, gradient in whole.items():
        if name in SHIFTS:
            continue
        assert (parts[name] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-6, name


@pytest.mark.slow
def test_it_learns(tmp_path):
    config = dataclasses.replace(
        CONFIG, steps=60, accumulate=1, batch_size=8, lr=3e-3, output=str(tmp_path), log_every=1, cells=(4, 6)
    )
    fit(config, Images(16))
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == list(range(1, 61))
    first, last = log[:15], log[-15:]
    assert sum(r["loss"] for r in last) < sum(r["loss"] for r in first)
    names = {"loss", "deletion", "insertion", "scores_std", "row_entropy", "images_per_second", "lr", "tau"}
    assert names <= set(log[0])
    assert all(0 <= record["row_entropy"] <= 1 for record in log)
    assert log[-1]["row_entropy"] < log[0]["row_entropy"]


def test_tensorboard_reads_the_log(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = dataclasses.replace(CONFIG, output=str(tmp_path), save_every=4)
    fit(config)

    def steps():
        events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        assert [event.value for event in events.Scalars("loss")] == pytest.approx(
            [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
        )
        return [event.step for event in events.Scalars("loss")]

    assert steps() == [2, 4, 6]
    (first,) = (tmp_path / "tensorboard").iterdir()
    first.rename(first.with_name(first.name.replace("tfevents.", "tfevents.0")))  # of a while ago
    # the steps after the checkpoint are made again, and shown once
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000006")
    fit(config, resume=True)
    assert steps() == [2, 4, 6]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoints",
        "explainer",
        "log.jsonl",
        "tensorboard",
    ]


def test_the_trained_explainer_is_saved_with_its_settings(tmp_path):
    explainer, clf = fresh()
    config = dataclasses.replace(CONFIG, output=str(tmp_path), tau=(0.1, 0.02), cells=(4, 6))
    aha.Trainer(explainer, clf, Images(), config).fit(progress=False)
    loaded = aha.Explainer.from_pretrained(tmp_path / "explainer", clf)
    assert (loaded.settings["temperature"], loaded.settings["cells"]) == (0.02, [4, 6])
    image = Images()[0]["image"][None]
    assert torch.equal(loaded.attribute(image), explainer.attribute(image))


@pytest.mark.parametrize("options", [{"shared_map": True}, {"targets": 1}, {"noise": 0.5}, {"offset": False}])
def test_options_run(options):
    assert all(torch.isfinite(value).all() for value in fit(dataclasses.replace(CONFIG, **options)).values())


@pytest.mark.parametrize("options", [{"tau_schedule": "linear"}, {"ends": False}, {"smooth": 0.0}])
def test_what_the_ablations_change_changes_the_training(options):
    plain, other = fit(CONFIG), fit(dataclasses.replace(CONFIG, **options))
    assert any(not torch.equal(plain[name], other[name]) for name in plain)


def test_targets_are_the_prediction_and_the_label_or_runner_up():
    explainer, clf = fresh()
    images = torch.stack([Images()[i]["image"] for i in range(4)])
    top = clf(images).topk(2).indices
    trainer = aha.Trainer(explainer, clf, Images(), CONFIG)
    assert torch.equal(trainer._targets(trainer.classifier, images, None), top)
    assert torch.equal(trainer._targets(trainer.classifier, images, top[:, 0]), top)  # right: runner-up
    wrong = (top[:, 0] + 1) % 5
    assert torch.equal(trainer._targets(trainer.classifier, images, wrong)[:, 1], wrong)
    assert torch.equal(trainer._targets(trainer.classifier, images, torch.full((4,), -1)), top)  # unknown label


def test_schedules():
    rates = [learning_rate(step, 100, 1.0) for step in range(100)]
    assert math.isclose(rates[0], 1 / 25)
    assert math.isclose(rates[6], 1.0)
    assert math.isclose(rates[-1], 1 / 25e4)
    assert rates[:7] == sorted(rates[:7])
    assert rates[6:] == sorted(rates[6:], reverse=True)
    assert [temperature(s, 3, 1.0, 0.3, "linear") for s in range(3)] == pytest.approx([1.0, 0.65, 0.3])
    assert [temperature(s, 3, 0.05, 0.005, "geometric") for s in range(3)] == pytest.approx([0.05, 0.0158114, 0.005])


def test_sampler_visits_every_item_once_per_epoch_in_any_division():
    whole = [i for batch in StepSampler(12, 4, range(6), 0) for i in batch]
    assert sorted(whole[:12]) == sorted(whole[12:]) == list(range(12))
    assert whole[:12] != whole[12:]
    later = [i for batch in StepSampler(12, 4, range(2, 6), 0) for i in batch]
    assert later == whole[8:]
    ranks = [list(StepSampler(12, 4, range(6), 0, places(4, 1, rank, 2))) for rank in range(2)]
    assert [i for pair in zip(*ranks, strict=True) for batch in pair for i in batch] == whole
    virtual = [i for batch in StepSampler(12, 4, range(6), 0, virtual=True) for i in batch]
    assert [i % 12 for i in virtual] == whole
    assert sorted(virtual) == list(range(24))


def test_default_cells():
    assert default_cells(224, 224) == (7, 28)
    assert default_cells(64, 64) == (7, 16)
    assert default_cells(32, 48) == (7, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 5}, "multiple of accumulate"),
        ({"targets": 3}, "give 1 .prediction. or 2"),
        ({"scores": "raw"}, "choose one of"),
        ({"tau_schedule": "steep"}, "choose linear or geometric"),
        ({"references": ("white",)}, "choose one or more of black, mean, blur"),
        ({"cells": (28, 7)}, "the smaller number first"),
        *(
            ({name: value}, f"^{name}=")
            for name, values in {
                "batch_size": (0, 1.5, 10**30),
                "accumulate": (0,),
                "steps": (0, -1, 10**30),
                "epochs": (-1, 0, math.nan, math.inf, "x"),
                "lr": (0, -1, math.nan, "x"),
                "weight_decay": (-1, math.nan, "x"),
                "clip": (0, -1, math.nan, None),
                "warmup": (-0.1, 1.1, math.nan),
                "fractions": (1, 2.5, 10**12),
                "cells": (5, (7,), (0, 1), (7, 10**12), "ab"),
                "tau": (5, (1,), (0, 0), (1, math.inf), ("a", 1)),
                "noise": (-1, math.nan, "x"),
                "smooth": (-1, math.nan),
                "n_iters": (0, 1.5),
                "weight_deletion": (-1, math.nan),
                "weight_insertion": (math.inf,),
                "weight_regularizer": ("x",),
                "references": (3, "black"),
                "coalitions": (0,),
                "players": (3, (0, 1)),
                "dropped_roles": (-1, 1, math.nan),
                "average": (-0.1, 1.1, math.nan),
                "chunk": (0, "x"),
                "workers": (-1, 10**9),
                "log_every": (0,),
                "save_every": (-1,),
                "seed": (-1, 2**70),
                "offset": ("no",),
                "output": (3,),
            }.items()
            for value in values
        ),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        dataclasses.replace(CONFIG, **options)
    assert "\n" not in str(caught.value)


def test_bad_data(tmp_path):
    explainer, clf = fresh()
    with pytest.raises(ValueError, match="data set is empty"):
        aha.Trainer(explainer, clf, Images(0), CONFIG)
    with pytest.raises(ValueError, match="NaN"):
        fit(CONFIG, Images(4, bad=2))


def test_bad_checkpoints(tmp_path):
    config = dataclasses.replace(CONFIG, output=str(tmp_path), save_every=3)
    fit(config)
    newest = checkpoint.available(tmp_path / "checkpoints")[-1]
    with pytest.raises(ValueError, match=r"other settings \(lr\)"):
        fit(dataclasses.replace(config, lr=1e-5), resume=True)
    faults.cut(newest / "state.safetensors")
    with pytest.raises(ValueError, match=r"cannot be used .*damaged") as caught:
        fit(config, resume=newest)
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        fit(config, resume=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="needs an output folder"):
        fit(dataclasses.replace(config, output=None), resume=True)


def test_the_log_says_how_long_a_step_waits_for_data(tmp_path):
    config = dataclasses.replace(CONFIG, output=str(tmp_path))
    fit(config, SlowImages())
    for line in (tmp_path / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        seconds = config.log_every * config.batch_size / record["images_per_second"]
        waited = record["data_wait"] * seconds
        assert 0.03 * config.log_every * config.batch_size <= waited < seconds

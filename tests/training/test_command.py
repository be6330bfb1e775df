"""``aha train``: exit codes of a run that a signal ends, the same command twice, one folder twice."""

import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from aha import lock
from aha.cli import main
from aha.training import Trainer

TRAIN = ["train", "--classifier", "scenes", "--fresh", "--steps", "3", "--batch-size", "2", "--fractions", "3"]
TRAIN += ["--targets", "1", "--n-iters", "3", "--cells", "3", "4", "--limit", "8"]


def train(output, *more):
    return main([*TRAIN, "--output", str(output), *more])


def weights(output):
    return load_file(output / "explainer" / "decoder.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    output = tmp_path_factory.mktemp("whole")
    assert train(output) == 0
    return weights(output)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_same_command_gives_the_same_weights(whole, tmp_path):
    assert train(tmp_path / "again") == 0
    assert equal(weights(tmp_path / "again"), whole)
    assert train(tmp_path / "other", "--seed", "1") == 0
    assert not equal(weights(tmp_path / "other"), whole)


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGTERM, 75, "aha train: ended by SIGTERM at step 2 of 3"), (signal.SIGINT, 130, "interrupted by SIGINT")],
)
def test_a_signal_is_an_exit_code_and_the_run_goes_on(whole, tmp_path, monkeypatch, capsys, number, code, said):
    step = Trainer._train_step

    def signalled(self, batch):
        if self.step == 1:
            os.kill(os.getpid(), number)
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", signalled)
        assert train(tmp_path) == code
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("aha")]
    assert said in line
    assert line.endswith(f"resume continues from {tmp_path}/checkpoints/step_00000002")
    assert train(tmp_path) == 1  # in a used folder
    assert "holds a run: resume it (--resume, resume=True), or give another folder" in capsys.readouterr().err
    with lock.held(tmp_path):
        assert train(tmp_path, "--resume") == 1
    assert f"in use by process {os.getpid()} on " in capsys.readouterr().err
    assert train(tmp_path, "--resume") == 0
    assert equal(weights(tmp_path), whole)

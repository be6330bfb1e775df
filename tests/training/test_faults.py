"""Whatever goes wrong while a run trains and saves, it is continued to the same end, bit for bit, or refused."""

import dataclasses
import errno
import os
import re
import shutil
import signal
import threading
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import aha
from aha import files, lock
from aha.data import ImageFolder
from aha.training import checkpoint
from aha.training.trainer import Log

from .. import faults, launch
from ..toys import TINY_DECODER, tiny_classifier
from .test_training import Images

pytest.importorskip("tensorboard.compat.proto.event_pb2")  # here, not in every child

CONFIG = aha.TrainConfig(
    steps=3, batch_size=2, fractions=3, n_iters=3, targets=1, cells=(3, 4), save_every=1, log_every=1, precision="fp32"
)
pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork") or torch.cuda.is_available(), reason="children are forked, which CUDA does not survive"
)


def train(output, resume=False, data=None, clf=None, decoder=TINY_DECODER, **changes):
    """The explainer's state after training."""
    clf = clf or tiny_classifier()
    explainer = aha.Explainer.build(clf, evidence=False, decoder=decoder)
    config = dataclasses.replace(CONFIG, output=output and str(output), **changes)
    trainer = aha.Trainer(explainer, clf, data or Images(), config)
    trainer.fit(resume=resume, progress=False)
    return trainer


def state(output):
    """What a finished run left: the weights of its explainer, and its settings."""
    found = aha.Explainer.from_pretrained(output / "explainer", tiny_classifier())
    return {k: v.numpy() for k, v in found.decoder.state_dict().items()}, found.settings


def same(one, other):
    return one[1] == other[1] and all(np.array_equal(one[0][k], other[0][k]) for k in one[0].keys() | other[0].keys())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run, and what it changes on the disk."""
    output = tmp_path_factory.mktemp("whole")
    changes = faults.changes(lambda: (train(output), None)[1], output)
    return output, changes, faults.forked(lambda: state(output)).value


def continued(output, whole, warns=None, **options):
    """Resume in ``output`` as a user would and compare with the uninterrupted run; nothing is left over."""

    def work():
        with warnings.catch_warnings(record=True) as said:
            train(output, resume=True, **options)
        said = [str(warning.message) for warning in said]
        assert [bool(re.search(warns or "", line)) for line in said] == [True] * bool(warns), said
        left = sorted(str(path.relative_to(output)) for path in output.rglob(".*"))
        steps = [line.split(",")[0] for line in (output / "log.jsonl").read_text().splitlines()]
        return same(state(output), whole[2]), left, steps

    done = faults.forked(work)
    assert done.error is None, f"{output}: {done.trace}"
    assert done.value == (True, [], [f'{{"step": {step}' for step in (1, 2, 3)])


@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_any_change(whole, tmp_path, every):
    _, changes, _ = whole
    writes = [number for number, change in enumerate(changes) if change.startswith("write ")]
    points = [(number, False) for number in range(0, len(changes), every)]
    for number, torn in [*points, *((number, True) for number in writes[::every])]:
        output = tmp_path / f"{number} {torn}"
        output.mkdir()
        faults.killed(lambda output=output: train(output), output, number, torn)
        continued(output, whole)


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("every", [11, pytest.param(3, marks=pytest.mark.slow)])
def test_a_disk_that_refuses_at_any_change(whole, tmp_path, every, reason):
    for number in range(0, len(whole[1]), every):
        output = tmp_path / str(number)
        output.mkdir()
        done = faults.refused(lambda output=output: train(output), output, number, reason)
        if done.error is None:  # all that was left to do was to remove something
            continue
        assert isinstance(done.error, OSError), done.trace
        assert str(output) in str(done.error)
        assert "\n" not in str(done.error)
        if reason != errno.EROFS:  # where nothing can be removed
            assert not list(output.rglob("*.partial"))
        continued(output, whole)


@pytest.fixture(scope="module")
def finished(whole, tmp_path_factory):
    """Copies of the finished run."""
    return lambda: shutil.copytree(whole[0], tmp_path_factory.mktemp("copy") / "run")


def spoiled(path, how):
    if how == "removed":
        path.unlink()
    elif how == "emptied":
        faults.cut(path, 0)
    elif how == "cut":
        faults.cut(path)
    elif how == "longer":
        path.write_bytes(path.read_bytes() + b"0")
    else:
        faults.flipped(path, how)


HOW = ["removed", "emptied", "cut", "longer", 3, 1001, 54321, 10**6 + 1, -30]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", ["state.safetensors", "run.json"])
def test_a_damaged_newest_checkpoint_falls_back(finished, whole, name, how):
    output = finished()
    spoiled(output / "checkpoints" / "step_00000003" / name, how)
    continued(output, whole, r"step_00000003 cannot be used .*: resuming from the one before, step_00000002$")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoint.load(output / "checkpoints" / "step_00000003").step == 3  # made again


def test_an_edited_step_is_refused(finished, whole):
    output = finished()
    record = output / "checkpoints" / "step_00000003" / "run.json"
    record.write_text(record.read_text().replace('"step": 3', '"step": 999'))
    continued(output, whole, "run.json was changed or damaged")


def test_without_one_whole_checkpoint_nothing_is_begun_again(finished):
    output = finished()
    for path in output.glob("checkpoints/*/run.json"):
        faults.cut(path)
    with pytest.raises(ValueError, match=r"step_00000003 cannot be used .*, nor can the 1 before it: start again in"):
        train(output, resume=True)


def test_an_older_pickle_is_not_read(finished):
    output = finished()
    for path in (output / "checkpoints").iterdir():
        (path / "state.safetensors").rename(path / "state.pt")
    with pytest.raises(ValueError, match="of an older version, as a pickle, which is not read"):
        train(output, resume=True)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", ["log.jsonl", "explainer/config.json", "explainer/decoder.safetensors"])
def test_what_a_run_does_not_read_is_made_again(finished, whole, name, how):
    output = finished()
    spoiled(output / name, how)

    def work():
        train(output, resume=True)
        return same(state(output), whole[2])

    assert faults.forked(work).value


def test_a_finished_run_returns_its_explainer(finished, whole):
    output = finished()
    trainer = train(output, resume=True)
    assert trainer.step == CONFIG.steps
    weights = trainer.explainer.decoder.state_dict()
    assert all(np.array_equal(weights[name].numpy(), value) for name, value in whole[2][0].items())


@pytest.mark.parametrize("left", ["all", "checkpoints", "explainer"])
def test_a_used_folder_is_not_begun_in(finished, left):
    output = finished()
    for name in {"checkpoints", "explainer"} - {left}:
        if left != "all":
            shutil.rmtree(output / name)
    before = sorted(output.rglob("*"))
    with pytest.raises(ValueError, match=r"holds a run: resume it \(--resume, resume=True\), or give another folder$"):
        train(output)
    if left == "explainer":
        with pytest.raises(ValueError, match="holds an explainer and no checkpoint"):
            train(output, resume=True)
    assert sorted(output.rglob("*")) == before


def test_runs_are_not_mixed(finished, tmp_path):
    output = finished()
    other = tmp_path / "other"
    train(other, seed=7)
    theirs = other / "checkpoints" / "step_00000002"
    with pytest.raises(ValueError, match=r"holds another run than .*step_00000002: give another output folder"):
        train(output, resume=theirs, seed=7)
    shutil.copytree(theirs, output / "checkpoints" / "step_00000001")
    with pytest.raises(ValueError, match="holds checkpoints of 2 runs: give the one to resume"):
        train(output, resume=True)
    # a longer run beside them would remove its own checkpoints only
    record = checkpoint.load(output / "checkpoints" / "step_00000003")
    for step in (4, 5, 6):
        checkpoint.save(output / "checkpoints", dataclasses.replace(record, step=step))
    kept = [path.name for path in checkpoint.available(output / "checkpoints")]
    assert kept == [checkpoint.name(step) for step in (1, 5, 6)]


def test_a_checkpoint_is_never_removed_as_it_is_written(tmp_path):
    empty = {"state": {}, "param_groups": []}
    for step in (10, 20, 3):  # the run has gone back, as after a damaged checkpoint
        states = {"w": torch.ones(2)}, empty, {"total": None, "images": 0.0}, {"mean": {}, "steps": 0}
        found = checkpoint.Checkpoint("a", step, {}, *states, ["one"])
        checkpoint.save(tmp_path, found)
    assert [path.name for path in checkpoint.available(tmp_path)] == [checkpoint.name(step) for step in (3, 10, 20)]
    assert checkpoint.load(tmp_path / checkpoint.name(3)).failures == ["one"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"clf": 1}, "classifier"),
        ({"data": 12}, "data"),
        ({"decoder": dataclasses.replace(TINY_DECODER, head=16)}, "decoder"),
        ({"lr": 1e-5}, "lr"),
        ({"seed": 5}, "seed"),
        ({"batch_size": 3}, "batch_size"),
        ({"steps": 5}, "steps, total"),
    ],
)
def test_another_run_is_not_resumed(finished, changes, named):
    changes = {**changes}
    if "clf" in changes:
        changes["clf"] = tiny_classifier(seed=changes["clf"])
    if "data" in changes:
        changes["data"] = Images(changes["data"])
    with pytest.raises(
        ValueError, match=rf"made with other settings \({named}\): resume with the same, or start in an"
    ):
        train(finished(), resume=True, **changes)


def test_two_runs_in_one_folder(tmp_path):
    with lock.held(tmp_path), pytest.raises(lock.FolderInUseError, match=f"in use by process {os.getpid()} on "):
        train(tmp_path)
    assert not list(tmp_path.iterdir())


class Signalled(Images):
    """Its ``at``-th image is read while a signal comes, ``times`` times."""

    def __init__(self, number, at, times=1):
        super().__init__()
        self.number, self.at, self.times, self.seen = number, at, times, 0

    def __getitem__(self, index):
        self.seen += 1
        if self.seen == self.at:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)
        return super().__getitem__(index)

    def identity(self, content=True):
        return {"type": "Images", "images": len(self)}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("save_every", [0, 1])
def test_a_signal_keeps_the_step(whole, tmp_path, number, save_every):
    before = signal.getsignal(number)
    kind = KeyboardInterrupt if number == signal.SIGINT else aha.training.Interrupted
    with pytest.raises(kind, match=rf"{number.name} at step 2 of 3; resume continues from .*step_00000002$") as caught:
        train(tmp_path, data=Signalled(number, 4), save_every=save_every)
    assert getattr(caught.value, "code", 75) == 75
    assert signal.getsignal(number) is before
    assert not (tmp_path / "explainer").exists()
    continued(tmp_path, whole)


def test_a_second_interrupt_does_not_wait(tmp_path):
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        train(tmp_path, data=Signalled(signal.SIGINT, 4, times=2))
    assert [path.name for path in checkpoint.available(tmp_path / "checkpoints")] == ["step_00000001"]
    assert not (tmp_path / lock.NAME).exists()


def test_a_signal_to_the_workers_too(whole, tmp_path):
    """As Slurm sends it: those that read images go on, and what they were asked for is there."""
    data = Signalled(signal.SIGTERM, 2)  # the second image that the worker reads
    done = faults.forked(lambda: train(tmp_path, data=data, workers=1).step)
    assert (done.error, done.value) == (None, 3), done.trace
    assert same(state(tmp_path), whole[2])


def test_a_signal_outside_the_main_thread_is_left_alone(tmp_path):
    found = []
    thread = threading.Thread(target=lambda: found.append(train(tmp_path).step))
    thread.start()
    thread.join()
    assert found == [3]


def test_a_killed_worker_is_one_line(tmp_path):
    data = Signalled(signal.SIGKILL, 4)
    error = faults.forked(lambda: train(tmp_path, data=data, workers=1).step).error
    assert isinstance(error, ChildProcessError)
    assert re.fullmatch(r"a process that reads images was killed \(.*\), .*: give fewer workers; .*", str(error))


def test_a_log_that_cannot_be_written_is_one_line(tmp_path, capfd):
    os.symlink("/dev/full", tmp_path / "log.jsonl")
    with pytest.raises(files.WriteError, match=r"log\.jsonl cannot be written, the disk is full: .*; no checkpoint"):
        train(tmp_path)
    assert "Traceback" not in capfd.readouterr().err


def test_events_that_cannot_be_written_are_one_line_at_once(tmp_path):
    log = Log(tmp_path, 0, 2, progress=False)
    log.write(1, {"loss": 1.0})
    (path,) = (tmp_path / "tensorboard").iterdir()
    with open("/dev/full", "wb", buffering=0) as full:
        os.dup2(full.fileno(), log.events._file.fileno())
        with pytest.raises(files.WriteError, match="the disk is full"):
            log.write(2, {"loss": 1.0})
    log.close()
    assert path.stat().st_size > 0


def test_a_loss_that_is_not_finite_keeps_nothing_bad(tmp_path):
    with pytest.raises(FloatingPointError, match=r"not finite at step \d: lower the learning rate; (.*)") as caught:
        train(tmp_path, lr=1e30, clip=1e30, steps=9, warmup=0.0)
    newest = checkpoint.available(tmp_path / "checkpoints")[-1]
    assert str(caught.value).endswith(f"resume continues from {newest}")
    kept = checkpoint.load(newest)
    assert all(torch.isfinite(value).all() for value in kept.decoder.values())
    with pytest.raises(FloatingPointError, match=r"nothing is kept, for there is no output folder$"):
        train(None, lr=1e30, clip=1e30, steps=9, warmup=0.0)


def photographs(folder, bad):
    folder.mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    for number in bad:
        faults.cut(folder / f"{number}.png")
    return ImageFolder(folder, 32)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_is_skipped_and_named_also_after_a_resume(tmp_path, workers):
    data = photographs(tmp_path / "in", [2])
    trainer = train(tmp_path / "run", data=data, batch_size=4, workers=workers)
    (line,) = trainer.failures
    assert str(tmp_path / "in" / "2.png") in line
    assert train(tmp_path / "run", data=data, batch_size=4, resume=True).failures == [line]  # which reads no image


@pytest.mark.parametrize("workers", [0, 1])
def test_where_no_image_can_be_read_one_line_says_so(tmp_path, workers):
    data = photographs(tmp_path / "in", range(4))
    with pytest.raises(ValueError, match=r"^none of the 4 images can be read; the first: .*/\d\.png") as caught:
        train(tmp_path / "run", data=data, batch_size=2, workers=workers)
    assert "\n" not in str(caught.value)


def test_equal_seeds_are_equal_explainers():
    clf = tiny_classifier()
    torch.manual_seed(11)
    first = aha.Explainer.build(clf, evidence=False, decoder=TINY_DECODER, seed=4)
    drawn = torch.rand(1)
    torch.manual_seed(11)
    assert torch.equal(torch.rand(1), drawn)  # the caller's generator is left as it is
    torch.manual_seed(12)
    again, other = (
        aha.Explainer.build(clf, evidence=False, decoder=TINY_DECODER, seed=seed).decoder.state_dict()
        for seed in (4, 5)
    )
    for name, value in first.decoder.state_dict().items():
        assert torch.equal(again[name], value)
    assert any(not torch.equal(other[name], value) for name, value in again.items())


SCRIPT = """
import os, signal, sys, torch
from tests.training.test_faults import Signalled, train
asked = sys.argv[2] == "asked" and os.environ["RANK"] == "1"  # one of two is told to end
try:
    train(sys.argv[1], data=Signalled(signal.SIGTERM, 2 if asked else -1), resume=True, save_every=0)
finally:
    torch.distributed.destroy_process_group()  # which gloo wants before the interpreter ends
"""


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_ends_both_at_one_step(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)

    def run(output, how):
        command = [*launch.several(2), tmp_path / "script.py", output, how]
        done = launch.finished(command, ACCELERATE_USE_CPU="true")
        return done.returncode, done.stderr

    code, said = run(tmp_path / "asked", "asked")
    assert code == 1  # the launcher's own
    assert "exitcode  : 75" in said, said[-3000:]
    (kept,) = checkpoint.available(tmp_path / "asked" / "checkpoints")
    assert 1 <= checkpoint.load(kept).step < 3
    for output in ("asked", "whole"):
        code, said = run(tmp_path / output, "not")
        assert code == 0, said[-3000:]
    assert same(state(tmp_path / "asked"), state(tmp_path / "whole"))

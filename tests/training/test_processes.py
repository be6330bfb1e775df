"""Several processes: they train and measure as one does, go on from one another's checkpoints, and end together."""

import json
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from aha import processes
from aha.evaluation import Records
from aha.store import Packs
from aha.training.trainer import places

from .. import launch
from ..launch import ROOT, environment, finished
from .together import TRAININGS, measure, train

HALF = "checkpoints/step_00000010"
TIMES = {"seconds_per_image", "images_per_second", "data_wait"}


def torchrun(*arguments):
    """What torchrun prints, of which the launcher's own lines are left out."""
    done = finished(launch.torchrun(*arguments))
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What this process, all alone, makes of everything."""
    folder = tmp_path_factory.mktemp("one")
    for name in TRAININGS:
        train(name, folder)
    measure(folder)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory, one):
    return together(tmp_path_factory, 2, one)


@pytest.fixture(scope="module")
def three(tmp_path_factory, two):
    return together(tmp_path_factory, 3, two)


def together(tmp_path_factory, count, before):
    folder = tmp_path_factory.mktemp(str(count))
    torchrun("--standalone", "--nproc-per-node", count, "-m", "tests.training.together", folder, before)
    return folder


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def differences(first, second):
    """The largest of every logged value over the steps that both made."""
    by_step = {record["step"]: record for record in first}
    pairs = [(by_step[record["step"]], record) for record in second]
    names = pairs[0][0].keys() - TIMES
    return {name: max(abs(a[name] - b[name]) for a, b in pairs) for name in names}


@pytest.mark.parametrize(("count", "name"), [*(("two", name) for name in TRAININGS), ("three", "ranking")])
def test_several_processes_train_as_one(request, one, count, name):
    several = request.getfixturevalue(count)
    first, second = log(one / name), log(several / name)
    assert [record["step"] for record in second] == list(range(1, TRAININGS[name].steps + 1))
    found = differences(first, second)
    found.pop("gap", None)  # of fastshap's maps their mean, which its loss does not see
    assert found.pop("grad_norm") <= 1e-3 * max(record["grad_norm"] for record in first)
    assert max(found.values()) <= 1e-5, found
    # the mean response too, of which every image of the second half is counted once
    settings = [json.loads((folder / name / "explainer" / "config.json").read_text()) for folder in (one, several)]
    responses = [saved["response"] and torch.tensor(saved["response"]["values"]) for saved in settings]
    if responses[0] is not None:
        torch.testing.assert_close(responses[1], responses[0], rtol=0, atol=1e-5)
    assert (responses[0] is None) == (name == "fastshap")
    # with norms of their own it would be another training: the comparison can tell
    if count == "two" and name == "ranking":
        assert differences(first, log(several / "own_norms"))["loss"] > 1e-3


@pytest.mark.parametrize(("before", "after"), [("one", "two"), ("two", "three")])
def test_more_processes_go_on_from_a_checkpoint_of_fewer(request, one, before, after):
    resumed = log(request.getfixturevalue(after) / "resumed")
    assert [record["step"] for record in resumed] == list(range(11, 21))
    assert differences(log(request.getfixturevalue(before) / "ranking"), resumed)["loss"] <= 1e-5
    assert differences(log(one / "ranking"), resumed)["loss"] <= 1e-5


def test_one_process_goes_on_from_a_checkpoint_of_two(tmp_path, one, two):
    train("ranking", tmp_path, resume=two / "ranking" / HALF)
    resumed = log(tmp_path / "ranking")
    assert [record["step"] for record in resumed] == list(range(11, 21))
    assert differences(log(one / "ranking"), resumed)["loss"] <= 1e-5


@pytest.mark.parametrize("count", ["two", "three"])
def test_several_processes_measure_what_one_measures(request, one, count):
    several = request.getfixturevalue(count)
    first, second = (Records.read(folder / "measured") for folder in (one, several))
    assert list(first) == list(second)
    for key, series in first.items():
        assert second[key].images.tolist() == series.images.tolist(), key
        if key.metric not in TIMES:
            assert second[key].values.tobytes() == series.values.tobytes(), key
    summaries = [json.loads((folder / "measured" / "rest.json").read_text()) for folder in (one, several)]
    assert summaries[0]["failures"]
    assert summaries[0] == summaries[1]


def test_a_share_of_every_part():
    assert places(7, 1, 0, 1) == list(range(7))
    assert [places(7, 1, rank, 3) for rank in range(3)] == [[0, 1], [2, 3], [4, 5, 6]]
    assert [places(8, 2, rank, 3) for rank in range(3)] == [[0, 4], [1, 5], [2, 3, 6, 7]]
    for message in ("batch_size=2 is less than one image for 3 processes each", "give 3 or more"):
        with pytest.raises(ValueError, match=message):
            places(2, 1, 0, 3)
    with pytest.raises(ValueError, match=r"accumulate=4 parts .* give 12 or more"):
        places(8, 4, 0, 3)


def test_a_process_that_sees_no_others_does_not_do_their_work(tmp_path):
    # a launcher of another kind, or an Accelerator of the script's own, made without cpu=True
    script = "import accelerate, aha.processes; accelerate.PartialState(); aha.processes.join()"
    alone = environment(RANK="0", WORLD_SIZE="2")
    done = subprocess.run([sys.executable, "-c", script], env=alone, capture_output=True, text=True, timeout=100)
    assert "ValueError: WORLD_SIZE=2 but accelerate sees 1 process" in done.stderr


def test_the_commands_of_the_documentation(tmp_path):
    section = (ROOT / "docs" / "clusters.md").read_text().split("## Many processes")[1]
    train_, evaluate_ = (
        re.search(r"```sh\n(.*?)```", section, re.DOTALL)[1].replace("runs/", f"{tmp_path}/").splitlines()
    )
    fast = ["--fractions", 4, "--log-every", 1]  # in seconds
    said = torchrun(*train_.split()[1:], *fast)
    assert said.count("explainer written to") == 1
    assert [record["step"] for record in log(tmp_path / "two")] == [1, 2, 3, 4]
    said = torchrun(*evaluate_.split()[1:])
    assert said.count("results written to") == 1
    summary = json.loads((tmp_path / "two" / "evaluation" / "summary.json").read_text())
    assert (summary["classifier"]["images"], list(summary["methods"])) == (8, ["aha T=0"])


def test_explained_images_are_shared(tmp_path):
    for i in range(3):
        Image.fromarray(np.full((40, 40, 3), 60 * i, np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "9.png").write_text("no image")
    command = [
        sys.executable,
        "-m",
        "aha.cli",
        "explain",
        tmp_path,
        "--classifier",
        "scenes",
        "--output",
        tmp_path / "maps",
    ]
    assert [process.wait(timeout=100) for process in by_hand(2, command, tmp_path)] == [1, 0]
    said = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    assert [[f"{i}.png: " in text for i in range(3)] for text in said] == [[True, False, True], [False, True, False]]
    assert ["3 maps written" in text for text in said] == [True, False]
    assert ["1 of 4 images failed" in text for text in said] == [True, False]
    assert sorted(path.name for path in (tmp_path / "maps").glob("*.npy")) == ["0.npy", "1.npy", "2.npy"]


def by_hand(count, command, folder, **more):
    """Processes started as srun does, each by itself: no launcher ends them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(count):
        about = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        about |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        with open(folder / f"{rank}.txt", "w") as output:
            own = environment(**{name: str(value) for name, value in about.items()}, **more)
            command = [*map(str, command)]
            started.append(subprocess.Popen(command, stdout=output, stderr=output, env=own, cwd=ROOT))
    return started


def waits(true, seconds=100):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(processes.PartialState, "_shared_state", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="3 processes for 2 GPUs"):
        processes.join()


def test_where_a_process_is_killed_the_others_end_with_one_line(tmp_path):
    options = ["--steps", 500, "--batch-size", 3, "--fractions", 4, "--targets", 1, "--log-every", 1, "--limit", 16]
    command = [sys.executable, "-m", "aha.cli", "train", "--classifier", "scenes", *options, "--output", tmp_path]
    main, other, killed = started = by_hand(3, command, tmp_path)
    try:
        waits((tmp_path / "log.jsonl").exists)
        killed.send_signal(signal.SIGKILL)
        assert [process.wait(timeout=60) for process in (main, other)] == [1, 1]
    finally:
        for process in started:
            process.kill()
    # beside the progress bar, which the main process alone draws
    ends = [(tmp_path / f"{rank}.txt").read_text().splitlines() for rank in range(2)]
    line = f"aha train: error: {processes.ENDED}"
    assert ends[1] == [line]
    assert ends[0].count(line) == 1
    assert "Traceback" not in "".join(ends[0])
    assert not any("gloo" in text for text in ends[0])


STILL = """
import pathlib, sys, time
from aha import evaluation, processes
from tests.toys import tiny_classifier
from tests.training.test_training import Images

def slow(images, target):
    pathlib.Path(sys.argv[1]).touch()
    time.sleep(0.2)
    return images.mean(dim=1, keepdim=True)

processes.BEAT, processes.SILENCE, processes.GRACE = 0.5, 5, 1
evaluation.evaluate(tiny_classifier(), {"slow": slow}, Images(10_000), batch_size=1)
"""


def test_where_a_process_is_still_the_others_end_with_one_line(tmp_path):
    # as one whose machine is lost: no connection is closed
    other, still = started = by_hand(2, [sys.executable, "-c", STILL, tmp_path / "started"], tmp_path)
    try:
        waits((tmp_path / "started").exists)
        still.send_signal(signal.SIGSTOP)
        assert other.wait(timeout=60) == 1
    finally:
        for process in started:
            process.kill()
    assert (tmp_path / "0.txt").read_text() == f"aha: error: {processes.ENDED}\n"


# a run that is asked to end, on a disk that takes longer than the others wait for one that is gone
ASKED = """
import os, pathlib, signal, sys, time
from aha import cli, processes
from aha.store import Packs
from aha.training import checkpoint

processes.BEAT, processes.GRACE = 0.2, 0.5
main, started = os.environ["RANK"] == "0", pathlib.Path(sys.argv[1])

def slowly(work):
    def call(*arguments):
        started.with_name(f"{started.name}{os.environ['RANK']}").touch()
        time.sleep(3 if main else 0.1)
        return work(*arguments)
    return call

checkpoint.save, Packs.put = slowly(checkpoint.save), slowly(Packs.put)
sys.exit(cli.main(sys.argv[2:]))
"""
TRAIN = ["train", "--classifier", "scenes", "--batch-size", 2, "--fractions", 3, "--targets", 1, "--limit", 8]
TRAIN += ["--steps", 500, "--log-every", 1]
COMPARE = ["compare", "--methods", "random", "--limit", 64, "--batch-size", 2]


def asked(tmp_path, command, *more):
    output = tmp_path / "output"
    return output, by_hand(2, [sys.executable, "-c", ASKED, tmp_path / "at", *command, "--output", output], tmp_path)


def terminated(started, ranks, when):
    """The exit codes of all processes, of which some got SIGTERM."""
    try:
        waits(when)
        for rank in ranks:
            started[rank].send_signal(signal.SIGTERM)
        return [process.wait(timeout=60) for process in started]
    finally:
        for process in started:
            process.kill()


@pytest.mark.parametrize("to", [pytest.param((0, 1), marks=pytest.mark.slow), (1,)])
def test_a_signal_waits_for_what_is_being_written(tmp_path, to):
    output, started = asked(tmp_path, [*TRAIN, "--save-every", 0])
    assert terminated(started, to, (output / "log.jsonl").exists) == [75, 75]
    (kept,) = (output / "checkpoints").iterdir()
    for rank in range(2):
        assert (tmp_path / f"{rank}.txt").read_text().rstrip().endswith(f"resume continues from {kept}")


def test_a_checkpoint_at_work_is_finished_where_another_process_is_killed(tmp_path):
    output, started = asked(tmp_path, [*TRAIN, "--save-every", 2])
    try:
        waits((tmp_path / "at0").exists)
        started[1].send_signal(signal.SIGKILL)
        assert started[0].wait(timeout=60) == 1
    finally:
        for process in started:
            process.kill()
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step_00000002"]
    assert (tmp_path / "0.txt").read_text().splitlines()[-1] == f"aha train: error: {processes.ENDED}"


@pytest.mark.parametrize("to", [pytest.param((0, 1), marks=pytest.mark.slow), (1,)])
def test_a_signal_waits_for_the_record_of_every_process(tmp_path, to):
    output, started = asked(tmp_path, COMPARE)
    assert terminated(started, to, (tmp_path / "at0").exists) == [75, 75]
    (root,) = output.glob("cells/*/*")
    store = Packs(root)
    # batches in turn: the main process had begun its first one
    measured = {int(key.split("/")[1]) for key in store._places if key.startswith("images/")}
    assert {number for number in measured if number % 2 == 0} == {0}
    assert {1} <= measured
    assert not (output / ".lock").exists()

"""Faults of a comparison: kills, full disks, damaged and foreign files. What was finished is kept, what is lost is made
again, and the tables at the end are those of an undisturbed run, bit for bit."""

import contextlib
import errno
import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from aha import cli, files
from aha.attributors.specs import parse
from aha.classifier import Classifier
from aha.evaluation import Failure, Records, engine
from aha.evaluation.compare import compare
from aha.evaluation.pieces import LOST
from aha.lock import FolderInUseError, held
from aha.metrics import Protocol
from aha.source import Source
from aha.store import Packs

from .. import faults, launch

SHORT = Protocol("short", points=4, references=("black",))
METHODS = ("random", "input_x_gradient")
MEASURED = ("seconds_per_image", "peak_bytes_per_image")  # of the machine, not of the methods
ALL = {(method, number) for method in METHODS for number in range(3)}  # rows and batches


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 4, 3, 2), nn.Linear(4, 10)

    def forward(self, pixels):
        return 4 * self.head(torch.tanh(self.conv(pixels)).mean(dim=(2, 3)))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Every source's classifier is a few convolutions, which forked children share."""
    clf = Classifier.wrap(Net(), input_size=(16, 16))
    monkeypatch.setattr(Source, "load_classifier", lambda _: clf)
    monkeypatch.setattr(engine, "peak_bytes", lambda *_: 1.0)  # which collects garbage, hundreds of times
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def run(output, limit=5):
    """Compare and write; returns the numbers, and which rows and batches were measured."""
    measured, original = [], engine.Engine._measure

    def measure(self, row, number, *rest):
        measured.append((row.name, number))
        return original(self, row, number, *rest)

    engine.Engine._measure = measure
    try:
        done = compare([Source(limit=limit)], parse(METHODS)[0], output, (SHORT,), batch_size=2)
    finally:
        engine.Engine._measure = original
    (result,) = done.results.values()
    result.write(output)
    assert read(output) == table(done.records)
    assert files.read_json(output / "summary.json", required=True)["failures"] == []
    assert done.failures == []
    return (table(done.records), done.images, curves(result)), sorted(measured)


def table(records):
    return {
        key: (series.images.tolist(), [value.hex() for value in series.values.tolist()])
        for key, series in records.items()
        if key.metric not in MEASURED
    }


def read(output):
    return table(Records.read(output))


def curves(result):
    return {
        (method, reference, name): curve.tolist()
        for method, of in result.curves.items()
        for reference, named in of.items()
        for name, curve in named.items()
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an undisturbed run, and its numbers."""
    patch = pytest.MonkeyPatch()
    clf = Classifier.wrap(Net(), input_size=(16, 16))
    patch.setattr(Source, "load_classifier", lambda _: clf)
    folder = tmp_path_factory.mktemp("whole")
    numbers, measured = run(folder)
    patch.undo()
    assert set(measured) == ALL
    return folder, numbers


def finished(output):
    """Rows and batches that are in the packs, as far as a method's cost and all its scores are."""
    found = set()
    for pack in {path.parent for path in output.rglob("*.pack")}:
        keys = Packs(pack)._places
        for row in {key.split("/")[0] for key in keys}:
            name = row.rpartition("-")[0]
            for number in range(3):
                parts = [key for key in keys if key.startswith(f"{row}/") and key.endswith(f"{number:06d}")]
                if name in METHODS and len(parts) == 4:  # maps, cost, short and localisation
                    found.add((name, number))
    return found


@pytest.mark.parametrize("every", [6, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_every_change(tmp_path, whole, every):
    _, expected = whole
    planned = faults.changes(lambda: run(tmp_path / "plan"), tmp_path)
    assert len(planned) > 40
    assert sum(change.startswith("write") and change.endswith(".pack") for change in planned) == 3 * 3  # with the facts
    kept = []
    for number, change in list(enumerate(planned))[::every]:
        output = tmp_path / f"{number}"
        faults.killed(lambda output=output: run(output), output, number, torn=change.startswith("write"))
        there = finished(output)
        again = faults.forked(lambda output=output: run(output))
        assert again.error is None, f"{change}: {again.trace}"
        numbers, measured = again.value
        assert numbers == expected, change
        assert set(measured) == ALL - there, change  # nothing that was finished is computed twice
        assert len(measured) == len(set(measured))
        if number % 4 == 0:
            assert faults.forked(lambda output=output: run(output)).value == (expected, [])
        assert not list(output.glob(".*")), change
        kept.append(len(there))
        shutil.rmtree(output)
    assert kept == sorted(kept)
    assert every > 1 or set(kept) == set(range(7))
    assert {0, 6} <= set(kept)


@pytest.mark.parametrize(("reason", "words"), [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "is read-only")])
def test_a_disk_that_refuses(tmp_path, whole, reason, words):
    _, expected = whole
    planned = faults.changes(lambda: run(tmp_path / "plan"), tmp_path)
    for number in range(0, len(planned) - 1, 7):
        output = tmp_path / f"{number}"
        refused = faults.refused(lambda output=output: run(output), output, number, reason)
        if "unlink" in planned[number] and refused.error is None:
            continue
        assert isinstance(refused.error, OSError), (planned[number], refused.trace)
        assert f"cannot be written, {'' if reason == errno.ENOSPC else 'the file system '}{words}" in str(refused.error)
        assert "\n" not in str(refused.error)
        there = finished(output)
        numbers, measured = faults.forked(lambda output=output: run(output)).value
        assert numbers == expected, planned[number]
        assert set(measured) == ALL - there


def kinds(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


DAMAGE = {
    **{
        f"bit {at}": lambda path, at=at: faults.flipped(path, int(at * 8 * path.stat().st_size))
        for at in (0.02, 0.4, 0.8, 0.99)
    },
    "half": lambda path: faults.cut(path, 0.5),
    "one byte less": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: faults.cut(path, 0),
    "removed": lambda path: path.unlink(),
    "noise": lambda path: path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_of_any_kind(tmp_path, whole, damage):
    """Never other numbers: what is read says so or is as it was, and the next run makes everything whole."""
    folder, expected = whole
    assert {path.suffix for path in kinds(folder)} >= {".pack", ".json", ".sha256"}
    _, before = pieces_of(folder)
    for path in kinds(folder):
        output = tmp_path / path.name
        shutil.copytree(folder, output)
        DAMAGE[damage](output / path)
        refused = (files.DamagedError, FileNotFoundError) if path.suffix != ".pack" else ()
        with contextlib.suppress(*refused):
            assert read(output) == read(folder)
            summary = files.read_json(output / "summary.json", required=True)
            assert summary == files.read_json(folder / "summary.json", required=True)
        numbers, measured = run(output)
        assert numbers == expected, path
        if path.suffix != ".pack" or damage.startswith("bit"):  # one record is hit, of one batch and at most one row
            assert len(measured) <= (path.suffix == ".pack")
        _, now = pieces_of(output)
        assert now.keys() == before.keys()  # all of them sound
        assert run(output) == (expected, [])


def pieces_of(folder):
    """Key → arrays of everything in the packs."""
    (place,) = {pack.parent for pack in folder.rglob("*.pack")}
    packs = Packs(place)
    return packs, {tuple(key.split("/")): dict(packs.get(tuple(key.split("/")))) for key in packs._places}


def foreign(piece):
    """Pieces that are sound as records and wrong as what they should be."""
    first = next(iter(piece))
    yield {"other": np.arange(3)}
    yield {}
    yield {name: array for name, array in piece.items() if name != first}
    yield {**piece, "more": np.arange(2)}
    for name, array in piece.items():
        yield {**piece, name: array[..., None]}
        yield {**piece, name: array.astype(bool) if array.dtype.kind != "U" else np.arange(array.size, dtype="float16")}
        if array.ndim and array.size:
            yield {**piece, name: array[:-1]}
            yield {**piece, name: np.concatenate([array, array])}
        if array.dtype.kind == "f" and array.ndim and name in ("maps", "scale", "seconds_per_image"):
            yield {**piece, name: np.full_like(array, np.nan)}
        if array.dtype.kind == "i":
            yield {**piece, name: array + 1000}


def test_pieces_of_other_keys_shapes_and_types_are_made_again(tmp_path, whole):
    folder, expected = whole
    output = tmp_path / "out"
    shutil.copytree(folder, output)
    packs, pieces = pieces_of(output)
    chosen = [key for key in pieces if key[-1] in ("000001", "peak")]
    assert len(chosen) == 2 * 5 + 1  # maps, cost, peak and two protocols of each method, the facts of the images
    count, options = 0, {key: list(foreign(pieces[key])) for key in chosen}
    for turn in range(0, max(map(len, options.values())), 5):
        packs = Packs(packs.root)
        packs.put({key: wrong[turn % len(wrong)] for key, wrong in options.items()})
        numbers, measured = run(output)
        assert numbers == expected
        assert set(measured) == {(method, number) for method in METHODS for number in (0, 1)}  # 0: of the peak
    reading = compare([Source(limit=5)], parse(METHODS)[0], output, (SHORT,), batch_size=2).pieces["Net", "predicted"]
    index, readers = pieces["images", "000001"]["index"], {"maps": reading.maps_of, "cost": reading.cost}
    for key, wrong in options.items():
        row, kind = key[0], key[1]
        for piece in wrong:
            reading.store.put({key: piece})
            if row == "images":
                assert reading.facts(1) is None
            elif kind == "peak":
                assert reading.peak(row) is None
            elif kind in readers:
                assert readers[kind](row, 1, index) is None
            else:
                assert reading.scores(row, kind, 1, index) is None
            count += 1
    assert count > 200
    numbers, measured = run(output)
    assert numbers == expected


def test_what_is_lost_between_measuring_and_reading_is_a_failure(tmp_path, monkeypatch, capsys):
    """Never fewer images in silence: exit 1, the images named; run again, it is whole."""

    def lose(what):
        original = engine.Engine.run

        def then(self, announce):
            original(self, announce)
            for key in [key for key in self.store._places if what in key]:
                place = self.store._places[key]
                faults.flipped(self.store.root / place.pack, 8 * place.offset + 100)

        monkeypatch.setattr(engine.Engine, "run", then)

    command = ["compare", "--limit", "5", "--batch-size", "2", "--methods", *METHODS, "--output", str(tmp_path)]
    for what, failure in (
        ("images/000001", Failure(None, (2, 3), LOST)),
        ("cost/000002", Failure("random", (4,), LOST)),
    ):
        with monkeypatch.context():
            lose(what)
            assert cli.main(command) == 1
            monkeypatch.undo()
        told = " ".join(capsys.readouterr().err.split())
        assert f"2 images: {LOST}" in told or f"failed on 1 image: {LOST}" in told
        found = json.loads((tmp_path / "summary.json").read_text())["failures"]
        assert {"method": failure.method, "images": list(failure.images), "reason": LOST} in found


def test_a_folder_that_disappears_is_said(tmp_path, monkeypatch, capsys):
    original, calls = engine.Engine._measure, []

    def measure(self, *rest):
        calls.append(rest)
        if len(calls) == 4:
            shutil.rmtree(tmp_path / "out")
        return original(self, *rest)

    monkeypatch.setattr(engine.Engine, "_measure", measure)
    output = tmp_path / "out"
    command = ["compare", "--limit", "5", "--batch-size", "2", "--methods", *METHODS, "--output", str(output)]
    assert cli.main(command) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("aha compare: error: ")
    assert "was removed or cut short while it was in use: leave it in place, and run again" in line
    assert len(calls) == 4
    assert not (output / "summary.json").exists()


def test_an_output_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli.main(["compare", "--limit", "2", "--methods", "random", "--output", str(tmp_path / "file" / "out")]) == 1
    assert "cannot be written, part of its path is a file: give another folder" in capsys.readouterr().err


def test_one_comparison_at_a_time_in_a_folder(tmp_path):
    with held(tmp_path), pytest.raises(FolderInUseError, match="is in use by process"):
        run(tmp_path)
    assert not (tmp_path / "cells").exists()
    run(tmp_path)


def test_one_classifier_at_a_time(tmp_path, monkeypatch):
    alive = []

    def load(source):
        gc.collect()
        assert not [reference for reference in alive if reference() is not None]
        clf = Classifier.wrap(Net(), input_size=(16, 16))
        clf.source = {"kind": "module", "name": source.classifier}
        alive.append(weakref.ref(clf.module))
        return clf

    monkeypatch.setattr(Source, "load_classifier", load)
    done = compare([Source(name, limit=3) for name in "abc"], parse(METHODS)[0], tmp_path, (SHORT,), batch_size=2)
    gc.collect()
    assert [reference() for reference in alive] == [None] * 3
    assert [model for model, _ in done.results] == ["a", "b", "c"]
    assert done.pieces["b", "predicted"].maps("random", [2, 0]).shape == (2, 1, 16, 16)


def test_failures_of_an_earlier_run_do_not_stay(tmp_path, monkeypatch):
    original = engine.Engine._measure

    def fail(self, row, number, *rest):
        if (row.name, number) in (("random", 0), ("input_x_gradient", 2)):
            raise RuntimeError("not today")
        return original(self, row, number, *rest)

    monkeypatch.setattr(engine.Engine, "_measure", fail)
    done = compare([Source(limit=5)], parse(METHODS)[0], tmp_path, (SHORT,), batch_size=2)
    (result,) = done.results.values()
    assert result.failures == [
        Failure("random", (0, 1), "RuntimeError: not today"),
        Failure("input_x_gradient", (4,), "RuntimeError: not today"),
    ]
    monkeypatch.setattr(engine.Engine, "_measure", original)
    _, measured = run(tmp_path)  # which asserts that there are none
    assert measured == [("input_x_gradient", 2), ("random", 0)]


# every process of it does what `run` does, and writes down what it has put
SCRIPT = """
import os, sys, time
from pathlib import Path
import torch
from tests.evaluation import test_faults as here
from aha import cli
from aha.classifier import Classifier
from aha.evaluation.compare import compare
from aha.source import Source
from aha.store import Packs

torch.set_num_threads(1)
output, slowly = Path(sys.argv[1]), float(sys.argv[2])
clf = Classifier.wrap(here.Net(), input_size=(16, 16))
Source.load_classifier = lambda _: clf
put = Packs.put

def noted(self, pieces):
    time.sleep(slowly)
    put(self, pieces)
    with open(f"{output}.log", "a") as log:
        log.write("".join("/".join(key) + "\\n" for key in pieces))

Packs.put = noted
if sys.argv[3:]:
    sys.exit(cli.main(sys.argv[3:] + ["--output", str(output)]))
done = compare([Source(limit=24)], here.parse(here.METHODS)[0], output, (here.SHORT,), batch_size=2)
if done is not None:
    (result,) = done.results.values()
    result.write(output)
    print("done:", here.table(done.records), done.images, here.curves(result), done.failures)
"""


def start(output, *arguments, processes=0, slowly=0.0):
    script = output.parent / "script.py"
    script.write_text(SCRIPT)
    launcher = launch.several(processes) if processes else [sys.executable]
    return subprocess.Popen(
        [*launcher, str(script), str(output), str(slowly), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=launch.environment(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""),
        start_new_session=True,
    )


def wait_for(output, records):
    """Until that many pieces are noted; the number that are."""
    log, deadline = Path(f"{output}.log"), time.monotonic() + 240
    while time.monotonic() < deadline:
        if log.is_file() and (count := log.read_text().count("\n")) >= records:
            return count
        time.sleep(0.02)
    raise AssertionError("nothing was put")


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [
        (signal.SIGTERM, 75, "SIGTERM; what was finished is kept, run again to go on"),
        (signal.SIGINT, 130, "interrupted"),
    ],
)
def test_a_signal_ends_it_after_the_record_at_work(tmp_path, number, code, words):
    output = tmp_path / "out"
    command = ["compare", "--limit", "64", "--batch-size", "2", "--methods", *METHODS]
    process = start(output, *command, slowly=0.05)
    wait_for(output, 6)
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == code, told
    assert "Traceback" not in told
    assert not (output / ".lock").exists()
    noted = Path(f"{output}.log").read_text().split()
    packs, pieces = pieces_of(output)
    assert set(noted) == set(map("/".join, pieces))
    for path in output.rglob("*.pack"):  # no record is cut short
        assert packs._ends[path.name] == path.stat().st_size


@pytest.mark.slow
def test_any_number_of_processes_killed_at_any_time(tmp_path):
    """1, 2, 3 processes give the same tables to the last bit, and what one had finished is never put again."""
    outcomes, rng = {}, random.Random(0)
    for count in (0, 2, 3):  # 0: without a launcher
        process = start(tmp_path / f"{count}", processes=count)
        said, told = process.communicate(timeout=400)
        assert process.returncode == 0, told
        (outcomes[count],) = [line for line in said.splitlines() if line.startswith("done:")]
        noted = Path(tmp_path / f"{count}.log").read_text().split()
        assert len(noted) == len(set(noted))
        assert len(list((tmp_path / f"{count}").rglob("*.pack"))) == max(1, count)
    output = tmp_path / "killed"
    for count, records in ((3, 5), (2, 30), (0, 50), (3, 70)):  # of 111
        process = start(output, processes=count, slowly=0.1)
        wait_for(output, records + rng.randint(0, 15))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        # torchrun's workers lead groups of their own
        for worker in workers(output):
            os.kill(worker, signal.SIGKILL)
    process = start(output, processes=2)
    said, told = process.communicate(timeout=400)
    assert process.returncode == 0, told
    (outcomes["killed"],) = [line for line in said.splitlines() if line.startswith("done:")]
    assert len(set(outcomes.values())) == 1
    noted = Path(f"{output}.log").read_text().split()
    assert len(noted) == len(set(noted))


def workers(output):
    """Processes that work for ``output``."""
    found = []
    for place in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if str(output).encode() in (place / "cmdline").read_bytes().split(b"\0"):
                found.append(int(place.name))
    return found

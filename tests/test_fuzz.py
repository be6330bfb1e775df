"""Every public function answers bad input with one clear line: no crash, no hang, no wrong number, not all the memory.

A short run by default. AHA_FUZZ=1000 makes about as many calls of every function; see tests/fuzz.py.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from unittest import mock

import pytest

from . import fuzz
from .launch import finished

TIME = 40 * max(1, int(os.environ.get("AHA_FUZZ") or 25) // 25)


@pytest.fixture(scope="module")
def run() -> subprocess.CompletedProcess:
    """The calls, in a process whose memory is limited, and whose crash is only its own."""
    calls = os.environ.get("AHA_FUZZ", "25")
    command = [sys.executable, "-m", "tests.fuzz"]
    return finished(command, timeout=10 * TIME, OMP_NUM_THREADS="1", AHA_FUZZ=calls)


def test_every_call_is_answered(run):
    unclear = [json.loads(line) for line in run.stdout.splitlines()]
    assert run.returncode == 0 and unclear, run.stderr[-2000:].replace("\r", "\n")
    sums = unclear.pop()
    assert not unclear, "\n".join(f"{x['case']} {x['number']}: {x['kind']}: {x['text']}" for x in unclear)
    # most odd values are refused, and some are none after all
    assert sums["refused"] > sums["calls"] / 2 and sums["result"] > sums["calls"] / 50
    assert sums["calls"] == sums["refused"] + sums["result"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterator[fuzz.World]:
    folder = tmp_path_factory.mktemp("world")
    with mock.patch.dict(os.environ, XDG_CACHE_HOME=str(folder)):
        yield fuzz.World(folder)


def test_all_that_is_public_is_called_or_excluded(world):
    assert not fuzz.unlisted(world.cases), "put it into tests/fuzz.py: among the cases, or EXCLUDED with a reason"
    stale = set(fuzz.EXCLUDED) - fuzz.public()
    assert not {name for name in stale if name.count(".") < 3}, "no longer public"
    assert not set(world.cases) & set(fuzz.EXCLUDED)


def test_the_arguments_of_every_case_are_taken_as_they_are(world):
    """An argument that is odd by itself would hide what the odd values do."""
    for name, case in world.cases.items():
        if name.removeprefix("aha.kernels.") not in fuzz.kernel_calls.PUBLIC and case.share > 0.05:
            case.call(**case.given())


def _refuse(text):
    raise ValueError(text)


@pytest.mark.parametrize(
    ("read", "same", "kind"),
    [
        (lambda content: content, True, "wrong"),  # other bytes for what was written
        (lambda content: content, False, "result"),
        (lambda content: b"kept", True, "result"),
        (lambda content: _refuse("FOLDER/x is damaged: write it again"), True, "refused"),
        (lambda content: _refuse("could not convert string to float: 'x'"), True, "vague"),
        (lambda content: _refuse("two\nlines"), True, "many lines"),
        (lambda content: content[10**9], False, "IndexError"),
    ],
)
def test_what_is_said_of_a_damaged_file(world, monkeypatch, read, same, kind):
    world_folder = str(world.folder)

    def reads(content):
        try:
            return read(content)
        except ValueError as error:
            raise ValueError(str(error).replace("FOLDER", world_folder)) from None

    case = fuzz.Case(
        reads, lambda: {"content": b"kept"}, spoil=lambda draw, content: content[:-1], same=same, named=True
    )
    # what it reads of the file as it was written
    monkeypatch.setitem(world._intact, "x", b"kept")
    monkeypatch.setitem(world.cases, "x", case)
    assert fuzz.answer(world, "x", 0)[0] == kind


@pytest.mark.parametrize(
    ("text", "good"),
    [("tau='x': give a number", True), ("images are on cuda: move them", True), ("embedded null byte", False)],
)
def test_what_a_clear_message_is(text, good):
    assert fuzz._names(text, {"images": 0, "tau": 1}, {"tau": "x"}) == good

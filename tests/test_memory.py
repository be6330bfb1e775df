"""How much goes through a classifier at a time, and what becomes of freed memory."""

import os
import subprocess
import sys

import pytest
import torch

import aha
from aha.cli import main
from aha.memory import CLEAR, PER_PASS, per_pass

from .toys import TINY_DECODER, pictures, tiny_classifier

GLIBC = sys.platform == "linux" and "glibc" in os.confstr("CS_GNU_LIBC_VERSION").lower()


def test_images_in_a_pass():
    assert per_pass(torch.device("cpu")) == PER_PASS
    assert per_pass(torch.device("cpu"), 5) == 5
    assert per_pass(torch.device("cuda")) == 128
    assert per_pass(torch.device("cuda"), 64) == 64
    assert per_pass(torch.device("cpu"), most=5) == 5
    assert per_pass(torch.device("cpu"), 2 * PER_PASS) == 2 * PER_PASS
    assert per_pass(torch.device("cuda"), most=64) == 64


def test_no_image_in_a_pass_is_refused():
    with pytest.raises(ValueError, match="internal_batch_size=0: give an integer ≥ 1"):
        aha.metrics.endpoints(tiny_classifier(), pictures(2), internal_batch_size=0)


@pytest.fixture
def sizes(monkeypatch):
    """The sizes of all passes of `clf`, of which two images go through at a time."""
    monkeypatch.setattr("aha.memory.PER_PASS", 2)
    clf, seen = tiny_classifier(), set()
    with clf.module.register_forward_pre_hook(lambda _module, args: seen.add(len(args[0]))):
        yield clf, seen


IMAGES = [{"image": image, "label": 0} for image in pictures(2)]
USES = {
    "metrics": lambda clf, _: aha.metrics.Suite(clf, "aha").measure(
        aha.metrics.Suite(clf, "aha").begin(pictures(2)), pictures(2)[:, :1]
    ),
    "a metric": lambda clf, _: aha.metrics.DeletionInsertion(clf).update(pictures(2), pictures(2)[:, :1]),
    "sweep": lambda clf, _: aha.metrics.sweep(
        clf, pictures(2), pictures(2)[:, :1], torch.tensor([0, 1]), torch.zeros(2, 3, 32, 32)
    ),
    "rise": lambda clf, _: aha.attributors.create("rise", clf, n_masks=12).attribute(pictures(2), 0),
    "mda": lambda clf, _: aha.attributors.create("mda", clf, prior="input_x_gradient", cells=3).attribute(
        pictures(2), 0
    ),
    "measured magnitudes": lambda clf, _: aha.calibration.measure(clf, pictures(2), pictures(2)[:, :1]),
    "refinement": lambda clf, explainer: aha.refine(explainer, clf, pictures(2), steps=1),
    "training": lambda clf, explainer: aha.Trainer(
        explainer, clf, IMAGES, aha.TrainConfig(steps=1, batch_size=2, targets=1, fractions=8, cells=(3, 4))
    ).fit(progress=False),
}


@pytest.mark.parametrize("use", USES)
def test_no_more_go_through_at_a_time_than_is_fast(sizes, use):
    clf, seen = sizes
    explainer = aha.Explainer.build(clf, evidence=False, decoder=TINY_DECODER)
    seen.clear()
    USES[use](clf, explainer)
    assert max(seen) == 2


PROGRAM = """
import resource, sys
import torch
from aha import memory

if "keep" in sys.argv: assert memory.keep_freed()

def call():
    return torch.ones(2**24), torch.ones(2**23)  # 64 and 32 MiB

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = min([faults() for _ in range(10)])
peak = memory.peak_bytes(call, torch.device("cpu")) / 2**20 if "peak" in sys.argv else 0
print(before, peak, min([faults() for _ in range(10)]))
"""


def measured(*arguments: str) -> list[float]:
    run = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=True)
    return [float(value) for value in run.stdout.split()]


@pytest.mark.skipif(not GLIBC, reason="glibc's allocator alone is told")
def test_freed_memory_stays():
    pages = 96 * 2**20 // os.sysconf("SC_PAGE_SIZE")
    assert measured()[0] >= 0.9 * pages
    assert measured("keep")[0] < 0.01 * pages


@pytest.mark.skipif(not GLIBC or not os.access(CLEAR, os.W_OK), reason="the kernel does not reset the high-water mark")
def test_the_peak_is_that_of_the_call_where_freed_memory_stays():
    before, peak, after = measured("keep", "peak")
    assert peak == pytest.approx(96, abs=6)
    assert max(before, after) < 0.01 * 96 * 2**20 / os.sysconf("SC_PAGE_SIZE")


def test_the_command_line_keeps_it(monkeypatch, capsys):
    called = []
    monkeypatch.setattr("aha.memory.keep_freed", lambda: called.append(True))
    assert main(["list"]) == 0
    assert called

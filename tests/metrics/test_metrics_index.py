"""Rows that carry the index of their image: repetitions, order, processes."""

import json
import random
import subprocess
import sys

import pytest
import torch

from aha.classifier import Classifier
from aha.metrics import ConfidenceChange, DeletionInsertion, Localization, Monotonicity, Protocol
from aha.metrics.state import mean
from tests.toys import SmallNet

from .. import launch

SHORT = Protocol("short", points=5, metrics=("deletion", "insertion", "ins_minus_del", "adp", "pic", "monotonicity"))
KINDS = (DeletionInsertion, ConfidenceChange, Monotonicity, Localization)
IMAGES = 7


def data():
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(IMAGES, 3, 8, 8, generator=generator)
    masks = torch.rand(IMAGES, 1, 8, 8, generator=generator) < 0.3
    masks[2] = False
    return images, torch.randn(IMAGES, 1, 8, 8, generator=generator), masks


def made(kind, **options):
    clf = Classifier.wrap(SmallNet().eval(), input_size=(8, 8), num_classes=3)
    return kind(**options) if kind is Localization else kind(clf, SHORT, **options)


def update(metric, rows, indexed=True):
    images, maps, masks = data()
    rows = list(rows)
    index = torch.tensor(rows) if indexed else None
    if isinstance(metric, Localization):
        metric.update(maps[rows], masks[rows], index=index)
    else:
        metric.update(images[rows], maps[rows], index=index)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("kind", KINDS)
def test_order_repetition_and_merges_change_nothing(kind):
    """Single images, so that every row is the same number wherever it is computed: all results are then equal bits."""
    whole = made(kind)
    for i in range(IMAGES):
        update(whole, [i])
    expected = whole.compute()
    plain = made(kind)
    for i in range(IMAGES):
        update(plain, [i], indexed=False)
    assert plain.compute() == expected
    draw = random.Random(0)
    for processes in (1, 2, 3, 5):
        order = [*range(IMAGES), *range(-IMAGES % processes)]  # padded by repetition, as a distributed sampler does
        draw.shuffle(order)
        states = []
        for rank in range(processes):
            part = made(kind)
            for i in order[rank::processes]:
                update(part, [i])
            states.append(torch.cat(part.rows))
        states.append(torch.zeros(0))  # a process that has seen nothing
        draw.shuffle(states)
        merged = made(
            kind,
            dist_sync_fn=lambda value, group=None, states=states: states,
            distributed_available_fn=lambda: True,
        )
        merged.rows = [states[0]]
        assert merged.compute() == expected


@pytest.mark.parametrize("kind", KINDS)
def test_batch_size_does_not_matter(kind):
    results = []
    for size in (1, 3, IMAGES):
        metric = made(kind)
        for start in range(0, IMAGES, size):
            update(metric, range(start, min(start + size, IMAGES)))
        computed = metric.compute()
        assert computed["images"] + computed["excluded"] == IMAGES
        results.append({key: value for key, value in computed.items() if key in metric.directions})
    for other in results[1:]:
        assert other == pytest.approx(results[0], abs=1e-6, rel=1e-6)


def test_rows_are_read_by_index():
    metric = made(DeletionInsertion)
    for i in (4, 0, 4, 2):
        update(metric, [i])
    plain = made(DeletionInsertion)
    update(plain, [0, 2, 4], indexed=False)
    assert torch.allclose(metric.per_image()["insertion"], plain.per_image()["insertion"], atol=1e-6)
    # places beyond what float32 holds exactly stay apart
    far = made(Localization)
    _, maps, masks = data()
    far.update(maps[:2], masks[:2], index=torch.tensor([2**40 + 1, 2**40]))
    assert torch.equal(far.per_image()["map"], made_of(maps[[1, 0]], masks[[1, 0]])["map"])
    with pytest.raises(ValueError, match="2 integers ≥ 0, one per image"):
        far.update(maps[:2], masks[:2], index=torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match="2 integers ≥ 0, one per image"):
        far.update(maps[:2], masks[:2], index=[-1, 0])
    far.update(maps[:2], masks[:2])
    with pytest.raises(RuntimeError, match="give it to all of them or to none"):
        far.compute()


def made_of(maps, masks):
    metric = Localization()
    metric.update(maps, masks)
    return metric.per_image()


def test_means_have_no_order():
    values = torch.cat([torch.rand(1000), torch.rand(1000) * 1e-7, torch.tensor([torch.nan])])
    shuffled = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(0))]
    assert mean(values) == mean(shuffled) == pytest.approx(values.double().nanmean().item(), rel=1e-12)


def run(rank, world):
    """What every metric computes of the share of images that a distributed sampler gives to this process."""
    found = {}
    for kind in KINDS:
        metric = made(kind)
        for i in torch.utils.data.DistributedSampler(range(IMAGES), world, rank, seed=3):
            update(metric, [i])
        found[kind.__name__] = metric.compute()
    return found


SCRIPT = """
import json, sys
import torch
from tests.metrics.test_metrics_index import run
store, rank, written = sys.argv[1], int(sys.argv[2]), sys.argv[3]
torch.distributed.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
found = run(rank, 2)
if rank == 0:
    open(written, "w").write(json.dumps(found))
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_measure_as_one(tmp_path):
    """7 images on 2 processes: one is padded. JSON keeps every bit of a float."""
    written = tmp_path / "two.json"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path / "store"), str(rank), str(written)],
            env=launch.environment(OMP_NUM_THREADS="1"),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=180)
            assert process.returncode == 0, errors[-2000:]
    finally:
        for process in processes:
            process.kill()
    found = json.loads(written.read_text())
    assert found == run(0, 1)
    assert found["DeletionInsertion"]["images"] == IMAGES
    assert found["Localization"]["excluded"] == 1

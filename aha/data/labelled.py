"""What labelled images on disk have in common, whether each is a file of its own or lies in a shard."""

from __future__ import annotations

import copy
import hashlib
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image

from aha.data.images import Preprocessing, augmented, fitted, to_tensor
from aha.data.listing import Samples

Self = TypeVar("Self", bound="LabelledImages")


class LabelledImages(torch.utils.data.Dataset):
    """Images with labels: items, virtual epochs and identity of `ImageFolder` and `Shards`.

    Attributes:
        folder: where the images lie.
        samples: a sequence of (path, label).
        labelled_by: "names", "numbers" or None without labels.
        class_names: in label order, or None.
        names_given: whether they were given, and not found.
        by_folder: whether labels are those of class folders.
    """

    folder: Path
    samples: Samples
    labelled_by: str | None
    class_names: list[str] | None
    by_folder: bool

    def __init__(
        self,
        image_size: int,
        preprocessing: Preprocessing,
        augment: bool,
        class_names: Sequence[str] | None,
        seed: int,
    ):
        if isinstance(class_names, str):
            raise ValueError(f"class_names is the text {class_names!r}: give a list of names in label order")
        self.image_size = image_size
        self.preprocessing = preprocessing
        self.resize, self.resample = preprocessing.resize(image_size), preprocessing.resample
        self.augment, self.seed = augment, seed
        self.names_given = class_names is not None

    @property
    def virtual_epochs(self) -> bool:
        """Whether an index beyond the size is another crop of an image."""
        return self.augment

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self):
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index < 0 or (index >= len(self) and not self.augment):
            raise IndexError(f"no image {index} among {len(self)}")
        place = index % len(self)
        path, label = self.samples[place]
        image = self._open(place, path)
        shape = image.size
        if self.augment:
            # a string seed is hashed by its content, the same in every process
            image = augmented(image, self.image_size, self.resample, random.Random(f"{self.seed},{index}"))
        else:
            image = fitted(image, self.image_size, self.resize, self.resample)
        return {"image": to_tensor(image), "label": label, "path": str(path), **self._beside(place, shape)}

    def _open(self, place: int, path: Path) -> Image.Image:
        """The whole image."""
        raise NotImplementedError

    def _beside(self, place: int, shape: tuple[int, int]) -> dict[str, Any]:
        """What else an item has; ``shape`` is width and height of the image."""
        return {}

    def relabelled(self: Self, numbers: Mapping[int, int], class_names: Sequence[str] | None) -> Self:
        """The same images with label ``numbers[label]``; shares everything else."""
        other = copy.copy(self)
        other.samples = self.samples.relabelled(numbers)
        other.class_names = None if class_names is None else list(class_names)
        other.labelled_by = "numbers"
        return other

    def identity(self, content: bool = True, indices: Sequence[int] | None = None) -> dict[str, Any]:
        """What these images are, as JSON types: equal where items are equal, wherever they lie.

        Args:
            content: a digest over the bytes, label and mask of every image; else over paths, sizes and labels, for
                data of which all bytes are too many. Sizes of ten thousand images and more are those of when the
                folder was last seen to change, see docs/data.md.
            indices: of the images that count; None is all.
        """
        places = range(len(self)) if indices is None else [index % len(self) for index in indices]
        digest = hashlib.sha256()
        prefix = {number: self._relative(folder) for number, folder in enumerate(self.samples.folders)}
        labels, where = self.samples.labels, self.samples.place
        for place, marks in zip(places, self._marks(places, content), strict=True):
            name = prefix[int(where[place])] + self.samples.name(place)
            digest.update(os.fsencode(f"{name}\0{labels[place]}\0") + marks)
        return {
            "type": type(self).__name__,
            "images": len(places),
            "digest": digest.hexdigest(),
            "by": "content" if content else "listing",
            "image_size": self.image_size,
            "resize": self.resize,
            "interpolation": self.resample.name.lower(),
            "augment": self.augment,
            "seed": self.seed if self.augment else None,
        }

    def _marks(self, places: Sequence[int], content: bool) -> Iterable[bytes]:
        """Of every image, a digest of its bytes, or its size."""
        raise NotImplementedError

    def _relative(self, folder: str) -> str:
        """What is before the name in a path relative to the data."""
        path = Path(folder)
        if not path.is_relative_to(self.folder):
            return os.path.join(folder, "")
        inside = path.relative_to(self.folder).as_posix()
        return "" if inside == "." else f"{inside}/"

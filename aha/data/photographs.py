"""Freely licensed photographs to train universal weights on: which they are, where they come from, how they are shown.

``photographs.csv`` beside this file lists every image with its package, licence, authors and checksum. The images
themselves are Debian's: `fetch` brings them.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import random
import shutil
import subprocess
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageEnhance, ImageOps

from .images import ImageReadError, open_image, to_tensor

LIST = "photographs.csv"
KINDS = ("photograph", "object")
SHORT = 1024  # pixels that are kept of the shorter side: crops are smaller
SMALLEST = 0.3  # of the shorter side, the smallest crop of a photograph
COVERED = (0.4, 1.0)  # of the picture's side, the longer side of an object
SECOND = 0.3  # how often there is a second object


@dataclass(frozen=True)
class Origin:
    """One image of the list.

    Attributes:
        kind: "photograph", or "object": cut out, transparent around.
        package, version: of Debian.
        file: within the package.
        sha256: of the file.
        authors, licence: as the package says.
    """

    kind: str
    package: str
    version: str
    file: str
    sha256: str
    authors: str
    licence: str

    def path(self, folder: Path) -> Path:
        """Where `fetch` puts it."""
        return folder / self.package / self.file


@functools.cache
def origins() -> tuple[Origin, ...]:
    """All images of the list."""
    text = resources.files(__package__).joinpath(LIST).read_text(encoding="utf-8")
    return tuple(Origin(**row) for row in csv.DictReader(text.splitlines()))


def fetch(folder: str | Path) -> Path:
    """Download and unpack the packages that are not yet in ``folder``, and check every image.

    Raises:
        ValueError: in one line, where a package cannot be had or an image is another.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for package in sorted({origin.package for origin in origins()}):
        if (folder / package).is_dir():
            continue
        _unpack(package, folder)
    for origin in origins():
        path = origin.path(folder)
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != origin.sha256:
            raise ValueError(
                f"{path} is not the image of {origin.package} {origin.version}: unpack that version there "
                "(dpkg-deb -x; old versions are on snapshot.debian.org)"
            )
    return folder


def _unpack(package: str, folder: Path) -> None:
    partial = folder / f".{package}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        subprocess.run(["apt-get", "download", package], cwd=partial, check=True, capture_output=True)
        (archive,) = partial.glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", archive.name, "."], cwd=partial, check=True, capture_output=True)
        archive.unlink()
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ValueError(
            f"the Debian package {package} could not be downloaded ({error}): unpack it into {folder / package}"
        ) from error
    partial.rename(folder / package)


class Photographs(torch.utils.data.Dataset):
    """Random crops at all scales of the listed photographs, three in four with objects laid over them.

    Every item is a function of (seed, index); an index beyond the size is another crop (virtual epochs).

    Args:
        folder: where `fetch` put them.
        image_size: side of the square items.
        seed: of crops and compositions.

    Items: {"image": (3, image_size, image_size) in [0, 1]}.

    Raises:
        ImageReadError: where an image of the list is not in ``folder``.
    """

    virtual_epochs = True

    def __init__(self, folder: str | Path, image_size: int = 224, seed: int = 0):
        self.folder, self.image_size, self.seed = Path(folder), image_size, seed
        for origin in origins():
            if not origin.path(self.folder).is_file():
                raise ImageReadError(
                    f"{self.folder} lacks {origin.package}/{origin.file}: aha.data.photographs.fetch brings it"
                )
        self._scenes = [origin for origin in origins() if origin.kind == "photograph"]
        self._objects = [origin for origin in origins() if origin.kind == "object"]
        self._kept: dict[Path, Image.Image] = {}

    def __len__(self) -> int:
        return len(self._objects) * 4 // 3

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = random.Random(f"{self.seed} {index}")
        position = index % len(self)
        with_object = position < len(self._objects)
        size = self.image_size
        picture = self._crop(self._photograph(rng.choice(self._scenes)), rng)
        if with_object:
            shown = [self._objects[position]]
            if rng.random() < SECOND:
                shown.insert(0, rng.choice(self._objects))
            for origin in shown:
                self._lay(self._cut_out(origin), picture, rng)
        for change in (ImageEnhance.Brightness, ImageEnhance.Color):
            picture = change(picture).enhance(rng.uniform(0.8, 1.2))
        assert picture.size == (size, size)
        return {"image": to_tensor(picture)}

    def identity(self, content: bool = True) -> dict[str, Any]:
        """What these images are, as JSON types."""
        mark = hashlib.sha256("".join(origin.sha256 for origin in origins()).encode()).hexdigest()[:16]
        return {"kind": "photographs", "list": mark, "image_size": self.image_size, "seed": self.seed}

    def _crop(self, image: Image.Image, rng: random.Random) -> Image.Image:
        short = min(image.size)
        side = max(min(short, self.image_size // 2), round(short * SMALLEST ** rng.random()))
        left, top = rng.randint(0, image.width - side), rng.randint(0, image.height - side)
        box = (left, top, left + side, top + side)
        square = image.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC, box=box)
        return ImageOps.mirror(square) if rng.random() < 0.5 else square

    def _lay(self, cut_out: Image.Image, picture: Image.Image, rng: random.Random) -> None:
        """Somewhere in the picture, a little over its border perhaps."""
        longer = self.image_size * rng.uniform(*COVERED)
        scale = longer / max(cut_out.size)
        width, height = (max(1, round(side * scale)) for side in cut_out.size)
        cut_out = cut_out.resize((width, height), Image.Resampling.BICUBIC)
        if rng.random() < 0.5:
            cut_out = ImageOps.mirror(cut_out)
        cut_out = cut_out.rotate(rng.uniform(-15, 15), Image.Resampling.BICUBIC, expand=True)
        over = self.image_size // 10
        left = rng.randint(-over, max(-over, self.image_size - cut_out.width + over))
        top = rng.randint(-over, max(-over, self.image_size - cut_out.height + over))
        picture.paste(cut_out, (left, top), cut_out)

    def _photograph(self, origin: Origin) -> Image.Image:
        path = origin.path(self.folder)
        if path not in self._kept:
            image = open_image(path, SHORT)
            if min(image.size) > SHORT:
                scale = SHORT / min(image.size)
                size = (round(image.width * scale), round(image.height * scale))
                image = image.resize(size, Image.Resampling.BICUBIC)
            self._kept[path] = image
        return self._kept[path]

    def _cut_out(self, origin: Origin) -> Image.Image:
        path = origin.path(self.folder)
        if path not in self._kept:
            with Image.open(path) as file:
                image = file.convert("RGBA")
            self._kept[path] = image.crop(image.getchannel("A").getbbox())
        return self._kept[path]

"""Labelled images: scenes made on the fly with their evidence known, and folders of images on disk."""

from aha.data.folders import ImageFolder, output_names
from aha.data.images import ImageMissingError, ImageReadError, Preprocessing, load_image
from aha.data.labels import fit_labels, label_note
from aha.data.listing import find_images
from aha.data.photograph import Photograph, View
from aha.data.readable import Readable, readable
from aha.data.scenes import Scenes
from aha.data.shards import Shards, images_in
from aha.data.split import Part, hold_out, identity
from aha.data.workers import workers_for

__all__ = [
    "ImageFolder",
    "ImageMissingError",
    "ImageReadError",
    "Part",
    "Photograph",
    "Preprocessing",
    "Readable",
    "Scenes",
    "Shards",
    "View",
    "find_images",
    "fit_labels",
    "hold_out",
    "identity",
    "images_in",
    "label_note",
    "load_image",
    "output_names",
    "readable",
    "workers_for",
]

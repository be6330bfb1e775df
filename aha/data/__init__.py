"""Labelled images: scenes made on the fly with their evidence known, and folders of images on disk."""

from aha.data.folders import ImageFolder, ImageReadError, find_images, load_image
from aha.data.scenes import Scenes
from aha.data.split import Part, hold_out

__all__ = ["ImageFolder", "ImageReadError", "Part", "Scenes", "find_images", "hold_out", "load_image"]

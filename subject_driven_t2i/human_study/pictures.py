"""Copies of images for the pages, treated alike: RGB, one size for all that are compared, PNG without metadata.

They lie under names that say nothing, so that no one can tell from a copy where it came from.
"""

from __future__ import annotations

import secrets
from pathlib import Path

from PIL import Image, ImageOps

from ..subjects import open_image

REFERENCE_SIDE = 512  # pixels of a reference image at most, in width and height


def square(path: Path, size: tuple[int, int]) -> Image.Image:
    """An image, scaled and cut about its centre to ``size``, (width, height)."""
    return ImageOps.fit(open_image(path), size, Image.Resampling.LANCZOS)


def reference(path: Path) -> Image.Image:
    """An image as it is, made smaller where it is large."""
    image = open_image(path)
    image.thumbnail((REFERENCE_SIDE, REFERENCE_SIDE), Image.Resampling.LANCZOS)
    return image


def new_name() -> str:
    return f"{secrets.token_hex(16)}.png"


def save(image: Image.Image, path: Path) -> None:
    """Writes the pixels of an RGB image as PNG, and nothing else that it knows."""
    Image.frombytes("RGB", image.size, image.tobytes()).save(path, "PNG")

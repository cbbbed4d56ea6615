"""Images: opening with every damage told in a line, square padding, pixel values."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

from moslora_core.errors import UserError

MAX_PIXELS = 64_000_000  # an image that claims more is not decoded: a small file may unpack to gigabytes


def open_image(source: str | Path | bytes, name: str | None = None) -> Image.Image:
    """Reads an image as RGB, turned as its EXIF orientation says.

    LLaVA and XTuner convert in the same way but leave the orientation out.

    Args:
        source: path of a file, or its content as base64 in bytes.
        name: what the error names; the path by default.

    Raises:
        UserError: no such file, something that is no image, or one that is cut off, damaged or too large.
    """
    name = name or ("base64 image" if isinstance(source, bytes) else str(source))
    try:
        with Image.open(_decode(source, name) if isinstance(source, bytes) else source) as image:
            _check_size(image, name)
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise UserError(f"no image {name}") from None
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise UserError(f"{name}: an image of more than {MAX_PIXELS} pixels; expected a smaller one") from None
    except Exception as error:  # the decoders raise many kinds on damaged data
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name} cannot be read as an image: {reason}") from None


def _decode(text: bytes, name: str) -> io.BytesIO:
    try:
        return io.BytesIO(base64.b64decode(text.strip(), validate=True))
    except binascii.Error as error:
        raise UserError(f"{name} is damaged: expected base64, found {error}") from None


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UserError(f"{name}: an image of {width} x {height} pixels; expected at most {MAX_PIXELS} in all")


def pad_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """Centres ``image`` on a square of its longer side in ``colour``, as LLaVA-1.5's ``expand2square``."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new(image.mode, (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def mean_colour(processor: Any) -> tuple[int, ...]:
    """The image processor's mean as a colour, so that padding is zero after normalisation."""
    return tuple(int(255 * channel) for channel in processor.image_processor.image_mean)


def pixel_values(images: Sequence[Image.Image], processor: Any, square: bool = True) -> torch.Tensor:
    """What the vision tower reads: (images, 3, height, width).

    Args:
        processor: a LlavaProcessor.
        square: pad to a square first, so that the centre crop loses nothing.
    """
    if square:
        images = [pad_to_square(image, mean_colour(processor)) for image in images]
    return processor.image_processor(list(images), return_tensors="pt")["pixel_values"]


def image_token_count(processor: Any) -> int:
    """Tokens that one image takes in the text: the patches of ``processor``'s (a LlavaProcessor's) crop.

    The class token counts too unless vision_feature_select_strategy is "default", which drops it.

    Raises:
        UserError: a processor without crop_size or patch_size.
    """
    crop = getattr(processor.image_processor, "crop_size", None)
    if not crop or not processor.patch_size:
        raise UserError("the base model's processor_config.json lacks crop_size or patch_size; expected LLaVA's")
    patches = (crop["height"] // processor.patch_size) * (crop["width"] // processor.patch_size)
    dropped = processor.vision_feature_select_strategy == "default"
    return patches + processor.num_additional_image_tokens - dropped

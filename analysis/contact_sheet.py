"""A contact sheet: images in a grid, a prompt beside every row and a name above every column, small enough to print.

Files stay small without a loss that print would show: an image has at most ``PIXELS`` on a side, and no more colours
than an indexed one can have (a PDF then takes a byte a pixel). Smaller images keep their pixels.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .style import FAINT, GREY, TEXT, pictures, publication

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image

PIXELS = 256  # 205 dots an inch at the largest size
COLOURS = 256
SIDE = 1.25  # inches of an image where there is room
GAP = 0.05
LABELS = 1.3  # inches for the prompts
NAMES = 0.34  # inches for the columns' names, of up to two lines
LETTERS = {"prompt": 22, "name": 19, "missing": 16}  # a line's


@dataclass(frozen=True)
class SheetRow:
    """One row; an image that is missing is None."""

    label: str
    images: Sequence[Image.Image | None]


def shrink(image: Image.Image) -> Image.Image:
    """The square centre of an image, RGB, in the pixels and colours of a sheet."""
    from PIL import Image, ImageOps

    image = image.convert("RGB")
    side = min(image.size)
    if side <= PIXELS:
        left, top = ((length - side) // 2 for length in image.size)
        image = image.crop((left, top, left + side, top + side))
    else:
        image = ImageOps.fit(image, (PIXELS, PIXELS), Image.Resampling.LANCZOS)
    if image.getcolors(COLOURS) is None:
        palette = image.quantize(COLOURS, Image.Quantize.FASTOCTREE)
        image = image.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).convert("RGB")
    return image


def draw(columns: Sequence[str], rows: Sequence[SheetRow]) -> dict[str, bytes]:
    """The sheet as PDF, SVG and PNG."""
    with publication():
        return pictures(compose(columns, rows))


def compose(columns: Sequence[str], rows: Sequence[SheetRow]) -> Figure:
    """The sheet, at most as wide as a page."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    side = min(SIDE, (TEXT - LABELS) / len(columns) - GAP)
    width, height = LABELS + len(columns) * (side + GAP), NAMES + len(rows) * (side + GAP)
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    for number, name in enumerate(columns):
        x = LABELS + number * (side + GAP) + side / 2
        wrapped = _wrapped(name, LETTERS["name"] * side / SIDE)
        figure.text(x / width, 1 - (NAMES - 0.06) / height, wrapped, ha="center", va="bottom", linespacing=1.1)
    for number, row in enumerate(rows):
        bottom = height - NAMES - (number + 1) * (side + GAP) + GAP
        label = _wrapped(row.label, LETTERS["prompt"])
        figure.text(0.02 / width, (bottom + side / 2) / height, label, ha="left", va="center", linespacing=1.2)
        for column, image in enumerate(row.images):
            left = LABELS + column * (side + GAP)
            axes = figure.add_axes((left / width, bottom / height, side / width, side / height))
            _cell(axes, image, side)
    return figure


def _cell(axes: Axes, image: Image.Image | None, side: float) -> None:
    import numpy as np

    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(color=FAINT, linewidth=0.4)
    if image is None:
        axes.text(0.5, 0.5, "missing", ha="center", va="center", color=GREY, fontsize=6 * side / SIDE)
        return
    # As it is: resampled, a file would have the pixels of the printer instead of the image's.
    axes.imshow(np.asarray(image), interpolation="none", aspect="auto")


def _wrapped(text: str, letters: float) -> str:
    return "\n".join(textwrap.wrap(text, round(letters), break_on_hyphens=False))

"""The one style of all figures: sizes, fonts, colours, and how a figure becomes files of the same bytes every time.

matplotlib is imported where a figure is drawn, not with the module: a report without figures does not wait for it.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from moslora_core.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMN = 3.3  # inches: one column of a two-column page
TEXT = 6.8  # inches: both columns

# Okabe and Ito's palette, told apart in every common form of colour blindness; its yellow is too light for a line.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P")  # a second cue beside the colour, for print in grey
LOOKS = tuple(zip(PALETTE, MARKERS, strict=True))
GREY = "#595959"  # words that are not to be read first
FAINT = "#c8c8c8"  # grids

RC = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same letters on every machine
    "font.size": 7.5,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "lines.linewidth": 1.1,
    "lines.markersize": 3.6,
    "axes.linewidth": 0.6,
    "figure.dpi": 100,
    "savefig.dpi": 300,
    "pdf.fonttype": 42,  # TrueType, embedded: publishers refuse Type 3
    "ps.fonttype": 42,
    "svg.fonttype": "path",  # a reader without the font sees the same letters
    "svg.hashsalt": "moslora",  # otherwise ids are random
}


@contextmanager
def publication() -> Iterator[None]:
    """Inside it figures are drawn in the style, whatever the user's own matplotlib settings are.

    Raises:
        UserError: if matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib import style
    except ImportError:
        raise UserError("figures need matplotlib: install the extra analysis, or pass --no-figures") from None
    with style.context("default"), matplotlib.rc_context(RC):
        yield


def pictures(figure: Figure) -> dict[str, bytes]:
    """PDF, SVG and PNG of ``figure`` at its own size, without a date or the version of a program in them."""
    metadata = {
        "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
        "svg": {"Date": None, "Creator": None},
        "png": {"Software": None},
    }
    files = {}
    for suffix, entries in metadata.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format=suffix, metadata=entries)
        files[suffix] = buffer.getvalue()
    return files

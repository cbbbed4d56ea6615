"""How the numbers of :mod:`analysis.subspace` are drawn: small multiples of matrices, lines, dots, a square matrix."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .style import COLUMN, FAINT, GREY, LOOKS, TEXT, pictures, publication

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar
    from matplotlib.figure import Figure

SMALL = 6  # points: numbers of scales and names of small things
COLOURS = "Blues"  # white is zero
LETTERS = "abcdefgh"
EDGE = {"markeredgecolor": "white", "markeredgewidth": 0.4}  # keeps markers apart that lie on one another
Matrix = Sequence[Sequence[float]]

# ------------------------------------------------------------------------------------------------------------ mixers


@dataclass(frozen=True)
class Block:
    """Matrices by layer (row) and kind of module (column); None where there is none."""

    name: str
    layers: Sequence[str]
    kinds: Sequence[str]
    matrices: Mapping[tuple[str, str], Matrix]


@dataclass(frozen=True)
class Moment:
    """All blocks of one adapter; ``name`` stands above them."""

    name: str
    blocks: Sequence[Block]


def draw_mixers(moments: Sequence[Moment], label: str) -> dict[str, bytes]:
    """The moments side by side, a column of the page each, over one scale of colours from zero."""
    with publication():
        return pictures(compose_mixers(moments, label))


def compose_mixers(moments: Sequence[Moment], label: str) -> Figure:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    margin, gap, title, bar = 0.3, 0.04, 0.2, 0.42  # inches
    blocks = moments[0].blocks
    heading = 0.3 if any(block.name for block in blocks) else 0.17
    size = min(0.48, (COLUMN - margin - 0.06) / max(len(block.kinds) for block in blocks))
    heights = [heading + size * len(block.layers) for block in blocks]
    width, height = (COLUMN if len(moments) == 1 else TEXT), title + sum(heights) + bar
    figure = _figure(width, height)
    values = [
        value for m in moments for b in m.blocks for rows in b.matrices.values() for row in rows for value in row
    ]
    norm = Normalize(0, max(values, default=1.0) or 1.0)
    for number, moment in enumerate(moments):
        left, top = number * width / len(moments), height - title
        figure.text((left + margin) / width, 1 - 0.06 / height, moment.name, fontweight="bold", va="top")
        for block, tall in zip(moment.blocks, heights, strict=True):
            top -= tall
            box = (left + margin, top, size * len(block.kinds), tall - heading)
            axes = figure.add_axes((box[0] / width, box[1] / height, box[2] / width, box[3] / height))
            _block(axes, block, norm, gap / size)
    scale = figure.add_axes((margin / width, 0.28 / height, 1.2 / width, 0.07 / height))
    colours = figure.colorbar(ScalarMappable(norm, COLOURS), cax=scale, orientation="horizontal")
    _quiet_bar(colours)
    figure.text((margin + 1.3) / width, 0.315 / height, label, va="center")
    return figure


def _block(axes: Axes, block: Block, norm: object, gap: float) -> None:
    from matplotlib.patches import Rectangle

    axes.set(xlim=(0, len(block.kinds)), ylim=(len(block.layers), 0))
    axes.axis("off")
    for (layer, kind), matrix in block.matrices.items():
        x, y = block.kinds.index(kind) + gap / 2, block.layers.index(layer) + gap / 2
        extent = (x, x + 1 - gap, y + 1 - gap, y)
        axes.imshow(matrix, cmap=COLOURS, norm=norm, extent=extent, aspect="auto", interpolation="nearest")
        frame = {"fill": False, "edgecolor": FAINT, "linewidth": 0.4}
        axes.add_patch(Rectangle((x, y), 1 - gap, 1 - gap, clip_on=False, **frame))
    axes.set(xlim=(0, len(block.kinds)), ylim=(len(block.layers), 0))
    for number, kind in enumerate(block.kinds):
        axes.text(number + 0.5, -0.04, kind, fontsize=SMALL, ha="center", va="bottom")
    numbered = [layer for layer in block.layers if layer]
    axes.text(-0.08, -0.04, "layer" if numbered else "", fontsize=SMALL, color=GREY, ha="right", va="bottom")
    for number, layer in enumerate(block.layers):
        axes.text(-0.08, number + 0.5, layer, fontsize=SMALL, ha="right", va="center")
    if block.name:
        shift = {"xytext": (0, 9), "textcoords": "offset points"}
        axes.annotate(block.name, (0, 0), color=GREY, ha="left", va="bottom", **shift)


# -------------------------------------------------------------------------------------------------------------- lines


@dataclass(frozen=True)
class Curve:
    """Points (x, y, low, high), where the last two are a band; ``dashed`` is how a group was at the start."""

    label: str
    colour: str
    marker: str
    points: Sequence[tuple[float, float, float, float]]
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """Curves over one pair of axes; ``guides`` are horizontal lines with the name of what would lie there.

    ``left`` is where the x axis begins, ``limits`` are the ends of the y axis; ``name`` tells a panel from others of
    the same axes. A curve of one point is a mark.
    """

    x: str
    y: str
    curves: Sequence[Curve]
    log: bool = False
    left: float | None = None
    guides: Mapping[float, str] = field(default_factory=dict)
    limits: tuple[float, float] | None = None
    name: str = ""


def draw_lines(charts: Sequence[Chart], columns: int) -> dict[str, bytes]:
    """The charts in rows of so many over one legend."""
    with publication():
        return pictures(compose_lines(charts, columns))


def compose_lines(charts: Sequence[Chart], columns: int) -> Figure:
    from matplotlib.lines import Line2D

    rows = math.ceil(len(charts) / columns)
    figure = _figure(TEXT, 3)
    labelled = {(c.colour, c.marker): c for chart in charts for c in chart.curves}
    handles = [
        Line2D([], [], label=textwrap.fill(labelled[look].label, 40), color=look[0], marker=look[1])
        for look in dict.fromkeys((*LOOKS, *labelled))
        if look in labelled
    ]
    if any(curve.dashed for chart in charts for curve in chart.curves):
        handles.append(Line2D([], [], label="at the start", color=GREY, linestyle="--"))
    legend = _legend(figure, handles)
    named = 0.16 if any(chart.name for chart in charts) else 0.0
    height = (1.65 + named) * rows + legend
    figure.set_figheight(height)
    margins = {
        "left": 0.5 / TEXT,
        "right": 1 - 0.08 / TEXT,
        "top": 1 - (0.1 + named) / height,
        "bottom": (legend + 0.4) / height,
    }
    grid = figure.add_gridspec(rows, columns, wspace=0.32 if columns > 2 else 0.2, hspace=0.42 + named, **margins)
    for number, chart in enumerate(charts):
        _chart(figure.add_subplot(grid[divmod(number, columns)]), chart, f"({LETTERS[number]})")
    return figure


def _chart(axes: Axes, chart: Chart, letter: str) -> None:
    from matplotlib.ticker import LogFormatter

    _quiet(axes)
    for curve in chart.curves:
        x, y, low, high = zip(*curve.points, strict=True)
        look = {"color": curve.colour, "zorder": 4}
        if curve.dashed:
            axes.plot(x, y, linestyle="--", linewidth=0.8, **look)
            continue
        # More markers than that would hide the line.
        axes.plot(x, y, marker=curve.marker, markevery=max(1, len(x) // 6), **EDGE, **look)
        if len(x) == 1:
            axes.plot([*x, *x], [*low, *high], linewidth=0.8, **look)
            continue
        axes.fill_between(x, low, high, color=curve.colour, alpha=0.12, linewidth=0, zorder=2)
    if chart.log:
        axes.set_yscale("log")
        # Plain numbers, fewer of them over a wider range: powers of ten are wide, and meet the axis' name.
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
    axes.set(xlabel=chart.x, ylabel=f"{letter} {chart.y}")
    if chart.left is not None:
        axes.set_xlim(left=chart.left)
    if chart.limits is not None:
        axes.set_ylim(chart.limits)
    if chart.name:
        axes.annotate(chart.name, (0, 1), (0, 4), "axes fraction", "offset points", va="bottom", fontweight="bold")
    for value in chart.guides:
        axes.axhline(value, color=GREY, linewidth=0.6, linestyle=":", zorder=1)
    bottom, top = axes.get_ylim()
    for value, name in chart.guides.items():
        above = value < (bottom + top) / 2
        place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "ha": "right"}
        place |= {"xytext": (-2, 1 if above else -2), "va": "bottom" if above else "top"}
        axes.annotate(name, (1, value), color=GREY, fontsize=SMALL, **place)


# --------------------------------------------------------------------------------------------------------------- dots


@dataclass(frozen=True)
class Dot:
    """A value with the range around it."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Series:
    """Dots by heading and name of the row."""

    label: str
    colour: str
    marker: str
    dots: Mapping[tuple[str, str], Dot]


@dataclass(frozen=True)
class DotPanel:
    """One quantity; ``guides`` are vertical lines with the name of what would lie there."""

    x: str
    series: Sequence[Series]
    guides: Mapping[float, str] = field(default_factory=dict)


def draw_dots(panels: Sequence[DotPanel], rows: Mapping[str, Sequence[str]]) -> dict[str, bytes]:
    """The panels side by side over common rows; ``rows`` maps a heading to the names of its rows."""
    with publication():
        return pictures(compose_dots(panels, rows))


def compose_dots(panels: Sequence[DotPanel], rows: Mapping[str, Sequence[str]]) -> Figure:
    from matplotlib.lines import Line2D

    headings, places, at = {}, {}, 0
    for name, members in rows.items():
        if name:
            headings[name], at = at, at + 1
        for member in members:
            places[name, member], at = at, at + 1
    figure = _figure(TEXT, 3)
    handles = [
        Line2D([], [], label=textwrap.fill(entry.label, 40), color=entry.colour, marker=entry.marker)
        for entry in panels[0].series
    ]
    legend = _legend(figure, handles)
    height = max(0.17, 0.062 * len(handles) + 0.05) * at + 0.6 + legend
    figure.set_figheight(height)
    margins = {
        "left": 1.02 / TEXT,
        "right": 1 - 0.1 / TEXT,
        "top": 1 - 0.2 / height,
        "bottom": (legend + 0.4) / height,
    }
    grid = figure.add_gridspec(1, len(panels), wspace=0.1, **margins)
    for number, panel in enumerate(panels):
        axes = figure.add_subplot(grid[0, number])
        _quiet(axes, "y")
        _dots(axes, panel, places)
        axes.locator_params(axis="x", nbins=5)
        axes.set(ylim=(at - 0.5, -0.5), xlabel=f"({LETTERS[number]}) {panel.x}")
        axes.set_yticks(list(places.values()), [] if number else [member for _, member in places])
        axes.tick_params(axis="y", length=0)
        for name, y in {} if number else headings.items():
            axes.annotate(name, (0.06 / TEXT, y), xycoords=("figure fraction", "data"), color=GREY, va="center")
    return figure


def _dots(axes: Axes, panel: DotPanel, places: Mapping[tuple[str, str], int]) -> None:
    for value in panel.guides:
        axes.axvline(value, color=GREY, linewidth=0.6, linestyle=":", zorder=1)
    for number, entry in enumerate(panel.series):
        shift = 0.7 * ((number + 0.5) / len(panel.series) - 0.5)
        for row, dot in entry.dots.items():
            y = places[row] + shift
            axes.plot([dot.low, dot.high], [y, y], color=entry.colour, linewidth=0.8, zorder=3)
            axes.plot([dot.value], [y], color=entry.colour, marker=entry.marker, zorder=4, **EDGE)
    left, right = axes.get_xlim()
    for value, name in panel.guides.items():
        part = (value - left) / (right - left)
        side = "left" if part < 0.1 else "right" if part > 0.9 else "center"
        if len(panel.guides) == 2:  # away from one another
            side = "right" if value == min(panel.guides) else "left"
        place = {"xycoords": ("data", "axes fraction"), "xytext": (0, 1.5), "textcoords": "offset points"}
        axes.annotate(name, (value, 1), color=GREY, fontsize=SMALL, ha=side, va="bottom", **place)


# ------------------------------------------------------------------------------------------------------------- angles


@dataclass(frozen=True)
class Square:
    """A matrix of angles in degrees between runs, with the names and sizes of the groups that they come in.

    Attributes:
        runs: names of the rows.
        groups: (name, number of its runs), in the order of the rows.
        below: angles under the diagonal, by (row, column) with row > column; ``above`` those over it, with the same
            keys.
    """

    runs: Sequence[str]
    groups: Sequence[tuple[str, int]]
    below: Mapping[tuple[int, int], float]
    above: Mapping[tuple[int, int], float]


def draw_angles(square: Square) -> dict[str, bytes]:
    with publication():
        return pictures(compose_angles(square))


def compose_angles(square: Square) -> Figure:
    import numpy as np

    count = len(square.runs)
    figure = _figure(TEXT, 3)
    names = [textwrap.fill(name, 22) for name, _ in square.groups]
    left, right, below, above = max(_width(figure, name) for name in names) + 0.32, 0.46, 0.38, 0.22  # inches
    side = min(0.24 * max(count, 4), TEXT - left - right)
    width, height = left + side + right, below + side + above
    figure.set_size_inches(width, height)
    table = np.full((count, count), np.nan)
    for (i, j), value in square.below.items():
        table[i, j] = value
    for (i, j), value in square.above.items():
        table[j, i] = value
    axes = figure.add_axes((left / width, below / height, side / width, side / height))
    image = axes.imshow(table, cmap=f"{COLOURS}_r", vmin=0, vmax=90, interpolation="nearest")
    for (i, j), value in np.ndenumerate(table):
        if not np.isnan(value):
            colour = "black" if value > 45 else "white"
            axes.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=SMALL, color=colour)
    axes.set_xticks(range(count), square.runs, fontsize=SMALL)
    axes.set_yticks(range(count), square.runs, fontsize=SMALL)
    axes.tick_params(length=0, pad=2)
    axes.spines[:].set_visible(False)
    first = 0
    for name, (_, members) in zip(names, square.groups, strict=True):
        place = {"xytext": (-14, 0), "textcoords": "offset points", "annotation_clip": False}
        axes.annotate(name, (-0.5, first + (members - 1) / 2), ha="right", va="center", **place)
        first += members
        if first < count:
            axes.axhline(first - 0.5, color="black", linewidth=0.6)
            axes.axvline(first - 0.5, color="black", linewidth=0.6)
    axes.plot([-0.5, count - 0.5], [-0.5, count - 0.5], color=FAINT, linewidth=0.6)
    axes.set(xlim=(-0.5, count - 0.5), ylim=(count - 0.5, -0.5))
    for words, y in {"above: input spaces": height - 0.1, "below: output spaces": 0.11}.items():
        figure.text((left + side / 2) / width, y / height, words, color=GREY, ha="center", va="center")
    bar = figure.add_axes(((left + side + 0.1) / width, below / height, 0.08 / width, side / height))
    scale = figure.colorbar(image, cax=bar, ticks=range(0, 91, 30), format="{x:.0f}°")
    _quiet_bar(scale)
    return figure


# ------------------------------------------------------------------------------------------------------------- shared


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def _quiet(axes: Axes, grid: str = "both") -> None:
    """Axes without a box, over a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color=FAINT, linewidth=0.4, alpha=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=SMALL, width=0.6, length=2)


def _legend(figure: Figure, handles: Sequence[object]) -> float:
    """Draws the legend below everything in as many columns as fit; returns its height in inches."""
    for columns in range(len(handles), 0, -1):
        legend = figure.legend(
            handles=handles, loc="lower center", ncols=columns, handlelength=2.2, columnspacing=1.2, borderaxespad=0.2
        )
        box = legend.get_window_extent()
        # Letters are a little wider at the size at which a picture is saved.
        if box.width <= 0.94 * figure.bbox.width or columns == 1:
            return box.height / figure.dpi + 0.04
        legend.remove()
    return 0.0


def _quiet_bar(bar: Colorbar) -> None:
    bar.outline.set_linewidth(0.4)
    bar.ax.tick_params(labelsize=SMALL, width=0.4, length=2, pad=1)


def _width(figure: Figure, text: str) -> float:
    """Width of a text in inches."""
    drawn = figure.text(0, 0, text)
    box = drawn.get_window_extent()
    drawn.remove()
    return box.width / figure.dpi

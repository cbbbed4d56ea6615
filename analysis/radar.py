"""A radar chart: one polygon a line over axes of one common scale, with a band around it."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .style import COLUMN, FAINT, GREY, TEXT, pictures, publication

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RADIUS = 0.98  # inches from the centre to the outer ring, where the names leave room for it
NAMES_AT = 1.09  # radii from the centre to an axis' name


@dataclass(frozen=True)
class Line:
    """Values by axis, None where there is none; ``band`` has (low, high) by axis. ``single``: one seed, dashed."""

    label: str
    colour: str
    marker: str
    values: Sequence[float | None]
    band: Sequence[tuple[float, float] | None]
    single: bool


@dataclass(frozen=True)
class Panel:
    """Axes and lines of one chart; ``name`` stands above it where there are several."""

    name: str
    axes: Sequence[str]
    lines: Sequence[Line]


@dataclass(frozen=True)
class Scale:
    """Value at the centre, and at each ring from the inner to the outer."""

    centre: float
    rings: tuple[float, ...]

    def radius(self, value: float) -> float:
        """Distance from the centre in units of the outer ring; what lies off the scale is moved to its end."""
        return min(max((value - self.centre) / (self.rings[-1] - self.centre), 0.0), 1.0)


def scale_for(low: float, high: float, whole: float, limit: float = math.inf) -> Scale:
    """A scale of two to six round rings that holds the values from ``low`` to ``high``, clear of the centre.

    It need not start at zero: lines that lie close together would not be told apart.

    Args:
        whole: size of the usual range of values, such as 100 for percent.
        limit: no ring lies above it.
    """
    for step in (whole * part for part in (0.05, 0.1, 0.2, 0.5, 1.0)):
        first = max(0, math.floor(round(low / step - 0.5, 9)))
        last = max(first + 2, math.ceil(round(high / step, 9)))
        if last - first <= 6:
            break
    if last * step > limit:
        last = round(limit / step)
        first = min(first, last - 2)
    if first * step <= whole / 5 and last <= 6:  # so near zero that the scale may as well start there
        first = 0
    return Scale(first * step, tuple(i * step for i in range(first + 1, last + 1)))


def draw(panels: Sequence[Panel], scale: Scale) -> dict[str, bytes]:
    """The panels side by side over a common legend, as PDF, SVG and PNG."""
    with publication():
        return pictures(compose(panels, scale))


def compose(panels: Sequence[Panel], scale: Scale) -> Figure:
    """The figure, one column wide with one panel and a page with several."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(COLUMN if len(panels) == 1 else TEXT, 3))
    FigureCanvasAgg(figure)
    legend_height = _legend(figure, panels[0].lines, most=2 * len(panels))
    lines = max(name.count("\n") + 1 for panel in panels for name in panel.axes)
    width = figure.get_figwidth() / len(panels)
    radius = min(_radius(figure, panel.axes, width) for panel in panels)
    reach = NAMES_AT + 0.04 + 0.14 * lines * RADIUS / radius  # from the centre to the far end of the names, in radii
    height = 2 * reach * radius
    total = height + legend_height
    figure.set_figheight(total)
    for number, panel in enumerate(panels):
        axes = figure.add_axes((number / len(panels), legend_height / total, 1 / len(panels), height / total))
        axes.set(xlim=(-width / 2 / radius, width / 2 / radius), ylim=(-reach, reach), aspect="equal")
        axes.axis("off")
        _panel(axes, panel, scale)
        axes.text(0.06, 0.97, panel.name, transform=axes.transAxes, fontweight="bold", ha="left", va="top")
    return figure


def _radius(figure: Figure, names: Sequence[str], width: float) -> float:
    """Inches from the centre to the outer ring with which the names at both sides stay inside ``width``."""
    radius = RADIUS
    for angle, name in zip(_angles(len(names)), names, strict=True):
        text = figure.text(0, 0, name)
        size = text.get_window_extent().width / figure.dpi
        text.remove()
        if abs(math.cos(angle)) > 0.1:
            radius = min(radius, (width / 2 - 0.1 - size) / abs(NAMES_AT * math.cos(angle)))
    return max(radius, RADIUS / 2)


def _legend(figure: Figure, lines: Sequence[Line], most: int) -> float:
    """Draws the legend in as many columns as fit; returns its height in inches."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=textwrap.fill(line.label, 40), **_look(line)) for line in lines]
    for columns in range(min(most, len(lines)), 0, -1):
        legend = figure.legend(
            handles=handles, loc="lower center", ncols=columns, handlelength=2.6, columnspacing=1.2, borderaxespad=0.2
        )
        box = legend.get_window_extent()
        if box.width <= figure.bbox.width or columns == 1:
            return box.height / figure.dpi + 0.02
        legend.remove()


def _look(line: Line) -> dict[str, object]:
    """A dashed line is one seed; the white edge keeps markers apart that lie on one another."""
    style = "--" if line.single else "-"
    edge = {"markeredgecolor": "white", "markeredgewidth": 0.4}
    return {"color": line.colour, "marker": line.marker, "linestyle": style, **edge}


def _panel(axes: Axes, panel: Panel, scale: Scale) -> None:
    from matplotlib.patches import Polygon
    from matplotlib.patheffects import withStroke

    angles = _angles(len(panel.axes))
    for ring in scale.rings:
        corners = [_point(angle, scale.radius(ring)) for angle in angles]
        axes.add_patch(Polygon(corners, fill=False, edgecolor=FAINT, linewidth=0.6, zorder=1))
    for angle, name in zip(angles, panel.axes, strict=True):
        axes.plot(*zip((0, 0), _point(angle, 1), strict=True), color=FAINT, linewidth=0.6, zorder=1)
        x, y = _point(angle, NAMES_AT)
        side = "center" if abs(x) < 0.1 else "left" if x > 0 else "right"
        height = "center" if abs(y) < 0.9 else "bottom" if y > 0 else "top"
        axes.text(x, y, name, ha=side, va=height, linespacing=1.1)
    for line in panel.lines:
        _band(axes, line, angles, scale)
    for line in panel.lines:
        corners = [
            (math.nan, math.nan) if value is None else _point(angle, scale.radius(value))
            for angle, value in zip(angles, line.values, strict=True)
        ]
        axes.plot(*zip(*corners, corners[0], strict=True), **_look(line), zorder=4)
    for value in (scale.centre, *scale.rings):
        x, y = _point(angles[0], scale.radius(value))
        halo = [withStroke(linewidth=1.5, foreground="white")]
        at = {"ha": "left", "va": "center", "zorder": 5}
        axes.text(x + 0.04, y, f"{value:g}", color=GREY, fontsize=6, path_effects=halo, **at)


def _angles(count: int) -> list[float]:
    """Directions of the axes, the first upwards, the others clockwise."""
    return [math.pi / 2 - 2 * math.pi * i / count for i in range(count)]


def _point(angle: float, radius: float) -> tuple[float, float]:
    return radius * math.cos(angle), radius * math.sin(angle)


def _band(axes: Axes, line: Line, angles: Sequence[float], scale: Scale) -> None:
    """Fills between the ends of the band, one quadrilateral between neighbouring axes that both have it."""
    from matplotlib.patches import Polygon

    for i in range(len(angles)):
        j = (i + 1) % len(angles)
        if line.band[i] is None or line.band[j] is None:
            continue
        inner = [_point(angles[k], scale.radius(line.band[k][0])) for k in (i, j)]
        outer = [_point(angles[k], scale.radius(line.band[k][1])) for k in (j, i)]
        axes.add_patch(Polygon([*inner, *outer], facecolor=line.colour, alpha=0.12, linewidth=0, zorder=2))

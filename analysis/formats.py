"""How differences, intervals and p values are written."""

from __future__ import annotations

from .statistics import Interval
from .tables import MISSING


def points(share: float) -> str:
    """``+2.8``: a difference of shares in points."""
    text = f"{100 * share:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def interval(found: Interval | None) -> str:
    """``-0.3 to +5.9`` points."""
    return MISSING if found is None else " to ".join(map(points, found))


def p_value(p: float | None) -> str:
    if p is None:
        return MISSING
    return "<0.001" if p < 0.001 else f"{p:.3f}"

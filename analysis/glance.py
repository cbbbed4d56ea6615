"""The outcome of every claim in one table: what the paper has, what came out here, and how sure that is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .contents import Contents
from .exhibits import EXHIBITS
from .formats import interval, points
from .tables import MISSING, ONE_SEED, Grid
from .verdict import Verdict, VerdictPage

_NAMES = {exhibit.name for exhibit in EXHIBITS}
HEADERS = ("Claim", "Where", "Runs", "Paper", "Here", "95% over seeds", "n", "Outcome")


@dataclass(frozen=True)
class Line:
    """One claim in one setting; ``runs`` names scale, protocol and base model."""

    claim: str
    where: str
    runs: str
    paper: str
    here: str
    interval: str
    n: str
    outcome: str

    @property
    def cells(self) -> tuple[str, ...]:
        return self.claim, self.where, self.runs, self.paper, self.here, self.interval, self.n, self.outcome


def glance(contents: Contents) -> Grid:
    """Differences in points."""
    return Grid(HEADERS, [line(*found).cells for found in in_order(contents)], left=3)


def in_order(contents: Contents) -> Iterable[tuple[VerdictPage, Verdict]]:
    """The verdicts in the order of the sections."""
    return [found for section in contents.sections for found in section.verdicts]


def line(page: VerdictPage, verdict: Verdict) -> Line:
    """The line of one verdict."""
    statement, comparison = verdict.statement, verdict.comparison
    found = None if comparison is None else comparison.mean
    n = 0 if comparison is None else len(comparison.seeds)
    return Line(
        claim=statement.text,
        where=statement.source if statement.source in _NAMES else "control",
        runs=", ".join([page.scale, page.protocol]) + (f"; {verdict.where}" if verdict.where else ""),
        paper=MISSING if verdict.paper_gap is None else f"{verdict.paper_gap:+.1f}",
        here=MISSING if found is None else points(found.by_seed.mean),
        interval=MISSING if found is None else interval(found.by_seed.interval),
        n=f"{n}{ONE_SEED if n == 1 else ''}",
        outcome=verdict.outcome,
    )

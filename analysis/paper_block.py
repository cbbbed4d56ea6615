"""The paper's numbers as a block of a page: every number with the mark of its provenance, every mark explained."""

from __future__ import annotations

from collections.abc import Sequence

from .paper import PROVENANCE_MARKS, Claim, PaperTable
from .tables import MISSING, Block, Grid

_ORIGIN = "Printed by the paper at its own scale and not measured here. A dash is a number that was not found."


def paper_block(paper: PaperTable, sources: dict[str, str]) -> Block:
    """The block of one table; ``sources`` says what the sources' tags stand for."""
    headers = ["Method", *(column.title for column in paper.columns)]
    rows = [
        [row.title, *(claims_text(row.cells.get(column.id, ())) for column in paper.columns)] for row in paper.rows
    ]
    return Block(
        title=f"Paper, {paper.setting} ({paper.title}, arXiv 2406.11909)",
        grid=Grid(headers, rows),
        facts=[_ORIGIN] if paper.claims() else [],
        notes=[
            *_legend(paper, sources),
            *(f"{note.text} {note.mark}" for note in paper.notes),
        ],
    )


def paper_lines(paper: PaperTable) -> list[dict[str, object]]:
    """One mapping a claim, for CSV; no claim goes without its provenance."""
    lines = []
    for row in paper.rows:
        for column in paper.columns:
            for claim in row.cells.get(column.id, ()):
                numbers = {name: getattr(claim, name) for name in ("value", "low", "high")}
                line = {"origin": "paper", "method": row.id, "column": column.id, "unit": column.unit}
                line |= {name: number for name, number in numbers.items() if number is not None}
                lines.append(line | {"provenance": claim.provenance, "source": claim.source})
    return lines


def claims_text(claims: Sequence[Claim]) -> str:
    """``95.0ʳ (94.5-95.3ᵈ)``: the headline, then what else is known of the cell."""
    texts = [_claim_text(claim) for claim in claims]
    if not texts:
        return MISSING
    return texts[0] + (f" ({'; '.join(texts[1:])})" if texts[1:] else "")


def _claim_text(claim: Claim) -> str:
    if claim.value is not None:
        return f"{claim.value}{claim.mark}"
    return (f"<{claim.high}" if claim.low is None else f"{claim.low}-{claim.high}") + claim.mark


def _legend(paper: PaperTable, sources: dict[str, str]) -> list[str]:
    """A line per provenance in use: its mark, its share of the numbers, its sources."""
    claims = paper.claims()
    lines = []
    for name, mark in PROVENANCE_MARKS.items():
        if used := sorted({entry.source for entry in (*claims, *paper.notes) if entry.provenance == name}):
            count = sum(claim.provenance == name for claim in claims)
            named = "; ".join(f"{sources[source]} ({source})" for source in used)
            share = f" ({count} of {len(claims)} numbers)" if claims else ""
            lines.append(f"{mark} {name}{share}: {named}.")
    return lines

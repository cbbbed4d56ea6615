"""The report as one HTML file: ``report.html.jinja`` filled in, with pictures inside and nothing to be fetched.

Pages come as Markdown (:mod:`analysis.markdown`), so that a table says the same in every format.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files

from moslora_core.errors import UserError

from . import glance, markdown
from .contents import Contents, Found, Part, Section
from .exhibits import TITLES
from .figure5 import Figure
from .markdown import Block, Bullets, Heading, Paragraph, Table
from .paper import PROVENANCE_MARKS
from .paper_block import paper_block
from .tables import FEWER_TASKS, MISSING, Grid
from .verdict import (
    HOLDS,
    NOT_COMPARABLE,
    NOT_RUN,
    ONE_SEED,
    OPEN,
    OPPOSITE,
    SMALLER,
    Verdict,
    VerdictPage,
)

TEMPLATE = "report.html.jinja"
# Outcome -> the class that colours it; a word always stands beside the colour.
OUTCOMES = {HOLDS: "yes", OPPOSITE: "no", SMALLER: "small", OPEN: "open", ONE_SEED: "open"}
OUTCOMES |= {NOT_COMPARABLE: "none", NOT_RUN: "none"}
_LEFT_OUT = Paragraph("Left out:")
_PAPERS = "Paper, "
_COUNT = re.compile(r" \([\d,]+\)$")
LARGEST_SVG = 400_000  # bytes; a picture of more is shown as its PNG
PROVENANCE = {
    "PAPER": "the paper's own text",
    "SECONDARY": "a source that relays the paper",
    "CODE": "the authors' repository",
    "DERIVED": "arithmetic on the above",
    "RECALLED": "from memory: agrees with the sourced aggregates, but no cell was checked against the paper",
}


@dataclass(frozen=True)
class Picture:
    uri: str
    alt: str


@dataclass(frozen=True)
class Page:
    """One document: its picture and tables, then what must be known to read them.

    Attributes:
        columns: titles of the first table's columns, as the paper has them.
        beside: rows of the paper under these columns.
    """

    title: str
    runs: str
    base: str
    suffixes: Sequence[str]
    picture: Picture | None
    blocks: Sequence[Block]
    notes: Sequence[str]
    columns: Sequence[str] = field(default_factory=tuple)
    beside: Sequence[Sequence[str]] = field(default_factory=tuple)


def render(contents: Contents) -> str:
    """The page."""
    return _template().render(
        glance=[_glance_line(*found) for found in glance.in_order(contents)],
        reminders=list(dict.fromkeys(page.reminder for page, _ in contents.verdicts)),
        sections=[_section(section, contents) for section in contents.sections],
        further=[group for group in _further(contents) if group["pages"]],
        found=[_found(found) for found in contents.found],
        left_out=[entry for found in contents.found for entry in found.left_out],
        marks=[(mark, name, PROVENANCE[name]) for name, mark in PROVENANCE_MARKS.items()],
    )


def _further(contents: Contents) -> list[dict[str, object]]:
    """What is of no exhibit; the pages of verdicts are shown at the exhibits."""
    parts = [part for part in contents.further if not isinstance(part.document, VerdictPage)]
    drawn = [_page(part) for part in parts if isinstance(part.document, Figure)]
    tables = [_page(part) for part in parts if not isinstance(part.document, Figure)]
    return [
        {"anchor": "comparisons", "title": "Comparisons, pair by pair", "pages": tables},
        {"anchor": "inside", "title": "Inside the adapters", "pages": drawn},
    ]


@cache
def _template():
    try:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup, escape
    except ImportError:
        raise UserError("the HTML report needs jinja2: install the extra analysis") from None
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    # Names of rows are lists of overrides without spaces: they may break behind a comma.
    environment.filters["breakable"] = lambda text: escape(text).replace(",", Markup(",<wbr>"))
    environment.tests["block"] = lambda block, name: type(block).__name__.lower() == name
    return environment.from_string(files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8"))


def _found(found: Found) -> dict[str, object]:
    by_scale = [f"{sum(run.scale == scale for run in found.runs)} runs of scale {scale}" for scale in found.scales]
    return {
        "name": TITLES.get(found.experiment, found.experiment),
        "runs": ", ".join(by_scale),
        "left_out": len(found.left_out),
    }


def _glance_line(page: VerdictPage, verdict: Verdict) -> dict[str, object]:
    line = glance.line(page, verdict)
    anchor = _verdict_anchor(page, verdict)
    return {"line": line, "anchor": anchor, "kind": OUTCOMES[verdict.outcome]}


def _verdict_anchor(page: VerdictPage, verdict: Verdict) -> str:
    words = [page.experiment, page.scale, page.protocol, verdict.statement.id, verdict.where]
    return "verdict-" + "".join(c if c.isalnum() else "-" for c in "-".join(words)).strip("-")


def _section(section: Section, contents: Contents) -> dict[str, object]:
    name, _, rest = section.paper.title.partition(": ")
    block = paper_block(section.paper, contents.numbers.sources)
    pages = [_page(part, block.grid) for part in section.parts]
    return {
        "anchor": section.exhibit.id,
        "name": name,
        "title": rest[:1].upper() + rest[1:],
        "setting": section.paper.setting,
        "claims": [(note.text, note.mark) for note in section.paper.notes],
        "pages": pages,
        "status": _status(section, pages),
        "verdicts": [
            {
                "title": verdict.statement.text,
                "source": verdict.statement.source,
                "runs": glance.line(page, verdict).runs,
                "outcome": verdict.outcome,
                "kind": OUTCOMES[verdict.outcome],
                "text": " ".join(verdict.reasons),
                "anchor": _verdict_anchor(page, verdict),
            }
            for page, verdict in section.verdicts
        ],
        "paper": _table(block.grid) if _has_more(block.grid, pages) else None,
        "legend": block.notes[: len(block.notes) - len(section.paper.notes)],
        "commands": section.commands,
    }


def _status(section: Section, pages: Sequence[Page]) -> tuple[str, str]:
    """The word and the class of what is there."""
    if not pages:
        return "missing", "none"
    if section.exhibit.experiment is None:
        return "computed", "yes"
    return "measured: " + "; ".join(dict.fromkeys(page.runs for page in pages)), "yes"


def _page(part: Part, paper: Grid | None = None) -> Page:
    """A document; ``paper`` has the paper's numbers where the section around it shows them."""
    document = part.document
    title, *blocks = markdown.blocks(document.markdown)
    blocks = _without_repeated(blocks, of_paper=paper is not None)
    at = next((number for number, block in enumerate(blocks) if not isinstance(block, Bullets)), len(blocks))
    facts, blocks = blocks[:at], blocks[at:]
    table = blocks[0] if blocks and isinstance(blocks[0], Table) else None
    marks = [] if table is None else [block for block in blocks[1:2] if isinstance(block, Bullets)]
    blocks = [*blocks[:1], *blocks[1 + len(marks) :]]
    return Page(
        title=title.text,
        runs=document.folder.replace("/", ", "),
        base=part.base,
        suffixes=list(document.files()),
        picture=_picture(document),
        blocks=blocks,
        notes=[item for block in (*marks, *facts) for item in block.items],
        columns=[] if table is None else [_title(header) for header in table.headers],
        beside=[] if table is None or paper is None else _beside(table, paper),
    )


def _without_repeated(blocks: Sequence[Block], of_paper: bool) -> list[Block]:
    """The blocks without the lists of what was left out and, ``of_paper``, the paper's: the report has them once."""
    kept: list[Block] = []
    for block, before in zip(blocks, [None, *blocks], strict=False):
        if of_paper and isinstance(block, Heading) and block.text.startswith(_PAPERS):
            break
        if _LEFT_OUT not in (block, before):
            kept.append(block)
    return kept


def _title(header: str) -> str:
    """The title of a column without what we add to it: a mark, a count, or that the column has the paper's numbers."""
    return _COUNT.sub("", header.removesuffix(FEWER_TASKS).removeprefix(_PAPERS))


def _beside(table: Table, paper: Grid) -> list[list[str]]:
    """The paper's rows under the columns of our table that have the same titles; none where it has them already."""
    if any(header.startswith(_PAPERS) for header in table.headers):
        return []
    titles = [_title(header) for header in table.headers]
    at = [paper.headers.index(title) if title in paper.headers else None for title in titles]
    rows = [["" if column is None else row[column] for column in at] for row in paper.rows]
    label = titles.index(paper.headers[0]) if paper.headers[0] in titles else 0
    return [row for row in rows if {*row[:label], *row[label + 1 :]} - {"", MISSING}]


def _has_more(paper: Grid, pages: Sequence[Page]) -> bool:
    """Whether the paper has numbers in columns that none of our tables has."""
    numbers = {
        title for row in paper.rows for title, cell in zip(paper.headers[1:], row[1:], strict=True) if cell != MISSING
    }
    return not numbers <= {title for page in pages for title in page.columns}


def _picture(document: object) -> Picture | None:
    if not isinstance(document, Figure) or not document.pictures:
        return None
    svg = document.pictures["svg"]
    kind, content = ("svg+xml", svg) if len(svg) <= LARGEST_SVG else ("png", document.pictures["png"])
    return Picture(f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}", document.title)


def _table(grid: Grid) -> Table:
    left = tuple(number < grid.left for number in range(len(grid.headers)))
    return Table(tuple(grid.headers), tuple(map(tuple, grid.rows)), left)

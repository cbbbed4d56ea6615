"""What every table is made of: number formats, a grid of cells, and a page written as Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .aggregate import Summary
from .paper import PROVENANCE_MARKS

MISSING = "-"
ONE_SEED = "†"
FEWER_TASKS = "‡"


def mean_sd(summary: Summary | None, decimals: int, factor: float = 1.0) -> str:
    """``81.3 ± 0.4``: mean and deviation times ``factor``, a dash where nothing was measured."""
    if summary is None:
        return MISSING
    deviation = "" if summary.sd is None else f" ± {factor * summary.sd:.{decimals}f}"
    return f"{factor * summary.mean:.{decimals}f}{deviation}"


def significant(value: float, digits: int = 3) -> str:
    """``value`` rounded to ``digits`` significant digits, never in exponent notation: 28.4, 0.0123, 1230."""
    if value == 0:
        return "0"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    rounded = round(value, places)
    # Rounding may carry into a further digit (9.999 is 10.0), which then needs one decimal fewer.
    places = digits - 1 - math.floor(math.log10(abs(rounded)))
    return f"{rounded:.{max(places, 0)}f}"


# ---------------------------------------------------------------------------------------------------------- writing


@dataclass(frozen=True)
class Grid:
    """A table of plain text: the first ``left`` columns are aligned to the left, the others to the right.

    ``groups`` has the numbers of the rows that begin a further group; LaTeX draws a rule above them.
    """

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1
    groups: Sequence[int] = ()

    def __post_init__(self) -> None:
        if bad := [row for row in self.rows if len(row) != len(self.headers)]:
            raise ValueError(f"a row of {len(bad[0])} cells under {len(self.headers)} headers: {bad[0]}")


@dataclass(frozen=True)
class Block:
    """A grid with its title, the ``facts`` that stand above it and the ``notes`` below."""

    title: str
    grid: Grid
    facts: Sequence[str] = field(default_factory=tuple)
    notes: Sequence[str] = field(default_factory=tuple)


@dataclass(frozen=True)
class Page:
    """Our numbers, the runs that did not enter them, and the paper's numbers as a block of their own.

    ``further`` has more of our numbers in tables of other columns.
    """

    label: str
    measured: Block
    left_out: Sequence[str]
    paper: Block
    further: Sequence[Block] = ()


def markdown_page(page: Page) -> str:
    ours = page.measured
    parts = [heading(2, ours.title), bullets(ours.facts), markdown_table(ours.grid), bullets(ours.notes)]
    parts += [text for block in page.further for text in _section(block)]
    if page.left_out:
        parts += ["Left out:\n", bullets(page.left_out)]
    return "\n".join(part for part in [*parts, *_section(page.paper)] if part)


def _section(block: Block) -> list[str]:
    return [heading(3, block.title), bullets(block.facts), markdown_table(block.grid), bullets(block.notes)]


def latex_page(page: Page) -> str:
    ours, theirs = page.measured, page.paper
    lines = [r"% Needs \usepackage{booktabs}.", *(f"% Left out: {' '.join(entry.split())}" for entry in page.left_out)]
    lines += [r"\begin{table*}", r"\centering\footnotesize\setlength{\tabcolsep}{3pt}"]
    lines += [rf"\caption{{{escape_latex(' '.join([f'{ours.title}.', *ours.facts]))}}}", rf"\label{{{page.label}}}"]
    lines += [latex_tabular(ours.grid) + _paragraphs(ours.notes), r"\medskip"]
    for block in page.further:
        lines += [_paragraphs([" ".join([f"{block.title}.", *block.facts])]) + latex_tabular(block.grid)]
        lines += [_paragraphs(block.notes), r"\medskip"]
    lines += [_paragraphs([" ".join([f"{theirs.title}.", *theirs.facts])]) + latex_tabular(theirs.grid)]
    return "\n".join([*lines, _paragraphs(theirs.notes), r"\end{table*}", ""])


def heading(level: int, text: str) -> str:
    return f"{'#' * level} {plain(text)}\n"


def bullets(lines: Iterable[str]) -> str:
    """A Markdown list of plain texts."""
    return "".join(f"- {plain(line)}\n" for line in lines)


def plain(text: str) -> str:
    """Keeps Markdown from reading markup into names and messages, such as ``two_subspaces`` or ``<module>``."""
    # An underscore inside a word or a "<" before a digit is no markup: escaping it would only spoil the plain text.
    return re.sub(r"([\\|*`\[\]]|<(?=[A-Za-z/!?])|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))


def _paragraphs(lines: Iterable[str]) -> str:
    return "".join(rf"\par {escape_latex(line)}" + "\n" for line in lines)


def markdown_table(grid: Grid) -> str:
    """A pipe table, padded so that it also reads well as plain text."""
    lines = [[plain(cell) for cell in row] for row in (grid.headers, *grid.rows)]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(grid.headers))]

    def join(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(w) if i < grid.left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if i < grid.left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join([join(lines[0]), join(rule), *(join(line) for line in lines[1:])]) + "\n"


def latex_tabular(grid: Grid) -> str:
    """A ``tabular`` with the rules of booktabs."""
    header, *rows = [" & ".join(escape_latex(cell) for cell in row) + r" \\" for row in (grid.headers, *grid.rows)]
    columns = "l" * grid.left + "r" * (len(grid.headers) - grid.left)
    rows = [r"\midrule" + f"\n{row}" if number in grid.groups else row for number, row in enumerate(rows)]
    body = [r"\toprule", header, r"\midrule", *rows, r"\bottomrule"]
    return "\n".join([rf"\begin{{tabular}}{{{columns}}}", *body, r"\end{tabular}", ""])


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    **{character: rf"\{character}" for character in "&%$#_{}"},
    "±": r"$\pm$",
    "†": r"$^{\dagger}$",
    "‡": r"$^{\ddagger}$",
    "Δ": r"$\Delta$",
    "²": r"$^{2}$",
    "·": r"$\cdot$",
    **{mark: rf"$^{{\mathrm{{{name[0].lower()}}}}}$" for name, mark in PROVENANCE_MARKS.items()},
}


def escape_latex(text: str) -> str:
    """``text`` for LaTeX: its special characters and the marks of the tables are written out."""
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))


def csv_text(fields: Sequence[str], rows: Iterable[dict[str, object]]) -> str:
    """CSV with one line a row; a field that a row lacks stays empty, an unknown one is an error."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fields, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()

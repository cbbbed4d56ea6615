"""Tables whose rows are those of the paper, in its order: each of them shows our runs, or that there are none.

The main tables (4 and 5) show whatever was run. Here the paper's rows are given, and a row finds its runs by method
and overrides (:mod:`analysis.arms`); one without runs stays, with the command that makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from .aggregate import Row, rows_of
from .arms import RATE, at_rates, contexts, find, settings_of
from .commands import joined, run
from .load import LeftOut, Run
from .paper import PaperNumbers, PaperTable
from .paper_block import claims_text, paper_block
from .tables import MISSING, Block, Grid, Page
from .task_table import (
    Columns,
    Document,
    by_scale_and_protocol,
    csv_lines,
    document,
    facts,
    grid,
    memory_kinds,
    metric_fact,
    row_notes,
    run_notes,
    with_tasks,
)

EXPERIMENT = "commonsense_reasoning"
COSTS = ("parameters", "hours", "memory")  # columns of Table 4 that are no tasks


@dataclass(frozen=True)
class Wanted:
    """A row of the paper's table.

    Attributes:
        id: of the row in the paper's numbers, whose average stands beside ours.
        labels: folders that the runs may be found under, the first before.
        arguments: what makes the runs on a command line.
    """

    id: str
    title: str
    method: str
    labels: tuple[str, ...]
    arguments: str


@dataclass(frozen=True)
class _Line:
    """A wanted row in one context (base model and the like), with our runs as a row where there are any."""

    wanted: Wanted
    context: str
    row: Row | None


def build(
    name: str,
    wanted: Callable[[Sequence[Run]], Sequence[Wanted]],
    runs: Sequence[Run],
    left_out: Sequence[LeftOut],
    numbers: PaperNumbers,
    *,
    beside: bool = False,
) -> list[Document]:
    """A document per scale and evaluation protocol that has runs of any row, in a stable order.

    Evaluations on validation files are for choosing settings and have no table of the paper.

    Args:
        name: of the table in the paper's numbers.
        wanted: the rows, given the runs of a scale and protocol.
        beside: show the paper's average of each row beside ours.
    """
    found = []
    for scale, protocol, group in by_scale_and_protocol(runs):
        if protocol.endswith("-validation"):
            continue
        tasks = tuple(task for task in _titles(numbers) if task != "avg")
        group, unused = with_tasks(group, left_out, scale, protocol, tasks)
        rows = rows_of(group, lambda run, protocol=protocol: run.evaluations[protocol].tasks, tasks)
        lines = _lines(rows, wanted(group))
        if any(line.row is not None for line in lines):
            found.append(_document(name, scale, protocol, group, unused, rows, lines, numbers, beside))
    return found


def _titles(numbers: PaperNumbers) -> dict[str, str]:
    """The eight tasks and the average, as in Table 4."""
    columns = numbers.tables["table4"].columns
    return {column.id: column.title for column in columns if column.id not in COSTS}


def _lines(rows: Sequence[Row], wanted: Sequence[Wanted]) -> list[_Line]:
    """The wanted rows in every context that has any of them."""
    by_key = {(row.method, row.label): row for row in rows}
    lines = []
    for context in contexts(by_key):
        keys = [find(by_key, of.method, of.labels, context) for of in wanted]
        if any(keys):
            lines += [_Line(of, context, by_key.get(key)) for of, key in zip(wanted, keys, strict=True)]
    several = len({line.context for line in lines}) > 1
    return [_named(line, f" [{line.context}]" if several and line.context else "") for line in lines]


def _named(line: _Line, where: str) -> _Line:
    title = line.wanted.title + where
    row = None if line.row is None else replace(line.row, name=title)
    return replace(line, wanted=replace(line.wanted, title=title), row=row)


def _document(
    name: str,
    scale: str,
    protocol: str,
    runs: Sequence[Run],
    left_out: Sequence[LeftOut],
    rows: Sequence[Row],
    lines: Sequence[_Line],
    numbers: PaperNumbers,
    beside: bool,
) -> Document:
    paper, titles = numbers.tables[name], _titles(numbers)
    tasks = tuple(task for task in titles if task != "avg")
    shown = [line.row for line in lines if line.row is not None]
    keys = {(row.method, row.label) for row in shown}
    members = [run for run in runs if (run.method, run.label) in keys]
    columns = Columns(tasks, tasks, titles, memory_kinds(shown))
    page = Page(
        label=f"tab:{name.removeprefix('table')}-{scale}-{protocol}",
        measured=Block(
            title=f"{paper.title}, scale {scale}, evaluation protocol {protocol}",
            grid=_grid(lines, columns, paper if beside else None),
            facts=[
                metric_fact(members, protocol, columns),
                *facts(members, shown, protocol, columns),
                *_rates_fact(lines),
            ],
            notes=[
                *row_notes(shown, columns),
                *run_notes(members, protocol, columns),
                *_missing(paper, lines, rows, scale, protocol),
            ],
        ),
        left_out=[f"{entry.path}: {entry.reason}" for entry in left_out],
        paper=paper_block(paper, numbers.sources),
    )
    return document(name, scale, protocol, page, paper, [line for row in shown for line in csv_lines(row, columns)])


def _grid(lines: Sequence[_Line], columns: Columns, paper: PaperTable | None) -> Grid:
    """Our rows and, where ``paper`` is given, its averages in a last column."""
    full = grid([line.row for line in lines if line.row is not None], columns)
    measured, width = iter(full.rows), len(full.headers)
    cells = [
        [line.wanted.title, "0", *[MISSING] * (width - 2)] if line.row is None else next(measured) for line in lines
    ]
    if paper is None:
        return Grid(full.headers, cells)
    claims = {row.id: row.cells.get("avg", ()) for row in paper.rows}
    theirs = [claims_text(claims.get(line.wanted.id, ())) for line in lines]
    rows = [[*of_row, claim] for of_row, claim in zip(cells, theirs, strict=True)]
    return Grid([*full.headers, f"Paper, {columns.titles['avg']}"], rows)


def _rates_fact(lines: Sequence[_Line]) -> list[str]:
    """The learning rates that rows were found at; a row without one was run at the rate of its scale."""
    rates = [
        f"{line.row.name}: {rate}"
        for line in lines
        if line.row is not None and (rate := settings_of(line.row.label).get(RATE)) is not None
    ]
    return [f"Learning rates: {'; '.join(rates)}."] if rates else []


def _missing(
    paper: PaperTable, lines: Sequence[_Line], rows: Sequence[Row], scale: str, protocol: str
) -> Iterable[str]:
    """What the rows without runs want: a choice between the learning rates that there are, or the runs."""
    seeds = sorted({seed for line in lines if line.row is not None for seed in line.row.seeds})
    for line in lines:
        if line.row is not None:
            continue
        known = [row.label for row in rows if row.method == line.wanted.method]
        if found := [label for of in line.wanted.labels for label in at_rates(known, of)]:
            rates = ", ".join(settings_of(label)[RATE] for label in found)
            yield (
                f"{line.wanted.title}: run at the learning rates {rates}, of which none is chosen; a study "
                "chooses one on validation items and reports it: python -m analysis.study"
            )
            continue
        arguments = " ".join([*line.context.split(","), line.wanted.arguments]).strip()
        commands = joined(run(EXPERIMENT, scale, arguments, protocol, seeds))
        yield f"{line.wanted.title}: no runs. To run it: {commands}"

"""Table 4 of the paper, commonsense reasoning: cost and accuracy of every method, from our runs.

One page per scale and evaluation protocol: numbers of two protocols never share a column. The paper's own numbers
stand in a block of their own, because they belong to another scale.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from moslora_core.record import TaskResult

from .aggregate import Row, Summary, rows_of
from .load import LeftOut, Run
from .paper import PaperNumbers
from .paper_block import paper_block, paper_lines
from .tables import (
    FEWER_TASKS,
    MISSING,
    ONE_SEED,
    Block,
    Grid,
    Page,
    csv_text,
    latex_page,
    markdown_page,
    mean_sd,
    significant,
)

NOT_TASKS = ("parameters", "hours", "memory", "avg")
MEMORY_KINDS = {"rss": "rss (whole process)", "cuda": "cuda (allocated on the device)"}
CSV_FIELDS = (
    *("origin", "scale", "protocol", "method", "label", "column", "unit", "value", "sd", "n", "tasks", "low", "high"),
    *("provenance", "source"),
)
GIB = 2**30


@dataclass(frozen=True)
class Document:
    """A page in its formats; ``folder`` is relative to the reports of the experiment."""

    folder: str
    name: str
    title: str
    markdown: str
    csv: str
    latex: str


@dataclass(frozen=True)
class _Columns:
    """The tasks of the table in the paper's order, their titles, and the kinds of memory that our runs measured."""

    tasks: tuple[str, ...]
    titles: dict[str, str]
    memory: tuple[str, ...]


def build(runs: Sequence[Run], left_out: Sequence[LeftOut], numbers: PaperNumbers) -> list[Document]:
    """A document per scale and evaluation protocol, in a stable order."""
    groups = defaultdict(list)
    for run in runs:
        for protocol in run.evaluations:
            groups[run.scale, protocol].append(run)
    return [
        _document(scale, protocol, group, [entry for entry in left_out if entry.scale == scale], numbers)
        for (scale, protocol), group in sorted(groups.items())
    ]


def _document(
    scale: str, protocol: str, runs: Sequence[Run], left_out: Sequence[LeftOut], numbers: PaperNumbers
) -> Document:
    paper = numbers.tables["table4"]
    tasks = tuple(column.id for column in paper.columns if column.id not in NOT_TASKS)
    useless = [run.path for run in runs if not set(tasks) & set(run.evaluations[protocol].tasks)]
    left_out = [*left_out, *(LeftOut(path, scale, f"{protocol} has no task of this table") for path in useless)]
    runs = [run for run in runs if run.path not in useless]
    rows = rows_of(runs, protocol, tasks)
    kinds = tuple(sorted({kind for row in rows for kind in row.memory}))
    columns = _Columns(tasks, {column.id: column.title for column in paper.columns}, kinds)
    title = f"Commonsense reasoning: scale {scale}, evaluation protocol {protocol}"
    page = Page(
        label=f"tab:4-{scale}-{protocol}",
        measured=Block(
            title=title,
            grid=_grid(rows, columns),
            facts=_facts(runs, rows, protocol, columns),
            notes=[*_row_notes(rows, columns), *_run_notes(runs, protocol, columns)],
        ),
        left_out=[f"{entry.path}: {entry.reason}" for entry in sorted(left_out, key=lambda entry: entry.path)],
        paper=paper_block(paper, numbers.sources),
    )
    measured = [{"origin": "measured", "scale": scale, "protocol": protocol, **line} for line in _lines(rows, columns)]
    return Document(
        folder=f"{scale}/{protocol}",
        name="table4",
        title=title,
        markdown=markdown_page(page),
        csv=csv_text(CSV_FIELDS, [*measured, *paper_lines(paper)]),
        latex=latex_page(page),
    )


# ------------------------------------------------------------------------------------------------------ the numbers


def _grid(rows: Sequence[Row], columns: _Columns) -> Grid:
    headers = [
        *("Method", "n", "Params (M)", "Train (s)"),
        *(f"Peak GiB ({kind})" for kind in columns.memory),
        *(columns.titles[task] for task in columns.tasks),
        *(columns.titles["avg"], "Unparsed (%)"),
    ]
    return Grid(headers, [_cells(row, columns) for row in rows])


def _cells(row: Row, columns: _Columns) -> list[str]:
    n = len(row.seeds)

    def cell(summary: Summary | None, decimals: int, factor: float = 1.0) -> str:
        # A cell over fewer seeds than its row says so itself.
        fewer = f" (n={summary.n})" if summary is not None and summary.n < n else ""
        return mean_sd(summary, decimals, factor) + fewer

    return [
        row.name,
        str(n) + (ONE_SEED if n == 1 else ""),
        " or ".join(significant(count / 1e6) for count in row.parameters) or MISSING,
        cell(row.seconds, 1 if row.seconds is not None and row.seconds.mean < 1000 else 0),
        *(cell(row.memory.get(kind), 2, 1 / GIB) for kind in columns.memory),
        *(cell(row.tasks[task], 1, 100) for task in columns.tasks),
        cell(row.average, 1, 100) + (FEWER_TASKS if _averages_fewer(row, columns) else ""),
        cell(row.unparsed, 1, 100),
    ]


def _averages_fewer(row: Row, columns: _Columns) -> bool:
    return row.average is not None and len(row.averaged) < len(columns.tasks)


def _lines(rows: Sequence[Row], columns: _Columns) -> list[dict[str, object]]:
    """One mapping a number, unrounded; shares in percent, as the tables show them."""
    lines = []
    for row in rows:
        numbers = [("parameters", "parameters", Summary(count, None, n), 1) for count, n in row.parameters.items()]
        numbers += [("seconds", "seconds", row.seconds, 1)]
        numbers += [(f"memory_{kind}", "GiB", row.memory.get(kind), 1 / GIB) for kind in columns.memory]
        numbers += [(task, "percent", row.tasks[task], 100) for task in columns.tasks]
        numbers += [("avg", "percent", row.average, 100), ("unparsed", "percent", row.unparsed, 100)]
        for column, unit, summary, factor in numbers:
            if summary is None:
                continue
            line = {"method": row.method, "label": row.label, "column": column, "unit": unit, "n": summary.n}
            line |= {"value": factor * summary.mean, "provenance": "MEASURED"}
            line |= {} if summary.sd is None else {"sd": factor * summary.sd}
            lines.append(line | ({"tasks": len(row.averaged)} if column == "avg" else {}))
    return lines


# -------------------------------------------------------------------------------------------------- what they stand on


def _facts(runs: Sequence[Run], rows: Sequence[Row], protocol: str, columns: _Columns) -> list[str]:
    """What a reader must know to read the numbers: over how much they were taken, and by which code."""
    items = _distinct(runs, protocol, columns.tasks, lambda result: result.n)
    metrics = _distinct(runs, protocol, columns.tasks, lambda result: result.metric)
    commits = sorted({_short(commit) for run in runs for commit in run.commits})
    if unknown := sum(not run.commits for run in runs):
        commits.append(f"not recorded in {unknown} of {len(runs)} runs")
    memory = [MEMORY_KINDS.get(kind, kind) for kind in columns.memory]
    return [
        f"Metric: {_or(sorted({metric for found in metrics.values() for metric in found}))}, in percent.",
        f"Seeds per row (n): {_or(sorted({len(row.seeds) for row in rows}))}. "
        "Cells are the mean ± the sample standard deviation over the seeds.",
        "Items per task: " + (", ".join(f"{columns.titles[t]} {_or(n)}" for t, n in items.items()) or "none") + ".",
        f"Peak memory: {', '.join(memory) or 'not measured'}.",
        f"Git commits of the runs: {', '.join(commits) or 'none'}.",
    ]


def _row_notes(rows: Sequence[Row], columns: _Columns) -> list[str]:
    """The marks in the table, explained."""
    notes = []
    if any(len(row.seeds) == 1 for row in rows):
        notes.append(f"{ONE_SEED} one seed, so no standard deviation.")
    average, every = columns.titles["avg"], len(columns.tasks)
    for row in rows:
        if _averages_fewer(row, columns):
            absent = ", ".join(columns.titles[task] for task in columns.tasks if task not in row.averaged)
            notes.append(
                f"{FEWER_TASKS} {row.name}: {average} is over {len(row.averaged)} of {every} tasks (without {absent}) "
                f"and not comparable with an average over all {every}."
            )
        elif row.average is not None and row.average.n < len(row.seeds):
            notes.append(f"{row.name}: {average} is over the seeds that have all {every} tasks.")
        if len(row.parameters) > 1:
            notes.append(f"Warning: {row.name}: the seeds differ in their trainable parameters.")
    return notes


def _run_notes(runs: Sequence[Run], protocol: str, columns: _Columns) -> list[str]:
    """What makes the runs less comparable than one table suggests."""
    notes = []
    for run in runs:
        if absent := [columns.titles[t] for t in columns.tasks if t not in run.evaluations[protocol].tasks]:
            notes.append(f"{run.path} lacks {', '.join(absent)}.")
    for what, of in (("metrics", lambda result: result.metric), ("numbers of items", lambda result: result.n)):
        found = _distinct(runs, protocol, columns.tasks, of)
        if differing := [columns.titles[task] for task, values in found.items() if len(values) > 1]:
            notes.append(f"Warning: the runs have different {what} in {', '.join(differing)}.")
    for key, values in _differing_settings(runs, protocol).items():
        notes.append(f"Warning: the runs differ in the evaluation setting {key}: {_or(values)}.")
    if others := sorted({task for run in runs for task in run.evaluations[protocol].tasks} - set(columns.tasks)):
        notes.append(f"Evaluated, but no column of this table: {', '.join(others)}.")
    return notes


def _distinct(
    runs: Sequence[Run], protocol: str, tasks: Iterable[str], of: Callable[[TaskResult], object]
) -> dict[str, list]:
    """Task -> the distinct values of ``of(result)`` over the runs, for the tasks that any run has."""
    results = [run.evaluations[protocol].tasks for run in runs]
    found = {task: sorted({of(result[task]) for result in results if task in result}) for task in tasks}
    return {task: values for task, values in found.items() if values}


def _differing_settings(runs: Sequence[Run], protocol: str) -> dict[str, list[str]]:
    settings = [run.evaluations[protocol].settings for run in runs]
    found = {}
    for key in sorted({key for entry in settings for key in entry}):
        values = {json.dumps(entry[key], sort_keys=True) if key in entry else "unset" for entry in settings}
        if len(values) > 1:
            found[key] = sorted(values)
    return found


def _short(commit: str) -> str:
    """Twelve digits of a commit, with its ``+dirty`` where the checkout had uncommitted changes."""
    return re.sub(r"^([0-9a-f]{12})[0-9a-f]+", r"\1", commit)


def _or(values: Iterable[object]) -> str:
    return " or ".join(str(value) for value in values) or "none"

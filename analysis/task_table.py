"""What the tables of methods against tasks share: their columns, cells, facts, notes and CSV lines.

A page per scale and evaluation protocol: numbers of two protocols never share a column.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from moslora_core.record import TaskResult

from .aggregate import Row, Summary, row_name
from .load import LeftOut, Run
from .paper import PaperTable
from .paper_block import paper_lines
from .tables import (
    FEWER_TASKS,
    MISSING,
    ONE_SEED,
    Grid,
    Page,
    csv_text,
    latex_page,
    markdown_page,
    mean_sd,
    significant,
)

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

    def files(self) -> dict[str, str]:
        """Suffix -> content."""
        return {"md": self.markdown, "csv": self.csv, "tex": self.latex}

    def section(self, base: str) -> str:
        """The page inside a report, ``base`` being the path of its files there without their suffix."""
        return self.markdown


@dataclass(frozen=True)
class Columns:
    """The tasks of a table in its order, their titles, and the kinds of memory that its runs measured.

    Attributes:
        tasks: what the average is over.
        shown: the columns; more than ``tasks`` where no run has some of them.
    """

    tasks: tuple[str, ...]
    shown: tuple[str, ...]
    titles: dict[str, str]
    memory: tuple[str, ...]


def by_scale_and_protocol(runs: Iterable[Run]) -> list[tuple[str, str, list[Run]]]:
    """(scale, protocol, runs) of every page, in a stable order."""
    groups = defaultdict(list)
    for run in runs:
        for protocol in run.evaluations:
            groups[run.scale, protocol].append(run)
    return [(scale, protocol, group) for (scale, protocol), group in sorted(groups.items())]


def with_tasks(
    runs: Iterable[Run], left_out: Iterable[LeftOut], scale: str, protocol: str, tasks: Iterable[str]
) -> tuple[list[Run], list[LeftOut]]:
    """The runs that have any of the ``tasks``, and those that enter no number of this scale, by their path."""
    useless = {run.path for run in runs if not set(tasks) & set(run.evaluations[protocol].tasks)}
    named = [entry for entry in left_out if entry.scale == scale]
    named += [LeftOut(path, scale, f"{protocol} has no task of this table") for path in useless]
    return [run for run in runs if run.path not in useless], sorted(named, key=lambda entry: entry.path)


def memory_kinds(rows: Iterable[Row]) -> tuple[str, ...]:
    return tuple(sorted({kind for row in rows for kind in row.memory}))


def document(
    name: str,
    scale: str,
    protocol: str,
    page: Page,
    paper: PaperTable,
    lines: Iterable[dict[str, object]],
    fields: Sequence[str] = CSV_FIELDS,
) -> Document:
    """The page in its formats; the CSV has our ``lines``, then the paper's."""
    measured = [{"origin": "measured", "scale": scale, "protocol": protocol, **line} for line in lines]
    return Document(
        folder=f"{scale}/{protocol}",
        name=name,
        title=page.measured.title,
        markdown=markdown_page(page),
        csv=csv_text(fields, [*measured, *paper_lines(paper)]),
        latex=latex_page(page),
    )


# ------------------------------------------------------------------------------------------------------ the numbers


def grid(rows: Sequence[Row], columns: Columns) -> Grid:
    headers = [
        *("Method", "n", "Params (M)", "Train (s)"),
        *(f"Peak GiB ({kind})" for kind in columns.memory),
        *(columns.titles[task] for task in columns.shown),
        columns.titles["avg"] + (FEWER_TASKS if len(columns.tasks) < len(columns.shown) else ""),
        "Unparsed (%)",
    ]
    return Grid(headers, [_cells(row, columns) for row in rows])


def _cells(row: Row, columns: Columns) -> list[str]:
    return [
        row.name,
        seeds_cell(row),
        " or ".join(significant(count / 1e6) for count in row.parameters) or MISSING,
        cell(row, row.seconds, 1 if row.seconds is not None and row.seconds.mean < 1000 else 0),
        *(cell(row, row.memory.get(kind), 2, 1 / GIB) for kind in columns.memory),
        *(cell(row, row.tasks.get(task), 1, 100) for task in columns.shown),
        cell(row, row.average, 1, 100) + (FEWER_TASKS if _averages_fewer(row, columns) else ""),
        cell(row, row.unparsed, 1, 100),
    ]


def seeds_cell(row: Row) -> str:
    return str(len(row.seeds)) + (ONE_SEED if len(row.seeds) == 1 else "")


def cell(row: Row, summary: Summary | None, decimals: int, factor: float = 1.0) -> str:
    """Mean and deviation; a cell over fewer seeds than its row says so itself."""
    fewer = f" (n={summary.n})" if summary is not None and summary.n < len(row.seeds) else ""
    return mean_sd(summary, decimals, factor) + fewer


def _averages_fewer(row: Row, columns: Columns) -> bool:
    return row.average is not None and len(row.averaged) < len(columns.tasks)


def csv_lines(row: Row, columns: Columns) -> list[dict[str, object]]:
    """One mapping a number of the row, unrounded; shares in percent, as the tables show them."""
    numbers = [("parameters", "parameters", Summary(count, None, n), 1) for count, n in row.parameters.items()]
    numbers += [("seconds", "seconds", row.seconds, 1)]
    numbers += [(f"memory_{kind}", "GiB", row.memory.get(kind), 1 / GIB) for kind in columns.memory]
    numbers += [(task, "percent", row.tasks[task], 100) for task in columns.tasks]
    numbers += [("avg", "percent", row.average, 100), ("unparsed", "percent", row.unparsed, 100)]
    lines = [csv_line(row, *number) for number in numbers if number[2] is not None]
    return [line | ({"tasks": len(row.averaged)} if line["column"] == "avg" else {}) for line in lines]


def csv_line(row: Row, column: str, unit: str, summary: Summary, factor: float) -> dict[str, object]:
    line = {"method": row.method, "label": row.label, "column": column, "unit": unit, "n": summary.n}
    line |= {"value": factor * summary.mean, "provenance": "MEASURED"}
    return line | ({} if summary.sd is None else {"sd": factor * summary.sd})


# -------------------------------------------------------------------------------------------------- what they stand on


def facts(runs: Sequence[Run], rows: Sequence[Row], protocol: str, columns: Columns) -> list[str]:
    """What a reader must know to read the numbers: over how much they were taken, and by which code."""
    items = distinct(runs, protocol, columns.tasks, lambda result: result.n)
    memory = [MEMORY_KINDS.get(kind, kind) for kind in columns.memory]
    return [
        f"Seeds per row (n): {either(sorted({len(row.seeds) for row in rows}))}. "
        "Cells are the mean ± the sample standard deviation over the seeds.",
        "Items per task: " + (", ".join(f"{columns.titles[t]} {either(n)}" for t, n in items.items()) or "none") + ".",
        f"Peak memory: {', '.join(memory) or 'not measured'}.",
        *rates_fact(runs),
        commits_fact(runs),
    ]


def rates_fact(runs: Sequence[Run]) -> list[str]:
    """The learning rates that a study chose for the rows; nothing where the labels name all settings."""
    rows: dict[float, dict[str, None]] = defaultdict(dict)
    for run in runs:
        if run.rate is not None:
            rows[float(run.rate.partition("=")[2])][row_name(run.method, [run.label] * (run.label != "default"))] = (
                None
            )
    if not rows:
        return []
    chosen = [f"{rate:g} ({'all' if len(rows) == 1 else ', '.join(names)})" for rate, names in sorted(rows.items())]
    return [f"Learning rates, each chosen on validation items for its method: {'; '.join(chosen)}."]


def metric_fact(runs: Sequence[Run], protocol: str, columns: Columns) -> str:
    metrics = distinct(runs, protocol, columns.tasks, lambda result: result.metric)
    return f"Metric: {either(sorted({metric for found in metrics.values() for metric in found}))}, in percent."


def commits_fact(runs: Sequence[Run]) -> str:
    commits = sorted({_short(commit) for run in runs for commit in run.commits})
    if unknown := sum(not run.commits for run in runs):
        commits.append(f"not recorded in {unknown} of {len(runs)} runs")
    return f"Git commits of the runs: {', '.join(commits) or 'none'}."


def row_notes(rows: Sequence[Row], columns: Columns) -> list[str]:
    """The marks in the table, explained."""
    notes = one_seed_note(rows)
    average, every = columns.titles["avg"], len(columns.tasks)
    for row in rows:
        if _averages_fewer(row, columns):
            absent = ", ".join(columns.titles[task] for task in columns.tasks if task not in row.averaged)
            notes.append(
                f"{FEWER_TASKS} {row.title}: {average} is over {len(row.averaged)} of {every} tasks "
                f"(without {absent}) and not comparable with an average over all {every}."
            )
        elif row.average is not None and row.average.n < len(row.seeds):
            notes.append(f"{row.title}: {average} is over the seeds that have all {every} tasks.")
        if len(row.parameters) > 1:
            notes.append(f"Warning: {row.title}: the seeds differ in their trainable parameters.")
    return notes


def one_seed_note(rows: Iterable[Row]) -> list[str]:
    one = any(len(row.seeds) == 1 for row in rows)
    return [f"{ONE_SEED} one seed, so no standard deviation."] if one else []


def run_notes(
    runs: Sequence[Run], protocol: str, columns: Columns, settings_notes: Iterable[str] | None = None
) -> list[str]:
    """What makes the runs less comparable than one table suggests.

    ``settings_notes`` replaces the warnings of settings in which the runs differ.
    """
    notes = [f"{run.path}: a later stage did not finish ({run.stopped})." for run in runs if run.stopped]
    for run in runs:
        if absent := [columns.titles[t] for t in columns.tasks if t not in run.evaluations[protocol].tasks]:
            notes.append(f"{run.path} lacks {', '.join(absent)}.")
    for what, of in (("metrics", lambda result: result.metric), ("numbers of items", lambda result: result.n)):
        found = distinct(runs, protocol, columns.tasks, of)
        if differing := [columns.titles[task] for task, values in found.items() if len(values) > 1]:
            notes.append(f"Warning: the runs have different {what} in {', '.join(differing)}.")
    if settings_notes is None:
        settings_notes = [differing_note(*found) for found in differing_settings(runs, protocol).items()]
    notes += settings_notes
    if others := sorted({task for run in runs for task in run.evaluations[protocol].tasks} - set(columns.tasks)):
        notes.append(f"Evaluated, but no column of this table: {', '.join(others)}.")
    return notes


def differing_note(key: str, values: Iterable[str]) -> str:
    return f"Warning: the runs differ in the evaluation setting {key}: {either(values)}."


def differing_settings(runs: Iterable[Run], protocol: str) -> dict[str, list[str]]:
    """Key -> its distinct values as JSON, for the settings of the evaluation in which the runs differ."""
    settings = [run.evaluations[protocol].settings for run in runs]
    found = {}
    for key in sorted({key for entry in settings for key in entry}):
        values = {json.dumps(entry[key], sort_keys=True) if key in entry else "unset" for entry in settings}
        if len(values) > 1:
            found[key] = sorted(values)
    return found


def distinct(
    runs: Sequence[Run], protocol: str, tasks: Iterable[str], of: Callable[[TaskResult], object]
) -> dict[str, list]:
    """Task -> the distinct values of ``of(result)`` over the runs, for the tasks that any run has."""
    results = [run.evaluations[protocol].tasks for run in runs]
    found = {task: sorted({of(result[task]) for result in results if task in result}) for task in tasks}
    return {task: values for task, values in found.items() if values}


def _short(commit: str) -> str:
    """Twelve digits of a commit, with its ``+dirty`` where the checkout had uncommitted changes."""
    return re.sub(r"^([0-9a-f]{12})[0-9a-f]+", r"\1", commit)


def either(values: Iterable[object]) -> str:
    return " or ".join(str(value) for value in values) or "none"

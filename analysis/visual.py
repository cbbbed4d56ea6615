"""What the table and the figure of visual instruction tuning share: benchmarks, settings and the names of rows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from .aggregate import ResultsOf, Row, Setting, order, row_name, rows_of
from .load import Run
from .paper import PaperTable

# Columns of the paper's block alone: a leaderboard's MMBench score whose language is not stated, and the average.
NOT_BENCHMARKS = ("mmbench_unstated", "avg")
SMOKE_ORDER = ("colour", "shape", "count", "existence", "position", "background")
NO_BASE = "not recorded"


def published(paper: PaperTable) -> tuple[str, ...]:
    """The nine benchmarks of the paper, in its order."""
    return tuple(column.id for column in paper.columns if column.id not in NOT_BENCHMARKS)


def benchmarks(runs: Iterable[Run], protocol: str, paper: PaperTable) -> tuple[str, ...]:
    """The paper's benchmarks where any run has one of them, else the tasks found, in a stable order."""
    found = {task for run in runs for task in run.evaluations[protocol].tasks}
    return published(paper) if found & set(published(paper)) else tuple(sorted(found, key=_task_order))


def _task_order(task: str) -> tuple:
    kind = task.removeprefix("smoke_")
    return SMOKE_ORDER.index(kind) if kind in SMOKE_ORDER else len(SMOKE_ORDER), task


def task_titles(tasks: Iterable[str], paper: PaperTable) -> dict[str, str]:
    """The paper's titles of its columns, and names that read well for the other tasks."""
    named = {task: task.removeprefix("smoke_").replace("_", " ").capitalize() for task in tasks}
    return named | {column.id: column.title for column in paper.columns}


def setting_of(protocol: str) -> Callable[[Run], Setting]:
    """The setting that a run's evaluation of ``protocol`` was made in."""

    def of(run: Run) -> Setting:
        settings = run.evaluations[protocol].settings
        return Setting(str(settings.get("base") or NO_BASE), str(settings.get("quantization") or "none"))

    return of


def named_rows(runs: Iterable[Run], protocol: str, results_of: ResultsOf, tasks: Sequence[str]) -> list[Row]:
    """The rows with short names: what their setting says already is not said again."""
    return short_names(rows_of(runs, results_of, tasks, setting_of(protocol)))


def short_names(rows: Sequence[Row]) -> list[Row]:
    """``rows`` in the order of the tables, each under the shortest name that is its own within the setting."""
    short = [_name(row, overrides(row)) for row in rows]
    count = Counter((row.setting, name) for row, name in zip(rows, short, strict=True))
    named = [
        replace(row, name=name if count[row.setting, name] == 1 else _name(row, [row.label]))
        for row, name in zip(rows, short, strict=True)
    ]
    return sorted(named, key=lambda row: order(row.setting, row.method, ",".join(overrides(row)) or "default"))


def _name(row: Row, notes: Sequence[str]) -> str:
    quantized = (
        "" if row.setting is None or row.setting.quantization == "none" else f", {row.setting.quantization.upper()}"
    )
    return row_name(row.method, notes) + quantized


def overrides(row: Row) -> list[str]:
    """The overrides of a row that its setting does not name, the mixer's initialisation by its value alone."""
    if row.label == "default":
        return []
    if "~" in row.label:  # cut short or with characters replaced: no list of overrides any more
        return [row.label]
    named = set()
    if row.setting is not None:
        named = {f"{key}={row.setting.base}" for key in ("base", "model", "model.name")}
        named.add(f"model.quantization={row.setting.quantization}")
    left = [override for override in row.label.split(",") if override not in named]
    return [re.sub(r"^method\.mixer_init=", "", override) for override in left]

"""Right and wrong, item by item: the predictions of runs, as tests that pair items need them.

Only questions that a task's number counts take part. MMBench asks a question again with rotated options, under an
index of a million more, and its accuracy counts the first form alone: where a record counts fewer items than it has
predictions, the rotations are left out. A task whose predictions still are not the items of its number is named.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from moslora_core.errors import UserError
from moslora_core.record import RunRecord, TaskResult, parse_json, read_log

from .load import Run
from .statistics import chance

ROTATION = 1_000_000  # of VLMEvalKit's circular benchmarks: rotation k of question i has the index i + k * 1,000,000
_INDEX = re.compile(r"/(\d+)$")
_COLUMNS = {"evaluation": str, "task": str, "id": str, "gold": str, "correct": bool}
_VALUES = itemgetter(*_COLUMNS)
Item = tuple[str, str, bool]  # id, gold, correct


@dataclass(frozen=True)
class Answers:
    """A run's answers to the items that a task's number counts, in the order of their ids."""

    ids: tuple[str, ...]
    golds: tuple[str, ...]
    right: np.ndarray  # bool, (items,)

    @cached_property
    def chance(self) -> float | None:
        return chance(self.golds)


@dataclass(frozen=True)
class Items:
    """Task -> the answers of one run under one protocol, and why tasks have none."""

    answers: Mapping[str, Answers]
    faults: tuple[str, ...] = ()


class Reader:
    """Reads each run's predictions once, and only when they are asked for.

    Args:
        root: the folder of runs.
    """

    def __init__(self, root: Path):
        self._root = root
        self._rows: dict[str, dict[str, dict[str, list[Item]]] | str] = {}
        self._items: dict[tuple[str, str], Items] = {}

    def items(self, run: Run, protocol: str) -> Items:
        """What ``run`` answered under ``protocol``. What cannot be used is named by the run, never raised."""
        key = run.path, protocol
        if key not in self._items:
            self._items[key] = self._read(run, protocol)
        return self._items[key]

    def _read(self, run: Run, protocol: str) -> Items:
        if run.path not in self._rows:
            self._rows[run.path] = _rows(self._root / run.path)
        rows = self._rows[run.path]
        if isinstance(rows, str):
            return Items({}, (f"{run.path}: {rows}",))
        by_task = rows.pop(run.evaluation_names.get(protocol, protocol), {})
        answers, faults = {}, []
        for task, result in run.evaluations[protocol].tasks.items():
            try:
                answers[task] = _answers(by_task.get(task, []), result)
            except UserError as error:
                faults.append(f"{run.path}: {task}: {error}")
        return Items(answers, tuple(faults))


def _rows(path: Path) -> dict[str, dict[str, list[Item]]] | str:
    """Evaluation -> task -> items of the predictions; or why there are none."""
    record = RunRecord(path)
    if record.predictions_file() is None:
        return "predictions.jsonl is missing"
    found: dict[str, dict[str, list[Item]]] = {}
    try:
        for (evaluation, task), items in groupby(_checked(_lines(record)), key=itemgetter(0, 1)):
            found.setdefault(evaluation, {}).setdefault(task, []).extend(item[2:] for item in items)
    except UserError as error:
        return " ".join(str(error).replace(f"{path}/", "").split())
    return found


def _checked(rows: list[dict[str, Any]]) -> list[tuple]:
    """The values of ``_COLUMNS`` in each row, all of their kinds; columns are checked, which is faster than rows."""
    try:
        values = list(map(_VALUES, rows))
        kinds = [set(map(type, column)) for column in zip(*values, strict=True)]
    except KeyError:
        kinds = [set()]
    if not rows or kinds == [{kind} for kind in _COLUMNS.values()]:
        return values
    for number, row in enumerate(rows, start=1):
        for column, kind in _COLUMNS.items():
            if type(row.get(column)) is not kind:
                raise UserError(
                    f"predictions.jsonl line {number}: {column} must be {kind.__name__}, found {row.get(column)!r}"
                )
    return values


def _lines(record: RunRecord) -> list[dict[str, Any]]:
    """The record's predictions. All lines are parsed at once, twice as fast as each; what is damaged is then named."""
    try:
        whole, _, _ = read_log(record.predictions_file()).rpartition(b"\n")
        rows = parse_json("[" + whole.replace(b"\n", b",").decode("utf-8") + "]")
        if len(rows) == (whole.count(b"\n") + 1 if whole else 0) and all(isinstance(row, dict) for row in rows):
            return rows
    except (UserError, ValueError):
        pass
    return record.predictions()


def _answers(items: list[Item], result: TaskResult) -> Answers:
    counted = items if len(items) == result.n else [item for item in items if not _rotated(item[0])]
    if len(counted) != result.n:
        raise UserError(f"predictions.jsonl has {len(counted)} items, its number counts {result.n}")
    ids, golds, right = zip(*sorted(counted), strict=True)
    if len(set(ids)) < len(ids):
        twice = next(one for one, other in pairwise(ids) if one == other)
        raise UserError(f"predictions.jsonl has item {twice} twice")
    return Answers(ids, golds, np.array(right, dtype=bool))


def _rotated(name: str) -> bool:
    found = _INDEX.search(name)
    return found is not None and int(found.group(1)) >= ROTATION

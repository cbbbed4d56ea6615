"""Items as files hold them: checked row by row, for prepare_data and for those who read what it wrote.

Imports no configuration: lm-eval's command line reads items too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moslora_core.errors import UserError
from moslora_core.record import read_json

from .tasks import ITEM_FIELDS, TASKS, offered_labels

Item = dict[str, str]


def check_item(
    row: Any, where: str, labels: tuple[str, ...] | None = None, fields: tuple[str, ...] = ITEM_FIELDS
) -> Item:
    """One row as an item of strings.

    Args:
        where: file and index, for the error.
        labels: label words of the task; None accepts those of any task.
        fields: what the item has, ``ITEM_FIELDS`` at least; others are left out.

    Raises:
        UserError: a missing field, one that is no string, or an answer that is no label or not in the output.
    """
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with {', '.join(fields)}, found {type(row).__name__}")
    for name in fields:
        if name not in row:
            raise UserError(f"{where}: field {name!r} is missing; expected {', '.join(fields)}")
        if not isinstance(row[name], str):
            raise UserError(f"{where}: {name} must be a string, found {type(row[name]).__name__}")
    if not row["instruction"].strip():
        raise UserError(f"{where}: instruction is empty")
    allowed = labels or offered_labels(row["instruction"]) or sum((task.labels for task in TASKS.values()), ())
    if row["answer"] not in allowed:
        raise UserError(f"{where}: answer must be one of {'/'.join(allowed)}, found {row['answer']!r}")
    if row["answer"] not in row["output"]:
        raise UserError(f"{where}: output must state the answer {row['answer']!r}, found {row['output']!r}")
    return {name: row[name] for name in fields}


def read_rows(path: Path) -> list[Any]:
    """The rows of a JSON list.

    Raises:
        UserError: the file cannot be read, or is no JSON list of anything.
    """
    rows = read_json(path)
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a JSON list of items, found {type(rows).__name__}")
    if not rows:
        raise UserError(f"{path}: expected items, found none")
    return rows


def read_prepared(path: Path, labels: tuple[str, ...] | None = None) -> list[Item]:
    """Items of a file that prepare_data wrote, with their ids.

    Raises:
        UserError: unprepared or damaged data; a bad row is named by file and index.
    """
    if not path.is_file():
        raise UserError(
            f"no items at {path}; prepare them: python -m commonsense_reasoning.prepare_data with the same scale"
        )
    fields = ("id", *ITEM_FIELDS)
    return [check_item(row, f"{path}[{number}]", labels, fields) for number, row in enumerate(read_rows(path))]

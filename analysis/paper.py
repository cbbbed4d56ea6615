"""The paper's numbers with their provenance, from ``paper_numbers.yaml``.

The file says how to correct it. Loading checks all of it, so that no number reaches a table without its mark.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from moslora_core.errors import UserError
from moslora_core.record import read_yaml
from moslora_core.typed import build, shown

PAPER_NUMBERS = Path(__file__).with_name("paper_numbers.yaml")


# How far a number can be trusted (the data file defines the words), and the mark that is shown beside it.
PROVENANCE_MARKS = {"PAPER": "ᵖ", "SECONDARY": "ˢ", "CODE": "ᶜ", "DERIVED": "ᵈ", "RECALLED": "ʳ"}


@dataclass(frozen=True)
class Claim:
    """A number, or a range ``low``-``high`` (``high`` alone: less than), and where it comes from."""

    provenance: str
    source: str
    value: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def mark(self) -> str:
        return PROVENANCE_MARKS[self.provenance]


@dataclass(frozen=True)
class Note:
    """A claim in words."""

    text: str
    provenance: str
    source: str

    @property
    def mark(self) -> str:
        return PROVENANCE_MARKS[self.provenance]


@dataclass(frozen=True)
class Column:
    id: str
    title: str
    unit: str


@dataclass(frozen=True)
class PaperRow:
    """``cells`` maps column ids to claims, the headline first; a number that was not found has no cell."""

    id: str
    title: str
    cells: dict[str, tuple[Claim, ...]]


@dataclass(frozen=True)
class PaperTable:
    id: str
    title: str
    setting: str
    columns: tuple[Column, ...]
    rows: tuple[PaperRow, ...]
    notes: tuple[Note, ...]

    def claims(self) -> list[Claim]:
        return [claim for row in self.rows for claims in row.cells.values() for claim in claims]


@dataclass(frozen=True)
class PaperNumbers:
    """``sources`` maps a source's tag to what it is."""

    sources: dict[str, str]
    tables: dict[str, PaperTable]


def load_paper_numbers(path: Path = PAPER_NUMBERS) -> PaperNumbers:
    """Reads and checks the data file.

    Raises:
        UserError: naming the file and the place of the first thing that is wrong.
    """
    raw = read_yaml(path, partial(yaml.load, Loader=_Loader))
    raw = _mapping(raw, str(path), ("sources", "tables"))
    provenance_of = {}
    for tag, entry in _mapping(raw["sources"], f"{path}: sources").items():
        entry = _mapping(entry, f"{path}: sources.{tag}", ("provenance", "text"))
        _text(entry["text"], f"{path}: sources.{tag}.text")
        provenance_of[tag] = _provenance(entry["provenance"], f"{path}: sources.{tag}")
    tables = {
        name: _table(name, entry, f"{path}: {name}", provenance_of)
        for name, entry in _mapping(raw["tables"], f"{path}: tables").items()
    }
    return PaperNumbers({tag: entry["text"] for tag, entry in raw["sources"].items()}, tables)


# --------------------------------------------------------------------------------------------------------- checking


class _Loader(yaml.SafeLoader):
    """Refuses a key that appears twice: plain YAML would keep the last one, and a correction could go unnoticed."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} appears twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _mapping(value: Any, where: str, keys: tuple[str, ...] | None = None) -> dict[str, Any]:
    """``value`` as a mapping with text keys; with ``keys``, exactly those."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a mapping, found {shown(value)}")
    for key in value:
        if not isinstance(key, str):
            raise UserError(f"{where}: key {shown(key)} must be text; put it in quotes")
    if keys is not None:
        if missing := [key for key in keys if key not in value]:
            raise UserError(f"{where}: {missing[0]} is missing; expected {', '.join(keys)}")
        if unknown := [key for key in value if key not in keys]:
            raise UserError(f"{where}: unknown key {unknown[0]!r}; expected {', '.join(keys)}")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: expected text, found {shown(value)}")
    return value


def _number(value: Any, where: str) -> float:
    return build(float, value, where)


def _provenance(value: Any, where: str) -> str:
    if not isinstance(value, str) or value not in PROVENANCE_MARKS:
        raise UserError(f"{where}: provenance must be one of {', '.join(PROVENANCE_MARKS)}, found {shown(value)}")
    return value


def _origin(entry: dict[str, Any], where: str, provenance_of: dict[str, str]) -> tuple[str, str]:
    """Provenance and source, which must agree: a correction that changes only one of them is caught here."""
    provenance, source = _provenance(entry["provenance"], where), _text(entry["source"], f"{where}: source")
    if source not in provenance_of:
        raise UserError(f"{where}: source must be one of {', '.join(provenance_of)}, found {source!r}")
    if provenance != provenance_of[source]:
        raise UserError(f"{where}: source {source} is {provenance_of[source]}, found provenance {provenance}")
    return provenance, source


def _claim(raw: Any, where: str, provenance_of: dict[str, str]) -> Claim:
    numbers = {key: raw[key] for key in ("value", "low", "high") if key in _mapping(raw, where)}
    if set(numbers) not in ({"value"}, {"low", "high"}, {"high"}):
        raise UserError(
            f"{where}: expected value, or low and high, or high; found {sorted(numbers) or 'none of them'}"
        )
    entry = _mapping(raw, where, (*numbers, "provenance", "source"))
    numbers = {key: _number(number, f"{where}: {key}") for key, number in numbers.items()}
    if "low" in numbers and numbers["low"] > numbers["high"]:
        raise UserError(f"{where}: low {numbers['low']} is above high {numbers['high']}")
    return Claim(*_origin(entry, where, provenance_of), **numbers)


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise UserError(f"{where}: expected a list, found {shown(value)}")
    return value


def _cell(raw: Any, where: str, provenance_of: dict[str, str]) -> tuple[Claim, ...]:
    claims = raw if isinstance(raw, list) else [raw]
    if not claims:
        raise UserError(f"{where}: an empty cell; leave it out where the number was not found")
    return tuple(_claim(claim, where, provenance_of) for claim in claims)


def _row(name: str, raw: Any, where: str, columns: list[str], provenance_of: dict[str, str]) -> PaperRow:
    raw = _mapping(raw, where, ("title", "cells"))
    cells = _mapping(raw["cells"], f"{where}.cells")
    if unknown := [column for column in cells if column not in columns]:
        raise UserError(f"{where}: unknown column {unknown[0]!r}; expected one of {', '.join(columns)}")
    return PaperRow(
        id=name,
        title=_text(raw["title"], f"{where}.title"),
        cells={column: _cell(cell, f"{where}.{column}", provenance_of) for column, cell in cells.items()},
    )


def _note(raw: Any, where: str, provenance_of: dict[str, str]) -> Note:
    raw = _mapping(raw, where, ("text", "provenance", "source"))
    return Note(_text(raw["text"], f"{where}: text"), *_origin(raw, where, provenance_of))


def _table(name: str, raw: Any, where: str, provenance_of: dict[str, str]) -> PaperTable:
    raw = _mapping(raw, where, ("title", "setting", "columns", "rows", "notes"))
    columns = []
    for column, entry in _mapping(raw["columns"], f"{where}.columns").items():
        entry = _mapping(entry, f"{where}.columns.{column}", ("title", "unit"))
        texts = [_text(entry[key], f"{where}.columns.{column}.{key}") for key in ("title", "unit")]
        columns.append(Column(column, *texts))
    known = [column.id for column in columns]
    return PaperTable(
        id=name,
        title=_text(raw["title"], f"{where}.title"),
        setting=_text(raw["setting"], f"{where}.setting"),
        columns=tuple(columns),
        rows=tuple(
            _row(row, entry, f"{where}.{row}", known, provenance_of)
            for row, entry in _mapping(raw["rows"], f"{where}.rows").items()
        ),
        notes=tuple(
            _note(note, f"{where}.notes[{number}]", provenance_of)
            for number, note in enumerate(_list(raw["notes"], f"{where}.notes"))
        ),
    )

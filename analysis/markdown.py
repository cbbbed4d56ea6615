"""Reads back the Markdown that :mod:`analysis.tables` and the figures write, for the page that shows it as HTML.

Only what is written there is understood: headings, lists, pipe tables, pictures, code and paragraphs of plain text. A
page of Markdown so is the one place where a table or a figure is put into words.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby


@dataclass(frozen=True)
class Heading:
    level: int
    text: str


@dataclass(frozen=True)
class Bullets:
    items: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """``left`` of each column says whether it is aligned to the left."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: tuple[bool, ...]


@dataclass(frozen=True)
class Picture:
    alt: str
    path: str


@dataclass(frozen=True)
class Code:
    text: str


@dataclass(frozen=True)
class Paragraph:
    text: str


Block = Heading | Bullets | Table | Picture | Code | Paragraph

_HEADING = re.compile(r"(#+) (.+)")
_PICTURE = re.compile(r"!\[(.*)\]\((\S+)\)")
_CELL = re.compile(r"((?:\\.|[^|\\])*)\|")
_KINDS = ("- ", "|", "#", "![", "```")


def blocks(text: str) -> list[Block]:
    """The blocks of a page, in its order, without the escapes of :func:`analysis.tables.plain`."""
    found: list[Block] = []
    parts = re.split(r"^```\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    for number, part in enumerate(parts):
        found += [Code(part.rstrip("\n"))] if number % 2 else _plain_blocks(part)
    return found


def _plain_blocks(text: str) -> Iterator[Block]:
    for kind, group in groupby(text.split("\n"), key=_kind):
        lines = list(group)
        if kind == "- ":
            yield Bullets(tuple(unescape(line[2:]) for line in lines))
        elif kind == "|":
            yield _table(lines)
        elif kind == "":
            yield from (Paragraph(unescape(line)) for line in lines if line.strip())
        else:
            yield from (_single(line) for line in lines)


def _kind(line: str) -> str:
    return next((kind for kind in _KINDS if line.startswith(kind)), "")


def _single(line: str) -> Block:
    if (match := _HEADING.fullmatch(line)) is not None:
        return Heading(len(match[1]), unescape(match[2]))
    if (match := _PICTURE.fullmatch(line)) is not None:
        return Picture(unescape(match[1]), match[2])
    return Paragraph(unescape(line))


def _table(lines: Sequence[str]) -> Table:
    header, rule, *rows = [_cells(line) for line in lines]
    return Table(header, tuple(rows), tuple(not cell.endswith(":") for cell in rule))


def _cells(line: str) -> tuple[str, ...]:
    return tuple(unescape(cell.strip()) for cell in _CELL.findall(line[1:]))


def unescape(text: str) -> str:
    """``text`` without backslashes before punctuation."""
    return re.sub(r"\\([^\w\s])", r"\1", text.replace("\\_", "_"))

"""A row of the tables of bad inputs: what is wrong with what file or key, and what the one line has to name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from moslora_core.errors import UserError


@dataclass(frozen=True)
class BadInput:
    """An input that the project has to refuse.

    Attributes:
        wrong: in words, unique in its table.
        write: puts the input below an empty folder.
        read: what a command does with it.
        names: what the message has to hold: the file or key, and what was found or expected.
    """

    wrong: str
    write: Callable[[Path], object]
    read: Callable[[Path], object]
    names: tuple[str, ...]

    def __str__(self) -> str:
        return self.wrong


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_refused(row: BadInput, folder: Path) -> None:
    """One line that names what is wrong, nothing else raised, and no file changed, half-written or lost."""
    row.write(folder)
    before = contents(folder)
    with pytest.raises(UserError) as refusal:
        row.read(folder)
    message = str(refusal.value)
    assert "\n" not in message
    for name in row.names:
        assert name in message
    assert contents(folder) == before

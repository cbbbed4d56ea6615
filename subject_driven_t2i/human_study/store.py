"""Raters and votes in SQLite: one transaction a vote, so that no vote is lost or halved when the server is killed.

    raters   code and number of each; the number decides order and sides
    screens  the order and the sides that a rater was given, kept so that votes never depend on drawing them again
    votes    the vote that counts, one a rater, pair and question
    history  every vote that was ever cast, in order

Votes are kept in terms of the screen (left, tie, right); :mod:`.export` turns them into methods. Every call opens a
connection of its own: threads and processes share nothing but the file, whose log (WAL) lets them read while another
writes; several servers may serve one study. What counts and its order follow from rows, never from a clock.

Every call raises a UserError where the database is damaged, or cannot be read or written; nothing is halved by it.
"""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from moslora_core.errors import UserError

from .study import Screen, Study, screens

VOTES_FILE = "votes.sqlite"
CHOICES = ("left", "tie", "right")
MOST_RATERS = 1000
_ALPHABET = "23456789abcdefghjkmnpqrstuvwxyz"  # without what is mistaken for something else
_CODE_LENGTH = 8
_WAIT = 30.0  # seconds for another writer
_SCHEMA = """
CREATE TABLE IF NOT EXISTS raters (
    number INTEGER PRIMARY KEY,
    code TEXT NOT NULL UNIQUE,
    began_at TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS screens (
    rater INTEGER NOT NULL REFERENCES raters (number),
    position INTEGER NOT NULL,
    pair TEXT NOT NULL,
    swapped INTEGER NOT NULL CHECK (swapped IN (0, 1)),
    PRIMARY KEY (rater, position),
    UNIQUE (rater, pair)
);
CREATE TABLE IF NOT EXISTS votes (
    rater INTEGER NOT NULL,
    pair TEXT NOT NULL,
    question TEXT NOT NULL,
    choice TEXT NOT NULL CHECK (choice IN ('left', 'tie', 'right')),
    voted_at TEXT NOT NULL,
    PRIMARY KEY (rater, pair, question),
    FOREIGN KEY (rater, pair) REFERENCES screens (rater, pair)
);
CREATE TABLE IF NOT EXISTS history (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    rater INTEGER NOT NULL,
    pair TEXT NOT NULL,
    question TEXT NOT NULL,
    choice TEXT NOT NULL,
    voted_at TEXT NOT NULL
);
"""


class Full(Exception):
    """No more raters are taken."""


@dataclass(frozen=True)
class Vote:
    """A vote that counts; ``position`` is from 1, ``changes`` how often the rater changed it."""

    rater: int
    position: int
    pair: str
    swapped: bool
    question: str
    choice: str
    changes: int
    voted_at: str


def open_store(folder: Path) -> None:
    """Makes the tables of a study, where they are not there yet, and looks for damage in them.

    Raises:
        UserError: a file that is no such database, is damaged or cannot be written.
    """
    with _connection(folder) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(_SCHEMA)
        (found,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
        if found != "ok":
            raise sqlite3.DatabaseError(found.splitlines()[-1])
        if connection.execute("PRAGMA foreign_key_check(votes)").fetchone():
            raise sqlite3.DatabaseError("a vote on a pair that its rater was not shown")


def check_study(folder: Path, study: Study) -> None:
    """Checks that the votes are on this study.

    Raises:
        UserError: names a pair that raters were shown, or a question that they answered, which are of another.
    """
    with _connection(folder) as connection:
        shown = {pair for (pair,) in connection.execute("SELECT DISTINCT pair FROM screens")}
        answered = {question for (question,) in connection.execute("SELECT DISTINCT question FROM votes")}
    for what, found, known in (
        ("pair", shown, {pair.id for pair in study.pairs}),
        ("question", answered, set(study.questions)),
    ):
        if other := sorted(found - known):
            raise UserError(f"{folder / VOTES_FILE}: votes on {what} {other[0]}, which is not of the study")


def add_rater(folder: Path, study: Study) -> str:
    """Takes in a rater, with an order and sides of their own; returns the code by which they come back.

    Raises:
        Full: if ``MOST_RATERS`` have begun.
    """
    code = "".join(secrets.choice(_ALPHABET) for _ in range(_CODE_LENGTH))
    with _connection(folder) as connection, _transaction(connection):
        (last,) = connection.execute("SELECT COALESCE(MAX(number), 0) FROM raters").fetchone()
        if last >= MOST_RATERS:
            raise Full
        number = last + 1
        connection.execute("INSERT INTO raters VALUES (?, ?, ?)", (number, code, _now()))
        connection.executemany(
            "INSERT INTO screens VALUES (?, ?, ?, ?)",
            [
                (number, position, screen.pair, screen.swapped)
                for position, screen in enumerate(screens(study, number), start=1)
            ],
        )
    return code


def find_rater(folder: Path, code: str) -> int | None:
    """Number of the rater of a code."""
    with _connection(folder) as connection:
        row = connection.execute("SELECT number FROM raters WHERE code = ?", (code,)).fetchone()
    return None if row is None else row[0]


def screens_of(folder: Path, rater: int) -> list[Screen]:
    """What a rater sees, in order."""
    with _connection(folder) as connection:
        rows = connection.execute("SELECT pair, swapped FROM screens WHERE rater = ? ORDER BY position", (rater,))
        return [Screen(pair, bool(swapped)) for pair, swapped in rows]


def votes_of(folder: Path, rater: int) -> dict[tuple[str, str], str]:
    """(pair, question) -> choice, of what a rater has answered."""
    with _connection(folder) as connection:
        rows = connection.execute("SELECT pair, question, choice FROM votes WHERE rater = ?", (rater,))
        return {(pair, question): choice for pair, question, choice in rows}


def vote(folder: Path, rater: int, pair: str, question: str, choice: str) -> None:
    """Takes a vote, which replaces another one on the same; it is on the disk when this returns.

    The same vote again changes nothing: it is sent twice when the server dies before its answer.
    """
    cast = (rater, pair, question, choice, _now())
    with _connection(folder) as connection, _transaction(connection):
        taken = connection.execute(
            "INSERT INTO votes VALUES (?, ?, ?, ?, ?) ON CONFLICT (rater, pair, question) DO UPDATE"
            " SET (choice, voted_at) = (excluded.choice, excluded.voted_at) WHERE choice != excluded.choice",
            cast,
        )
        if taken.rowcount:
            connection.execute(
                "INSERT INTO history (rater, pair, question, choice, voted_at) VALUES (?, ?, ?, ?, ?)", cast
            )


def all_votes(folder: Path, questions: Sequence[str]) -> list[Vote]:
    """Every vote that counts, by rater, position and question in the order of ``questions``."""
    with _connection(folder) as connection:
        rows = connection.execute(
            "SELECT rater, position, pair, swapped, question, choice,"
            " (SELECT COUNT(*) - 1 FROM history AS h"
            "  WHERE (h.rater, h.pair, h.question) = (v.rater, v.pair, v.question)),"
            " voted_at FROM votes AS v JOIN screens USING (rater, pair) ORDER BY rater, position"
        ).fetchall()
    votes = [Vote(rater, position, pair, bool(swapped), *rest) for rater, position, pair, swapped, *rest in rows]
    return sorted(votes, key=lambda vote: (vote.rater, vote.position, questions.index(vote.question)))


@contextmanager
def _connection(folder: Path) -> Iterator[sqlite3.Connection]:
    path = folder / VOTES_FILE
    try:
        with closing(sqlite3.connect(path, timeout=_WAIT, isolation_level=None)) as connection:
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA synchronous = FULL")  # in WAL mode only this outlives a power cut
            yield connection
    except sqlite3.IntegrityError:  # a caller's mistake
        raise
    except sqlite3.DatabaseError as error:
        raise UserError(f"{path}: {error}; expected the votes of a study, in a folder that can be written") from None


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """One transaction that writes: it waits for another writer at its start, not in its middle."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        if connection.in_transaction:  # SQLite itself rolls back when the disk is full
            connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

"""Human studies as the analysis reads them: the design of each and its exported votes.

    runs/subject_driven_t2i/<scale>/human_study/<name>/study.json and votes.csv

The rule by which inattentive raters are left out is the study's own, written before the first vote.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moslora_core.errors import UserError
from moslora_core.record import check_version, read_json
from moslora_core.typed import Share, build, shown

from .aggregate import row_name
from .rating import FIRST, SECOND, TIE

EXPERIMENT = "subject_driven_t2i"
COMMAND = f"python -m {EXPERIMENT}.human_study export"
SCHEMA_VERSION = 1
_WINNERS = {"first": FIRST, "tie": TIE, "second": SECOND}
_COLUMNS = ("rater", "pair", "question", "choice", "winner", "expected")


@dataclass(frozen=True)
class Vote:
    """``winner`` is +1 (first), 0 (tie) or -1; ``correct`` is that of an attention question, None for another one."""

    rater: str
    pair: str
    question: str
    choice: str
    winner: int
    correct: bool | None


@dataclass(frozen=True)
class Study:
    """A study with its votes.

    Attributes:
        first, second: names of the methods, as the tables write them.
        keys: what names them in CSV: the methods without their overrides, where that tells them apart.
        pairs: subject -> ids of its pairs, attention checks apart.
        checks: ids of the attention checks.
        max_wrong: share of wrong answers to attention questions beyond which a rater is left out.
    """

    path: str
    scale: str
    name: str
    first: str
    second: str
    keys: tuple[str, str]
    questions: tuple[str, ...]
    pairs: Mapping[str, tuple[str, ...]]
    checks: tuple[str, ...]
    max_wrong: float
    votes: tuple[Vote, ...]

    @property
    def raters(self) -> tuple[str, ...]:
        """All who voted."""
        return tuple(sorted({vote.rater for vote in self.votes}))

    def attention(self, rater: str) -> tuple[int, int]:
        """How many attention questions a rater answered wrong, and how many in all."""
        answers = [vote.correct for vote in self.votes if vote.rater == rater and vote.correct is not None]
        return answers.count(False), len(answers)

    def inattentive(self) -> tuple[str, ...]:
        """The raters who are left out."""
        found = {rater: self.attention(rater) for rater in self.raters}
        return tuple(rater for rater, (wrong, asked) in found.items() if asked and wrong / asked > self.max_wrong)

    def counted(self) -> tuple[str, ...]:
        """The raters whose votes count."""
        return tuple(rater for rater in self.raters if rater not in self.inattentive())

    def matrices(self, question: str) -> list[np.ndarray]:
        """Votes on the pairs of each subject, shape (raters that count, pairs); NaN where there is none."""
        raters = {rater: row for row, rater in enumerate(self.counted())}
        winners = {(v.rater, v.pair): v.winner for v in self.votes if v.question == question}
        found = []
        for pairs in self.pairs.values():
            votes = np.full((len(raters), len(pairs)), np.nan)
            for rater, row in raters.items():
                for column, pair in enumerate(pairs):
                    votes[row, column] = winners.get((rater, pair), np.nan)
            found.append(votes)
        return found


@dataclass(frozen=True)
class _Method:
    method: str
    label: str


@dataclass(frozen=True)
class _Pair:
    id: str
    kind: str
    subject: str


@dataclass(frozen=True)
class _Design:
    """What the analysis needs of study.json."""

    first: _Method
    second: _Method
    subjects: dict[str, Any]
    pairs: list[_Pair]
    questions: tuple[str, ...]
    max_wrong: Share


def find_studies(runs_dir: Path, scale: str | None = None) -> list[Path]:
    """Folders of the studies below a folder of runs, of one scale or all."""
    return sorted(path.parent for path in runs_dir.glob(f"{EXPERIMENT}/{scale or '*'}/human_study/*/study.json"))


def read_study(folder: Path, runs_dir: Path) -> Study:
    """One study and its votes.

    Raises:
        UserError: a damaged study, or votes that are missing, damaged or another study's.
    """
    raw = read_json(folder / "study.json")
    check_version(raw, SCHEMA_VERSION, "study.json")
    design = build(_Design, raw, "study.json", others=True)
    where = folder.relative_to(runs_dir)
    kinds = {pair.id: pair.kind for pair in design.pairs}
    if len(kinds) < len(design.pairs):
        twice, _ = Counter(pair.id for pair in design.pairs).most_common(1)[0]
        raise UserError(f"study.json: the pair {shown(twice)} is there twice")
    sides = design.first, design.second
    first, second = map(_name, sides)
    methods = tuple(side.method for side in sides)
    return Study(
        path=where.as_posix(),
        scale=where.parts[1],
        name=where.parts[3],
        first=first,
        second=second,
        keys=methods if methods[0] != methods[1] else (first, second),
        questions=design.questions,
        pairs={
            subject: tuple(pair.id for pair in design.pairs if pair.subject == subject and pair.kind == "pair")
            for subject in design.subjects
        },
        checks=tuple(pair for pair, kind in kinds.items() if kind != "pair"),
        max_wrong=design.max_wrong,
        votes=_votes(folder, design, kinds),
    )


def _name(method: _Method) -> str:
    """``moslora (orthogonal)``: a method with its overrides, the mixer's initialisation by its value alone."""
    if method.label == "default":
        return row_name(method.method, [])
    overrides = [method.label] if "~" in method.label else method.label.split(",")
    return row_name(method.method, [re.sub(r"^method\.mixer_init=", "", override) for override in overrides])


def _votes(folder: Path, design: _Design, kinds: Mapping[str, str]) -> tuple[Vote, ...]:
    path = folder / "votes.csv"
    if not path.is_file():
        name, scale = folder.name, folder.parts[-3]
        raise UserError(f"its votes are not exported yet; run {COMMAND} --scale {scale} --name {name}")
    votes: dict[tuple[str, str, str], Vote] = {}
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            if absent := [column for column in _COLUMNS if column not in (reader.fieldnames or ())]:
                raise UserError(f"votes.csv has no column {absent[0]}; expected what {COMMAND} writes")
            for row in reader:
                vote = _vote(row, f"votes.csv line {reader.line_num}", design.questions, kinds)
                key = (vote.rater, vote.pair, vote.question)
                if key in votes:
                    raise UserError(f"votes.csv line {reader.line_num}: a second vote of {' on '.join(key[:2])}")
                votes[key] = vote
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read votes.csv: {error}") from None
    return tuple(votes.values())


def _vote(row: Mapping[str, str], where: str, questions: Sequence[str], kinds: Mapping[str, str]) -> Vote:
    if not row["rater"] or None in row or None in row.values():
        raise UserError(f"{where}: expected {', '.join(_COLUMNS)}, found {shown(list(row.values()))}")
    allowed = {"pair": kinds, "question": questions, "winner": _WINNERS, "choice": ("left", "tie", "right")}
    for column, known in allowed.items():
        if row[column] not in known:
            raise UserError(f"{where}: {column} {row[column]!r} is not of this study")
    if row["expected"] not in ("", *_WINNERS):
        raise UserError(f"{where}: expected {shown(row['expected'])} is not of this study")
    expected = row["expected"] if kinds[row["pair"]] != "pair" else ""
    return Vote(
        rater=row["rater"],
        pair=row["pair"],
        question=row["question"],
        choice=row["choice"],
        winner=_WINNERS[row["winner"]],
        correct=row["winner"] == expected if expected else None,
    )

"""Writes the votes of a study as CSV, in terms of the methods: the one place where screens are turned into methods."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from moslora_core.errors import UserError
from moslora_core.record import write_atomic

from . import store
from .study import Pair, Study, read_study

CSV_FILE = "votes.csv"
FIELDS = (
    *("rater", "position", "kind", "pair", "subject", "prompt_index", "index", "prompt", "question"),
    *("left", "right", "choice", "winner", "expected", "correct", "changes", "voted_at"),
)


def export(folder: Path) -> Path:
    """Writes ``votes.csv`` of the study in ``folder``: a line a vote that counts, by rater and position.

    Raters are numbered; their codes, with which their votes could be changed, are not written. ``left``, ``right``,
    ``winner`` and ``expected`` are first, second or tie, which the study's ``first`` and ``second`` name; ``expected``
    and ``correct`` are those of attention checks, whose sides have no method.

    Returns:
        The file.

    Raises:
        UserError: no study, or no votes of it alone.
    """
    study = read_study(folder)
    if not (folder / store.VOTES_FILE).is_file():
        raise UserError(f"{folder}: no {store.VOTES_FILE}; the study was never served")
    pairs = {pair.id: pair for pair in study.pairs}
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, FIELDS, lineterminator="\n")
    writer.writeheader()
    store.open_store(folder)
    store.check_study(folder, study)
    for vote in store.all_votes(folder, study.questions):
        writer.writerow(_row(vote, pairs[vote.pair], study))
    path = folder / CSV_FILE
    write_atomic(path, buffer.getvalue())
    return path


def _row(vote: store.Vote, pair: Pair, study: Study) -> dict[str, object]:
    left, right = ("second", "first") if vote.swapped else ("first", "second")
    winner = {"left": left, "right": right, "tie": "tie"}[vote.choice]
    expected = pair.expected.get(vote.question)
    return {
        "rater": f"{vote.rater:03d}",
        "position": vote.position,
        "kind": pair.kind,
        "pair": pair.id,
        "subject": pair.subject,
        "prompt_index": pair.prompt_index,
        "index": pair.index,
        "prompt": pair.prompt,
        "question": vote.question,
        "left": left,
        "right": right,
        "choice": vote.choice,
        "winner": winner,
        "expected": expected,
        "correct": None if expected is None else int(winner == expected),
        "changes": vote.changes,
        "voted_at": vote.voted_at,
    }

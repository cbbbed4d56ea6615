"""Table 6 of the paper, the blind human study: wins, ties and losses of one method against another.

A page a study, by subject and question. What the numbers stand on is below: how the difference holds against other
raters and other pairs, how far the raters agree, and who was left out for want of attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moslora_core.errors import UserError

from .formats import interval, p_value, points
from .human_study import Study, find_studies, read_study
from .load import LeftOut, Run
from .paper import PaperNumbers, PaperTable
from .paper_block import paper_block, paper_lines
from .rating import (
    BY,
    Intervals,
    Shares,
    SignTest,
    agreement,
    bootstrap,
    mean_shares,
    shares,
    sign_test,
)
from .statistics import ALPHA, RESAMPLES, Interval, holm
from .tables import MISSING, Block, Grid, Page, csv_text, latex_page, markdown_page
from .task_table import Document

TABLE = "table6"
_TITLE = "Human evaluation of subject-driven generation"
MEAN = "mean"
FEW_VOTES = "‡"
CSV_FIELDS = (
    *("origin", "scale", "study", "first", "second", "question", "subject", "column", "unit", "value", "low", "high"),
    *("resampled", "n", "provenance", "source"),
)
_UNITS = ("pairs", "raters")  # of the sign tests


def build(
    runs_dir: Path,
    scale: str | None,
    runs: Sequence[Run],
    left_out: Sequence[LeftOut],
    numbers: PaperNumbers,
) -> list[Document]:
    """A document per study, in a stable order; one that cannot be read says why. The runs themselves are not read."""
    paper = numbers.tables[TABLE]
    documents = []
    for folder in find_studies(runs_dir, scale):
        try:
            page, lines = _page(read_study(folder, runs_dir), paper, numbers)
        except UserError as error:
            page, lines = _unread(folder, runs_dir, " ".join(str(error).split()), paper, numbers), []
        measured = [{"origin": "measured", "provenance": "MEASURED", **line} for line in lines]
        printed = [{"question": line.pop("method"), "subject": MEAN, **line} for line in paper_lines(paper)]
        documents.append(
            Document(
                folder=f"{folder.relative_to(runs_dir).parts[1]}/human_study",
                name=f"{TABLE}-{folder.name}",
                title=page.measured.title,
                markdown=markdown_page(page),
                csv=csv_text(CSV_FIELDS, [*measured, *printed]),
                latex=latex_page(page),
            )
        )
    return documents


_SignTests = dict[str, dict[str, tuple[SignTest, float | None]]]  # unit, question -> the test, and Holm's p


@dataclass(frozen=True)
class _Row:
    """The ``n`` votes of a question on one subject, or on all and the mean over the subjects."""

    subject: str
    n: int
    shares: Shares | None
    intervals: dict[str, Intervals]  # by what was resampled


@dataclass(frozen=True)
class _Question:
    """Rows of a question, the mean last; the votes on all pairs, shape (raters, pairs)."""

    id: str
    title: str
    rows: tuple[_Row, ...]
    votes: np.ndarray

    @property
    def mean(self) -> _Row:
        return self.rows[-1]


def _question(study: Study, question: str, title: str) -> _Question:
    groups = study.matrices(question)
    resampled = {by: bootstrap(groups, by) for by in BY}
    rows = [
        _Row(subject, _count(votes), shares(votes), {by: each[number] for by, (_, each) in resampled.items()})
        for number, (subject, votes) in enumerate(zip(study.pairs, groups, strict=True))
    ]
    votes = np.concatenate(groups, axis=1)
    rows.append(_Row(MEAN, _count(votes), mean_shares(groups), {by: mean for by, (mean, _) in resampled.items()}))
    return _Question(question, title, tuple(rows), votes)


def _count(votes: np.ndarray) -> int:
    return int(np.isfinite(votes).sum())


def _page(study: Study, paper: PaperTable, numbers: PaperNumbers) -> tuple[Page, list[dict[str, object]]]:
    titles = {row.id: row.title for row in paper.rows}
    questions = [
        _question(study, name, titles.get(name, name.replace("_", " ").capitalize())) for name in study.questions
    ]
    tests = _sign_tests(questions)
    page = Page(
        label=f"tab:6-{study.scale}-{study.name}",
        measured=Block(
            title=f"{_TITLE}, study {study.name}: {study.first} against {study.second}, scale {study.scale}",
            grid=_shares_grid(study, questions),
            facts=[
                _votes_fact(study),
                "Percent of the votes, with 95% intervals of a bootstrap that resamples raters and pairs "
                f"({RESAMPLES:,} resamples); differences are in points. The mean is the plain mean over the subjects.",
                "Raters were blind; order and sides were shuffled. Both images of a pair started from the same noise.",
            ],
            notes=[*_incomplete_notes(study, questions), *_attention_notes(study), *_side_notes(study)],
        ),
        further=[_difference_block(study, questions, tests), _agreement_block(questions)],
        left_out=[],
        paper=paper_block(paper, numbers.sources),
    )
    return page, _lines(study, questions, tests)


def _unread(folder: Path, runs_dir: Path, reason: str, paper: PaperTable, numbers: PaperNumbers) -> Page:
    where = folder.relative_to(runs_dir)
    return Page(
        label=f"tab:6-{where.parts[1]}-{folder.name}",
        measured=Block(
            title=f"{_TITLE}, study {folder.name}: scale {where.parts[1]}",
            grid=Grid(["Question", "Subject", "Votes"], []),
        ),
        left_out=[f"{where.as_posix()}: {reason}"],
        paper=paper_block(paper, numbers.sources),
    )


# ----------------------------------------------------------------------------------------------------- wins and losses


def _shares_grid(study: Study, questions: Sequence[_Question]) -> Grid:
    headers = ["Question", "Subject", "Votes", f"{study.first} wins", "Tie", f"{study.second} wins", "Difference"]
    cells, groups = [], []
    for question in questions:
        groups += [len(cells)] if cells else []
        for row in question.rows:
            found = row.intervals["raters and pairs"]
            cells.append(
                [
                    question.title,
                    row.subject,
                    str(row.n) + _mark(row, study),
                    *(_percent(row.shares, found, name) for name in ("first", "tie", "second")),
                    _points(row.shares, found.difference),
                ]
            )
    return Grid(headers, cells, left=2, groups=groups)


def _mark(row: _Row, study: Study) -> str:
    subjects = study.pairs if row.subject == MEAN else (row.subject,)
    expected = len(study.counted()) * sum(len(study.pairs[subject]) for subject in subjects)
    return "" if row.n == expected else FEW_VOTES


def _percent(found: Shares | None, intervals: Intervals, name: str) -> str:
    if found is None:
        return MISSING
    between = getattr(intervals, name)
    text = "" if between is None else f" ({100 * between[0]:.1f} to {100 * between[1]:.1f})"
    return f"{100 * getattr(found, name):.1f}{text}"


def _points(found: Shares | None, between: Interval | None) -> str:
    if found is None:
        return MISSING
    return points(found.difference) + ("" if between is None else f" ({interval(between)})")


# ------------------------------------------------------------------------------------------------- what it stands on


def _sign_tests(questions: Sequence[_Question]) -> _SignTests:
    """Unit -> question -> the sign test, and its p by Holm over the questions."""
    found = {}
    for unit in _UNITS:
        tests = {question.id: sign_test(question.votes, unit) for question in questions}
        adjusted = holm({name: test.p for name, test in tests.items()})
        found[unit] = {name: (test, adjusted[name]) for name, test in tests.items()}
    return found


def _difference_block(study: Study, questions: Sequence[_Question], tests: _SignTests) -> Block:
    headers = ["Question", "Difference", *(f"Resampling {by}" for by in BY)]
    for unit in _UNITS:
        headers += [
            f"{unit.capitalize()} for either (even)",
            f"{unit.capitalize()}: p",
            f"{unit.capitalize()}: p (Holm)",
        ]
    cells = []
    for question in questions:
        mean = question.mean
        row = [question.title, _points(mean.shares, None)]
        row += [interval(mean.intervals[by].difference if mean.shares else None) for by in BY]
        for unit in _UNITS:
            test, adjusted = tests[unit][question.id]
            row += [f"{test.first} : {test.second} ({test.even})", p_value(test.p), p_value(adjusted)]
        cells.append(row)
    return Block(
        title="The mean difference against other raters and other pairs",
        grid=Grid(headers, cells),
        facts=[
            "Intervals of the mean difference in points, by what is resampled: other raters of the same pairs, other "
            "pairs before the same raters, or both, which is the widest.",
            f"Exact sign tests: pairs, and raters, with more votes for {study.first} : for {study.second}; even ones "
            "do not enter. Holm's p is adjusted for the two questions.",
            "A method counts as preferred if the interval over raters and pairs lies on its side of zero and the sign "
            f"test by pairs agrees, with Holm's p below {ALPHA}.",
        ],
        notes=[f"{question.title}: {_verdict(study, question, tests)}." for question in questions],
    )


def _verdict(study: Study, question: _Question, tests: _SignTests) -> str:
    between = question.mean.intervals["raters and pairs"].difference
    test, adjusted = tests["pairs"][question.id]
    if between is not None and adjusted is not None and adjusted < ALPHA:
        if between[0] > 0 and test.first > test.second:
            return f"{study.first} is preferred"
        if between[1] < 0 and test.first < test.second:
            return f"{study.second} is preferred"
    return "cannot be told"


def _agreement_block(questions: Sequence[_Question]) -> Block:
    cells = []
    for question in questions:
        found = agreement(question.votes)
        if found is None:
            cells.append([question.title, "0", MISSING, MISSING])
        else:
            alpha = MISSING if found.alpha is None else f"{found.alpha:.2f}".replace("-0.00", "0.00")
            cells.append([question.title, str(found.pairs), f"{100 * found.observed:.1f}", alpha])
    return Block(
        title="Agreement between raters",
        grid=Grid(["Question", "Pairs with two votes", "Alike (%)", "Krippendorff's alpha"], cells),
        facts=["Alike: share of two raters' votes on the same pair. Alpha (nominal): 1 is perfect, 0 is chance."],
    )


# -------------------------------------------------------------------------------------------------- who took part


def _votes_fact(study: Study) -> str:
    pairs, raters = sum(map(len, study.pairs.values())), len(study.counted())
    return (
        f"Raters: {raters}; subjects: {len(study.pairs)}; pairs: {pairs}, and {len(study.checks)} attention checks; "
        f"questions: {len(study.questions)}."
    )


def _incomplete_notes(study: Study, questions: Sequence[_Question]) -> Iterator[str]:
    if not study.counted():
        yield "No votes yet." if not study.raters else "No rater is left."
        return
    expected = sum(map(len, study.pairs.values())) * len(study.questions)
    voted = {rater: 0 for rater in study.counted()}
    for question in questions:
        for rater, row in zip(voted, question.votes, strict=True):
            voted[rater] += _count(row)
    if partial := [f"{rater} {count} of {expected}" for rater, count in voted.items() if count < expected]:
        yield f"{FEW_VOTES} not all votes are there. Raters who have not finished, and votes: {', '.join(partial)}."
    if any(row.shares is None for question in questions for row in question.rows[:-1]):
        yield "A subject without votes has no shares, and the mean needs every subject."
    if len(voted) == 1:
        yield "One rater: nothing can be said about others, so there is no interval over raters and no agreement."


def _attention_notes(study: Study) -> Iterator[str]:
    rule = f"more than {100 * study.max_wrong:g}% of a rater's attention questions wrong"
    left_out = study.inattentive()
    yield f"Raters left out ({rule}, as the study set before its first vote): {', '.join(left_out) or 'none'}."
    for rater in study.raters:
        wrong, asked = study.attention(rater)
        if wrong:
            yield (
                f"Rater {rater}: {wrong} of {asked} attention questions wrong, "
                f"{'left out' if rater in left_out else 'kept'}."
            )
    if unasked := [rater for rater in study.counted() if not study.attention(rater)[1]] if study.checks else []:
        yield f"Kept without having met an attention check yet: {', '.join(unasked)}."


def _side_notes(study: Study) -> Iterator[str]:
    """Whether raters lean to a side, which says how carefully they looked; it favours neither method."""
    counted, checks = set(study.counted()), set(study.checks)
    sides = [v.choice for v in study.votes if v.rater in counted and v.pair not in checks and v.choice != "tie"]
    if sides:
        left = 100 * sides.count("left") / len(sides)
        yield f"Of {len(sides)} votes that are no tie, {left:.1f}% are for the left image."


# --------------------------------------------------------------------------------------------------------------- CSV


def _lines(study: Study, questions: Sequence[_Question], tests: _SignTests) -> Iterator[dict[str, object]]:
    of_study = {"scale": study.scale, "study": study.name, "first": study.first, "second": study.second}
    columns = {"first": f"{study.keys[0]}_wins", "tie": "tie", "second": f"{study.keys[1]}_wins"}
    for question in questions:
        common = {**of_study, "question": question.id}
        for row in question.rows:
            if row.shares is None:
                continue
            line = {**common, "subject": row.subject, "n": row.n}
            both = row.intervals["raters and pairs"]
            for name, column in columns.items():
                number = {"column": column, "unit": "percent", "value": 100 * getattr(row.shares, name)}
                yield {**line, **number, **_ends(getattr(both, name), "raters and pairs")}
            for by in BY:
                number = {"column": "difference", "unit": "points", "value": 100 * row.shares.difference}
                yield {**line, **number, **_ends(row.intervals[by].difference, by)}
        line = {**common, "subject": MEAN}
        for unit in _UNITS:
            test, adjusted = tests[unit][question.id]
            for column, value in ((f"p_sign_{unit}", test.p), (f"p_sign_{unit}_holm", adjusted)):
                if value is not None:
                    yield {**line, "column": column, "unit": "p", "value": value, "n": test.first + test.second}
        found = agreement(question.votes)
        if found is not None:
            yield {**line, "column": "alike", "unit": "percent", "value": 100 * found.observed, "n": found.pairs}
            if found.alpha is not None:
                yield {**line, "column": "krippendorff_alpha", "unit": "alpha", "value": found.alpha, "n": found.pairs}


def _ends(between: Interval | None, by: str) -> dict[str, object]:
    return {"resampled": by} | ({} if between is None else {"low": 100 * between[0], "high": 100 * between[1]})

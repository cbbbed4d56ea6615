"""Scores without a judge: what a response is worth, and what a benchmark's items add up to.

    multiple choice   accuracy of the letters; MMBench also in its circular form, where a question counts only if it
                      is answered right in every rotation of its options (VLMEvalKit reports this form)
    yes or no         accuracy; MME in its points: per category the accuracy over questions and the share of pictures
                      with both questions right, in percent, added up over ten categories of perception (at most 2000)
                      and four of cognition (at most 800)
    short answer      VQA accuracy against ten people's answers; equality after the same normalisation with one answer

All are given as shares in [0, 1], those of MME as points over the points that its categories offer. Standard errors
are those of a mean over questions (n - 1), over groups of rotations for the circular form, and for MME of the sum of
the categories' means over pictures.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from moslora_core.evaluations import share_stderr
from moslora_core.record import TaskResult

from .extraction import normalise, read_option, read_yes_no, vqa_accuracy
from .registry import JUDGED, MME_PARTS, MULTIPLE_CHOICE, SHORT_ANSWER, Benchmark
from .tsv import Item

ACCURACY, CIRCULAR, POINTS, VQA = "accuracy", "circular_accuracy", "share_of_points", "vqa_accuracy"


@dataclass(frozen=True)
class Answer:
    """What a response was read as, None where no answer was found, and its worth in [0, 1]."""

    prediction: str | None
    score: float

    @property
    def correct(self) -> bool:
        """For tests that pair items: in TextVQA, whether two of the ten people gave this answer (a score of 0.6)."""
        return self.score >= 0.5


def answer(item: Item, response: str) -> Answer:
    """Reads the answer to an item out of a response and scores it; what is judged elsewhere is worth nothing here."""
    if item.kind == JUDGED:
        return Answer(None, 0.0)
    if item.kind == SHORT_ANSWER:
        return Answer(normalise(response), vqa_accuracy(response, item.answers))
    found = read_option(response, item.options) if item.kind == MULTIPLE_CHOICE else read_yes_no(response)
    return Answer(found, float(found == item.answers[0]))


def gold(item: Item) -> str:
    """The right answer as predictions are written: of several people's, the one that most of them gave."""
    answers = map(normalise, item.answers) if item.kind == SHORT_ANSWER else item.answers
    return Counter(answers).most_common(1)[0][0]


def task_result(benchmark: Benchmark, items: Sequence[Item], answers: Sequence[Answer]) -> TaskResult:
    """The number of a benchmark, with its parts.

    Args:
        items: not empty and not judged; of a circular benchmark with their rotations, of MME with both questions of a
            picture.
        answers: one for each item.
    """
    pairs = list(zip(items, answers, strict=True))
    if benchmark.mme:
        result = _points(pairs)
        found = {part: [pair for pair in pairs if pair[0].category in MME_PARTS[part]] for part in MME_PARTS}
        result.breakdown = {part: _points(members) for part, members in found.items() if members}
        return result
    plain = [pair for pair in pairs if not pair[0].rotated]
    result = _accuracy(plain)
    parts = {name: _accuracy(members) for name, members in _by_ability(plain).items()}
    if benchmark.circular:
        parts["circular"] = _circular(pairs)
    result.breakdown = parts or None
    return result


Pairs = Sequence[tuple[Item, Answer]]


def _accuracy(pairs: Pairs) -> TaskResult:
    n, scores = len(pairs), [found.score for _, found in pairs]
    item = pairs[0][0]
    parsed = item.kind != SHORT_ANSWER
    mean = sum(scores) / n
    return TaskResult(
        metric=VQA if len(item.answers) > 1 else ACCURACY,
        value=mean,
        n=n,
        stderr=share_stderr(mean, n) if parsed else _stderr(scores),
        unparsed=sum(found.prediction is None for _, found in pairs) / n if parsed else None,
    )


def _by_ability(pairs: Pairs) -> dict[str, Pairs]:
    names = sorted({item.l2_category for item, _ in pairs if item.l2_category})
    return {name: [pair for pair in pairs if pair[0].l2_category == name] for name in names}


def _circular(pairs: Pairs) -> TaskResult:
    right = {item.group: True for item, _ in pairs if not item.rotated}
    for item, found in pairs:
        if item.group in right:
            right[item.group] &= found.score == 1
    share = sum(right.values()) / len(right)
    return TaskResult(metric=CIRCULAR, value=share, n=len(right), stderr=share_stderr(share, len(right)))


def _points(pairs: Pairs) -> TaskResult:
    """Points of MME's categories in ``pairs`` over what they offer."""
    pictures: dict[str, dict[str, list[float]]] = {}
    for item, found in pairs:
        pictures.setdefault(item.category, {}).setdefault(item.group, []).append(found.score)
    # A picture's worth in [0, 1]: half for its share of right answers, half for having both right.
    worth = [[(sum(s) / len(s) + float(all(s))) / 2 for s in of.values()] for of in pictures.values()]
    errors = [_stderr(values) for values in worth]
    return TaskResult(
        metric=POINTS,
        value=sum(sum(values) / len(values) for values in worth) / len(worth),
        n=len(pairs),
        stderr=None if None in errors else math.sqrt(sum(error**2 for error in errors)) / len(errors),
        unparsed=sum(found.prediction is None for _, found in pairs) / len(pairs),
    )


def _stderr(values: Sequence[float]) -> float | None:
    n = len(values)
    if n < 2:
        return None
    mean = sum(values) / n
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)

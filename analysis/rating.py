"""The statistics of ratings: shares of wins with their intervals, sign tests, and how far raters agree.

Votes are arrays of shape ``(raters, pairs)``: +1 for the first method, 0 for a tie, -1 for the second, NaN where a
rater has not voted on a pair. Pure functions; what is random is drawn from a fixed seed.

A vote is no independent draw: it shares its rater with other votes, and its pair. Intervals therefore resample raters,
pairs, or both, and a sign test counts raters or pairs, never votes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from .statistics import LEVEL, RESAMPLES, Interval

FIRST, TIE, SECOND = 1, 0, -1
OUTCOMES = (FIRST, TIE, SECOND)
BY = {"raters and pairs": (True, True), "raters": (True, False), "pairs": (False, True)}
_SEED = 20240616


@dataclass(frozen=True)
class Shares:
    """Shares of the votes for the first method, for neither, and for the second."""

    first: float
    tie: float
    second: float

    @property
    def difference(self) -> float:
        return self.first - self.second


def shares(votes: np.ndarray) -> Shares | None:
    """The shares of all votes; None without any."""
    n = int(np.isfinite(votes).sum())
    if not n:
        return None
    return Shares(*(float((votes == outcome).sum() / n) for outcome in OUTCOMES))


def mean_shares(groups: Sequence[np.ndarray]) -> Shares | None:
    """The plain mean of the groups' shares; None if one of them has no vote."""
    found = [shares(votes) for votes in groups]
    if not found or any(group is None for group in found):
        return None
    means = [float(np.mean([getattr(group, name) for group in found])) for name in ("first", "tie", "second")]
    return Shares(*means)


@dataclass(frozen=True)
class Intervals:
    """95% percentile intervals of what :class:`Shares` has; None where there is nothing to resample."""

    first: Interval | None
    tie: Interval | None
    second: Interval | None
    difference: Interval | None


def bootstrap(groups: Sequence[np.ndarray], by: str) -> tuple[Intervals, list[Intervals]]:
    """Intervals of the mean over the groups, and of each group.

    Resamples draw raters, the same for all groups, and pairs within each group, as ``by`` says (a key of ``BY``). One
    rater, or one pair in a group, cannot be resampled: a resampling that asks for it gives no interval.

    Args:
        groups: votes on the pairs of each subject, with the same raters in the same order.
    """
    of_raters, of_pairs = BY[by]
    generator = np.random.default_rng(_SEED)
    (raters,) = {len(votes) for votes in groups}
    chosen = _weights(generator, raters, of_raters)
    drawn = []
    for votes in groups:
        weights = _weights(generator, votes.shape[1], of_pairs)
        counts = [((chosen @ (votes == outcome)) * weights).sum(axis=1) for outcome in OUTCOMES]
        with np.errstate(invalid="ignore"):  # a resample without any vote has no share
            drawn.append(np.stack(counts) / np.sum(counts, axis=0))
    alone = [(of_raters and raters < 2) or (of_pairs and votes.shape[1] < 2) for votes in groups]
    each = [_none() if one else _intervals(of_group) for one, of_group in zip(alone, drawn, strict=True)]
    return _none() if any(alone) else _intervals(np.mean(drawn, axis=0)), each


def _weights(generator: np.random.Generator, n: int, resampled: bool) -> np.ndarray:
    """How often each of n is drawn, shape (RESAMPLES, n); once each if they are not resampled."""
    return generator.multinomial(n, np.full(n, 1 / n), size=RESAMPLES) if resampled and n else np.ones((RESAMPLES, n))


def _intervals(drawn: np.ndarray) -> Intervals:
    first, tie, second = drawn
    return Intervals(*(_percentiles(values) for values in (first, tie, second, first - second)))


def _none() -> Intervals:
    return Intervals(None, None, None, None)


def _percentiles(values: np.ndarray) -> Interval | None:
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class SignTest:
    """Raters or pairs on either side, those that are even, and the exact two-sided p; None where all are even."""

    first: int
    second: int
    even: int
    p: float | None


def sign_test(votes: np.ndarray, by: str) -> SignTest:
    """Exact sign test of which method has more votes, by ``raters`` or by ``pairs``."""
    axis = {"raters": 1, "pairs": 0}[by]
    voted = np.isfinite(votes).any(axis=axis)
    signs = np.sign(np.nansum(votes, axis=axis))[voted]
    first, second = int((signs > 0).sum()), int((signs < 0).sum())
    p = float(stats.binomtest(first, first + second).pvalue) if first + second else None
    return SignTest(first, second, len(signs) - first - second, p)


@dataclass(frozen=True)
class Agreement:
    """How far raters agree on the pairs that two or more of them have voted on.

    Attributes:
        alpha: Krippendorff's alpha for nominal data: 1 is perfect, 0 is chance; None where all votes are alike.
        observed: share of two raters' votes on the same pair that are alike.
        pairs: number of such pairs.
    """

    alpha: float | None
    observed: float
    pairs: int


def agreement(votes: np.ndarray) -> Agreement | None:
    """Agreement between raters, who need not all have voted on all pairs; None if no pair has two votes."""
    counts = np.stack([(votes == outcome).sum(axis=0) for outcome in OUTCOMES], axis=1)  # (pairs, outcomes)
    counts = counts[counts.sum(axis=1) >= 2]
    if not len(counts):
        return None
    of_pair, of_outcome = counts.sum(axis=1), counts.sum(axis=0)
    n = counts.sum()
    alike = (counts * (counts - 1)).sum(axis=1)
    # Krippendorff weighs a pair by its votes: each of m votes is compared with the m - 1 others.
    observed = float((alike / (of_pair - 1)).sum() / n)
    expected = float((of_outcome * (of_outcome - 1)).sum() / (n * (n - 1)))
    alpha = None if expected == 1 else 1 - (1 - observed) / (1 - expected)
    return Agreement(alpha, observed, len(counts))

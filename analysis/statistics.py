"""The statistics of the comparisons: intervals, paired tests by seed and by item, and what could have been detected.

Pure functions on arrays; what is random is drawn from a fixed seed, so that the same numbers give the same results.
Differences are ``first - second`` in the unit of what they are computed from; an array of items has the shape
``(seeds, items)``. Two kinds of chance are told apart:

    by seed     another training of the same methods: the only tests that speak of the methods
    by item     other questions of the same kind, for the models that were trained

One pair of seeds has no spread: it gets no interval and no test (None).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.power import TTestPower

from moslora_core.errors import UserError

LEVEL = 0.95  # of every interval
ALPHA = 0.05
POWER = 0.8
RESAMPLES = 1000  # of a bootstrap
FLIPS = 4999  # of the permutation test by seed, where they are not enumerated
EXCHANGES = 1999  # of items
BELOW_CHANCE = 0.1  # a run with a task further below chance has collapsed
MOST_LABELS = 9  # with more kinds of answer nothing lies that far below chance
_SEED = 20240616
# Differences of shares that are equal on paper may differ in their last bits; no two accuracies are so close.
_DECIMALS = 12
_FEW = 8  # items of a kind, up to which drawing them one by one is the faster way

Interval = tuple[float, float]


def finite(values: ArrayLike, names: Sequence[str] | None = None) -> np.ndarray:
    """``values`` as an array of floats.

    Args:
        values: any shape; the first axis has an entry for each of ``names``.
        names: the runs that the entries come from.

    Raises:
        UserError: a NaN or an infinity, by the name of its run.
    """
    array = np.asarray(values, dtype=float)
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        at = int(bad[0][0]) if array.ndim else 0
        name = f"value {at}" if names is None else names[at]
        raise UserError(f"{name}: found {array[tuple(bad[0])]}; expected a finite number")
    return array


# ------------------------------------------------------------------------------------------------------------ by seed


@dataclass(frozen=True)
class Estimate:
    """Mean over the seeds; the sample standard deviation and the interval need two of them."""

    mean: float
    n: int
    sd: float | None
    interval: Interval | None


def estimate(values: ArrayLike, names: Sequence[str] | None = None) -> Estimate:
    """Mean, sample standard deviation (n - 1) and 95% t interval of one number over the seeds.

    The interval of paired differences excludes zero exactly when the paired t test has p < 0.05. Seeds that agree to
    the last digit have an interval of no width.

    Args:
        values: shape (n,), n > 0.
        names: the runs, for the message.

    Raises:
        UserError: a value that is not finite, or none at all.
    """
    values = finite(values, names)
    if values.ndim != 1 or not len(values):
        raise UserError(f"found values of shape {values.shape}; expected one for each of one or more seeds")
    n, mean = len(values), float(values.mean())
    if n == 1:
        return Estimate(mean, 1, None, None)
    sd = 0.0 if np.ptp(values) < 10**-_DECIMALS else float(values.std(ddof=1))
    half = _quantile(n) * sd / math.sqrt(n)
    return Estimate(mean, n, sd, (mean - half, mean + half))


@functools.cache
def _quantile(n: int) -> float:
    return float(stats.t.ppf((1 + LEVEL) / 2, n - 1))


def sign_flip(differences: ArrayLike) -> float | None:
    """Two-sided p of the paired permutation test: how many flips of the signs have as large a mean.

    All 2**n flips are taken up to twelve pairs, a seeded draw of ``FLIPS`` beyond. The smallest p that n pairs can
    have is :func:`smallest_p`; five pairs never reach 0.05.

    Args:
        differences: shape (n,), one for each seed that both methods have.
    """
    return sign_flips(np.reshape(differences, (-1, 1)))[0]


def sign_flips(columns: ArrayLike) -> list[float | None]:
    """:func:`sign_flip` of every column of an array of shape (n, columns), each as if it stood alone."""
    columns = finite(columns)
    n, many = columns.shape
    if n < 2:
        return [None] * many
    # All flips are the same flips for every column; a draw is each column's own.
    together = [columns] if 2**n <= FLIPS else np.hsplit(columns, many)
    ps = [_permuted(part, lambda values, axis: np.round(values.mean(axis=axis), _DECIMALS)) for part in together]
    return [float(p) for p in np.concatenate(ps)]


def _permuted(columns: np.ndarray, statistic: Callable[..., np.ndarray]) -> np.ndarray:
    """Two-sided p of ``statistic`` under flips of the signs, for every column of (n, columns)."""
    result = stats.permutation_test(
        (columns,),
        statistic,
        permutation_type="samples",
        vectorized=True,
        n_resamples=FLIPS,
        axis=0,
        rng=np.random.default_rng(_SEED),
    )
    return np.atleast_1d(result.pvalue)


def smallest_p(n: int) -> float | None:
    """The p of :func:`sign_flip` if all of ``n`` differences have the same sign; None for one pair."""
    return None if n < 2 else 2.0 ** (1 - n)


def wilcoxon(differences: ArrayLike) -> float | None:
    """Two-sided p of Wilcoxon's signed ranks; zeros take part in the ranking (Pratt). None for one pair."""
    differences = np.round(finite(differences), _DECIMALS)
    if len(differences) < 2:
        return None
    if not differences.any():
        return 1.0
    sizes = np.abs(differences)
    tied = 0 in sizes or len(np.unique(sizes)) < len(sizes)
    if tied and 2 ** len(differences) <= FLIPS:
        # As scipy does, which ranks the same sizes again for every flip: a tenth of a second.
        signed = np.sign(differences) * stats.rankdata(sizes)
        return float(_permuted(signed[:, None], lambda ranks, axis: np.maximum(ranks, 0).sum(axis=axis))[0])
    return float(stats.wilcoxon(differences, zero_method="pratt").pvalue)


def detectable(sd: float | None, n: int) -> float | None:
    """Smallest true difference that a paired t test at 0.05 finds with 80% probability, in the unit of ``sd``.

    Args:
        sd: standard deviation of the paired differences, itself estimated from the n pairs.
        n: number of pairs.
    """
    if sd is None or n < 2:
        return None
    return sd * _effect(n)


@functools.cache
def _effect(n: int) -> float:
    found = TTestPower().solve_power(nobs=n, alpha=ALPHA, power=POWER, alternative="two-sided")
    return float(np.squeeze(found))


# ------------------------------------------------------------------------------------------------------------ by item


@dataclass(frozen=True)
class Discordant:
    """Items that one model alone got right, and exact McNemar's two-sided p."""

    only_first: int
    only_second: int
    p: float


def mcnemar_exact(first: ArrayLike, second: ArrayLike) -> Discordant:
    """Exact McNemar test of two models on the same items.

    Args:
        first: shape (items,), whether the first model was right.
        second: the same items, in the same order.
    """
    first, second = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if first.shape != second.shape:
        raise ValueError(f"items of shapes {first.shape} and {second.shape} are no pairs")
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    return Discordant(only_first, only_second, _mcnemar(only_first, only_second))


@functools.cache
def _mcnemar(only_first: int, only_second: int) -> float:
    # The exact test is about the discordant items alone: those that both or neither got right do not enter it.
    return float(mcnemar([[0, only_first], [only_second, 0]], exact=True).pvalue)


def flip_items(tasks: Sequence[ArrayLike]) -> tuple[float, list[float]]:
    """Two-sided p of exchanging the two methods item by item: for the mean over the tasks, and for each task.

    McNemar's test for more than one seed: an item is exchanged in all seeds at once, since how hard it is stays the
    same from seed to seed, and items would be counted several times otherwise. A seeded draw of ``EXCHANGES``.

    Args:
        tasks: for each task, differences of correctness in {-1, 0, 1}, shape (seeds, items).
    """
    rng = np.random.default_rng(_SEED)
    observed, drawn = [], []
    for differences in tasks:
        differences = np.atleast_2d(np.asarray(differences))
        sums = differences.sum(axis=0)
        sizes, counts = np.unique(np.abs(sums[sums != 0]), return_counts=True)
        flips = 2 * rng.binomial(counts, 0.5, size=(EXCHANGES, len(counts))) - counts
        observed.append(sums.sum() / differences.size)
        drawn.append(flips @ sizes / differences.size)
    return (
        _tail(np.mean(drawn, axis=0), float(np.mean(observed))),
        [_tail(of_task, float(value)) for of_task, value in zip(drawn, observed, strict=True)],
    )


def _tail(drawn: np.ndarray, observed: float) -> float:
    as_large = np.abs(drawn) >= abs(observed) - 10**-_DECIMALS
    return float((1 + as_large.sum()) / (1 + len(drawn)))


def bootstrap(tasks: Sequence[ArrayLike]) -> tuple[Interval, list[Interval]]:
    """95% percentile intervals of the difference: of the mean over the tasks, and of each task.

    Stratified: a resample draws the seeds, the same for all tasks, and the items within each task, the same for all
    seeds. With one seed it speaks of the items alone. A handful of seeds makes percentile intervals too narrow, so
    none of them decides anything without the t interval (:func:`estimate`).

    Args:
        tasks: for each task the differences, shape (seeds, items), with the same seeds in the same order; a task
            without items to resample has one column, its difference over all of them.
    """
    tasks = [np.atleast_2d(finite(differences)) for differences in tasks]
    seeds = {len(differences) for differences in tasks}
    if len(seeds) != 1:
        raise ValueError(f"tasks of {sorted(seeds)} seeds; expected the same number in each")
    (n,) = seeds
    rng = np.random.default_rng(_SEED)
    chosen = rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES) / n
    drawn = np.stack([_resampled(differences, chosen, rng) for differences in tasks])
    return _percentiles(drawn.mean(axis=0)), [_percentiles(of_task) for of_task in drawn]


def _resampled(differences: np.ndarray, chosen: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    kinds, counts = np.unique(differences, axis=1, return_counts=True)
    items = differences.shape[1]
    if items <= _FEW * len(kinds.T):
        picks = rng.integers(0, items, size=(len(chosen), items))
        return np.take_along_axis(chosen @ differences, picks, axis=1).mean(axis=1)
    # Items with the same differences are the same to a resample: to draw how often each kind occurs is enough.
    weights = rng.multinomial(items, counts / items, size=len(chosen)) / items
    return ((chosen @ kinds) * weights).sum(axis=1)


def _percentiles(values: np.ndarray) -> Interval:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


# ----------------------------------------------------------------------------------------------- many tests, collapses


def holm(ps: Mapping[str, float | None]) -> dict[str, float | None]:
    """p values adjusted by Holm over those that are there; None stays None and does not count."""
    # Not statsmodels' multipletests: it collects the garbage of the whole process at every call, a tenth of a second.
    ascending = sorted((p, name) for name, p in ps.items() if p is not None)
    factors = range(len(ascending), 0, -1)
    adjusted = itertools.accumulate((min(1.0, k * p) for k, (p, _) in zip(factors, ascending, strict=True)), max)
    found = dict(zip([name for _, name in ascending], adjusted, strict=True))
    return {name: found.get(name) for name in ps}


def chance(golds: Sequence[str]) -> float | None:
    """Accuracy of answers drawn from the right answers' own distribution; None where there are too many kinds.

    With k labels that are equally frequent it is 1/k. Beyond nine kinds (open answers) no chance is known.
    """
    counts = Counter(golds)
    if not counts or len(counts) > MOST_LABELS:
        return None
    return sum((count / len(golds)) ** 2 for count in counts.values())


def collapse(
    values: Mapping[str, float], chances: Mapping[str, float | None], untrained: Mapping[str, float]
) -> str | None:
    """Why a run counts as collapsed, None if it does not.

    It has if the mean over its tasks lies below the untrained model's over the same tasks, or if a task lies more
    than 10 points below chance. Every argument maps tasks to shares; a task without chance or untrained value is not
    judged by it.
    """
    shared = [task for task in values if task in untrained]
    if shared:
        mean, least = (sum(of[task] for task in shared) / len(shared) for of in (values, untrained))
        if mean < least - 10**-_DECIMALS:
            return f"mean {100 * mean:.1f} below the untrained model's {100 * least:.1f}"
    for task, value in values.items():
        expected = chances.get(task)
        if expected is not None and value < expected - BELOW_CHANCE - 10**-_DECIMALS:
            return f"{task} {100 * value:.1f}, chance {100 * expected:.1f}"
    return None

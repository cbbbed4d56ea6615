"""Knock-out curves: how well a trained adapter answers without a growing share of its subspaces.

The share goes from none to all, the weakest first, the strongest first, or in a random order for comparison; and all
mixed or all diagonal terms at once. The subspaces are those of :mod:`moslora_core.knock_out`, ranked in every module
by itself. All points are evaluated by one process on one model, whose adapter loses its terms in place.

The numbers go to a file of their own in the run record, never to its results: no table can take them for the run's.
"""

from __future__ import annotations

import functools
import logging
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .errors import UserError
from .evaluations import Scoring, check_positive, fingerprint, in_chunks, is_base, trained_adapter
from .knock_out import ORDERS, Terms, check_order, removed_pairs, removed_ranks, terms_of, without_terms
from .mixer import seeded_generator
from .record import KnockOut, KnockOutPoint, RunRecord, TaskResult
from .running import check_on_finished
from .subspaces import adapter_factors

logger = logging.getLogger(__name__)

STAGE = "knock_out"
UNITS = {"pairs": removed_pairs, "ranks": removed_ranks}
PARTS = ("diagonal", "mixed")


@dataclass
class KnockOutConfig:
    """Which subspaces of a trained adapter are left out.

    Attributes:
        unit: pairs (the terms m_ij B_i A_j) | ranks (i, each with its row and its column of the mixer).
        orders: which go first, some of weakest, strongest, random.
        steps: equal steps from the whole adapter to none of it.
        draws: number of random orders.
    """

    unit: str = "pairs"
    orders: list[str] = field(default_factory=lambda: list(ORDERS))
    steps: int = 8
    draws: int = 1


# ------------------------------------------------------------------------------------------------------------- points


@dataclass(frozen=True)
class Point:
    """Which subspaces are gone (see :class:`~moslora_core.record.KnockOutPoint`)."""

    order: str
    share: float
    draw: int = 0

    def number(self, terms: Terms, unit: str) -> int:
        """How many subspaces of a module are gone."""
        if self.order in PARTS:
            return terms.r if self.order == "diagonal" else terms.number - terms.r
        return math.floor(self.share * available(terms, unit) + 0.5)

    def removed(self, terms: Terms, unit: str, module: str) -> torch.Tensor:
        """The terms of a module that are gone, (r, r) of booleans."""
        if self.order in PARTS:
            diagonal = torch.eye(terms.r, dtype=torch.bool)
            return terms.there & (diagonal if self.order == "diagonal" else ~diagonal)
        order = self.order if self.order in ORDERS else "weakest"  # of none and of all, any order is the same
        return UNITS[unit](terms, self.number(terms, unit), order, seeded_generator(self.draw, module))


def available(terms: Terms, unit: str) -> int:
    """How many subspaces a module has."""
    return terms.number if unit == "pairs" else terms.r


def points_of(config: KnockOutConfig, mixed: bool) -> list[Point]:
    """The points of a curve, each once: none and all of the subspaces are the same in every order.

    Args:
        mixed: whether the adapter has mixers, and so a diagonal and a mixed part.

    Raises:
        UserError: a value that is out of range or unknown.
    """
    key = "evaluation.knock_out"
    if config.unit not in UNITS:
        raise UserError(f"{key}.unit must be one of {', '.join(UNITS)}, found {config.unit!r}")
    if not config.orders:
        raise UserError(f"{key}.orders names no order; expected some of {', '.join(ORDERS)}")
    for order in config.orders:
        check_order(order, f"{key}.orders")
    check_positive({f"{key}.steps": config.steps, f"{key}.draws": config.draws})
    shares = [step / config.steps for step in range(1, config.steps)]
    draws = {order: config.draws if order == "random" else 1 for order in ORDERS if order in config.orders}
    found = [Point(order, share, draw) for order, n in draws.items() for draw in range(n) for share in shares]
    parts = [Point(part, 0.0) for part in PARTS] if mixed and config.unit == "pairs" else []
    return [Point("none", 0.0), *found, Point("all", 1.0), *parts]


# -------------------------------------------------------------------------------------------------------------- curve


def knock_out_name(evaluation: str, config: KnockOutConfig, limit: int | None) -> str:
    """Name of a curve in the run record: what its points have in common."""
    return "+".join([evaluation, config.unit, *([] if limit is None else [f"limit={limit}"])])


def measure(
    scoring: Scoring,
    modules: Mapping[str, Terms],
    unit: str,
    points: Sequence[Point],
    partial: Path,
    expected: str,
    chunk: int,
) -> Iterator[tuple[KnockOutPoint, float]]:
    """Evaluates point by point; what an earlier start finished is not done again.

    Args:
        modules: the terms of every module of the adapter.
        partial, expected, chunk: see :func:`~moslora_core.evaluations.in_chunks`.

    Yields:
        A point, and the seconds that it took.
    """
    total = sum(available(terms, unit) for terms in modules.values())

    @functools.lru_cache(maxsize=1)  # chunks of one point follow one another
    def removed(point: Point) -> dict[str, torch.Tensor]:
        return {module: point.removed(terms, unit, module) for module, terms in modules.items()}

    def answer(model: Any, key: str, indices: list[int]) -> list:
        point, task = places[key]
        with without_terms(model.model, removed(point)):
            return scoring.answer(model, task, indices)

    places = {f"{p.order}/{p.draw}/{p.share:.6g}/{task}": (p, task) for p in points for task in scoring.sizes}
    sizes = {key: scoring.sizes[task] for key, (_, task) in places.items()}
    results: dict[str, TaskResult] = {}
    seconds = 0.0
    for key, predictions, spent in in_chunks(partial, expected, sizes, chunk, scoring.load, answer):
        point, task = places[key]
        results[task] = scoring.result(task, predictions)
        seconds += spent
        if len(results) < len(scoring.sizes):
            continue
        number = sum(point.number(terms, unit) for terms in modules.values())
        share = number / total if point.order in PARTS else point.share
        values = {task: result.value for task, result in results.items()}
        yield KnockOutPoint(point.order, point.draw, share, number, values, _unparsed(results)), seconds
        results, seconds = {}, 0.0


def _unparsed(results: Mapping[str, TaskResult]) -> float | None:
    parsed = [result for result in results.values() if result.unparsed is not None]
    return (
        sum(result.unparsed * result.n for result in parsed) / sum(result.n for result in parsed) if parsed else None
    )


# ------------------------------------------------------------------------------------------------------------ command


def knock_out_command(
    config: Any, experiment: str, record: RunRecord, evaluation: str, scoring: Callable[[Path], Scoring]
) -> None:
    """The whole of a ``knock_out`` command: from the state of the record to the file of the curve.

    Args:
        config: the experiment's configuration, with ``evaluation.knock_out``.
        evaluation: name of the evaluation that is repeated.
        scoring: gives it for the folder of the adapter.

    Raises:
        UserError: no adapter, or none of LoRA's kind; bad settings; a finished curve.
    """
    settings = config.evaluation.knock_out
    points_of(settings, mixed=True)
    check_on_finished(config.on_finished)
    if is_base(config):
        raise UserError(f"method={config.method.name} is the untrained model: there is no adapter to take apart")
    name = knock_out_name(evaluation, settings, config.evaluation.limit)
    path = record.knock_out_path(name)
    if config.dry_run:
        logger.info("would evaluate %d points into %s", len(points_of(settings, mixed=True)), path)
        return
    if path.exists() and config.on_finished != "overwrite":
        if config.on_finished == "refuse":
            raise UserError(f"{path} is there already; on_finished=skip keeps it, on_finished=overwrite replaces it")
        logger.info("already knocked out: %s", path)
        return
    adapter = trained_adapter(record, config, experiment)
    modules = {module: terms_of(factors) for module, factors in adapter_factors(adapter).items()}
    points = points_of(settings, mixed=any(terms.mixed for terms in modules.values()))
    found = scoring(adapter)
    expected = fingerprint(adapter, found.settings | {"unit": settings.unit}, found.digests)
    done, seconds = [], 0.0
    with record.stage(STAGE):
        partial = record.partial_predictions_path(name)
        for point, spent in measure(found, modules, settings.unit, points, partial, expected, config.evaluation.chunk):
            gone = f"{100 * point.share:.3g}% gone ({point.order})"
            logger.info("%s: mean %.1f%%", gone, 100 * statistics.fmean(point.tasks.values()))
            done.append(point)
            seconds += spent
        subspaces = sum(available(terms, settings.unit) for terms in modules.values())
        record.write_knock_out(
            name,
            KnockOut(
                *(evaluation, settings.unit, subspaces, found.sizes, done),
                *(round(seconds, 3), found.settings, expected),
            ),
        )
    logger.info("knocked out: %s", path)

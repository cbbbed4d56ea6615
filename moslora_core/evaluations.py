"""Evaluations of a run that can be stopped and resumed: what is kept of an earlier start, and what must not be.

A running evaluation keeps its finished items in the record's partial file, a line a chunk, under a first line with the
fingerprint of all that the answers depend on. Every line has its own sha256.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import nn

from .base_models import adapter_digest, check_adapter
from .errors import UserError
from .record import Prediction, RunRecord, TaskResult, append_jsonl, repair_jsonl, write_atomic
from .running import check_on_finished
from .typed import Count, Seconds, build

logger = logging.getLogger(__name__)

STAGE = "evaluate"

Model = TypeVar("Model")
Item = TypeVar("Item")


@dataclass(frozen=True)
class Scoring(Generic[Model]):
    """One evaluation of an experiment: how its tasks are answered and scored, whatever adapter is on the model.

    Attributes:
        name: name of the evaluation in the run record.
        settings: what the numbers depend on, beside the adapter and the items.
        digests: task -> digest of its items.
        sizes: task -> number of its items.
        load: gives what answers; it has the model with its adapter, in evaluation mode, as ``model``.
        answer: predictions for the items of a task with these indices, in their order.
        result: the number of a task from the predictions for all of its items.
    """

    name: str
    settings: dict[str, Any]
    digests: dict[str, str]
    sizes: dict[str, int]
    load: Callable[[], Model]
    answer: Callable[[Model, str, list[int]], list[Prediction]]
    result: Callable[[str, Sequence[Prediction]], TaskResult]


def is_done(record: RunRecord, name: str, on_finished: str) -> bool:
    """Whether the record has the evaluation ``name`` already and is to keep it.

    Raises:
        UserError: it has, and ``on_finished`` is ``refuse``.
    """
    check_on_finished(on_finished)
    if on_finished == "overwrite" or name not in record.results().evaluations:
        return False
    record.settle(STAGE, leftovers=[record.partial_predictions_path(name)])
    if on_finished == "refuse":
        raise UserError(
            f"{record.path} has the evaluation {name} already; on_finished=skip keeps it, on_finished=overwrite "
            "replaces it"
        )
    logger.info("already evaluated (%s): %s", name, record.path)
    return True


def is_base(config: Any) -> bool:
    """Whether the model of an experiment's configuration is evaluated as it is, without an adapter."""
    return config.method.tuner == "none"


def check_positive(values: Mapping[str, int | None]) -> None:
    """Checks counts by the key that they are set with; None is no count.

    Raises:
        UserError: one is below 1.
    """
    for key, value in values.items():
        if value is not None and value < 1:
            raise UserError(f"{key} must be positive, found {value}")


def choose_tasks(
    known: Sequence[str], asked: Sequence[str] | None, key: str, source: str, kind: str = "task"
) -> list[str]:
    """The tasks to evaluate, in the order of ``known``: those that are asked for, or all.

    Args:
        key: setting that asks.
        source: setting that ``known`` comes from.
        kind: what a task is called.

    Raises:
        UserError: an unknown task, or none at all.
    """
    asked = known if asked is None else asked
    expected = f"{source} has {', '.join(known) or 'none'}"
    for name in asked:
        if name not in known:
            raise UserError(f"{key}: unknown {kind} {name!r}; {expected}")
    if not asked:
        raise UserError(f"{key} names no {kind}; {expected}")
    return [name for name in known if name in asked]


def assert_evaluating(model: nn.Module) -> None:
    """Refuses to score with dropout on, as the published evaluation did: it never leaves the training mode.

    Raises:
        RuntimeError: a module is in training mode.
    """
    training = [name or type(module).__name__ for name, module in model.named_modules() if module.training]
    if training:
        raise RuntimeError(
            f"{len(training)} modules are in training mode, {training[0]} among them: their dropout would blur the "
            "scores; call model.eval() first"
        )


def trained_adapter(record: RunRecord, config: Any, experiment: str) -> Path | None:
    """Folder of the run's adapter, None for the untrained base.

    Args:
        config: the experiment's configuration, with ``method``, ``scale``, ``seed`` and ``run_name``.

    Raises:
        UserError: the run has not been trained, which says the command, or the adapter is not the one it gave.
    """
    if is_base(config):
        return None
    if not record.adapter_path.is_dir():
        command = f"python -m {experiment}.train scale={config.scale.name} method={config.method.name}"
        same = "" if config.run_name in (None, "default") else f" and the same overrides ({config.run_name})"
        raise UserError(f"no adapter at {record.adapter_path}; train it: {command} seed={config.seed}{same}")
    if (training := record.results().training) is not None:
        check_adapter(record.adapter_path, training.adapter_sha256)
    return record.adapter_path


def digest(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def fingerprint(adapter: Path | None, used: dict[str, Any], item_digests: dict[str, str]) -> str:
    """Digest of all that earlier predictions must agree with to be kept.

    The batch size is left out: no answer depends on it, and a smaller one is how an evaluation that ran out of memory
    goes on.

    Args:
        used: settings that the answers depend on.
        item_digests: task -> digest of its items.
    """
    kept = {key: value for key, value in used.items() if key != "batch_size"}
    return digest([adapter and adapter_digest(adapter), kept, item_digests])


@dataclass(frozen=True)
class Chunk:
    """Finished items of a task, by their indices; ``predictions`` have the fields of what is evaluated."""

    task: str
    items: list[Count]
    seconds: Seconds
    predictions: list[dict[str, Any]]


def resume(path: Path, expected: str) -> list[Chunk]:
    """Finished chunks of a stopped evaluation: one line each, so that a chunk is there whole or not at all.

    A file of another adapter, other settings or other items is replaced by an empty one; a damaged chunk is left out.

    Raises:
        UserError: a line of this evaluation is no JSON, or no chunk.
    """

    def is_whole(row: dict[str, Any]) -> bool:
        whole = row == _sealed(_unsealed(row))
        if not whole:
            logger.warning("%s: a damaged line is left out, and what it held evaluated again", path)
        return whole

    rows = repair_jsonl(path, keep=is_whole) if path.exists() else []
    if rows and rows[0].get("fingerprint") == expected:
        return [build(Chunk, _unsealed(row), f"{path} line {number}") for number, row in enumerate(rows[1:], start=2)]
    if rows:
        logger.warning("the stopped evaluation in %s had another adapter, settings or items: starting afresh", path)
    write_atomic(path, json.dumps(_sealed({"fingerprint": expected})) + "\n")
    return []


def _sealed(row: dict[str, Any]) -> dict[str, Any]:
    """A line of the file with its own digest: a flipped bit may leave valid JSON."""
    return row | {"sha256": digest(row)}


def _unsealed(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "sha256"}


def in_chunks(
    partial: Path,
    expected: str,
    sizes: Mapping[str, int],
    chunk: int,
    load: Callable[[], Model],
    answer: Callable[[Model, str, list[int]], Sequence[Item]],
    kind: type[Item] = Prediction,
) -> Iterator[tuple[str, list[Item], float]]:
    """Evaluates task by task and chunk by chunk; what an earlier start finished is not done again.

    Args:
        partial: the record's partial file, where every finished chunk is appended.
        expected: fingerprint of this evaluation.
        sizes: task -> number of its items.
        chunk: items between two saves.
        load: gives the model; called once, and not at all where nothing is left to do.
        answer: predictions of a model for the items of a task with these indices, in their order.
        kind: dataclass of what ``answer`` gives for an item, where that is no prediction.

    Yields:
        A task, the predictions of all of its items, and the seconds that they took, loading apart.
    """
    chunks = resume(partial, expected)
    model = functools.cache(load)
    for task, size in sizes.items():
        done = _finished_items(chunks, task, kind, partial)
        seconds = sum(chunk.seconds for chunk in chunks if chunk.task == task)
        pending = [index for index in range(size) if index not in done]
        if done:
            logger.info("%s: %d of %d items were done before", task, len(done), size)
        for start in range(0, len(pending), chunk):
            indices = pending[start : start + chunk]
            loaded = model()
            begun = time.monotonic()
            found = answer(loaded, task, indices)
            spent = round(time.monotonic() - begun, 3)
            predictions = [asdict(prediction) for prediction in found]
            chunk_done = {"task": task, "items": indices, "seconds": spent, "predictions": predictions}
            append_jsonl(partial, [_sealed(chunk_done)])
            seconds += spent
            done |= dict(zip(indices, found, strict=True))
            if len(done) < size:
                logger.info("%s: %d of %d items, %.1f s", task, len(done), size, spent)
        yield task, [done[index] for index in range(size)], seconds


def _finished_items(chunks: Sequence[Chunk], task: str, kind: type[Item], path: Path) -> dict[int, Item]:
    """Predictions in ``chunks`` of one task, by index of the item."""
    found = {}
    for chunk in (chunk for chunk in chunks if chunk.task == task):
        if len(chunk.items) != len(chunk.predictions):
            raise UserError(f"{path}: {len(chunk.items)} items of {task} have {len(chunk.predictions)} predictions")
        found |= dict(zip(chunk.items, build(list[kind], chunk.predictions, f"{path}: {task}"), strict=True))
    return found


def share_stderr(share: float, n: int) -> float | None:
    """Standard error of a share over ``n`` items (of a mean, with n - 1); None for a single item."""
    return math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else None

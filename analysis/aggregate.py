"""Runs to the rows of a table: the seeds of one method with one set of overrides, summarised."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from moslora_core.record import TaskResult

from .load import REFERENCES, Run

METHOD_ORDER = (
    *REFERENCES,
    "lora",
    "lora_scaled",
    "two_subspaces",
    "moslora",
    "moslora_frozen",
    "moslora_folded",
    "dora",
    "rslora",
    "pissa",
    "adalora",
    "lokr",
    "loha",
    "lora_plus",
)


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation of one number over the seeds; one seed has no deviation."""

    mean: float
    sd: float | None
    n: int


def summarize(values: Iterable[float]) -> Summary | None:
    """Summary of ``values``, None where there are none."""
    values = list(values)
    if not values:
        return None
    return Summary(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


@dataclass(frozen=True)
class Row:
    """One method with one set of overrides, over its seeds.

    Attributes:
        parameters: trainable parameters -> number of seeds that had so many; one entry if all is well.
        tasks: task -> accuracy, over the seeds that have the task.
        average: plain mean over the tasks of each seed, over the seeds.
        averaged: the tasks that every averaged seed has; fewer than all of them must be marked.
        memory: kind -> peak bytes; the kinds are different quantities.
    """

    method: str
    label: str
    seeds: tuple[int, ...]
    parameters: dict[int, int]
    seconds: Summary | None
    memory: dict[str, Summary]
    tasks: dict[str, Summary | None]
    average: Summary | None
    averaged: tuple[str, ...]
    unparsed: Summary | None

    @property
    def name(self) -> str:
        notes = ["no adapter"] if self.method in ("none", "base") else []
        notes += [self.label] if self.label != "default" else []
        return self.method + (f" ({'; '.join(notes)})" if notes else "")


def rows_of(runs: Iterable[Run], protocol: str, tasks: Sequence[str]) -> list[Row]:
    """Runs that differ only in their seed make a row; rows in the order of the methods, then of their overrides."""
    groups = defaultdict(list)
    for run in runs:
        groups[run.method, run.label].append(run)
    return [
        _row(method, label, sorted(group, key=lambda run: run.seed), protocol, tasks)
        for (method, label), group in sorted(groups.items(), key=lambda item: _order(*item[0]))
    ]


def _order(method: str, label: str) -> tuple:
    known = METHOD_ORDER.index(method) if method in METHOD_ORDER else len(METHOD_ORDER)
    return known, method, label != "default", label


def _row(method: str, label: str, runs: Sequence[Run], protocol: str, tasks: Sequence[str]) -> Row:
    results = [run.evaluations[protocol].tasks for run in runs]
    trainings = [run.training for run in runs if run.training is not None]
    memory = defaultdict(list)
    for training in trainings:
        memory[training.peak_memory_kind].append(training.peak_memory_bytes)
    averaged, average = _average(results, tasks)
    return Row(
        method=method,
        label=label,
        seeds=tuple(run.seed for run in runs),
        parameters=dict(sorted(Counter(training.trainable_parameters for training in trainings).items())),
        seconds=summarize(training.seconds for training in trainings),
        memory={kind: summarize(peaks) for kind, peaks in sorted(memory.items())},
        tasks={task: summarize(result[task].value for result in results if task in result) for task in tasks},
        average=average,
        averaged=averaged,
        unparsed=summarize(share for result in results if (share := _unparsed(result, tasks)) is not None),
    )


def _average(
    results: Sequence[Mapping[str, TaskResult]], tasks: Sequence[str]
) -> tuple[tuple[str, ...], Summary | None]:
    """The tasks averaged over and the average: over the complete seeds where there are any, as the paper's column.

    Without a complete seed it is taken over the tasks that all seeds have, the same for each of them: averages over
    different tasks are different quantities.
    """
    complete = [result for result in results if all(task in result for task in tasks)]
    averaged = tuple(task for task in tasks if all(task in result for result in complete or results))
    if not averaged:
        return (), None
    means = [sum(result[task].value for task in averaged) / len(averaged) for result in complete or results]
    return averaged, summarize(means)


def _unparsed(result: Mapping[str, TaskResult], tasks: Sequence[str]) -> float | None:
    """Share of all responses of a run in which no answer was found; None where the protocol parses none."""
    parsed = [result[task] for task in tasks if task in result and result[task].unparsed is not None]
    return sum(entry.unparsed * entry.n for entry in parsed) / sum(entry.n for entry in parsed) if parsed else None

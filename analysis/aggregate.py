"""Runs to the rows of a table: the seeds of one method with one set of overrides, summarised."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
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
class Setting:
    """What a table that has several base models groups its rows by."""

    base: str
    quantization: str = "none"

    @property
    def order(self) -> tuple:
        """Sort key: a base model's unquantised form comes first."""
        return self.base, self.quantization != "none", self.quantization


@dataclass(frozen=True)
class Row:
    """One method with one set of overrides, over its seeds.

    Attributes:
        setting: base model and its quantisation, None in a table that has one of them.
        name: the row's name in its table, unique within its setting.
        parameters: trainable parameters -> number of seeds that had so many; one entry if all is well.
        tasks: task -> accuracy, over the seeds that have the task.
        average: plain mean over the tasks of each seed, over the seeds.
        averaged: the tasks that every averaged seed has; fewer than all of them must be marked.
        memory: kind -> peak bytes; the kinds are different quantities.
    """

    setting: Setting | None
    method: str
    label: str
    name: str
    seeds: tuple[int, ...]
    parameters: dict[int, int]
    seconds: Summary | None
    memory: dict[str, Summary]
    tasks: dict[str, Summary | None]
    average: Summary | None
    averaged: tuple[str, ...]
    unparsed: Summary | None

    @property
    def title(self) -> str:
        """The row's name in a sentence, unique within its table."""
        return self.name if self.setting is None else f"{self.setting.base}: {self.name}"


ResultsOf = Callable[[Run], Mapping[str, TaskResult]]


def row_name(method: str, notes: Iterable[str]) -> str:
    """``moslora (orthogonal)``: the method and, in brackets, what sets the row apart."""
    notes = [*(["no adapter"] if method in ("none", "base") else []), *notes]
    return method + (f" ({'; '.join(notes)})" if notes else "")


def rows_of(
    runs: Iterable[Run],
    results_of: ResultsOf,
    tasks: Sequence[str],
    setting_of: Callable[[Run], Setting | None] = lambda run: None,
) -> list[Row]:
    """Runs that differ only in their seed make a row.

    Rows come in the order of their settings (the unquantised first), then of the methods, then of their overrides.
    """
    groups = defaultdict(list)
    for run in runs:
        groups[setting_of(run), run.method, run.label].append(run)
    return [
        _row(*key, sorted(group, key=lambda run: run.seed), results_of, tasks)
        for key, group in sorted(groups.items(), key=lambda item: order(*item[0]))
    ]


def order(setting: Setting | None, method: str, label: str) -> tuple:
    """Sort key of a row."""
    known = METHOD_ORDER.index(method) if method in METHOD_ORDER else len(METHOD_ORDER)
    return () if setting is None else setting.order, known, method, label != "default", label


def _row(
    setting: Setting | None,
    method: str,
    label: str,
    runs: Sequence[Run],
    results_of: ResultsOf,
    tasks: Sequence[str],
) -> Row:
    results = [results_of(run) for run in runs]
    trainings = [run.training for run in runs if run.training is not None]
    memory = defaultdict(list)
    for training in trainings:
        memory[training.peak_memory_kind].append(training.peak_memory_bytes)
    averaged, average = _average(results, tasks)
    return Row(
        setting=setting,
        method=method,
        label=label,
        name=row_name(method, [label] if label != "default" else []),
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

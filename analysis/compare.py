"""Methods against each other: every row against plain LoRA, MoSLoRA against its controls, paired by seed and by item.

A difference is that of the numbers in the tables, over the seeds that both rows have. Tests by item pair the answers
to the same question in the same seed (:mod:`analysis.items`). Right answers add up to the table's number where that is
an accuracy; where it is not (MME's points, TextVQA's agreement with ten people) the tests by item are about right
answers, and no interval resamples items.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from moslora_core.record import TaskResult

from . import claims
from .aggregate import Row
from .arms import Key, contexts, find_pair, parts_of, split
from .items import Answers, Reader
from .load import REFERENCES, Run
from .statistics import (
    Discordant,
    Estimate,
    Interval,
    bootstrap,
    collapse,
    detectable,
    estimate,
    flip_items,
    holm,
    mcnemar_exact,
    sign_flips,
    wilcoxon,
)
from .task_table import differing_settings

LORA = "lora"
MOSLORA = "moslora"
CONTROLS = ("moslora_folded", "moslora_frozen", "lora_scaled", "two_subspaces")
# No answer depends on the first; the others name files, or versions that a note is enough for.
NO_CONDITIONS = ("batch_size", "sources", "model_name", "judged")
VERSIONS = ("lm_eval", "transformers", "peft")
_RANK = re.compile(r"adapter\.r=\d+")


@dataclass(frozen=True)
class Arm:
    """One row of a table with its runs."""

    row: Row
    runs: tuple[Run, ...]

    @property
    def name(self) -> str:
        return self.row.name

    @cached_property
    def by_seed(self) -> dict[int, Run]:
        return {run.seed: run for run in self.runs}


@dataclass(frozen=True)
class Difference:
    """First minus second, as a share, over the seeds that both arms have.

    Attributes:
        values: seed -> difference.
        by_seed: their mean, deviation and t interval.
        interval: bootstrap over seeds and items.
        p_wilcoxon: of the mean over the tasks alone.
        items: how many were paired; None where answers are missing.
        adds_up: whether the right answers of these items are the number of the table.
    """

    values: Mapping[int, float]
    by_seed: Estimate
    interval: Interval | None = None
    p_seed: float | None = None
    p_wilcoxon: float | None = None
    p_item: float | None = None
    detectable: float | None = None
    items: int | None = None
    adds_up: bool = True


@dataclass(frozen=True)
class Comparison:
    """Two arms and what sets them apart.

    Attributes:
        tasks: what the mean is over; fewer than the table has are marked.
        seeds: those that the mean is over.
        means: mean of each arm over these seeds and tasks, None without a common seed.
        holm_seed, holm_item: task -> p adjusted over the tasks.
        discordant: (task, seed) -> items that one arm alone got right.
        collapsed: of each arm, the runs that collapsed with the reason.
        barriers: why the difference is none of the methods alone.
        notes: what else a reader must know.
    """

    first: Arm
    second: Arm
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    means: tuple[Estimate, Estimate] | None
    mean: Difference | None
    by_task: Mapping[str, Difference]
    holm_seed: Mapping[str, float | None]
    holm_item: Mapping[str, float | None]
    discordant: Mapping[tuple[str, int], Discordant]
    collapsed: tuple[dict[str, str], dict[str, str]]
    barriers: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return f"{self.first.name} - {self.second.name}"


# --------------------------------------------------------------------------------------------------------- which pairs


def pairs(arms: Sequence[Arm], statements: Iterable[claims.Statement] = ()) -> list[tuple[Arm, Arm]]:
    """The pairs to compare, in the order of the rows, within each setting (base model and quantisation).

    Every row against plain LoRA with the same overrides (those of the method itself aside; against LoRA's defaults
    where there is none), every MoSLoRA row against its controls with the same overrides and against LoRA of another
    rank, and the pairs that the statements are about. Evaluations of untrained models are no arms.
    """
    found: dict[tuple, tuple[Arm, Arm]] = {}
    for setting in dict.fromkeys(arm.row.setting for arm in arms):
        members = {
            (arm.row.method, arm.row.label): arm
            for arm in arms
            if arm.row.setting == setting and arm.row.method not in REFERENCES
        }
        for (method, label), arm in members.items():
            plain = _without_method(label)
            core, context = split(label)
            reference = next((members[LORA, of] for of in (plain, "default") if (LORA, of) in members), None)
            if reference is arm:  # LoRA with other settings against LoRA as it is
                reference = members.get((LORA, "default"))
            others = [reference]
            if method == MOSLORA and label == plain:
                others += [members.get((control, label)) for control in CONTROLS]
            if method == MOSLORA and core == "default":
                others += [members[key] for key in members if key[0] == LORA and _is_rank(key[1], context)]
            found |= {_key(arm, other): (arm, other) for other in others if other not in (None, arm)}
        for statement in statements:
            for context in contexts(members):
                keys = present(members, statement, context)
                if None not in keys:
                    first, second = (members[key] for key in keys)
                    found.setdefault(_key(first, second), (first, second))
    return list(found.values())


def present(rows: Iterable[Key], statement: claims.Statement, context: str) -> tuple[Key | None, Key | None]:
    """The rows, (method, label), that are the arms of a claim in this context; None for one that there is not."""
    first, second = ((side.method, side.labels) for side in (statement.first, statement.second))
    return find_pair(rows, first, second, context)


def _is_rank(label: str, context: str) -> bool:
    core, of = split(label)
    return of == context and _RANK.fullmatch(core) is not None


def _key(first: Arm, second: Arm) -> tuple:
    return first.row.setting, first.row.method, first.row.label, second.row.method, second.row.label


def _without_method(label: str) -> str:
    """The label of the same overrides without those of the method; a shortened label is no list of overrides."""
    if "~" in label:
        return label
    return ",".join(part for part in parts_of(label) if not part.startswith("method.")) or "default"


# ----------------------------------------------------------------------------------------------------------- one pair


@dataclass
class _Pairing:
    """Collects, task by task, what two arms differ in, and what stands in the way."""

    first: Arm
    second: Arm
    protocol: str
    reader: Reader
    barriers: list[str] = field(default_factory=list)

    def results(self, seed: int) -> tuple[Mapping[str, TaskResult], Mapping[str, TaskResult]]:
        return tuple(arm.by_seed[seed].evaluations[self.protocol].tasks for arm in (self.first, self.second))

    def has(self, seed: int, task: str) -> bool:
        return all(task in results for results in self.results(seed))

    def values(self, seeds: Sequence[int], task: str) -> np.ndarray:
        """Table differences, (seeds,)."""
        pairs = [[results[task].value for results in self.results(seed)] for seed in seeds]
        return np.array([first - second for first, second in pairs])

    def answers(self, seed: int, task: str) -> list[Answers | None]:
        runs = (self.first.by_seed[seed], self.second.by_seed[seed])
        return [self.reader.items(run, self.protocol).answers.get(task) for run in runs]

    def right(self, seeds: Sequence[int], task: str) -> np.ndarray | None:
        """Whether the arms answered the items that all runs have: bool, (seeds, 2, items); None without answers."""
        found = [self.answers(seed, task) for seed in seeds]
        every = [answers for pair in found for answers in pair]
        if any(answers is None for answers in every):
            return None
        one = every[0]
        if all(answers.ids == one.ids and answers.golds == one.golds for answers in every):
            return np.array([[answers.right for answers in pair] for pair in found])
        known = [dict(zip(answers.ids, answers.golds, strict=True)) for answers in every]
        shared = [name for name in one.ids if all(name in golds for golds in known)]
        same = [name for name in shared if len({golds[name] for golds in known}) == 1]
        if len(same) < len(shared):
            self.barriers.append(f"{task}: {len(shared) - len(same)} items have different right answers in the runs")
        if len(shared) < max(map(len, known)):
            self.barriers.append(f"{task}: only {len(shared)} items are in all runs, of up to {max(map(len, known))}")
        if not same:
            return None
        by_name = [[dict(zip(answers.ids, answers.right, strict=True)) for answers in pair] for pair in found]
        return np.array([[[right[name] for name in same] for right in pair] for pair in by_name])


def compare(
    first: Arm,
    second: Arm,
    protocol: str,
    tasks: Sequence[str],
    reader: Reader,
    untrained: Mapping[str, float],
) -> Comparison:
    """Compares two arms under one evaluation protocol.

    Args:
        tasks: of the table, in its order.
        untrained: task -> share of the untrained model, to tell collapsed runs by; empty where it was not evaluated.
    """
    pairing = _Pairing(first, second, protocol, reader)
    common = sorted(first.by_seed.keys() & second.by_seed.keys())
    complete = [seed for seed in common if all(pairing.has(seed, task) for task in tasks)]
    seeds = complete or common
    averaged = tuple(task for task in tasks if seeds and all(pairing.has(seed, task) for seed in seeds))
    by_task, mean, discordant = _differences(pairing, common, seeds, averaged, tasks)
    means = None
    if averaged:
        levels = [
            [np.mean([results[task].value for task in averaged]) for results in pairing.results(seed)]
            for seed in seeds
        ]
        means = tuple(estimate(of_arm) for of_arm in zip(*levels, strict=True))
    return Comparison(
        first=first,
        second=second,
        tasks=averaged,
        seeds=tuple(seeds),
        means=means,
        mean=mean,
        by_task=by_task,
        holm_seed=holm({task: found.p_seed for task, found in by_task.items()}),
        holm_item=holm({task: found.p_item for task, found in by_task.items()}),
        discordant=discordant,
        collapsed=tuple(collapsed(arm, protocol, tasks, reader, untrained) for arm in (first, second)),
        barriers=tuple([*_barriers(first, second, common, protocol, tasks), *dict.fromkeys(pairing.barriers)]),
        notes=tuple(_notes(first, second, common, seeds, protocol)),
    )


def _differences(
    pairing: _Pairing, common: Sequence[int], seeds: Sequence[int], averaged: Sequence[str], tasks: Sequence[str]
) -> tuple[dict[str, Difference], Difference | None, dict[tuple[str, int], Discordant]]:
    """The difference in each task, in the mean over ``averaged``, and the discordant items of each seed."""
    seeds_of = {task: [seed for seed in common if pairing.has(seed, task)] for task in tasks}
    seeds_of = {task: found for task, found in seeds_of.items() if found}
    right = {task: pairing.right(found, task) if len(found) > 1 else None for task, found in seeds_of.items()}
    discordant = {
        (task, seed): mcnemar_exact(*answers)
        for task, found in right.items()
        if found is not None
        for seed, answers in zip(seeds_of[task], found, strict=True)
    }
    by_task, mean = {}, None
    if averaged:
        at = {task: [seeds_of[task].index(seed) for seed in seeds] for task in averaged}
        values = np.stack([pairing.values(seeds, task) for task in averaged], axis=1)
        rights = [None if right[task] is None else right[task][at[task]] for task in averaged]
        mean, of_tasks = _tested(values, seeds, rights)
        by_task = dict(zip(averaged, of_tasks, strict=True))
    for task, found in seeds_of.items():
        if task not in by_task or found != list(seeds):  # on its own, over the seeds that have it
            by_task[task], _ = _tested(pairing.values(found, task)[:, None], found, [right[task]])
    return {task: by_task[task] for task in seeds_of}, mean, discordant


def _tested(
    values: np.ndarray, seeds: Sequence[int], rights: Sequence[np.ndarray | None]
) -> tuple[Difference, list[Difference]]:
    """The difference in the mean over tasks, and in each of them.

    Args:
        values: differences of the table's numbers, (seeds, tasks).
        rights: for each task whether the arms were right, (seeds, 2, items); None without answers.
    """
    columns = np.column_stack([values.mean(axis=1), values])
    mean, *of_tasks = (_by_seed(column, seeds, p) for column, p in zip(columns.T, sign_flips(columns), strict=True))
    if len(seeds) < 2:
        return mean, of_tasks
    items = [None if right is None else right[:, 0].astype(np.int8) - right[:, 1] for right in rights]
    fits = [
        of_task is not None and bool(np.allclose(of_task.mean(axis=1), column, rtol=0, atol=1e-9))
        for of_task, column in zip(items, values.T, strict=True)
    ]
    of_mean, intervals = bootstrap(
        [of_task if fit else column[:, None] for of_task, fit, column in zip(items, fits, values.T, strict=True)]
    )
    paired = [of_task for of_task in items if of_task is not None]
    p_mean, ps = flip_items(paired) if paired else (None, [])
    left = iter(ps)
    of_tasks = [
        replace(
            of_seeds,
            interval=interval,
            p_item=None if of_task is None else next(left),
            items=None if of_task is None else of_task.shape[1],
            adds_up=of_task is None or fit,
        )
        for of_seeds, interval, of_task, fit in zip(of_tasks, intervals, items, fits, strict=True)
    ]
    all_paired = len(paired) == len(items)
    mean = replace(
        mean,
        interval=of_mean,
        p_wilcoxon=wilcoxon(columns[:, 0]),
        p_item=p_mean if all_paired else None,
        items=sum(of_task.shape[1] for of_task in paired) if all_paired else None,
        adds_up=not all_paired or all(fits),
    )
    return mean, of_tasks


def _by_seed(values: np.ndarray, seeds: Sequence[int], p: float | None) -> Difference:
    found = estimate(values)
    return Difference(
        values=dict(zip(seeds, map(float, values), strict=True)),
        by_seed=found,
        p_seed=p,
        detectable=detectable(found.sd, found.n),
    )


# ------------------------------------------------------------------------------------------------- what is to be known


def collapsed(
    arm: Arm, protocol: str, tasks: Sequence[str], reader: Reader, untrained: Mapping[str, float]
) -> dict[str, str]:
    """Path -> why, of the arm's runs that collapsed (:func:`analysis.statistics.collapse`)."""
    found = {}
    for run in arm.runs:
        results = run.evaluations[protocol].tasks
        answers = reader.items(run, protocol).answers
        values = {task: results[task].value for task in tasks if task in results}
        reason = collapse(values, {task: answers[task].chance for task in values if task in answers}, untrained)
        if reason:
            found[run.path] = reason
    return found


def _barriers(first: Arm, second: Arm, seeds: Sequence[int], protocol: str, tasks: Sequence[str]) -> list[str]:
    """Differences of the evaluations, which make the numbers those of two measurements."""
    runs = [arm.by_seed[seed] for arm in (first, second) for seed in seeds]
    found = []
    for key, values in differing_settings(runs, protocol).items():
        if key not in (*NO_CONDITIONS, *VERSIONS):
            found.append(f"the runs differ in the evaluation setting {key}: {' or '.join(values)}")
    for what, of in (("metrics", lambda result: result.metric), ("numbers of items", lambda result: result.n)):
        results = [run.evaluations[protocol].tasks for run in runs]
        for task in tasks:
            if len({of(result[task]) for result in results if task in result}) > 1:
                found.append(f"{task}: the runs have different {what}")
    return found


def _notes(first: Arm, second: Arm, common: Sequence[int], seeds: Sequence[int], protocol: str) -> list[str]:
    notes = []
    for arm, other in ((first, second), (second, first)):
        if missing := sorted(other.by_seed.keys() - arm.by_seed.keys()):
            named = ", ".join(map(str, missing))
            notes.append(f"{arm.name} lacks the seed{'s' * (len(missing) > 1)} {named} of {other.name}")
    if len(seeds) < len(common):
        left = ", ".join(str(seed) for seed in common if seed not in seeds)
        notes.append(f"the mean leaves out seed{'s' * (left.count(',') > 0)} {left}, which not all tasks have")
    runs = [arm.by_seed[seed] for arm in (first, second) for seed in common]
    for key, values in differing_settings(runs, protocol).items():
        if key in VERSIONS:
            notes.append(f"the runs were evaluated with different versions of {key}: {' or '.join(values)}")
    commits = [{commit for run in arm.runs for commit in run.commits} for arm in (first, second)]
    if all(commits) and commits[0] != commits[1]:
        notes.append("the runs come from different commits")
    return notes

"""What the table and the figure of subject-driven generation share: subjects, arms, and averages over the subjects.

A run is of one subject, which its folder names beside the overrides (``data.subject=dog``). The runs of an arm, a
method with one set of overrides, are therefore told apart by seed and subject, and what is compared between arms are
averages over the same subjects.
"""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from .aggregate import Summary, order, row_name, summarize
from .load import REFERENCES, LeftOut, Run
from .statistics import Interval, bootstrap

SUBJECT = "data.subject"
REAL = "real_images"  # part of a task's result: the subject's real images under the same metric
Key = tuple[int, str]  # seed and subject


@dataclass(frozen=True)
class Arm:
    """The runs of a method with one set of overrides.

    Attributes:
        label: the overrides without the subject.
        runs: by seed and subject.
    """

    method: str
    label: str
    runs: Mapping[Key, Run]

    @property
    def name(self) -> str:
        """``moslora (orthogonal)``: the mixer's initialisation by its value alone."""
        parts = [] if self.label == "default" else self.label.split(",")
        return row_name(self.method, [re.sub(r"^method\.mixer_init=", "", part) for part in parts])

    @property
    def is_reference(self) -> bool:
        return self.method in REFERENCES

    @property
    def subjects(self) -> set[str]:
        return {subject for _, subject in self.runs}

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(sorted({seed for seed, _ in self.runs}))

    def values(self, of: Callable[[Run], float | None]) -> dict[Key, float]:
        """What ``of`` gives for each run, where it gives something."""
        found = {key: of(run) for key, run in self.runs.items()}
        return {key: value for key, value in found.items() if value is not None}


def subject_of(run: Run, protocol: str) -> str | None:
    """The subject of a run as its evaluation recorded it; None where it did not."""
    subject = run.evaluations[protocol].settings.get("subject")
    return subject if isinstance(subject, str) and subject else None


def any_subject(run: Run) -> str | None:
    """The subject of a run as any of its evaluations recorded it."""
    return next((found for protocol in run.evaluations if (found := subject_of(run, protocol)) is not None), None)


def label_without_subject(label: str) -> str:
    """The overrides of a run but for its subject; a label that was cut short is no list and stays as it is."""
    if "~" in label:
        return label
    return ",".join(part for part in label.split(",") if not part.startswith(f"{SUBJECT}=")) or "default"


def arms_of(runs: Iterable[Run], subject_of: Callable[[Run], str | None]) -> tuple[list[Arm], list[LeftOut]]:
    """The arms in the order of tables, and the runs that are of no subject or of one that another run is of too."""
    groups: dict[tuple[str, str], dict[Key, list[Run]]] = defaultdict(lambda: defaultdict(list))
    left_out = []
    for run in runs:
        if (subject := subject_of(run)) is None:
            left_out.append(LeftOut(run.path, run.scale, "its evaluation does not say its subject"))
            continue
        groups[run.method, label_without_subject(run.label)][run.seed, subject].append(run)
    arms = []
    for (method, label), by_key in sorted(groups.items(), key=lambda item: order(None, *item[0])):
        single = {key: found[0] for key, found in by_key.items() if len(found) == 1}
        if single:
            arms.append(Arm(method, label, dict(sorted(single.items()))))
        for (seed, subject), found in by_key.items():
            same = f"one of {len(found)} runs of {subject} with seed {seed} and the same settings"
            left_out += [LeftOut(run.path, run.scale, same) for run in found if len(found) > 1]
    return arms, left_out


# ----------------------------------------------------------------------------------------------------------- averages


@dataclass(frozen=True)
class Average:
    """One number of an arm, averaged over its subjects within each seed.

    Attributes:
        by_seed: seed -> mean over the subjects, for the seeds that enter.
        by_subject: subject -> mean over these seeds.
    """

    by_seed: Mapping[int, float]
    by_subject: Mapping[str, float]

    @property
    def summary(self) -> Summary:
        found = summarize(self.by_seed.values())
        assert found is not None  # an average has a seed
        return found

    @property
    def interval(self) -> Interval | None:
        """95% bootstrap over the subjects; one subject says nothing of others."""
        if len(self.by_subject) < 2:
            return None
        (found,) = bootstrap([list(self.by_subject.values())])[1]
        return found


def average(values: Mapping[Key, float], subjects: Sequence[str]) -> Average | None:
    """Averages over the subjects within a seed: over the complete seeds where there are any.

    Without a seed that has all ``subjects`` it is taken over those that every seed has, the same for each of them:
    averages over different subjects are different quantities. None where there is no such subject.

    Args:
        values: (seed, subject) -> value.
        subjects: those that the table is about.
    """
    by_seed: dict[int, dict[str, float]] = defaultdict(dict)
    for (seed, subject), value in sorted(values.items()):
        by_seed[seed][subject] = value
    complete = {seed: found for seed, found in by_seed.items() if set(subjects) <= found.keys()}
    entering = complete or by_seed
    shared = [subject for subject in subjects if entering and all(subject in found for found in entering.values())]
    if not shared:
        return None
    return Average(
        {seed: statistics.fmean(found[subject] for subject in shared) for seed, found in entering.items()},
        {subject: statistics.fmean(found[subject] for found in entering.values()) for subject in shared},
    )


def differences(first: Mapping[Key, float], second: Mapping[Key, float]) -> dict[Key, float]:
    """First minus second where both have the seed and the subject."""
    return {key: first[key] - second[key] for key in sorted(first.keys() & second.keys())}

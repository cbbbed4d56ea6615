"""Run records as the analysis uses them: the runs that can enter a table, and those left out with the reason."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import yaml

from moslora_core.errors import UserError
from moslora_core.record import Evaluation, RunRecord, TaskResult, Training, bounds, find_runs, read_json, read_yaml
from moslora_core.typed import build

# Evaluations without a trained adapter, the lines that every method must beat; they have no training to report.
REFERENCES = ("majority", "none", "base")

_YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C where it is there, ten times as fast
_SEED = re.compile(r"seed-(\d+)")
_PROTOCOL = re.compile(r"\w[\w.,=+:@-]*", re.ASCII)  # it names a folder of the report


@dataclass(frozen=True)
class Run:
    """One run with finished evaluations. ``path`` is relative to the folder of runs; ``evaluations`` maps protocols.

    ``stopped`` says how a later stage ended that did not finish; None if all is well. ``evaluation_names`` maps
    protocols to the names under which the predictions stand; ``folder`` is where the record is. ``rate`` is the
    learning rate that a study chose for the run's arm, with its key, where the label does not name it.
    """

    path: str
    experiment: str
    scale: str
    method: str
    label: str
    seed: int
    training: Training | None
    evaluations: dict[str, Evaluation]
    commits: frozenset[str]
    stopped: str | None = None
    evaluation_names: dict[str, str] = field(default_factory=dict)
    rate: str | None = None
    folder: Path | None = None

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved configuration of the run; empty where it cannot be read. Read when first asked for."""
        if self.folder is None:
            return {}
        try:
            found = read_yaml(self.folder / "config.yaml", partial(yaml.load, Loader=_YAML))
        except UserError:
            return {}
        return found if isinstance(found, dict) else {}

    def setting(self, key: str) -> Any:
        """The value of a setting such as ``adapter.r``; None where the configuration does not say."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value


@dataclass(frozen=True)
class LeftOut:
    """A run that enters no table, and why."""

    path: str
    scale: str
    reason: str


def with_config(runs: Iterable[Run], needed: Callable[[Run], bool]) -> tuple[list[Run], list[LeftOut]]:
    """The runs that a table can place, and those whose configuration is ``needed`` for that and cannot be read."""
    placed, unread = [], []
    for run in runs:
        if needed(run) and not run.config:
            unread.append(LeftOut(run.path, run.scale, "config.yaml cannot be read: not counted here"))
        else:
            placed.append(run)
    return placed, unread


def load_runs(root: Path, experiment: str, scale: str | None = None) -> tuple[list[Run], list[LeftOut]]:
    """Every run of ``experiment`` below ``root``, of one ``scale`` or all.

    A record that cannot be used is named in the second list; it never raises and is never averaged in.

    Raises:
        UserError: if ``root`` is no folder.
    """
    records = {record.path for record in find_runs(root, experiment)}
    # A seed's folder without status.json is no record to find_runs; it is named here, not passed over.
    records.update(path for path in Path(root).glob(f"{experiment}/[!.]*/[!.]*/[!.]*/seed-*") if path.is_dir())
    runs, left_out = [], []
    for path in sorted(records):
        found_scale = path.parts[-4]
        if scale not in (None, found_scale):
            continue
        try:
            runs.append(_load(RunRecord(path), path.relative_to(root).as_posix()))
        except UserError as error:
            reason = " ".join(str(error).replace(f"{path}/", "").split())
            left_out.append(LeftOut(path.relative_to(root).as_posix(), found_scale, reason))
    duplicates = _duplicates(runs)
    left_out += [LeftOut(run.path, run.scale, reason) for run, reason in duplicates]
    refused = {run.path for run, _ in duplicates}
    return [run for run in runs if run.path not in refused], sorted(left_out, key=lambda entry: entry.path)


def _load(record: RunRecord, relative: str) -> Run:
    experiment, scale, method, label, seed = record.path.parts[-5:]
    if not (match := _SEED.fullmatch(seed)):
        raise UserError(f"folder {seed!r} names no seed; expected seed-<number>")
    status = record.status()
    if status is None:
        raise UserError("status.json is missing")
    stopped = None
    if status.state != "finished":
        stopped = f"{status.state} at stage {status.stage}" + (f": {status.reason}" if status.reason else "")
        if status.stage == "train":
            raise UserError(stopped)
    results = record.results()
    # An evaluation enters the results when it is complete: one that was stopped costs none of the earlier ones.
    if stopped is not None and not results.evaluations:
        raise UserError(stopped)
    if results.training is None and method not in REFERENCES:
        raise UserError("results.json has no training summary")
    if not results.evaluations:
        raise UserError(f"not evaluated yet; the last finished stage is {status.stage}")
    names = _by_protocol(results.evaluations)
    return Run(
        path=relative,
        experiment=experiment,
        scale=scale,
        method=method,
        label=label,
        seed=int(match.group(1)),
        training=results.training,
        evaluations={protocol: results.evaluations[name] for protocol, name in names.items()},
        commits=_commits(record),
        stopped=stopped,
        evaluation_names=names,
        folder=record.path,
    )


def _by_protocol(evaluations: dict[str, Evaluation]) -> dict[str, str]:
    """Protocol -> name of its evaluation, of which a run may have one each: which of two would stand in the table?"""
    found: dict[str, str] = {}
    for name, evaluation in evaluations.items():
        protocol = evaluation.protocol
        if not _PROTOCOL.fullmatch(protocol):
            raise UserError(f"results.json: {name}.protocol must be a name without spaces, found {protocol!r}")
        if protocol in found:
            raise UserError(f"results.json: evaluations {found[protocol]!r} and {name!r} are both of {protocol!r}")
        found[protocol] = name
        for task, result in evaluation.tasks.items():
            _check(result, f"results.json: {name}.{task}")
            for part, entry in (result.breakdown or {}).items():
                _check(entry, f"results.json: {name}.{task}.breakdown.{part}")
    return found


def _check(result: TaskResult, where: str) -> None:
    low, high = bounds(result.metric)
    if not low <= result.value <= high:
        what = "a share" if low == 0 else "a similarity"
        raise UserError(f"{where}: value must be {what} in [{low}, {high}], found {result.value}")
    if result.unparsed is not None and not 0 <= result.unparsed <= 1:
        raise UserError(f"{where}: unparsed must be a share in [0, 1], found {result.unparsed}")
    if result.n < 1:
        raise UserError(f"{where}: n must be positive, found {result.n}")


@dataclass(frozen=True)
class _Stage:
    git_commit: str | None = None


def _commits(record: RunRecord) -> frozenset[str]:
    """Git commits of the code that trained and evaluated; empty where none was noted."""
    path = record.path / "environment.json"
    if not path.exists():
        return frozenset()
    stages = build(dict[str, _Stage], read_json(path), str(path), others=True)
    # Knocking out subspaces adds a file of its own and changes no number of a table.
    counted = [stage for name, stage in stages.items() if name != "knock_out"]
    return frozenset(stage.git_commit for stage in counted if stage.git_commit)


def _duplicates(runs: Iterable[Run]) -> list[tuple[Run, str]]:
    """Runs that claim the same method, overrides and seed (seed-1 and seed-01): none of them is to be trusted."""
    same = defaultdict(list)
    for run in runs:
        same[run.experiment, run.scale, run.method, run.label, run.seed].append(run)
    return [
        (run, f"duplicate of {', '.join(other.path for other in group if other is not run)}: same method and seed")
        for group in same.values()
        if len(group) > 1
        for run in group
    ]

"""What a study is made of: its definition in one file, the runs that it asks for, and what of them is there.

A study compares arms (a method with its overrides), each at a learning rate of its own: a grid of rates is tried on
seeds of its own and judged on validation items alone, then every arm is run at its best rate on the paired seeds of
the comparison, which also are run under the study's variants (other ranks, fractions of the data). Definitions are in
``analysis/studies``; a study's runs are ordinary run records, which its commands repeat one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from moslora_core.errors import UserError
from moslora_core.record import RunRecord, override_label, read_yaml
from moslora_core.typed import Count, build, shown

DONE, FAILED, MISSING = "done", "failed", "missing"

Settings = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Arm:
    """A method with the overrides that make it what it is; ``rate`` is fixed where no grid is to be tried."""

    name: str
    method: str
    overrides: Settings = ()
    rate: float | None = None


@dataclass(frozen=True)
class Rates:
    """The grid of learning rates and how one of them is chosen.

    Attributes:
        key: the setting.
        values: ascending, by a constant factor.
        extend: how many further values may be tried at either end while the best one is the last there.
        seeds: of the trials; none of them is a seed of the comparison.
        choose_by: evaluation by whose mean over the tasks the best is chosen.
        evaluate: arguments that make that evaluation.
    """

    key: str
    values: tuple[float, ...]
    extend: int
    seeds: tuple[int, ...]
    choose_by: str
    evaluate: Settings


@dataclass(frozen=True)
class Variant:
    """Some arms again with further overrides, at the rates that were chosen for them.

    Attributes:
        settings: arguments that are not part of a run's name, such as the folder of the data.
    """

    name: str
    arms: tuple[str, ...]
    overrides: Settings
    settings: Settings


@dataclass(frozen=True)
class Study:
    """One study as its file defines it.

    Attributes:
        settings: arguments of every command; ``scale`` among them, and none that is part of a run's name.
        seeds: of the comparison.
        evaluation: name of the evaluation that is compared, and ``evaluate`` the arguments that make it.
        train: arguments of the trainings of the comparison alone, not part of a run's name either.
        references: methods without training that are evaluated beside the arms.
    """

    path: Path
    name: str
    question: str
    experiment: str
    settings: Settings
    seeds: tuple[int, ...]
    evaluation: str
    evaluate: Settings
    train: Settings
    rates: Rates
    arms: tuple[Arm, ...]
    variants: tuple[Variant, ...]
    references: tuple[str, ...]

    @property
    def scale(self) -> str:
        return dict(self.settings)["scale"]

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)


@dataclass(frozen=True)
class Wanted:
    """A run that a study asks for.

    Attributes:
        part: what it is for: the grid, the comparison, the references, or the name of a variant.
        overrides: what names it beside its method, the rate among them.
        settings: arguments of its commands that do not name it; ``train`` those of the training alone.
        evaluation: name of the evaluation that it must have.
    """

    study: Study
    arm: Arm
    part: str
    overrides: Settings
    settings: Settings
    train: Settings
    evaluation: str
    evaluate: Settings
    seed: int
    trained: bool = True

    @property
    def label(self) -> str:
        return override_label(f"{key}={value}" for key, value in self.overrides)

    def record(self, runs_dir: Path) -> RunRecord:
        return RunRecord.locate(
            runs_dir, self.study.experiment, self.study.scale, self.arm.method, self.label, self.seed
        )


GRID, COMPARISON, REFERENCES = "learning rates", "comparison", "references"


# ---------------------------------------------------------------------------------------------------------- the file

_Values = dict[str, Any]


@dataclass(frozen=True)
class _RatesFile:
    key: str
    values: list[Any]
    seeds: list[Count]
    choose_by: str
    evaluate: _Values = field(default_factory=dict)
    extend: Count = 0
    fixed: _Values = field(default_factory=dict)


@dataclass(frozen=True)
class _VariantFile:
    arms: list[str]
    overrides: _Values
    settings: _Values = field(default_factory=dict)


@dataclass(frozen=True)
class _StudyFile:
    name: str
    question: str
    experiment: str
    settings: _Values
    seeds: list[Count]
    evaluation: str
    arms: dict[str, _Values]
    rates: _RatesFile
    evaluate: _Values = field(default_factory=dict)
    train: _Values = field(default_factory=dict)
    variants: dict[str, _VariantFile] = field(default_factory=dict)
    references: list[str] = field(default_factory=list)


def read_study(path: Path) -> Study:
    """The study that a YAML file defines.

    Raises:
        UserError: no such file, or one with a key that is unknown, missing or of the wrong kind.
    """
    raw = build(_StudyFile, read_yaml(path, yaml.safe_load), str(path))
    rates = raw.rates
    texts = {"name": raw.name, "experiment": raw.experiment, "evaluation": raw.evaluation, "rates.key": rates.key}
    if empty := [key for key, given in {**texts, "arms": raw.arms, "seeds": raw.seeds}.items() if not given]:
        raise UserError(f"{path}: {empty[0]} is empty")
    settings = _settings(raw.settings, f"{path}: settings")
    if "scale" not in dict(settings):
        raise UserError(f"{path}: settings has no scale; expected one such as smoke")
    parts = {"name": raw.name, "experiment": raw.experiment, "settings.scale": dict(settings)["scale"]}
    parts |= {f"{key}.{name}": name for key in ("arms", "variants") for name in getattr(raw, key)}
    parts |= {f"references.{number}": name for number, name in enumerate(raw.references)}
    for key, name in parts.items():
        _check_name(name, f"{path}: {key}")
    fixed = {name: _number(rate, f"{path}: rates.fixed.{name}") for name, rate in rates.fixed.items()}
    arms = tuple(_arm(name, given, fixed.pop(name, None), f"{path}: arms.{name}") for name, given in raw.arms.items())
    if fixed:
        raise UserError(f"{path}: rates.fixed names {next(iter(fixed))!r}, which is no arm")
    seeds = _seeds(raw.seeds, f"{path}: seeds")
    grid = Rates(
        key=rates.key,
        values=_grid(rates.values, f"{path}: rates.values"),
        extend=rates.extend,
        seeds=_seeds(rates.seeds, f"{path}: rates.seeds"),
        choose_by=rates.choose_by,
        evaluate=_settings(rates.evaluate, f"{path}: rates.evaluate"),
    )
    if both := set(seeds) & set(grid.seeds):
        raise UserError(
            f"{path}: rates.seeds has {min(both)}, a seed of the comparison; expected seeds of its own, so that no "
            "rate is chosen by a run that is compared"
        )
    return Study(
        path=path,
        name=raw.name,
        question=raw.question,
        experiment=raw.experiment,
        settings=settings,
        seeds=seeds,
        evaluation=raw.evaluation,
        evaluate=_settings(raw.evaluate, f"{path}: evaluate"),
        train=_settings(raw.train, f"{path}: train"),
        rates=grid,
        arms=arms,
        variants=tuple(
            _variant(name, given, raw.arms, f"{path}: variants.{name}") for name, given in raw.variants.items()
        ),
        references=tuple(raw.references),
    )


def _check_name(name: str, where: str) -> None:
    """What names a folder of runs or a log must not lead elsewhere."""
    if name in ("", ".", "..") or {"/", "\\", "\0"} & set(name):
        raise UserError(f"{where} must be the name of a folder, not a path; found {shown(name)}")


def _settings(given: _Values, where: str) -> Settings:
    for key, value in given.items():
        if isinstance(value, dict | list):
            raise UserError(f"{where}.{key} must be one value as on a command line, found {shown(value)}")
    return tuple(sorted((key, _text(value)) for key, value in given.items()))


def _text(value: Any) -> str:
    """A value as it is written on a command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)  # of a float, the shortest text that reads back the same, which is also Hydra's


def _arm(name: str, given: _Values, rate: float | None, where: str) -> Arm:
    settings = dict(_settings(given, where))
    if "method" not in settings:
        raise UserError(f"{where}: method is missing")
    _check_name(settings["method"], f"{where}.method")
    return Arm(name, settings.pop("method"), tuple(settings.items()), rate)


def _variant(name: str, given: _VariantFile, arms: Iterable[str], where: str) -> Variant:
    if unknown := [arm for arm in given.arms if arm not in arms]:
        raise UserError(f"{where}: {unknown[0]!r} is no arm; expected some of {', '.join(sorted(arms))}")
    if not given.arms:
        raise UserError(f"{where}: arms is empty")
    overrides, settings = (_settings(getattr(given, key), f"{where}.{key}") for key in ("overrides", "settings"))
    return Variant(name, tuple(given.arms), overrides, settings)


def _number(value: Any, where: str) -> float:
    try:
        number = -1.0 if isinstance(value, bool) else float(value)  # YAML reads 1e-3 as a text
    except (TypeError, ValueError, OverflowError):
        number = -1.0
    if not 0 < number < float("inf"):
        raise UserError(f"{where} must be a positive number, found {shown(value)}")
    return number


def _grid(values: Sequence[Any], where: str) -> tuple[float, ...]:
    found = tuple(_number(value, where) for value in values)
    factors = [after / before for before, after in pairwise(found)]
    if len(found) < 3 or min(factors) <= 1 or max(factors) / min(factors) > 1.01:
        raise UserError(f"{where}: expected at least three values that rise by a constant factor, found {values}")
    return found


def _seeds(values: Sequence[int], where: str) -> tuple[int, ...]:
    if len(set(values)) < len(values):
        raise UserError(f"{where}: a seed stands there twice: {values}")
    return tuple(values)


# ----------------------------------------------------------------------------------------------------------- its runs


@dataclass(frozen=True)
class State:
    """Whether a run has what is wanted of it; ``mean`` is that of the evaluation, ``reason`` that of a failure."""

    state: str
    mean: float | None = None
    reason: str | None = None


def state_of(run: Wanted, runs_dir: Path) -> State:
    """What is there of one run. A training that failed stays so until somebody removes or repeats it; one that was
    stopped by hand is missing.

    Raises:
        UserError: a damaged record.
    """
    record = run.record(runs_dir)
    status = record.status()
    if status is None:
        return State(MISSING)
    results = record.results()
    if (found := results.evaluations.get(run.evaluation)) is not None:
        return State(DONE, mean=found.mean)
    if status.state == "failed" and status.stage == "train" and not status.interrupted:
        return State(FAILED, reason=status.reason)
    return State(MISSING)


@dataclass(frozen=True)
class Choice:
    """An arm's learning rate: rate -> mean of the validation evaluation over the trial seeds, None where one failed.

    Attributes:
        best: None while trials are missing.
        inside: whether a worse rate was tried on either side of the best.
    """

    arm: Arm
    tried: Mapping[float, float | None]
    best: float | None
    inside: bool = False


@dataclass
class Progress:
    """A study's runs and what is there of them, as far as they are known: rates are chosen when the grid is done."""

    study: Study
    runs_dir: Path
    choices: dict[str, Choice] = field(default_factory=dict)

    @cached_property
    def runs(self) -> dict[Wanted, State]:
        found: dict[Wanted, State] = {}
        for arm in self.study.arms:
            trials = self._trials(arm, found)
            best = self.choices[arm.name].best
            found |= trials
            if best is not None:
                wanted = compared(self.study, arm, best)
                found |= {run: state_of(run, self.runs_dir) for run in wanted}
        found |= {run: state_of(run, self.runs_dir) for run in references(self.study)}
        return found

    def _trials(self, arm: Arm, found: Mapping[Wanted, State]) -> dict[Wanted, State]:
        """The trials of an arm's rates, with those that extend the grid; notes the choice."""
        if arm.rate is not None:
            self.choices[arm.name] = Choice(arm, {}, arm.rate)
            return {}
        grid, rates = self.study.rates, list(self.study.rates.values)
        trials: dict[Wanted, State] = {}
        while True:
            wanted = [trial(self.study, arm, rate, seed) for rate in rates for seed in grid.seeds]
            trials |= {run: state_of(run, self.runs_dir) for run in wanted if run not in trials}
            if any(state.state == MISSING for state in trials.values()):
                self.choices[arm.name] = Choice(arm, _means(trials, grid), None)
                return trials
            choice = choose(arm, _means(trials, grid))
            further = _further(choice, rates, grid)
            if further is None:
                self.choices[arm.name] = choice
                return trials
            rates = sorted([*rates, further])

    def of_state(self, state: str) -> list[Wanted]:
        return [run for run, found in self.runs.items() if found.state == state]


def trial(study: Study, arm: Arm, rate: float, seed: int) -> Wanted:
    """A run of the grid."""
    overrides = (*arm.overrides, (study.rates.key, _text(rate)))
    return Wanted(study, arm, GRID, overrides, study.settings, (), study.rates.choose_by, study.rates.evaluate, seed)


def compared(study: Study, arm: Arm, rate: float) -> list[Wanted]:
    """An arm's runs at its rate: those of the comparison and of the variants."""
    with_rate = (*arm.overrides, (study.rates.key, _text(rate)))
    parts = [(COMPARISON, (), ())]
    parts += [
        (variant.name, variant.overrides, variant.settings) for variant in study.variants if arm.name in variant.arms
    ]
    return [
        Wanted(
            study,
            arm,
            part,
            tuple((dict(with_rate) | dict(overrides)).items()),
            tuple((dict(study.settings) | dict(settings)).items()),
            study.train,
            study.evaluation,
            study.evaluate,
            seed,
        )
        for part, overrides, settings in parts
        for seed in study.seeds
    ]


def references(study: Study) -> list[Wanted]:
    """Untrained models under the evaluation that chooses rates and the one that is compared."""
    evaluations = {study.rates.choose_by: study.rates.evaluate, study.evaluation: study.evaluate}
    return [
        Wanted(study, Arm(name, name), REFERENCES, (), study.settings, (), evaluation, evaluate, 0, trained=False)
        for name in study.references
        for evaluation, evaluate in evaluations.items()
    ]


def _means(trials: Mapping[Wanted, State], grid: Rates) -> dict[float, float | None]:
    by_rate: dict[float, list[float | None]] = {}
    for run, state in trials.items():
        if state.state != MISSING:
            by_rate.setdefault(float(dict(run.overrides)[grid.key]), []).append(state.mean)
    return {rate: None if None in means else fmean(means) for rate, means in sorted(by_rate.items())}


def choose(arm: Arm, tried: Mapping[float, float | None]) -> Choice:
    """The rate of the highest mean, the smallest of equals; a rate with a failed trial cannot be chosen.

    Raises:
        UserError: trials of every rate failed.
    """
    usable = {rate: mean for rate, mean in tried.items() if mean is not None}
    if not usable:
        raise UserError(f"arm {arm.name}: trials failed at every learning rate: {', '.join(f'{r:g}' for r in tried)}")
    best = max(usable, key=lambda rate: (usable[rate], -rate))
    # A failed trial is a worse one.
    return Choice(arm, dict(tried), best, inside=min(tried) < best < max(tried))


def _further(choice: Choice, rates: Sequence[float], grid: Rates) -> float | None:
    """The next rate to try where the best one is the last of the grid, None where it is not or enough were tried."""
    factor = grid.values[1] / grid.values[0]
    if choice.best == max(rates) and sum(rate > grid.values[-1] for rate in rates) < grid.extend:
        return float(f"{max(rates) * factor:.6g}")
    if choice.best == min(rates) and sum(rate < grid.values[0] for rate in rates) < grid.extend:
        return float(f"{min(rates) / factor:.6g}")
    return None

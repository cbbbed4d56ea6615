"""A study's runs as the tables show them: each arm at the learning rate that was chosen for it, named without it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from moslora_core.record import override_label

from .load import LeftOut, Run
from .study_plan import COMPARISON, DONE, FAILED, GRID, REFERENCES, Progress


def study_runs(
    progress: Progress, runs: Sequence[Run], left_out: Sequence[LeftOut], variants: bool = True
) -> tuple[list[Run], list[LeftOut]]:
    """The runs of a study's comparison and variants, its references, and what enters no number of its scale.

    A run's label loses the learning rate, which stands in ``rate`` instead: rows of a table are arms, and every arm
    has a rate of its own. The trials of the rates are no results, and are passed over. Runs of other scales stay.

    Args:
        runs: of the study's experiment, as :func:`analysis.load.load_runs` gives them.
        left_out: given back with the runs of this scale that are no part of the study.
        variants: show the arms under the study's variants too.
    """
    study = progress.study
    wanted = {_path(progress.runs_dir, run): run for run in progress.runs}
    found, unused = [], list(left_out)
    for run in runs:
        if run.scale != study.scale:
            found.append(run)
        elif (of := wanted.get(run.path)) is None:
            unused.append(LeftOut(run.path, run.scale, f"no part of the study {study.name}"))
        elif of.part != GRID and (variants or of.part in (COMPARISON, REFERENCES)):
            plain = [f"{key}={value}" for key, value in of.overrides if key != study.rates.key]
            rate = dict(of.overrides).get(study.rates.key)
            found.append(
                replace(
                    run,
                    label=override_label(plain),
                    rate=rate and f"{study.rates.key}={rate}",
                    evaluations={
                        name: evaluation
                        for name, evaluation in run.evaluations.items()
                        if run.evaluation_names[name] != study.rates.choose_by
                    },
                )
            )
    named = {entry.path for entry in unused}
    for path, run in wanted.items():
        state = progress.runs[run]
        if state.state == FAILED and path not in named and run.part != GRID:
            unused.append(LeftOut(path, study.scale, state.reason or "failed"))
    return found, sorted(unused, key=lambda entry: entry.path)


def _path(runs_dir: Path, run) -> str:
    return run.record(runs_dir).path.relative_to(runs_dir).as_posix()


def missing(progress: Progress) -> list[str]:
    """What a study still lacks, a line an arm and part."""
    lacking: dict[tuple[str, str], int] = {}
    for run, found in progress.runs.items():
        if found.state not in (DONE, FAILED):
            key = run.arm.name, run.part
            lacking[key] = lacking.get(key, 0) + 1
    unchosen = [name for name, choice in progress.choices.items() if choice.best is None]
    lines = [f"{arm}, {part}: {count} run{'s' * (count > 1)} missing" for (arm, part), count in lacking.items()]
    if unchosen:
        lines.append(f"the comparison of {', '.join(unchosen)}: the learning rates are not chosen yet")
    return lines

"""Score against learning rate, arm by arm: how a study chose its rates, and what choosing one rate for all would cost.

A panel an arm: the mean of the validation evaluation over the tasks, at every rate that was tried, over the seeds of
the trials, each seed a dot; the chosen rate is marked. The first arm's curve is behind every other, in grey.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from moslora_core.record import override_label

from .figure5 import Figure
from .study_plan import DONE, FAILED, GRID, Choice, Progress
from .study_view import missing
from .style import COLUMN, FAINT, GREY, PALETTE, TEXT, pictures, publication
from .tables import MISSING, Grid, bullets, csv_text, heading, markdown_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME = "learning_rates"
PANEL_HEIGHT = 1.15  # inches
CSV_FIELDS = (
    "study",
    "arm",
    "method",
    "label",
    "key",
    "rate",
    "unit",
    "mean",
    "sd",
    "n",
    "failed",
    "chosen",
    "inside",
)


@dataclass(frozen=True)
class Trial:
    """One rate of one arm: the mean over the tasks by seed, as shares, and how many trainings failed."""

    rate: float
    means: tuple[float, ...]
    failed: int

    @property
    def mean(self) -> float | None:
        return fmean(self.means) if self.means else None


def trials_of(progress: Progress) -> dict[str, list[Trial]]:
    """Arm -> its trials, by rising rate; arms with a fixed rate have none."""
    key = progress.study.rates.key
    found: dict[str, dict[float, list]] = {}
    for run, state in progress.runs.items():
        if run.part == GRID and state.state in (DONE, FAILED):
            found.setdefault(run.arm.name, {}).setdefault(float(dict(run.overrides)[key]), []).append(state.mean)
    return {
        arm: [
            Trial(rate, tuple(mean for mean in means if mean is not None), means.count(None))
            for rate, means in sorted(rates.items())
        ]
        for arm, rates in found.items()
    }


def build(progress: Progress) -> list[Figure]:
    """The figure of one study; none before its first trial."""
    trials, study = trials_of(progress), progress.study
    if not trials:
        return []
    title = f"Learning rates of the study {study.name.replace('_', ' ')}"
    facts = [
        f"Score: mean over the tasks of {study.rates.choose_by}, in percent, over the trials' seeds "
        f"{_listed(study.rates.seeds)}; those of the comparison are others ({_listed(study.seeds)}).",
        "The best mean is chosen for each arm by itself, the smaller rate of equals. A rate with a failed training "
        "cannot be chosen.",
        *_ends(progress),
        *missing(progress),
        f"All runs of the study: python -m analysis.study {study.path.as_posix()}",
    ]
    with publication():
        drawn = pictures(_compose(progress, trials))
    markdown = "\n".join([heading(2, title), bullets(facts), markdown_table(_table(progress, trials))])
    csv = csv_text(CSV_FIELDS, [line for arm in trials for line in _lines(progress, arm, trials[arm])])
    return [Figure(f"{study.scale}/{study.evaluation}", NAME, title, markdown, csv, drawn)]


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def _ends(progress: Progress) -> list[str]:
    """Arms whose best rate is the last that was tried: a better one may lie beyond."""
    at = [
        f"{name} ({choice.best:g})"
        for name, choice in progress.choices.items()
        if choice.tried and choice.best is not None and not choice.inside
    ]
    return [f"Warning: the best rate is at an end of the grid for {', '.join(at)}."] if at else []


def _table(progress: Progress, trials: dict[str, list[Trial]]) -> Grid:
    rates = sorted({trial.rate for found in trials.values() for trial in found})
    rows = []
    for arm, found in trials.items():
        by_rate = {trial.rate: trial for trial in found}
        best = progress.choices[arm].best
        rows.append([arm, "-" if best is None else f"{best:g}", *(_cell(by_rate.get(rate)) for rate in rates)])
    return Grid(["Arm", "Chosen", *(f"{rate:g}" for rate in rates)], rows)


def _cell(trial: Trial | None) -> str:
    if trial is None:
        return MISSING
    failed = f" ({trial.failed} failed)" if trial.failed else ""
    if trial.mean is None:
        return "failed"
    deviation = f" ± {100 * stdev(trial.means):.1f}" if len(trial.means) > 1 else ""
    return f"{100 * trial.mean:.1f}{deviation}{failed}"


def _lines(progress: Progress, arm: str, found: Sequence[Trial]) -> list[dict[str, object]]:
    study, choice = progress.study, progress.choices[arm]
    definition = study.arm(arm)
    common = {"study": study.name, "arm": arm, "method": definition.method, "key": study.rates.key, "unit": "percent"}
    common["label"] = override_label(f"{key}={value}" for key, value in definition.overrides)
    return [
        common
        | {"rate": trial.rate, "n": len(trial.means), "failed": trial.failed}
        | ({} if trial.mean is None else {"mean": 100 * trial.mean})
        | ({"sd": 100 * stdev(trial.means)} if len(trial.means) > 1 else {})
        | ({"chosen": int(trial.rate == choice.best)} if choice.best is not None else {})
        | ({"inside": int(choice.inside)} if trial.rate == choice.best else {})
        for trial in found
    ]


# ------------------------------------------------------------------------------------------------------------ drawing


def _compose(progress: Progress, trials: dict[str, list[Trial]]):
    from matplotlib.figure import Figure as Canvas

    columns = min(4, len(trials))
    rows = math.ceil(len(trials) / columns)
    figure = Canvas(figsize=(TEXT if columns > 2 else COLUMN, PANEL_HEIGHT * rows + 0.45))
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    behind = next(iter(trials))
    for number, axes in enumerate(grid.flat):
        if number >= len(trials):
            axes.set_visible(False)
            continue
        arm = list(trials)[number]
        if arm != behind:
            _curve(axes, trials[behind], FAINT, "-")
        _panel(axes, trials[arm], progress.choices[arm], PALETTE[0])
        axes.set_title(_words(arm), fontsize=7.5, pad=2.5)
        below = number + columns
        if below >= len(trials):  # the lowest of its column
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("learning rate")
    for axes in grid[:, 0]:
        axes.set_ylabel("validation, %")
    figure.tight_layout(pad=0.4, h_pad=0.7, w_pad=0.5)
    return figure


def _words(arm: str) -> str:
    words = arm.replace("_", " ")
    return re.sub(r"\bmoslora\b", "MoSLoRA", re.sub(r"\blora\b", "LoRA", words))


def _curve(axes: Axes, found: Sequence[Trial], colour: str, style: str) -> None:
    drawn = [trial for trial in found if trial.mean is not None]
    axes.plot([trial.rate for trial in drawn], [100 * trial.mean for trial in drawn], style, color=colour)


def _panel(axes: Axes, found: Sequence[Trial], choice: Choice, colour: str) -> None:
    axes.set_xscale("log")
    axes.set_ylim(-3, 103)
    axes.grid(axis="y", color=FAINT, linewidth=0.4)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    _curve(axes, found, colour, "o-")
    for trial in found:
        axes.plot(
            [trial.rate] * len(trial.means), [100 * mean for mean in trial.means], ".", color=colour, ms=3, alpha=0.45
        )
        if trial.mean is None:
            axes.plot([trial.rate], [0], "x", color=GREY)
        elif trial.rate == choice.best:
            axes.plot([trial.rate], [100 * trial.mean], "o", color=colour, mfc="none", ms=8, mew=0.9, clip_on=False)

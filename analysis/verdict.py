"""What the runs say about each claim of the paper: a paragraph made from the numbers, whichever way they came out.

A claim holds here, or its opposite does, only if both 95% intervals of the difference lie on the same side of zero:
the t interval over the seeds, and the bootstrap over seeds and items. Where enough pairs of seeds are there for the
exact test by seed to reach 0.05 at all (six), it must do so as well. Otherwise the smallest detectable difference
says whether the paper's gap would have been found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from . import commands
from .aggregate import Row, Setting
from .arms import RATE, contexts, settings_of, split
from .claims import Arm, Statement, paper_gap
from .compare import Comparison, present
from .formats import interval, p_value, points
from .load import REFERENCES
from .paper import PaperNumbers
from .statistics import ALPHA, smallest_p
from .tables import csv_text, escape_latex, heading, plain
from .task_table import Document

HOLDS = "holds here"
OPPOSITE = "the opposite holds here"
SMALLER = "no gap as large as the paper's here"
OPEN = "cannot be told"
ONE_SEED = "not tested"
NOT_COMPARABLE = "not comparable"
NOT_RUN = "not run"
CSV_FIELDS = (
    *("scale", "protocol", "base", "quantization", "claim", "outcome", "unit", "difference", "n", "low", "high"),
    *("bootstrap_low", "bootstrap_high", "p_seed", "p_item", "detectable", "paper_gap"),
)

_SCALES = {
    "smoke": "a tiny model on a generated world, trained for minutes",
    "small": "a small model on part of the data",
}


@dataclass(frozen=True)
class Verdict:
    """One claim in one setting, with its outcome and the sentences that give the reasons.

    Attributes:
        gap: the paper's in points, or the one that stands in for it (:class:`analysis.claims.Statement`).
        where: base model or other conditions, where a page has several.
    """

    statement: Statement
    title: str
    outcome: str
    reasons: tuple[str, ...]
    comparison: Comparison | None
    gap: float | None
    where: str = ""

    @property
    def paper_gap(self) -> float | None:
        """The size of the claim in the paper."""
        return self.gap if self.statement.gap else None


@dataclass(frozen=True)
class VerdictPage(Document):
    """The page of all verdicts of one experiment, scale and protocol, and the verdicts themselves."""

    experiment: str = ""
    scale: str = ""
    protocol: str = ""
    reminder: str = ""
    verdicts: tuple[Verdict, ...] = ()


def build(
    experiment: str,
    scale: str,
    protocol: str,
    compared: Sequence[Comparison],
    rows: Sequence[Row],
    statements: Sequence[Statement],
    numbers: PaperNumbers,
) -> VerdictPage:
    """The verdict of one scale and protocol."""
    verdicts = verdicts_of(experiment, scale, protocol, compared, rows, statements, numbers)
    title = f"Verdict, {experiment.replace('_', ' ')}: scale {scale}, evaluation protocol {protocol}"
    tuned = any(run.rate for found in compared for run in (*found.first.runs, *found.second.runs))
    reminder = reminder_of(scale, tuned)
    paragraphs = [heading(2, title), f"{plain(reminder)}\n"]
    for found in verdicts:
        paragraphs.append(f"**{plain(found.title)}: {found.outcome}.** {plain(' '.join(found.reasons))}\n")
    latex = [f"{escape_latex(reminder)}\n"]
    for found in verdicts:
        latex.append(
            rf"\paragraph{{{escape_latex(found.title)}: {found.outcome}.}} {escape_latex(' '.join(found.reasons))}"
            + "\n"
        )
    lines = [{"scale": scale, "protocol": protocol, **_csv_line(found)} for found in verdicts]
    return VerdictPage(
        folder=f"{scale}/{protocol}",
        name="verdict",
        title=title,
        markdown="\n".join(paragraphs),
        csv=csv_text(CSV_FIELDS, lines),
        latex="\n".join(latex),
        experiment=experiment,
        scale=scale,
        protocol=protocol,
        reminder=reminder,
        verdicts=tuple(verdicts),
    )


def reminder_of(scale: str, tuned: bool = False) -> str:
    """What a verdict cannot say, whatever the numbers are.

    Args:
        tuned: whether a learning rate was chosen for every arm by itself.
    """
    what = _SCALES.get(scale)
    far = (
        "These runs are of the paper's scale."
        if scale == "paper"
        else f"These runs are of scale {scale}{f': {what}' if what else ''}. They cannot say whether a difference of "
        "the paper exists at its scale, nor how large it is there: neither a gap nor the lack of one carries over "
        "from other models, data and lengths of training. They show what the methods do here, and whether the "
        "measurement could have told."
    )
    rates = (
        "Every method is compared at the learning rate that was chosen for it on validation items, from a grid and "
        "few seeds; its variants (ranks, fractions of the data) are at the same rate."
        if tuned
        else "Every arm is compared at the settings that its row names; at another learning rate a difference may be "
        "another."
    )
    return (
        f"{far} {rates} The paper's gaps come from single unseeded runs as far as is known. The intervals are those "
        "of each claim alone, not adjusted for the number of claims."
    )


# --------------------------------------------------------------------------------------------------------- the claims


def verdicts_of(
    experiment: str,
    scale: str,
    protocol: str,
    compared: Sequence[Comparison],
    rows: Sequence[Row],
    statements: Sequence[Statement],
    numbers: PaperNumbers,
) -> list[Verdict]:
    """A verdict on every claim, in each setting (base model and quantisation) and context that has runs."""
    found = []
    for setting in dict.fromkeys(row.setting for row in rows):
        known = {
            (_key(comparison.first.row), _key(comparison.second.row)): comparison
            for comparison in compared
            if comparison.first.row.setting == setting
        }
        have = {_key(row): row for row in rows if row.setting == setting and row.method not in REFERENCES}
        for context in contexts(have):
            where = ", ".join(_where(setting, context, several=len(contexts(have)) > 1))
            for statement in statements:
                title = f"{statement.text} ({statement.source})" + (f" [{where}]" if where else "")
                gap = paper_gap(statement.gap or statement.yardstick, numbers)
                sides = (statement.first, statement.second)
                keys = present(have, statement, context)
                missing = [side for side, key in zip(sides, keys, strict=True) if key is None]
                comparison = None if missing else known[keys]
                if comparison is None:
                    outcome, reasons = NOT_RUN, [f"No runs of {' and '.join(side.title for side in missing)}."]
                else:
                    outcome, reasons = judge(comparison, statement, gap)
                if outcome == NOT_RUN:
                    reasons.append(_command(experiment, scale, protocol, missing or sides, have, context))
                found.append(Verdict(statement, title, outcome, tuple(reasons), comparison, gap and gap[0], where))
    return found


def _key(row: Row) -> tuple[str, str]:
    return row.method, row.label


def _where(setting: Setting | None, context: str, several: bool) -> list[str]:
    names = [] if setting is None else [setting.base]
    if setting is not None and setting.quantization != "none":
        names.append(setting.quantization.upper())
    return names + ([context] if context and (setting is None or several) else [])


def judge(comparison: Comparison, statement: Statement, gap: tuple[float, str] | None) -> tuple[str, list[str]]:
    """Outcome of one claim and the sentences that give the reasons.

    Args:
        gap: the paper's in points, and the cells that it is from.
    """
    found, n = comparison.mean, len(comparison.seeds)
    if found is None:
        return NOT_RUN, ["The two have no seed in common with a task that both were evaluated on."]
    reasons = [_numbers(comparison, statement)]
    if comparison.barriers:
        return NOT_COMPARABLE, [*reasons, f"But {'; '.join(comparison.barriers)}."]
    reasons += _collapsed(comparison, statement)
    if n == 1:
        return ONE_SEED, [*reasons, "One pair of seeds has no spread: no interval and no test."]
    reasons.append(_tests(comparison))
    side = decided(comparison)
    if side:
        reasons.append(_beside(found.by_seed.mean, gap, statement))
        return (HOLDS if side > 0 else OPPOSITE), [reason for reason in reasons if reason]
    if not found.by_seed.sd:
        return OPEN, [*reasons, "All pairs differ by the same amount: there is no spread to tell chance by."]
    power = f"The smallest detectable difference is {100 * found.detectable:.1f} points"
    if gap is None:
        return OPEN, [*reasons, f"{power}; the paper's gap is not known."]
    named = _named_gap(gap, statement)
    if 100 * found.detectable > gap[0]:
        return OPEN, [*reasons, f"{power}, larger than {named}."]
    above = 100 * found.by_seed.interval[1] < gap[0]
    outside = " The interval over seeds lies below it as well." if above else ""
    return SMALLER, [*reasons, f"{power}, not larger than {named}, which would have been found.{outside}"]


def decided(comparison: Comparison) -> int:
    """1 if the first arm is better, -1 if the second is, 0 if the rule above leaves it open."""
    found, n = comparison.mean, len(comparison.seeds)
    if n < 2 or not found.by_seed.sd:
        return 0
    if smallest_p(n) <= ALPHA < found.p_seed:
        return 0
    lows, highs = zip(found.by_seed.interval, found.interval, strict=True)
    return int(min(lows) > 0) - int(max(highs) < 0)


# ------------------------------------------------------------------------------------------------------ the sentences


def _numbers(comparison: Comparison, statement: Statement) -> str:
    first, second = comparison.means
    n = len(comparison.seeds)
    many = "1 pair of seeds" if n == 1 else f"{n} pairs of seeds"
    titles = (_at_rate(statement.first, comparison.first.row), _at_rate(statement.second, comparison.second.row))
    return (
        f"{titles[0]}: {100 * first.mean:.1f}, {titles[1]}: {100 * second.mean:.1f} in the "
        f"mean over {len(comparison.tasks)} task{'s' * (len(comparison.tasks) > 1)}, a difference of "
        f"{points(comparison.mean.by_seed.mean)} points over {many}."
    )


def _at_rate(side: Arm, row: Row) -> str:
    rate = settings_of(row.label).get(RATE)
    return side.title if rate is None else f"{side.title} (at rate {rate})"


def _tests(comparison: Comparison) -> str:
    found, n = comparison.mean, len(comparison.seeds)
    least = smallest_p(n)
    cannot = f" ({n} pairs cannot have a p below {p_value(least)})" if least > ALPHA else ""
    by_item = "no answers to pair by item" if found.p_item is None else f"p by item {p_value(found.p_item)}"
    return (
        f"95% over seeds {interval(found.by_seed.interval)}, over seeds and items {interval(found.interval)}; "
        f"p by seed {p_value(found.p_seed)}{cannot}, {by_item}."
    )


def _collapsed(comparison: Comparison, statement: Statement) -> list[str]:
    texts = [
        f"{len(found)} of {len(arm.runs)} of {side.title}"
        for arm, side, found in zip(
            (comparison.first, comparison.second),
            (statement.first, statement.second),
            comparison.collapsed,
            strict=True,
        )
        if found
    ]
    return [f"Collapsed runs: {', '.join(texts)}; they are part of these numbers."] if texts else []


def _named_gap(gap: tuple[float, str], statement: Statement) -> str:
    of = "the paper's gap" if statement.gap else "the paper's gap of MoSLoRA over LoRA"
    return f"{of}, {gap[0]:+.1f} ({gap[1]})"


def _beside(mean: float, gap: tuple[float, str] | None, statement: Statement) -> str:
    return "" if gap is None else f"For comparison, {_named_gap(gap, statement)}."


def _command(
    experiment: str,
    scale: str,
    protocol: str,
    sides: Sequence[Arm],
    have: Mapping[tuple[str, str], Row],
    context: str,
) -> str:
    """The command line that makes what is missing, with the seeds that the other arms have."""
    seeds = sorted({seed for (_, label), row in have.items() if split(label)[1] == context for seed in row.seeds})
    lines = []
    for side in sides:
        overrides = " ".join([*context.split(","), side.overrides]).strip()
        lines += commands.run(experiment, scale, overrides, protocol, seeds)
    return f"To run it: {commands.joined(lines)}"


def _csv_line(found: Verdict) -> dict[str, object]:
    line: dict[str, object] = {"claim": found.statement.id, "outcome": found.outcome, "unit": "points"}
    line["paper_gap"] = found.paper_gap
    if found.comparison is not None and found.comparison.mean is not None:
        setting, mean = found.comparison.first.row.setting, found.comparison.mean
        line |= {} if setting is None else {"base": setting.base, "quantization": setting.quantization}
        low, high = mean.by_seed.interval or (None, None)
        bootstrap_low, bootstrap_high = mean.interval or (None, None)
        shares = {"difference": mean.by_seed.mean, "low": low, "high": high, "detectable": mean.detectable}
        shares |= {"bootstrap_low": bootstrap_low, "bootstrap_high": bootstrap_high}
        line |= {key: None if share is None else 100 * share for key, share in shares.items()}
        line |= {"n": mean.by_seed.n, "p_seed": mean.p_seed, "p_item": mean.p_item}
    return {key: value for key, value in line.items() if value is not None}

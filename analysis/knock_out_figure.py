"""Figures of knock-out curves: how well the trained adapters answer without a growing share of their subspaces.

From the curves in the run records (``python -m <experiment>.knock_out``), which need no adapter any more: a figure per
scale, setting (base model and its quantisation), evaluation and unit. Runs with other tasks or settings than most of a
figure's runs are named and left out.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moslora_core.errors import UserError
from moslora_core.record import KnockOut, RunRecord, override_label

from .aggregate import Row, Setting, Summary, rows_of
from .figure5 import Figure
from .load import LeftOut, Run
from .paper import PaperNumbers
from .style import GREY, LOOKS
from .subspace import by_setting, chosen_rows, over_seeds, setting_of
from .subspace_plots import Chart, Curve, draw_lines
from .tables import MISSING, ONE_SEED, Grid, bullets, csv_text, heading, markdown_table, mean_sd
from .visual import short_names

# Order -> what is said of it, its colour and marker: others than those of LoRA and MoSLoRA in the other figures.
ORDERS = {
    "weakest": ("weakest first", *LOOKS[2]),
    "random": ("in random order", GREY, "o"),
    "strongest": ("strongest first", *LOOKS[3]),
}
PARTS = {"diagonal": ("all diagonal terms", *LOOKS[4]), "mixed": ("all mixed terms", *LOOKS[5])}
UNITS = {"pairs": "terms", "ranks": "ranks"}
CSV_FIELDS = (
    *("scale", "base", "quantization", "evaluation", "unit", "method", "label", "order", "share", "mean", "sd", "n"),
    *("unparsed", "subspaces"),
)
_FACTS = {
    "pairs": "The terms m_ij B_i A_j of every module are ranked by |m_ij| |B_i| |A_j| and set to zero: r² of them "
    "where there is a mixer, the r with i = j in LoRA.",
    "ranks": "The ranks i of every module are ranked by the norm of their terms' sizes |m_ij| |B_i| |A_j| and set to "
    "zero, with the whole row and column of the mixer: r of them in LoRA and MoSLoRA alike.",
}
_LINES = (
    "Means over the tasks and the seeds, in percent; bands are ± one sample standard deviation of the seeds, cut at 0 "
    "and 100. At the left the whole adapter, at the right none of it."
)
_PARTS = "Single marks: the mixer's diagonal alone is set to zero, or all of it but the diagonal."


@dataclass(frozen=True)
class _Group:
    """The curves of runs that differ only in their seed."""

    row: Row
    curves: tuple[KnockOut, ...]

    def values(self, order: str) -> dict[float, Summary]:
        """Share that is gone -> mean accuracy over the tasks and the draws, over the seeds."""
        found: dict[float, list[float]] = defaultdict(list)
        for curve in self.curves:
            draws: dict[float, list[float]] = defaultdict(list)
            for point in curve.points:
                if point.order == order or (point.order in ("none", "all") and order in ORDERS):
                    draws[point.share].append(statistics.fmean(point.tasks.values()))
            for share, means in draws.items():
                found[share].append(statistics.fmean(means))
        return {share: over_seeds(means) for share, means in sorted(found.items())}

    def orders(self) -> list[str]:
        there = {point.order for curve in self.curves for point in curve.points}
        return [order for order in (*ORDERS, *PARTS) if order in there]

    @property
    def name(self) -> str:
        return self.row.name + (ONE_SEED if len(self.curves) == 1 else "")


def build(
    experiment: str, runs_dir: Path, runs: Sequence[Run], left_out: Sequence[LeftOut], numbers: PaperNumbers
) -> list[Figure]:
    """The figures of every scale and setting, in a stable order; one without a picture where there are no curves.

    Args:
        runs_dir: where the records of the runs are.
        left_out, numbers: not used; the tables name the runs that are left out, and the paper has no such figure.
    """
    figures = []
    for scale, setting, members in by_setting(runs):
        curves: dict[str, list[tuple[Run, KnockOut]]] = defaultdict(list)
        damaged = []
        for run in members:
            record = RunRecord(runs_dir / run.path)
            try:
                for name, curve in record.knock_outs().items():
                    curves[name].append((run, curve))
            except UserError as error:
                damaged.append(f"Left out: {run.path}: {' '.join(str(error).replace(f'{record.path}/', '').split())}.")
        place = _Place(experiment, scale, setting)
        if not curves:
            facts = ["Not drawn: no run was evaluated without some of its subspaces.", *damaged]
            figures.append(_figure(place, "", [*facts, place.missing(members, "generate+pairs")], "", {}))
        figures += [_drawn(place, name, found, members, damaged) for name, found in sorted(curves.items())]
    return figures


@dataclass(frozen=True)
class _Place:
    """Where the figures of one scale and setting stand."""

    experiment: str
    scale: str
    setting: Setting | None

    @property
    def words(self) -> list[str]:
        if self.setting is None:
            return []
        quantized = [] if self.setting.quantization == "none" else [self.setting.quantization]
        return [self.setting.base, *quantized]

    def missing(self, runs: Sequence[Run], name: str) -> str:
        """What makes the curves of that name, of runs that have none."""
        evaluation, unit, *limit = name.split("+")
        mode = evaluation.split("-")[0]
        more = [f"evaluation.mode={mode}"] if mode in ("loglikelihood", "harness") else []
        more += ["evaluation.split=validation"] if evaluation.endswith("-validation") else []
        more += [f"evaluation.{entry}" for entry in limit]
        more += [] if unit == "pairs" else [f"evaluation.knock_out.unit={unit}"]
        commands = []
        for row in rows_of(runs, lambda run: {}, ()):
            overrides = [] if row.label == "default" else row.label.split(",")
            # A study's label has no learning rate, and its runs have one.
            rates = {run.rate for run in runs if run.rate and (run.method, run.label) == (row.method, row.label)}
            overrides += sorted(rates)
            words = [f"scale={self.scale} method={row.method}", *overrides, f"seed={','.join(map(str, row.seeds))}"]
            commands.append(f"python -m {self.experiment}.knock_out -m {' '.join([*words, *more])}")
        shown = "; ".join(commands[:3]) + (f"; and {len(commands) - 3} more" if len(commands) > 3 else "")
        return f"Missing: {shown}."


def _drawn(
    place: _Place, name: str, found: Sequence[tuple[Run, KnockOut]], members: Sequence[Run], facts: Sequence[str]
) -> Figure:
    """The figure of the curves of one name."""
    kinds = Counter(_kind(curve) for _, curve in found)
    usual = max(kinds, key=kinds.__getitem__)
    curves = {run.path: curve for run, curve in found if _kind(curve) == usual}
    facts = [
        *facts,
        *(f"Left out: {run.path}: other tasks or settings." for run, c in found if run.path not in curves),
    ]
    runs = [run for run, _ in found if run.path in curves]
    paths = {(run.method, run.label, run.seed): run.path for run in runs}
    rows = short_names(rows_of(runs, lambda run: {}, (), setting_of))
    groups = [_Group(row, tuple(curves[paths[row.method, row.label, seed]] for seed in row.seeds)) for row in rows]
    any_curve = groups[0].curves[0]
    unit = any_curve.unit
    kept = chosen_rows([(group.row, "mixed" in group.orders()) for group in groups])
    shown = [group for group in groups if (group.row.method, group.row.label) in kept]
    lacking = [run for run in members if run.path not in {run.path for run, _ in found}]
    facts = [
        f"Evaluation {any_curve.evaluation}, {_items(any_curve)}.",
        *(_FACTS[unit], _LINES, *([_PARTS] if any("mixed" in group.orders() for group in shown) else [])),
        *(
            [f"Not drawn, but in the data: {', '.join(g.name for g in groups if g not in shown)}."]
            if len(groups) > len(shown)
            else []
        ),
        *([f"{ONE_SEED} one seed."] if any(len(group.curves) == 1 for group in groups) else []),
        *facts,
        *([place.missing(lacking, name)] if lacking else []),
    ]
    charts = _charts(shown, unit)
    pictures = draw_lines(charts, min(3, len(charts)))
    return _figure(place, name, facts, _csv(place, name, groups), pictures, _table(groups))


def _kind(curve: KnockOut) -> str:
    """What curves must have in common to be averaged; the batch size changes no answer."""
    settings = {key: value for key, value in curve.settings.items() if key != "batch_size"}
    return json.dumps([curve.evaluation, curve.unit, curve.items, settings], sort_keys=True)


def _items(curve: KnockOut) -> str:
    counts = sorted(set(curve.items.values()))
    each = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{each} items of {'each of ' if len(curve.items) > 1 else ''}{len(curve.items)} tasks"


def _charts(groups: Sequence[_Group], unit: str) -> list[Chart]:
    """A panel a group, over the same axes."""
    found = [(group.name, _curves(group)) for group in groups]
    top = max(high for _, curves in found for curve in curves for *_, high in curve.points)
    edge = 3  # room for the marks at the ends
    limits = (-edge, max(top, 1.0) + edge)
    x = f"{UNITS[unit]} gone (%)"
    return [Chart(x, "accuracy (%)", curves, left=-edge, limits=limits, name=name) for name, curves in found]


def _curves(group: _Group) -> list[Curve]:
    curves = []
    for order in group.orders():
        label, colour, marker = (ORDERS | PARTS)[order]
        points = []
        for share, summary in group.values(order).items():
            ends = (summary.mean + sign * (summary.sd or 0.0) for sign in (-1, 1))
            low, high = (100 * min(1.0, max(0.0, end)) for end in ends)
            points.append((100 * share, 100 * summary.mean, low, high))
        curves.append(Curve(label, colour, marker, points))
    return curves


def _csv(place: _Place, name: str, groups: Sequence[_Group]) -> str:
    setting = place.setting or Setting("")
    head = {"scale": place.scale, "base": setting.base, "quantization": setting.quantization}
    lines = []
    for group in groups:
        curve = group.curves[0]
        head |= {"evaluation": curve.evaluation, "unit": curve.unit, "subspaces": curve.subspaces}
        head |= {"method": group.row.method, "label": group.row.label}
        for order in group.orders():
            for share, summary in group.values(order).items():
                unparsed = [p.unparsed for c in group.curves for p in c.points if _at(p, order, share)]
                known = [value for value in unparsed if value is not None]
                lines.append(
                    head
                    | {"order": order, "share": f"{share:.6g}", "mean": f"{100 * summary.mean:.6g}", "n": summary.n}
                    | ({} if summary.sd is None else {"sd": f"{100 * summary.sd:.6g}"})
                    | ({"unparsed": f"{100 * statistics.fmean(known):.6g}"} if known else {})
                )
    return csv_text(CSV_FIELDS, lines)


def _at(point: object, order: str, share: float) -> bool:
    return point.share == share and (point.order == order or (point.order in ("none", "all") and order in ORDERS))


def _table(groups: Sequence[_Group]) -> str:
    """One line a group: the whole adapter, half of its subspaces by order, and each part alone."""
    rows = []
    for group in groups:
        by_order = {order: group.values(order) for order in group.orders()}
        whole = next((values[0.0] for order, values in by_order.items() if order in ORDERS), None)
        half = [by_order.get(order, {}).get(0.5) for order in ORDERS]
        parts = [next(iter(by_order[part].values())) if part in by_order else None for part in PARTS]
        cells = [mean_sd(summary, 1, 100) for summary in (whole, *half, *parts)]
        rows.append([group.name, str(len(group.curves)), *cells])
    halves = [f"half gone, {label}" for label, *_ in ORDERS.values()]
    gone = [f"without {label}" for label, *_ in PARTS.values()]
    headers = ["Method", "n", "whole", *halves, *gone]
    empty = [at for at in range(2, len(headers)) if all(row[at] == MISSING for row in rows)]
    keep = [at for at in range(len(headers)) if at not in empty]
    return markdown_table(Grid([headers[at] for at in keep], [[row[at] for at in keep] for row in rows]))


def _figure(
    place: _Place, name: str, facts: Sequence[str], csv: str, pictures: Mapping[str, bytes], table: str = ""
) -> Figure:
    words = place.words
    title = f"Without some of the subspaces: scale {place.scale}"
    title += f", {name.replace('+', ', ')}" if name else ""
    if words:
        title += f", base model {words[0]}" + "".join(f", {word.upper()}" for word in words[1:])
    file = ["knock-out", *(name.split("+") if name else []), *(override_label([word]) for word in words)]
    return Figure(
        folder=f"{place.scale}/subspaces",
        name="-".join(file),
        title=title,
        markdown="\n".join(part for part in [heading(2, title), bullets(facts), table] if part),
        csv=csv,
        pictures=dict(pictures),
    )

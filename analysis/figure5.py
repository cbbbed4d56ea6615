"""Figure 5 of the paper: a radar of abilities, from our runs.

The axes are MMBench's six abilities, in English and in Chinese, where any run has them; elsewhere (the smoke scale)
the tasks of Table 5, which are the kinds of question. A figure per scale, evaluation protocol and setting (base model
and its quantisation), a line per method and overrides: the mean over its seeds.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from moslora_core.record import TaskResult, override_label

from .aggregate import ResultsOf, Row, Setting
from .load import REFERENCES, LeftOut, Run
from .paper import PaperNumbers, PaperTable
from .paper_block import paper_block
from .radar import Line, Panel, Scale, draw, scale_for
from .style import LOOKS
from .tables import ONE_SEED, Grid, bullets, csv_text, heading, markdown_table
from .task_table import by_scale_and_protocol, cell, commits_fact, one_seed_note, seeds_cell
from .visual import benchmarks, named_rows, overrides, published, setting_of, task_titles

# l2-category of MMBench's items -> the axis; VLMEvalKit's result files have the short names.
ABILITIES = {
    "attribute_reasoning": ("AR", "Attribute reasoning"),
    "relation_reasoning": ("RR", "Relation reasoning"),
    "logic_reasoning": ("LR", "Logic reasoning"),
    "coarse_perception": ("CP", "Coarse perception"),
    "finegrained_perception (instance-level)": ("FP-S", "Fine-grained, single-instance"),
    "finegrained_perception (cross-instance)": ("FP-C", "Fine-grained, cross-instance"),
}
MMBENCH = {"mmbench_en": "EN", "mmbench_cn": "CN"}
NORMALISED = "axis / its largest mean"
MOST_LINES = 4  # the bands of more cannot be told apart
FIRST = {"lora": LOOKS[0], "moslora": LOOKS[1]}  # the paper's two; the others are drawn while there is room
CSV_FIELDS = (
    *("scale", "protocol", "base", "quantization", "panel", "method", "label", "axis", "unit", "value", "sd", "n"),
    *("normalisation", "plotted", "plotted_low", "plotted_high", "drawn"),
)


@dataclass(frozen=True)
class Figure:
    """A figure in its formats with its data; ``folder`` is relative to the reports of the experiment."""

    folder: str
    name: str
    title: str
    markdown: str
    csv: str
    pictures: dict[str, bytes]

    def files(self) -> dict[str, str | bytes]:
        """Suffix -> content."""
        return {"md": self.section(self.name), "csv": self.csv, **self.pictures}

    def section(self, base: str) -> str:
        """The figure inside a report, ``base`` being the path of its files there without their suffix."""
        heading, _, rest = self.markdown.partition("\n\n")
        picture = f"![{self.title}]({base}.png)\n\n" if self.pictures else ""
        return f"{heading}\n\n{picture}{rest}"


@dataclass(frozen=True)
class _Chart:
    """The rows of one panel over its axes (id -> title)."""

    name: str
    axes: Mapping[str, str]
    rows: Sequence[Row]


@dataclass(frozen=True)
class _Point:
    """What is drawn of a row on an axis: its mean and band, in percent or as a share of the axis' largest mean."""

    value: float
    low: float
    high: float


def build(
    runs: Sequence[Run], left_out: Sequence[LeftOut], numbers: PaperNumbers, normalised: bool = False
) -> list[Figure]:
    """A figure per scale, evaluation protocol and setting, in a stable order.

    Args:
        left_out: not used; the table names the runs that are left out.
        normalised: divide every axis by its largest mean, as the paper's figure is normalised; otherwise all axes
            have the same scale, in percent.
    """
    figures = []
    for scale, protocol, group in by_scale_and_protocol(runs):
        if protocol.endswith("-validation"):  # for choosing settings, not for results
            continue
        by_setting: dict[Setting, list[Run]] = {}
        for run in group:
            by_setting.setdefault(setting_of(protocol)(run), []).append(run)
        for setting, members in sorted(by_setting.items(), key=lambda item: item[0].order):
            figures.append(_figure(scale, protocol, setting, members, numbers, normalised))
    return figures


def _figure(
    scale: str, protocol: str, setting: Setting, runs: Sequence[Run], numbers: PaperNumbers, normalised: bool
) -> Figure:
    charts = _charts(runs, protocol, numbers.tables["table5"])
    drawn = _drawn(charts)
    points = [_points(chart, drawn, normalised) for chart in charts]
    radial = _scale(points, normalised)
    quantized = [] if setting.quantization == "none" else [setting.quantization]
    title = f"Figure 5, abilities: scale {scale}, evaluation protocol {protocol}, base model {setting.base}"
    title = ", ".join([title, *(name.upper() for name in quantized)])
    enough = bool(drawn) and all(len(chart.axes) >= 3 for chart in charts)
    caption = _caption(charts, drawn, radial, normalised) if enough else [_nothing(charts, drawn)]
    lines = [
        {"scale": scale, "protocol": protocol, "base": setting.base, "quantization": setting.quantization, **line}
        for chart, of_chart in zip(charts, points, strict=True)
        for line in _csv_lines(chart, drawn, of_chart, normalised)
    ]
    return Figure(
        folder=f"{scale}/{protocol}",
        name="-".join(["figure5", *(override_label([name]) for name in (setting.base, *quantized))]),
        title=title,
        markdown=_markdown(title, [*caption, commits_fact(runs)], charts, numbers),
        csv=csv_text(CSV_FIELDS, lines),
        pictures=draw(_panels(charts, drawn, points), radial) if enough else {},
    )


# ------------------------------------------------------------------------------------------------------ the numbers


def _charts(runs: Sequence[Run], protocol: str, paper: PaperTable) -> list[_Chart]:
    """A chart per language of MMBench that any run has abilities of, else one of the tasks; rows in the same order."""

    def chart(name: str, axes: Mapping[str, str], results_of: ResultsOf) -> _Chart:
        return _Chart(name, axes, named_rows(runs, protocol, results_of, tuple(axes)))

    abilities = {ability: title for ability, (_, title) in ABILITIES.items()}
    charts = [
        chart(name, abilities, lambda run, task=task: _abilities(run, protocol, task))
        for task, name in MMBENCH.items()
        if any(_abilities(run, protocol, task) for run in runs)
    ]
    if charts:
        return charts
    tasks = benchmarks(runs, protocol, paper)
    titles = task_titles(tasks, paper)
    # The nine benchmarks are no abilities: their place is Table 5.
    axes = {} if set(tasks) & set(published(paper)) else {task: titles[task] for task in tasks}
    return [chart("", axes, lambda run: run.evaluations[protocol].tasks)]


def _abilities(run: Run, protocol: str, task: str) -> dict[str, TaskResult]:
    """Ability -> result, under either of its names."""
    result = run.evaluations[protocol].tasks.get(task)
    found = (result.breakdown if result is not None else None) or {}
    names = [(ability, name) for ability, (short, _) in ABILITIES.items() for name in (short, ability)]
    return {ability: found[name] for ability, name in names if name in found}


def _drawn(charts: Sequence[_Chart]) -> list[int]:
    """Numbers of the rows that are drawn: trained ones, the paper's methods first while there is room."""
    numbers = [
        number
        for number, rows in enumerate(zip(*(chart.rows for chart in charts), strict=True))
        if rows[0].method not in REFERENCES and any(summary for row in rows for summary in row.tasks.values())
    ]
    rows = charts[0].rows
    return sorted(sorted(numbers, key=lambda number: rows[number].method not in FIRST)[:MOST_LINES])


def _points(chart: _Chart, drawn: Sequence[int], normalised: bool) -> dict[tuple[int, str], _Point]:
    """(row, axis) -> point, for the drawn rows where they have the axis."""
    points = {}
    for axis in chart.axes:
        found = {number: summary for number in drawn if (summary := chart.rows[number].tasks[axis]) is not None}
        largest = max((summary.mean for summary in found.values()), default=0.0)
        if normalised and largest == 0:
            continue
        factor = 1 / largest if normalised else 100
        for number, summary in found.items():
            low, high = (summary.mean + sign * (summary.sd or 0.0) for sign in (-1, 1))
            points[number, axis] = _Point(factor * summary.mean, factor * max(low, 0.0), factor * min(high, 1.0))
    return points


def _scale(points: Iterable[Mapping[object, _Point]], normalised: bool) -> Scale:
    found = [point for of_chart in points for point in of_chart.values()] or [_Point(0.0, 0.0, 0.0)]
    low, high = min(point.low for point in found), max(point.high for point in found)
    return scale_for(low, high, 1.0) if normalised else scale_for(low, high, 100.0, limit=100.0)


def _csv_lines(
    chart: _Chart, drawn: Sequence[int], points: Mapping[tuple[int, str], _Point], normalised: bool
) -> list[dict[str, object]]:
    """One mapping a number: the mean and deviation in percent, and what is drawn of them."""
    lines = []
    for number, row in enumerate(chart.rows):
        for axis in chart.axes:
            if (summary := row.tasks[axis]) is None:
                continue
            line = {"panel": chart.name, "method": row.method, "label": row.label, "axis": axis, "unit": "percent"}
            line |= {"value": 100 * summary.mean, "n": summary.n, "drawn": "yes" if number in drawn else "no"}
            line |= {} if summary.sd is None else {"sd": 100 * summary.sd}
            line |= {"normalisation": NORMALISED if normalised else "none"}
            if (point := points.get((number, axis))) is not None:
                line |= {"plotted": point.value, "plotted_low": point.low, "plotted_high": point.high}
            lines.append(line)
    return lines


# ------------------------------------------------------------------------------------------------------ the picture


def _panels(
    charts: Sequence[_Chart], drawn: Sequence[int], points: Sequence[Mapping[tuple[int, str], _Point]]
) -> list[Panel]:
    looks = looks_of([charts[0].rows[number] for number in drawn])
    panels = []
    for chart, of_chart in zip(charts, points, strict=True):
        lines = []
        for number, (colour, marker) in zip(drawn, looks, strict=True):
            row = chart.rows[number]
            found = [of_chart.get((number, axis)) for axis in chart.axes]
            single = len(row.seeds) == 1
            lines.append(
                Line(
                    label=row.name + (ONE_SEED if single else ""),
                    colour=colour,
                    marker=marker,
                    values=[point.value if point else None for point in found],
                    band=[(point.low, point.high) if point else None for point in found],
                    single=single,
                )
            )
        panels.append(Panel(chart.name, [_wrapped(title) for title in chart.axes.values()], lines))
    return panels


def looks_of(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Colour and marker: LoRA's and MoSLoRA's own are the same in every figure, the others share out what is left.

    There are as many as the palette has colours.
    """
    plain = {row.method: number for number, row in reversed([*enumerate(rows)]) if not overrides(row)}
    fixed = {plain[method]: look for method, look in FIRST.items() if method in plain}
    free = [look for look in LOOKS if look not in fixed.values()]
    others = iter(sorted(free, key=lambda look: look in FIRST.values()))
    return [fixed[number] if number in fixed else next(others) for number in range(len(rows))]


def _wrapped(title: str) -> str:
    return "\n".join(textwrap.wrap(title, 14, break_long_words=False, break_on_hyphens=False))


# --------------------------------------------------------------------------------------------------------- the words


def _caption(charts: Sequence[_Chart], drawn: Sequence[int], radial: Scale, normalised: bool) -> list[str]:
    named = [chart.name for chart in charts if chart.name]
    axes = f"the six abilities of MMBench, {' and '.join(named)}" if named else "the tasks of Table 5"
    ends = f"from {radial.centre:g} at the centre to {radial.rings[-1]:g} at the outer ring"
    if normalised:
        scale = (
            f"Normalised: every axis is divided by the largest mean among its lines; {ends}. How the paper normalises "
            "is not known."
        )
    else:
        scale = f"In percent, the same scale on every axis, {ends}."
    lines = [
        f"Axes: {axes}.",
        scale,
        "Lines are means over the seeds, dashed where there is one seed. Bands are ± one sample standard deviation, "
        "cut at the ends of the scale.",
    ]
    rows = charts[0].rows
    hidden = [row.name for number, row in enumerate(rows) if number not in drawn]
    if hidden:
        lines.append(f"Not drawn, but in the data: {', '.join(hidden)}.")
    for chart in charts:
        for number in drawn:
            row = chart.rows[number]
            panel = f" ({chart.name})" if chart.name else ""
            if absent := [title for axis, title in chart.axes.items() if row.tasks[axis] is None]:
                lines.append(f"{row.name} lacks {', '.join(absent)}{panel}: its line is open there.")
    return lines


def _nothing(charts: Sequence[_Chart], drawn: Sequence[int]) -> str:
    if not charts[0].axes:
        return "Not drawn: no run has abilities of MMBench; evaluate mmbench_en or mmbench_cn."
    if not drawn:
        return "Not drawn: no trained run has any of the axes."
    return f"Not drawn: {len(charts[0].axes)} axes are too few; evaluate at least three tasks."


def _markdown(title: str, facts: Sequence[str], charts: Sequence[_Chart], numbers: PaperNumbers) -> str:
    parts = [heading(2, title), bullets(facts)]
    for chart in charts:
        rows = [row for row in chart.rows if any(row.tasks.values())]
        cells = [
            [row.name, seeds_cell(row), *(cell(row, row.tasks[axis], 1, 100) for axis in chart.axes)] for row in rows
        ]
        if chart.name:
            parts.append(heading(3, f"MMBench {chart.name}"))
        if chart.axes:
            parts += [markdown_table(Grid(["Method", "n", *chart.axes.values()], cells)), bullets(one_seed_note(rows))]
    paper = paper_block(numbers.tables["figure5"], numbers.sources)
    parts += [heading(3, paper.title)]
    parts += [markdown_table(paper.grid)] if numbers.tables["figure5"].claims() else []
    return "\n".join(part for part in [*parts, bullets(paper.notes)] if part)

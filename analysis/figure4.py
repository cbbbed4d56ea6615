"""Figure 4 of the paper: average accuracy against the share of the training data, from our runs.

Points are runs that set ``data.train_items``, and at 100% those of the same method that do not; how many items that
is stands in their configuration. A figure per scale and evaluation protocol. The paper's points, of which two are
known, stand in a panel of their own: their scale is another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .aggregate import Row, row_name, rows_of
from .arms import RATE, find, parts_of, settings_of, split, without
from .claims import Arm, Gap, Statement
from .commands import FULL
from .figure5 import Figure, looks_of
from .formats import interval, p_value, points
from .load import REFERENCES, LeftOut, Run, with_config
from .paper import Claim, PaperNumbers, PaperTable
from .paper_block import claims_text, paper_block
from .statistics import Estimate, estimate, sign_flip
from .style import FAINT, GREY, LOOKS, TEXT, pictures, publication
from .table4 import NOT_TASKS
from .tables import MISSING, ONE_SEED, Grid, bullets, csv_text, heading, markdown_table, significant
from .task_table import by_scale_and_protocol, commits_fact

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

ITEMS = "data.train_items"
PUBLISHED_ITEMS = FULL["commonsense_reasoning", "paper"]  # all of which are used where no number is set
METHODS = {"lora": "LoRA", "moslora": "MoSLoRA"}  # of the paper's figure
CSV_FIELDS = (
    *("origin", "scale", "protocol", "method", "label", "items", "share", "column", "unit", "value", "sd", "n"),
    *("low", "high", "p_seed", "provenance", "source"),
)


@dataclass(frozen=True)
class _Point:
    """Runs of an arm on one number of training items: seed -> average over the tasks, as a share."""

    items: int
    label: str
    averages: Mapping[int, float]

    @property
    def estimate(self) -> Estimate:
        return estimate(list(self.averages.values()))


@dataclass(frozen=True)
class _Curve:
    """An arm over the numbers of training items; ``label`` has what sets it apart beside them."""

    method: str
    label: str
    points: tuple[_Point, ...]

    @property
    def name(self) -> str:
        return row_name(self.method, [] if self.label == "default" else [self.label])

    @property
    def by_items(self) -> dict[int, _Point]:
        return {point.items: point for point in self.points}


def build(runs: Sequence[Run], left_out: Sequence[LeftOut], numbers: PaperNumbers) -> list[Figure]:
    """A figure per scale and evaluation protocol that has runs on a part of the data, in a stable order.

    Args:
        left_out: not used; the tables name these runs. The figure names those on all data whose configuration, which
            says how many items that is, cannot be read.
    """
    figures = []
    for scale, protocol, group in by_scale_and_protocol(runs):
        if protocol.endswith("-validation"):  # for choosing settings, not for results
            continue
        tasks = tuple(column.id for column in numbers.tables["table4"].columns if column.id not in NOT_TASKS)
        group = [run for run in group if set(tasks) <= set(run.evaluations[protocol].tasks)]
        group, unread = _with_size(group)
        curves = _curves(group, protocol, tasks)
        if curves:
            figures.append(_figure(scale, protocol, group, unread, curves, full_size(group), numbers))
    return figures


def _with_size(runs: Sequence[Run]) -> tuple[list[Run], list[LeftOut]]:
    """The runs, and apart those of the figure's arms on all data whose configuration cannot be read."""
    arms = {(run.method, without(run.label, ITEMS, RATE)) for run in runs if _counts(run.label)}

    def on_all_data(run: Run) -> bool:
        return ITEMS not in settings_of(run.label) and (run.method, without(run.label, RATE)) in arms

    return with_config(runs, on_all_data)


def full_size(runs: Sequence[Run]) -> int | None:
    """Training items of the runs that set no number of them; None where they do not agree or do not say.

    A run whose configuration cannot be read has no say.
    """
    full = [run for run in runs if ITEMS not in settings_of(run.label) and run.method not in REFERENCES]
    sizes = {_size(run) for run in full if run.config}
    return sizes.pop() if len(sizes) == 1 else None


def _size(run: Run) -> int | None:
    size = run.setting(ITEMS)
    if size is None and run.setting("data.published_sizes"):
        return PUBLISHED_ITEMS
    return size if isinstance(size, int) else None


def statements(runs: Sequence[Run]) -> list[Statement]:
    """The paper's claims about less data, for the numbers of items that were run."""
    full = full_size(runs)
    sizes = {int(settings_of(run.label)[ITEMS]) for run in runs if _counts(run.label)}
    found = []
    for items in sorted(sizes):
        label = f"{ITEMS}={items}"
        on = f"{items:,} training items" if full is None else f"{_percent(items, full)} of the training data"
        arms = [Arm(f"{METHODS[method]} on {on}", method, (label,)) for method in ("moslora", "lora")]
        found.append(Statement(f"data_{items}", f"MoSLoRA is better than LoRA on {on}", "Figure 4", *arms))
        if full is not None and 2 * items == full:
            all_of_it = Arm("LoRA on all of the training data", "lora")
            text = "MoSLoRA on half of the training data is better than LoRA on all of it"
            gap = Gap("figure4", "moslora", "lora", "50", "100")
            found.append(Statement("data_half", text, "Figure 4", arms[0], all_of_it, gap))
    return found


def _counts(label: str) -> bool:
    return settings_of(label).get(ITEMS, "").isdigit()


def _percent(items: int, full: int) -> str:
    return f"{significant(100 * items / full)}%".replace(".0%", "%")


# ------------------------------------------------------------------------------------------------------ the numbers


def _curves(runs: Sequence[Run], protocol: str, tasks: Sequence[str]) -> list[_Curve]:
    """The arms that have runs on a part of the data, in the order of the tables."""
    rows = rows_of(runs, lambda run: run.evaluations[protocol].tasks, tasks)
    by_key = {(row.method, row.label): row for row in rows}
    arms: dict[tuple[str, str, str], set[int]] = {}
    for row in rows:
        if _counts(row.label):
            core, context = split(without(row.label, ITEMS, RATE))
            arms.setdefault((row.method, core, context), set()).add(int(settings_of(row.label)[ITEMS]))
    full, curves = full_size(runs), []
    for (method, core, context), sizes in arms.items():
        labels = {size: ",".join(sorted([*parts_of(core), f"{ITEMS}={size}"])) for size in sizes}
        if full is not None:
            labels.setdefault(full, core)
        keys = {size: find(by_key, method, (label,), context) for size, label in sorted(labels.items())}
        points = tuple(
            _point(size, by_key[key], runs, protocol, tasks) for size, key in keys.items() if key is not None
        )
        if points:
            label = ",".join(part for part in (core, context) if part not in ("", "default")) or "default"
            curves.append(_Curve(method, label, points))
    return curves


def _point(items: int, row: Row, runs: Sequence[Run], protocol: str, tasks: Sequence[str]) -> _Point:
    members = [run for run in runs if (run.method, run.label) == (row.method, row.label)]
    averages = {
        run.seed: sum(run.evaluations[protocol].tasks[task].value for task in tasks) / len(tasks)
        for run in sorted(members, key=lambda run: run.seed)
    }
    return _Point(items, row.label, averages)


def _figure(
    scale: str,
    protocol: str,
    runs: Sequence[Run],
    unread: Sequence[LeftOut],
    curves: Sequence[_Curve],
    full: int | None,
    numbers: PaperNumbers,
) -> Figure:
    paper = numbers.tables["figure4"]
    title = f"{paper.title}, scale {scale}, evaluation protocol {protocol}"
    drawn = _drawn(curves) if full is not None else []
    sizes = sorted({point.items for curve in curves for point in curve.points})
    members = [run for run in runs if any(run.label == point.label for curve in curves for point in curve.points)]
    facts = [*_caption(curves, drawn, full), commits_fact(members)]
    parts = [heading(2, title), bullets(facts), markdown_table(_table(curves, sizes, full))]
    notes = [f"{ONE_SEED} one seed, so no interval."] if _single(curves) else []
    notes += [f"{entry.path}: {entry.reason}" for entry in unread]
    parts += [bullets(notes)] if notes else []
    parts += _gap_section(curves, sizes, full)
    block = paper_block(paper, numbers.sources)
    parts += [heading(3, block.title), bullets(block.facts), markdown_table(block.grid), bullets(block.notes)]
    lines = [
        {"origin": "measured", "scale": scale, "protocol": protocol, "provenance": "MEASURED", **line}
        for line in _csv_lines(curves, sizes, full)
    ]
    return Figure(
        folder=f"{scale}/{protocol}",
        name="figure4",
        title=title,
        markdown="\n".join(parts),
        csv=csv_text(CSV_FIELDS, [*lines, *_paper_lines(paper)]),
        pictures=draw(drawn, full, paper, _other_full(numbers)) if drawn else {},
    )


def _drawn(curves: Sequence[_Curve]) -> list[_Curve]:
    """The paper's two methods first, while there are colours."""
    first = sorted(curves, key=lambda curve: (curve.label != "default", curve.method not in METHODS))
    return [curve for curve in curves if curve in first[: len(LOOKS)]]


def _single(curves: Sequence[_Curve]) -> bool:
    return any(len(point.averages) == 1 for curve in curves for point in curve.points)


def _share(items: int, full: int | None) -> str:
    return f"{items:,} items" if full is None else f"{_percent(items, full)} ({items:,})"


def _table(curves: Sequence[_Curve], sizes: Sequence[int], full: int | None) -> Grid:
    headers = ["Method", *(_share(size, full) for size in sizes)]
    return Grid(headers, [[curve.name, *(_cell(curve.by_items.get(size)) for size in sizes)] for curve in curves])


def _cell(point: _Point | None) -> str:
    """``81.2 (79.0 to 83.4), n=5``: mean over the seeds and its interval."""
    if point is None:
        return MISSING
    found = point.estimate
    if found.interval is None:
        return f"{100 * found.mean:.1f}{ONE_SEED}"
    low, high = (100 * end for end in found.interval)
    return f"{100 * found.mean:.1f} ({low:.1f} to {high:.1f}), n={found.n}"


def _gaps(curves: Sequence[_Curve]) -> dict[int, dict[int, float]]:
    """Items -> seed -> MoSLoRA minus LoRA, as shares, where both were run without further overrides."""
    plain = {curve.method: curve.by_items for curve in curves if curve.label == "default"}
    if not set(METHODS) <= set(plain):
        return {}
    gaps = {}
    for size in sorted(plain["lora"].keys() & plain["moslora"].keys()):
        theirs, ours = plain["lora"][size].averages, plain["moslora"][size].averages
        if seeds := sorted(theirs.keys() & ours.keys()):
            gaps[size] = {seed: ours[seed] - theirs[seed] for seed in seeds}
    return gaps


def _gap_section(curves: Sequence[_Curve], sizes: Sequence[int], full: int | None) -> list[str]:
    gaps = _gaps(curves)
    if not gaps:
        return []
    rows = []
    for size, by_seed in gaps.items():
        found = estimate(list(by_seed.values()))
        p = sign_flip(list(by_seed.values()))
        n = f"{found.n}{ONE_SEED if found.n == 1 else ''}"
        rows.append([_share(size, full), n, points(found.mean), interval(found.interval), p_value(p)])
    grid = Grid(["Training data", "n", "MoSLoRA - LoRA", "95% over seeds", "p by seed"], rows)
    return [heading(3, "The gap"), bullets([_widening(gaps, full)]), markdown_table(grid)]


def _widening(gaps: Mapping[int, Mapping[int, float]], full: int | None) -> str:
    """Whether the gap widens from the smallest share to the largest, over the seeds that both have."""
    above = sum(estimate(list(of.values())).mean > 0 for of in gaps.values())
    text = f"MoSLoRA is above LoRA at {above} of {len(gaps)} sizes of the training data."
    least, most = min(gaps), max(gaps)
    seeds = sorted(gaps[least].keys() & gaps[most].keys())
    if least == most or not seeds:
        return f"{text} Whether the gap widens with the data cannot be told from one size."
    found = estimate([gaps[most][seed] - gaps[least][seed] for seed in seeds])
    change = f"From {_share(least, full)} to {_share(most, full)} the gap changes by {points(found.mean)} points"
    if found.interval is None:
        return f"{text} {change}: one pair of seeds, no interval and no test."
    low, high = found.interval
    outcome = "it widens here" if low > 0 else "it narrows here" if high < 0 else "whether it widens cannot be told"
    return f"{text} {change} (95% over {found.n} seeds {interval(found.interval)}): {outcome}."


def _csv_lines(curves: Sequence[_Curve], sizes: Sequence[int], full: int | None) -> list[dict[str, object]]:
    """One mapping a point, and one a gap; in percent and points."""
    lines = []
    for curve in curves:
        for point in curve.points:
            line = {"method": curve.method, "label": point.label, "items": point.items, "column": "avg"}
            lines.append(line | {"unit": "percent"} | _numbers(point.estimate) | _shares(point.items, full))
    for size, by_seed in _gaps(curves).items():
        line = {"method": "moslora - lora", "items": size, "column": "gap", "unit": "points"}
        values = list(by_seed.values())
        p = sign_flip(values)
        line |= _numbers(estimate(values)) | _shares(size, full) | ({} if p is None else {"p_seed": p})
        lines.append(line)
    return lines


def _numbers(found: Estimate) -> dict[str, object]:
    line: dict[str, object] = {"value": 100 * found.mean, "n": found.n}
    if found.interval is not None:
        low, high = found.interval
        line |= {"sd": 100 * found.sd, "low": 100 * low, "high": 100 * high}
    return line


def _shares(items: int, full: int | None) -> dict[str, object]:
    return {} if full is None else {"share": 100 * items / full}


def _paper_lines(paper: PaperTable) -> list[dict[str, object]]:
    return [
        {"origin": "paper", "method": row.id, "share": column.id, "column": "avg", "unit": column.unit}
        | {"value": claim.value, "provenance": claim.provenance, "source": claim.source}
        for row in paper.rows
        for column in paper.columns
        for claim in row.cells.get(column.id, ())
        if claim.value is not None
    ]


def _caption(curves: Sequence[_Curve], drawn: Sequence[_Curve], full: int | None) -> list[str]:
    if full is None:
        return [
            "Not drawn: how many items 100% are is not known; it is read from the configuration of runs without "
            f"{ITEMS}, of which there are none or several sizes."
        ]
    lines = [
        f"Mean over the tasks against the share of the {full:,} training items; all of them are 100%.",
        "Points are means over the seeds, bars their 95% t intervals; an open point is one seed, which has none.",
        "The panel at the right has the paper's points as far as they are known, with the mark of their provenance. "
        "They are of another scale and do not compare.",
    ]
    if hidden := [curve.name for curve in curves if curve not in drawn]:
        lines.append(f"Not drawn, but in the data: {', '.join(hidden)}.")
    return lines


# ------------------------------------------------------------------------------------------------------ the picture


def _other_full(numbers: PaperNumbers) -> Claim | None:
    """What Table 4 says of LoRA on all data, if that is not what Figure 4 says."""
    here, there = (
        next((row.cells.get(column, ()) for row in numbers.tables[table].rows if row.id == "lora"), ())
        for table, column in (("figure4", "100"), ("table4", "avg"))
    )
    contradicts = bool(here and there) and here[0].value != there[0].value
    return there[0] if contradicts else None


def draw(curves: Sequence[_Curve], full: int, paper: PaperTable, other: Claim | None) -> dict[str, bytes]:
    with publication():
        return pictures(compose(curves, full, paper, other))


def compose(curves: Sequence[_Curve], full: int, paper: PaperTable, other: Claim | None = None) -> Canvas:
    """Our curves in a wide panel, the paper's points in a narrow one.

    Args:
        other: LoRA's average on all data as Table 4 has it, where it contradicts the figure's.
    """
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(TEXT, 2.5))
    ours, theirs = figure.subplots(1, 2, width_ratios=(2, 1))
    looks = looks_of([_look_row(curve) for curve in curves])
    shift = 0.7  # percent of the data: bars of equal shares beside one another
    for number, (curve, (colour, marker)) in enumerate(zip(curves, looks, strict=True)):
        _draw_curve(ours, curve, full, colour, marker, shift * (number - (len(curves) - 1) / 2))
    shares = sorted({100 * point.items / full for curve in curves for point in curve.points})
    _axes(ours, "Share of the training data (%)", "Average accuracy (%)", shares)
    markers = {curve.method: marker for curve, (_, marker) in zip(curves, looks, strict=True)}
    _draw_paper(theirs, _known(paper, other), markers)
    _axes(theirs, "Share of the training data (%)", "", [float(column.id) for column in paper.columns])
    theirs.text(0, 1.03, f"Paper, {paper.setting}", transform=theirs.transAxes, color=GREY, va="bottom")
    handles, names = ours.get_legend_handles_labels()
    figure.legend(handles, names, loc="lower center", ncols=min(3, len(names)))
    rows = -(-len(names) // 3)
    bottom = (0.5 + 0.16 * rows) / 2.5
    figure.subplots_adjust(left=0.48 / TEXT, right=1 - 0.08 / TEXT, top=0.92, bottom=bottom, wspace=0.22)
    return figure


def _look_row(curve: _Curve) -> Row:
    return Row(None, curve.method, curve.label, curve.name, (), {}, None, {}, {}, None, (), None)


def _draw_curve(axes: Axes, curve: _Curve, full: int, colour: str, marker: str, shift: float) -> None:
    x = [100 * point.items / full + shift for point in curve.points]
    found = [point.estimate for point in curve.points]
    axes.plot(x, [100 * one.mean for one in found], color=colour, linewidth=1, zorder=3)
    for at, one in zip(x, found, strict=True):
        if one.interval is None:
            axes.plot([at], [100 * one.mean], marker, color=colour, markerfacecolor="white", zorder=4)
            continue
        low, high = (100 * end for end in one.interval)
        axes.plot([at, at], [low, high], color=colour, linewidth=0.8, zorder=3)
        axes.plot([at], [100 * one.mean], marker, color=colour, zorder=4)
    single = ONE_SEED if all(one.interval is None for one in found) else ""
    axes.plot([], [], marker=marker, color=colour, label=curve.name + single)


def _known(paper: PaperTable, other: Claim | None) -> list[tuple[str, str, float, Claim]]:
    """(method, words, share, claim) of the paper's points; ``other`` is one that contradicts the figure."""
    found = [
        (row.id, row.title, float(column.id), claim)
        for row in paper.rows
        for column in paper.columns
        for claim in row.cells.get(column.id, ())
        if claim.value is not None
    ]
    return found + ([] if other is None else [("", "LoRA in Table 4", 100.0, other)])


def _draw_paper(axes: Axes, known: Sequence[tuple[str, str, float, Claim]], markers: Mapping[str, str]) -> None:
    for method, words, share, claim in known:
        marker, right = markers.get(method, "x"), share > 60
        axes.plot([share], [claim.value], marker, color=GREY, markerfacecolor="white", zorder=4)
        place = {"textcoords": "offset points", "ha": "right" if right else "left", "va": "center"}
        at = {"xytext": (-5 if right else 5, 0), "fontsize": 6.5, "color": GREY}
        axes.annotate(f"{words} {claims_text([claim])}", (share, claim.value), **place, **at)
    if known:
        values = [claim.value for *_, claim in known]
        axes.set_ylim(min(values) - 1, max(values) + 1)


def _axes(axes: Axes, x: str, y: str, shares: Sequence[float]) -> None:
    axes.set(xlabel=x, ylabel=y, xlim=(0, 106))
    axes.set_xticks(shares, [f"{share:.3g}" for share in shares])
    axes.grid(axis="y", color=FAINT, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(width=0.6, length=2.5)

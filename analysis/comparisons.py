"""The page of comparisons and the verdict of a scale and an evaluation protocol, from the runs."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from . import figure4, table1, table4, verdict
from .aggregate import Row, rows_of
from .claims import STATEMENTS, Statement, paper_gap
from .compare import Arm, Comparison, Difference, compare, pairs
from .formats import interval, p_value, points
from .items import Reader
from .load import REFERENCES, LeftOut, Run
from .paper import PaperNumbers, PaperTable
from .statistics import ALPHA, RESAMPLES, smallest_p
from .tables import (
    FEWER_TASKS,
    MISSING,
    ONE_SEED,
    Block,
    Grid,
    Page,
    csv_text,
    latex_page,
    markdown_page,
)
from .task_table import Document, by_scale_and_protocol, commits_fact, with_tasks
from .visual import benchmarks, named_rows, setting_of, task_titles

OTHER_ITEMS = "*"
NOT_COMPARABLE = "!"
CSV_FIELDS = (
    *("scale", "protocol", "base", "quantization", "first", "first_label", "second", "second_label"),
    *("column", "seed", "unit", "value", "sd", "n", "low", "high", "bootstrap_low", "bootstrap_high"),
    *("p_seed", "p_seed_holm", "p_wilcoxon", "p_item", "p_item_holm", "smallest_p_seed", "detectable"),
    *("items", "items_add_up", "only_first", "only_second", "p_mcnemar", "tasks"),
    *("first_runs", "first_collapsed", "second_runs", "second_collapsed", "comparable"),
)


@dataclass(frozen=True)
class _Layout:
    """What a page has of its experiment: the tasks, their titles, and the rows."""

    title: str
    tasks: tuple[str, ...]
    titles: Mapping[str, str]
    rows: Sequence[Row]


def build(
    experiment: str,
    runs_dir: Path,
    runs: Sequence[Run],
    left_out: Sequence[LeftOut],
    numbers: PaperNumbers,
    statements: Sequence[Statement] | None = None,
) -> list[Document]:
    """The comparisons and the verdict of every scale and evaluation protocol, in a stable order.

    Evaluations on validation files are for choosing settings, and are not compared.

    Args:
        runs_dir: where the predictions of the runs are.
        statements: the claims to judge, whose arms name the overrides that they were run with; None for the paper's
            claims with every method as it is by default.
    """
    reader = Reader(runs_dir)
    found, given = [], statements
    for scale, protocol, group in by_scale_and_protocol(runs):
        if protocol.endswith("-validation"):
            continue
        statements = claims_of(experiment, group) if given is None else given
        layout, group, unused = _layout(experiment, scale, protocol, group, left_out, numbers)
        compared = comparisons(layout, group, protocol, reader, statements)
        found.append(_page(experiment, scale, protocol, layout, group, compared, unused, reader, statements, numbers))
        found.append(verdict.build(experiment, scale, protocol, compared, layout.rows, statements, numbers))
    return found


def claims_of(experiment: str, runs: Sequence[Run]) -> list[Statement]:
    """The paper's claims, and those of its tables and figures over sizes that only the runs can name."""
    of_sizes = (table1.statements, figure4.statements) if experiment == "commonsense_reasoning" else ()
    return [*STATEMENTS[experiment], *(statement for make in of_sizes for statement in make(runs))]


def _layout(
    experiment: str,
    scale: str,
    protocol: str,
    runs: Sequence[Run],
    left_out: Sequence[LeftOut],
    numbers: PaperNumbers,
) -> tuple[_Layout, list[Run], list[LeftOut]]:
    if experiment == "visual_instruction":
        paper = numbers.tables["table5"]
        tasks = benchmarks(runs, protocol, paper)
        runs, unused = with_tasks(runs, left_out, scale, protocol, tasks)
        tasks = tuple(task for task in tasks if any(task in run.evaluations[protocol].tasks for run in runs))
        rows = named_rows(runs, protocol, lambda run: run.evaluations[protocol].tasks, tasks)
        return _Layout("Visual instruction tuning", tasks, task_titles(tasks, paper), rows), runs, unused
    paper = numbers.tables["table4"]
    titles = _titles(paper)
    runs, unused = with_tasks(runs, left_out, scale, protocol, titles)
    tasks = tuple(task for task in titles if any(task in run.evaluations[protocol].tasks for run in runs))
    rows = rows_of(runs, lambda run: run.evaluations[protocol].tasks, tasks)
    return _Layout("Commonsense reasoning", tasks, titles, rows), runs, unused


def _titles(paper: PaperTable) -> dict[str, str]:
    return {column.id: column.title for column in paper.columns if column.id not in table4.NOT_TASKS}


def comparisons(
    layout: _Layout, runs: Iterable[Run], protocol: str, reader: Reader, statements: Sequence[Statement]
) -> list[Comparison]:
    """Every pair of the rows that is to be compared (:func:`analysis.compare.pairs`)."""
    by_row = defaultdict(list)
    for run in runs:
        by_row[run.method, run.label].append(run)
    arms, untrained = [], defaultdict(dict)
    for row in layout.rows:
        # A row's runs are those of its setting: a label may stand in two of them.
        members = [run for run in by_row[row.method, row.label] if _is_of(run, row, protocol)]
        arms.append(Arm(row, tuple(sorted(members, key=lambda run: run.seed))))
        if row.method in REFERENCES and row.method != "majority":
            untrained[row.setting] |= {task: found.mean for task, found in row.tasks.items() if found is not None}
    return [
        compare(first, second, protocol, layout.tasks, reader, untrained[first.row.setting])
        for first, second in pairs(arms, statements)
    ]


def _is_of(run: Run, row: Row, protocol: str) -> bool:
    return row.setting is None or setting_of(protocol)(run) == row.setting


# ------------------------------------------------------------------------------------------------------------ the page


def _page(
    experiment: str,
    scale: str,
    protocol: str,
    layout: _Layout,
    runs: Sequence[Run],
    compared: Sequence[Comparison],
    left_out: Sequence[LeftOut],
    reader: Reader,
    statements: Sequence[Statement],
    numbers: PaperNumbers,
) -> Document:
    page = Page(
        label=f"tab:comparisons-{experiment}-{scale}-{protocol}",
        measured=Block(
            title=f"Comparisons, {layout.title[0].lower()}{layout.title[1:]}: scale {scale}, "
            f"evaluation protocol {protocol}",
            grid=_with_base(_means(compared, layout), compared),
            facts=[*_facts(), commits_fact(runs)],
            notes=[*_marks(compared, layout), *_notes(compared, layout), *_faults(runs, protocol, reader)],
        ),
        further=[_by_task(compared, layout)] if compared else [],
        left_out=[f"{entry.path}: {entry.reason}" for entry in left_out],
        paper=_gaps(statements, numbers),
    )
    lines = [line for comparison in compared for line in _csv_lines(comparison)]
    return Document(
        folder=f"{scale}/{protocol}",
        name="comparisons",
        title=page.measured.title,
        markdown=markdown_page(page),
        csv=csv_text(CSV_FIELDS, [{"scale": scale, "protocol": protocol, **line} for line in lines]),
        latex=latex_page(page),
    )


def _with_base(plain: Grid, compared: Sequence[Comparison]) -> Grid:
    """The grid behind a column of base models, where the experiment has several."""
    settings = [comparison.first.row.setting for comparison in compared]
    if not settings or settings[0] is None:
        return plain
    begins = [number for number, (above, here) in enumerate(pairwise(settings), start=1) if above != here]
    cells = [[setting.base, *line] for setting, line in zip(settings, plain.rows, strict=True)]
    return Grid(["Base", *plain.headers], cells, left=2, groups=begins)


def _means(compared: Sequence[Comparison], layout: _Layout) -> Grid:
    headers = [
        *("First - second", "n", "First", "Second", "Difference", "95% over seeds", "95% over seeds and items"),
        *("p by seed", "p by item", "Detectable", "Collapsed"),
    ]
    return Grid(headers, [_mean_cells(comparison, layout) for comparison in compared])


def _mean_cells(comparison: Comparison, layout: _Layout) -> list[str]:
    n = len(comparison.seeds)
    name = comparison.title + (NOT_COMPARABLE if comparison.barriers else "")
    counts = "; ".join(
        f"{len(found)} of {len(arm.runs)}"
        for arm, found in zip((comparison.first, comparison.second), comparison.collapsed, strict=True)
    )
    found = comparison.mean
    if found is None:
        return [name, str(n), *[MISSING] * 8, counts]
    fewer = FEWER_TASKS if len(comparison.tasks) < len(layout.tasks) else ""
    first, second = comparison.means
    return [
        name,
        f"{n}{ONE_SEED if n == 1 else ''}",
        *(f"{100 * of.mean:.1f}" for of in (first, second)),
        points(found.by_seed.mean) + fewer,
        interval(found.by_seed.interval),
        interval(found.interval),
        p_value(found.p_seed),
        p_value(found.p_item) + (OTHER_ITEMS if found.p_item is not None and not found.adds_up else ""),
        MISSING if found.detectable is None else f"{100 * found.detectable:.1f}",
        counts,
    ]


def _by_task(compared: Sequence[Comparison], layout: _Layout) -> Block:
    headers = ["First - second", "n", *(layout.titles[task] for task in layout.tasks)]
    rows = [
        [
            comparison.title + (NOT_COMPARABLE if comparison.barriers else ""),
            f"{len(comparison.seeds)}{ONE_SEED if len(comparison.seeds) == 1 else ''}",
            *(_task_cell(comparison, task) for task in layout.tasks),
        ]
        for comparison in compared
    ]
    return Block(
        title="By task",
        grid=_with_base(Grid(headers, rows), compared),
        facts=[
            "Difference in points (p by seed; p by item), each p adjusted by Holm over the tasks of its row. "
            "Unadjusted ones, intervals, and the discordant items of each seed with McNemar's p are in the CSV."
        ],
    )


def _task_cell(comparison: Comparison, task: str) -> str:
    if (found := comparison.by_task.get(task)) is None:
        return MISSING
    n = "" if found.by_seed.n == len(comparison.seeds) else f" n={found.by_seed.n}"
    if found.by_seed.n == 1:
        return points(found.by_seed.mean) + n
    mark = OTHER_ITEMS if found.p_item is not None and not found.adds_up else ""
    by_seed, by_item = (p_value(of.get(task)) for of in (comparison.holm_seed, comparison.holm_item))
    return f"{points(found.by_seed.mean)} ({by_seed}; {by_item}{mark}){n}"


# ------------------------------------------------------------------------------------------ what the numbers stand on


def _facts() -> list[str]:
    return [
        "Differences in points of the mean over the tasks, over the seeds that both methods have (n pairs).",
        "95% over seeds: t interval of the paired differences. 95% over seeds and items: bootstrap of "
        f"{RESAMPLES} resamples of the seeds and, within each task, of the items; a few seeds make it too narrow to "
        "decide anything alone.",
        "p by seed: exact test over all exchanges of the two methods within a seed; n pairs cannot have a p below "
        f"2 / 2^n, so that fewer than six never reach {ALPHA}. It speaks of the methods. p by item: exchanges of the "
        "answers to an item, in all seeds at once. It speaks of the trained models on other items, not of another "
        "training.",
        "Detectable: the smallest true difference that a paired t test finds with 80% probability, given the spread "
        "of these pairs.",
        "Collapsed, first; second: runs whose mean is below the untrained model's, or with a task more than 10 points "
        "below chance (as answers drawn from the right answers' distribution).",
    ]


def _marks(compared: Sequence[Comparison], layout: _Layout) -> list[str]:
    notes = []
    if any(len(comparison.seeds) == 1 for comparison in compared):
        notes.append(f"{ONE_SEED} one pair of seeds, so no interval and no test.")
    differences: list[Difference] = [found for comparison in compared for found in comparison.by_task.values()]
    if any(not found.adds_up for found in differences):
        notes.append(
            f"{OTHER_ITEMS} right answers, which are not what the task's number adds up; its items are not resampled."
        )
    for comparison in compared:
        if comparison.mean is not None and len(comparison.tasks) < len(layout.tasks):
            absent = ", ".join(layout.titles[task] for task in layout.tasks if task not in comparison.tasks)
            notes.append(f"{FEWER_TASKS} {_name(comparison)}: the mean is without {absent}.")
    return notes


def _name(comparison: Comparison) -> str:
    setting = comparison.first.row.setting
    return comparison.title if setting is None else f"{setting.base}: {comparison.title}"


def _notes(compared: Sequence[Comparison], layout: _Layout) -> list[str]:
    """Barriers and notes; what is the same in many pairs is said once."""
    if not compared:
        return ["Nothing to compare: the runs are of one method."]
    notes = []
    for mark, of in ((f"{NOT_COMPARABLE} not comparable: ", "barriers"), ("", "notes")):
        members = defaultdict(list)
        for comparison in compared:
            for text in getattr(comparison, of):
                members[text].append(_name(comparison))
        for text, names in members.items():
            everywhere = len(names) == len(compared) > 1
            notes.append(f"{mark}{'all pairs' if everywhere else '; '.join(names)}: {text}.")
    paths = {
        path: f"{path} collapsed: {reason}."
        for comparison in compared
        for found in comparison.collapsed
        for path, reason in found.items()
    }
    return notes + [paths[path] for path in sorted(paths)]


def _faults(runs: Sequence[Run], protocol: str, reader: Reader) -> list[str]:
    """Why answers cannot be paired; a reason that many runs have is told with the first of them."""
    faults = [fault for run in runs for fault in reader.items(run, protocol).faults]
    count = Counter(fault.split(": ", 1)[1] for fault in faults)
    told, notes = set(), []
    for fault in faults:
        path, reason = fault.split(": ", 1)
        if reason in told:
            continue
        told.add(reason)
        more = count[reason] - 1
        others = f" and {more} other{'s' * (more > 1)}" if more else ""
        notes.append(f"No tests by item for {path}{others}: {reason}.")
    return notes


def _gaps(statements: Sequence[Statement], numbers: PaperNumbers) -> Block:
    rows = []
    for statement in statements:
        found = paper_gap(statement.gap, numbers)
        gap, cells = (MISSING, MISSING) if found is None else (f"{found[0]:+.1f}", found[1])
        rows.append([f"{statement.first.title} - {statement.second.title}", statement.source, gap, cells])
    return Block(
        title="Paper, the same differences (arXiv 2406.11909)",
        grid=Grid(["First - second", "Where", "Gap (points)", "From"], rows, left=2),
        facts=["At the paper's own scale, from single unseeded runs as far as is known. A dash was not found."],
    )


# ------------------------------------------------------------------------------------------------------------- the CSV


def _csv_lines(comparison: Comparison) -> list[dict[str, object]]:
    """A line for the mean and for each task, and under it one for each seed."""
    first, second = comparison.first, comparison.second
    setting = first.row.setting
    head = {"first": first.row.method, "first_label": first.row.label}
    head |= {"second": second.row.method, "second_label": second.row.label, "unit": "points"}
    head |= {} if setting is None else {"base": setting.base, "quantization": setting.quantization}
    head["comparable"] = "no" if comparison.barriers else "yes"
    lines = []
    if comparison.mean is not None:
        line = _csv_line(comparison.mean) | {"column": "avg", "tasks": len(comparison.tasks)}
        for side, arm, found in zip(("first", "second"), (first, second), comparison.collapsed, strict=True):
            line |= {f"{side}_runs": len(arm.runs), f"{side}_collapsed": len(found)}
        lines += [line, *_seed_lines("avg", comparison.mean, comparison)]
    for task, found in comparison.by_task.items():
        holm = {"p_seed_holm": comparison.holm_seed[task], "p_item_holm": comparison.holm_item[task]}
        lines += [{**_csv_line(found), **holm, "column": task}, *_seed_lines(task, found, comparison)]
    return [head | {key: value for key, value in line.items() if value is not None} for line in lines]


def _csv_line(found: Difference) -> dict[str, object]:
    low, high = found.by_seed.interval or (None, None)
    bootstrap_low, bootstrap_high = found.interval or (None, None)
    shares = {"value": found.by_seed.mean, "sd": found.by_seed.sd, "low": low, "high": high}
    shares |= {"bootstrap_low": bootstrap_low, "bootstrap_high": bootstrap_high, "detectable": found.detectable}
    line = {key: None if share is None else 100 * share for key, share in shares.items()}
    line |= {"n": found.by_seed.n, "p_seed": found.p_seed, "p_wilcoxon": found.p_wilcoxon, "p_item": found.p_item}
    line |= {"smallest_p_seed": smallest_p(found.by_seed.n), "items": found.items}
    return line | ({} if found.items is None else {"items_add_up": "yes" if found.adds_up else "no"})


def _seed_lines(column: str, found: Difference, comparison: Comparison) -> list[dict[str, object]]:
    lines = []
    for seed, value in found.values.items():
        line = {"column": column, "seed": seed, "value": 100 * value, "n": 1}
        if (of_seed := comparison.discordant.get((column, seed))) is not None:
            line |= {"only_first": of_seed.only_first, "only_second": of_seed.only_second, "p_mcnemar": of_seed.p}
        lines.append(line)
    return lines

"""Table 5 of the paper, visual instruction tuning: the benchmarks of every method, by base model and quantisation.

The benchmarks that are scored in parts (MME's perception and cognition, MMBench's circular form) have them in a table
of their own below. The paper's numbers stand apart, because they belong to another scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from moslora_core.record import TaskResult

from .aggregate import Row, Setting
from .load import LeftOut, Run
from .paper import PaperNumbers
from .paper_block import paper_block
from .tables import FEWER_TASKS, Block, Grid, Page
from .task_table import (
    CSV_FIELDS,
    Columns,
    Document,
    by_scale_and_protocol,
    cell,
    csv_line,
    csv_lines,
    differing_note,
    differing_settings,
    distinct,
    document,
    either,
    facts,
    grid,
    memory_kinds,
    one_seed_note,
    row_notes,
    run_notes,
    seeds_cell,
    with_tasks,
)
from .visual import NO_BASE, benchmarks, named_rows, setting_of, task_titles

# A record's values are shares of what can be had; MME's parts are read in points.
PARTS = ("circular", "perception", "cognition")
POINTS = {("mme", "perception"): 2000, ("mme", "cognition"): 800}
# Settings that rows are named by, and those that name the run's own files.
NO_CONDITIONS = ("base", "quantization", "sources", "model_name")


def build(runs: Sequence[Run], left_out: Sequence[LeftOut], numbers: PaperNumbers) -> list[Document]:
    """A document per scale and evaluation protocol, in a stable order."""
    return [
        _document(scale, protocol, group, left_out, numbers) for scale, protocol, group in by_scale_and_protocol(runs)
    ]


def _document(
    scale: str, protocol: str, runs: Sequence[Run], left_out: Sequence[LeftOut], numbers: PaperNumbers
) -> Document:
    paper = numbers.tables["table5"]
    shown = benchmarks(runs, protocol, paper)
    runs, left_out = with_tasks(runs, left_out, scale, protocol, shown)
    tasks = tuple(task for task in shown if any(task in run.evaluations[protocol].tasks for run in runs))
    rows = named_rows(runs, protocol, lambda run: run.evaluations[protocol].tasks, tasks)
    columns = Columns(tasks, shown, task_titles(shown, paper), memory_kinds(rows))
    parts = _parts_of_runs(runs, protocol, tasks)
    part_rows = named_rows(runs, protocol, lambda run: _parts(run, protocol, tasks), parts)
    page = Page(
        label=f"tab:5-{scale}-{protocol}",
        measured=Block(
            title=f"Visual instruction tuning: scale {scale}, evaluation protocol {protocol}",
            grid=_with_base(grid(rows, columns), rows),
            facts=[
                _metrics_fact(runs, protocol, columns),
                *facts(runs, rows, protocol, columns),
                *_setting_facts(rows),
            ],
            notes=[
                *_absent_notes(columns),
                *row_notes(rows, columns),
                *_base_notes(runs, protocol),
                *run_notes(runs, protocol, columns, _settings_notes(runs, protocol)),
            ],
        ),
        further=[_parts_block(part_rows, parts, columns)] if parts else [],
        left_out=[f"{entry.path}: {entry.reason}" for entry in left_out],
        paper=paper_block(paper, numbers.sources),
    )
    lines = [_with_setting(line, row) for row in rows for line in csv_lines(row, columns)]
    lines += [_with_setting(line, row) for row in part_rows for line in _part_lines(row)]
    at = CSV_FIELDS.index("method")
    fields = (*CSV_FIELDS[:at], "base", "quantization", *CSV_FIELDS[at:])
    return document("table5", scale, protocol, page, paper, lines, fields)


def _with_base(plain: Grid, rows: Sequence[Row]) -> Grid:
    """The grid behind a column of base models, a group each."""
    bases = [row.setting.base for row in rows]
    begins = [number for number, (above, base) in enumerate(pairwise(bases), start=1) if above != base]
    cells = [[base, *line] for base, line in zip(bases, plain.rows, strict=True)]
    return Grid(["Base", *plain.headers], cells, left=2, groups=begins)


def _with_setting(line: dict[str, object], row: Row) -> dict[str, object]:
    return {"base": row.setting.base, "quantization": row.setting.quantization, **line}


# ---------------------------------------------------------------------------------------------- parts of a benchmark


def _parts(run: Run, protocol: str, tasks: Sequence[str]) -> Mapping[str, TaskResult]:
    """``task/part`` -> the part's result."""
    results = run.evaluations[protocol].tasks
    return {
        f"{task}/{part}": entry
        for task in tasks
        if task in results
        for part, entry in (results[task].breakdown or {}).items()
        if part in PARTS
    }


def _parts_of_runs(runs: Sequence[Run], protocol: str, tasks: Sequence[str]) -> tuple[str, ...]:
    found = {part for run in runs for part in _parts(run, protocol, tasks)}
    return tuple(name for task in tasks for part in PARTS if (name := f"{task}/{part}") in found)


def _scale_of(part: str) -> tuple[str, int]:
    """Unit of a part in the tables, and the factor from its share to it."""
    points = POINTS.get(tuple(part.split("/")))
    return ("percent", 100) if points is None else ("points", points)


def _part_lines(row: Row) -> list[dict[str, object]]:
    lines = []
    for part, summary in row.tasks.items():
        unit, factor = _scale_of(part)
        lines += [] if summary is None else [csv_line(row, part, unit, summary, factor)]
    return lines


def _parts_block(rows: Sequence[Row], parts: Sequence[str], columns: Columns) -> Block:
    headers = ["Method", "n"]
    for name in parts:
        task, part = name.split("/")
        unit, factor = _scale_of(name)
        of = f" (of {factor} points)" if unit == "points" else ""
        headers.append(f"{columns.titles[task].removesuffix(' (rescaled)')} {part}{of}")
    rows = [row for row in rows if any(row.tasks.values())]
    cells = [
        [row.name, seeds_cell(row), *(cell(row, row.tasks[name], 1, _scale_of(name)[1]) for name in parts)]
        for row in rows
    ]
    return Block(
        title="Parts of the benchmarks",
        grid=_with_base(Grid(headers, cells), rows),
        facts=["In percent where no points are named."],
        notes=one_seed_note(rows),
    )


# -------------------------------------------------------------------------------------------- what the rows stand on


def _metrics_fact(runs: Sequence[Run], protocol: str, columns: Columns) -> str:
    by_metric: dict[str, list[str]] = {}
    for task, metrics in distinct(runs, protocol, columns.tasks, lambda result: result.metric).items():
        by_metric.setdefault(either(metrics), []).append(columns.titles[task])
    named = "; ".join(f"{metric} ({', '.join(titles)})" for metric, titles in by_metric.items())
    return f"Metrics, in percent: {named or 'none'}."


def _setting_facts(rows: Sequence[Row]) -> list[str]:
    lines = [f"Base models: {', '.join(sorted({row.setting.base for row in rows})) or 'none'}."]
    if quantized := sorted({row.setting.quantization for row in rows} - {"none"}):
        names = " and ".join(name.upper() for name in quantized)
        lines.append(f"{names}: rows whose base model is quantised; the paper calls NF4's QLoRA and QMoSLoRA.")
    return lines


def _absent_notes(columns: Columns) -> list[str]:
    if not (absent := [columns.titles[task] for task in columns.shown if task not in columns.tasks]):
        return []
    some, every = len(columns.tasks), len(columns.shown)
    return [
        f"{FEWER_TASKS} {columns.titles['avg']} is over {some} of {every} benchmarks: no run has {either(absent)}. "
        f"It is not comparable with an average over all {every}."
    ]


def _base_notes(runs: Sequence[Run], protocol: str) -> list[str]:
    unknown = sum(setting_of(protocol)(run).base == NO_BASE for run in runs)
    return [f"Warning: {unknown} of {len(runs)} runs do not record their base model."] if unknown else []


def _settings_notes(runs: Sequence[Run], protocol: str) -> list[str]:
    """Settings in which the runs differ; those that only follow the base model and its quantisation are no warning."""
    by_setting: dict[Setting, list[Run]] = {}
    for run in runs:
        by_setting.setdefault(setting_of(protocol)(run), []).append(run)
    within = {key for group in by_setting.values() for key in differing_settings(group, protocol)}
    return [
        differing_note(key, values) if key in within else f"By setting, the evaluation's {key} is {either(values)}."
        for key, values in differing_settings(runs, protocol).items()
        if key not in NO_CONDITIONS
    ]

"""Table 4 of the paper, commonsense reasoning: cost and accuracy of every method, from our runs.

The paper's own numbers stand in a block of their own, because they belong to another scale.
"""

from __future__ import annotations

from collections.abc import Sequence

from .aggregate import rows_of
from .load import LeftOut, Run
from .paper import PaperNumbers
from .paper_block import paper_block
from .tables import Block, Page
from .task_table import (
    Columns,
    Document,
    by_scale_and_protocol,
    csv_lines,
    document,
    facts,
    grid,
    memory_kinds,
    metric_fact,
    row_notes,
    run_notes,
    with_tasks,
)

NOT_TASKS = ("parameters", "hours", "memory", "avg")


def build(runs: Sequence[Run], left_out: Sequence[LeftOut], numbers: PaperNumbers) -> list[Document]:
    """A document per scale and evaluation protocol, in a stable order."""
    return [
        _document(scale, protocol, group, left_out, numbers) for scale, protocol, group in by_scale_and_protocol(runs)
    ]


def _document(
    scale: str, protocol: str, runs: Sequence[Run], left_out: Sequence[LeftOut], numbers: PaperNumbers
) -> Document:
    paper = numbers.tables["table4"]
    tasks = tuple(column.id for column in paper.columns if column.id not in NOT_TASKS)
    runs, left_out = with_tasks(runs, left_out, scale, protocol, tasks)
    rows = rows_of(runs, lambda run: run.evaluations[protocol].tasks, tasks)
    columns = Columns(tasks, tasks, {column.id: column.title for column in paper.columns}, memory_kinds(rows))
    page = Page(
        label=f"tab:4-{scale}-{protocol}",
        measured=Block(
            title=f"Commonsense reasoning: scale {scale}, evaluation protocol {protocol}",
            grid=grid(rows, columns),
            facts=[metric_fact(runs, protocol, columns), *facts(runs, rows, protocol, columns)],
            notes=[*row_notes(rows, columns), *run_notes(runs, protocol, columns)],
        ),
        left_out=[f"{entry.path}: {entry.reason}" for entry in left_out],
        paper=paper_block(paper, numbers.sources),
    )
    return document("table4", scale, protocol, page, paper, [line for row in rows for line in csv_lines(row, columns)])

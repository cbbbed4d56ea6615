"""Writes the tables and figures of the runs: ``python -m analysis.report --runs runs --out reports``.

Each table becomes ``<out>/<experiment>/<scale>/<protocol>/<table>.{md,csv,tex}``, each figure
``<figure>.{md,csv,pdf,svg,png}`` there. ``<out>/report.html`` holds them all in one file to be read from top to
bottom: the paper's tables and figures with its numbers beside ours, the verdict on every claim, and the commands that
make what is missing; ``<out>/report.md`` is the same in Markdown. The same runs give the same bytes. The comparisons
of methods and the verdict on the paper's claims alone read the answers item by item.
"""

from __future__ import annotations

import gc

if __name__ == "__main__":
    # A short process: looking for garbage among a million objects that are all in use would take a sixth of its time,
    # from the first import on.
    gc.disable()

import argparse
import io
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import dropwhile, takewhile
from pathlib import Path

from moslora_core.arguments import Parser
from moslora_core.errors import UserError
from moslora_core.record import write_atomic

from . import commands, html_page
from .contents import SMOKE, Contents, Found, Section, gather
from .exhibits import experiments as all_experiments
from .figure5 import Figure
from .glance import glance
from .paper import load_paper_numbers
from .study_plan import Study, read_study
from .tables import FEWER_TASKS, ONE_SEED, bullets, heading, markdown_table
from .task_table import Document

EXPERIMENTS = all_experiments()
MOST_LINES = 120  # of tables on a terminal; more are only named


def write_report(
    runs_dir: Path,
    out: Path,
    experiments: Sequence[str] = EXPERIMENTS,
    scale: str | None = None,
    figures: bool = True,
    normalised: bool = False,
    comparisons: bool = True,
    subspaces: bool = False,
    studies: Sequence[Study] = (),
) -> tuple[Path, str]:
    """Writes every table and figure and the report that holds them; returns its path and what a terminal shows.

    Args:
        normalised: divide every axis of a radar by its largest mean.
        comparisons: compare the methods and judge the paper's claims.
        subspaces: draw what the mixers do inside the adapters, which reads their weights.
        studies: whose runs alone are shown of their experiment and scale, each arm at the rate chosen for it.

    Raises:
        UserError: if there is no run at all, or a folder cannot be read or written.
    """
    contents = gather(
        *(runs_dir, experiments, load_paper_numbers(), scale),
        figures=figures,
        normalised=normalised,
        comparisons=comparisons,
        subspaces=subspaces,
        studies=studies,
    )
    if not any(found.runs or found.left_out for found in contents.found):
        what = f"{' or '.join(experiments)}{f' at scale {scale}' if scale else ''}"
        first = ", or: ".join(_first(experiment, scale or SMOKE) for experiment in experiments)
        raise UserError(f"no runs of {what} under {runs_dir}; make the first with: {first}")
    for part in contents.parts:
        for suffix, content in part.document.files().items():
            write_atomic(out / f"{part.base}.{suffix}", content)
    write_atomic(out / "report.md", "\n".join(_sections(contents)))
    path = out / "report.html"
    write_atomic(path, html_page.render(contents))
    return path, _shown(contents)


def _first(experiment: str, scale: str) -> str:
    """The command line that makes a first run of an experiment."""
    run = f"scale={scale} method=moslora seed=1"
    stages = {"prepare_data": f"scale={scale}"} | dict.fromkeys(commands.stages(experiment), run)
    return commands.joined(f"python -m {experiment}.{stage} {arguments}" for stage, arguments in stages.items())


# -------------------------------------------------------------------------------------------------------- as Markdown


def _sections(contents: Contents) -> Iterator[str]:
    yield "# Report\n"
    if contents.verdicts:
        yield heading(2, "The claims at a glance")
        yield markdown_table(glance(contents))
    for section in contents.sections:
        yield from _exhibit(section)
    yield from (_with_files(part.base, part.document) for part in contents.further)
    for found in contents.found:
        yield from (_only_left_out(found, scale) for scale in found.unusable)


def _exhibit(section: Section) -> Iterator[str]:
    if section.parts:
        yield from (_with_files(part.base, part.document) for part in section.parts)
        return
    yield heading(2, section.paper.title)
    yield "Missing: there are no runs to make it of. To make them:\n"
    for lines in section.commands.values():
        yield f"```\n{chr(10).join(lines)}\n```\n"


def _with_files(base: str, document: Document | Figure) -> str:
    files = ", ".join(f"[{suffix}]({base}.{suffix})" for suffix in document.files())
    return f"{document.section(base)}\nFiles: {files}\n"


def _only_left_out(found: Found, scale: str) -> str:
    entries = bullets(f"{entry.path}: {entry.reason}" for entry in found.left_out_of(scale))
    return f"## {found.experiment}: scale {scale}\n\nNo run can be used. Left out:\n\n{entries}"


# ------------------------------------------------------------------------------------------------------ on a terminal


def _shown(contents: Contents) -> str:
    """The tables of the methods without what stands around them, as an evaluation prints its results."""
    tables = [
        _table(part.document)
        for section in contents.sections
        for part in section.parts
        if not section.exhibit.is_figure and section.exhibit.experiment is not None
    ]
    tables += [_only_left_out(found, scale) for found in contents.found for scale in found.unusable]
    if contents.verdicts:
        tables.append(f"{heading(2, 'The claims at a glance')}\n{markdown_table(glance(contents))}")
    missing = [section.exhibit.name for section in contents.sections if not section.parts]
    shown, hidden = _within(tables, MOST_LINES)
    lines = [*shown, *([f"{hidden} more tables are in the report.\n"] if hidden else [])]
    return "\n".join([*lines, *([f"Missing: {', '.join(missing)}.\n"] if missing else [])])


def _within(texts: Iterable[str], most: int) -> tuple[list[str], int]:
    """The texts that fit on so many lines, the first in any case, and how many do not."""
    shown, lines, hidden = [], 0, 0
    for text in texts:
        lines += text.count("\n") + 1
        if lines <= most or not shown:
            shown.append(text)
        else:
            hidden += 1
    return shown, hidden


def _table(document: Document) -> str:
    """The title, the first table and the marks under it."""
    title, *lines = document.markdown.split("\n")
    table = takewhile(lambda line: line.startswith("|"), dropwhile(lambda line: not line.startswith("|"), lines))
    marks = [line for line in lines if line.startswith((f"- {ONE_SEED}", f"- {FEWER_TASKS}"))]
    return "\n".join([title, "", *table, "", *marks, ""])


# ------------------------------------------------------------------------------------------------------------ command


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m analysis.report", description="Write the tables and figures.", allow_abbrev=False)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of run records (default: runs)")
    parser.add_argument("--out", type=Path, default=Path("reports"), help="folder to write to (default: reports)")
    parser.add_argument("--experiment", choices=EXPERIMENTS, help="only this experiment")
    parser.add_argument("--scale", help="only this scale, such as smoke")
    parser.add_argument(
        "--study",
        type=Path,
        action="append",
        default=[],
        help="show this study's runs, each arm at its learning rate, in place of all of that scale; repeatable",
    )
    pictures = parser.add_mutually_exclusive_group()
    pictures.add_argument("--no-figures", action="store_true", help="tables only")
    pictures.add_argument(
        "--subspaces",
        action="store_true",
        help="figures of the subspaces inside the adapters too: reads their weights",
    )
    parser.add_argument("--no-comparisons", action="store_true", help="no tests and no verdict: faster")
    parser.add_argument(
        "--normalised",
        action="store_true",
        help="divide every axis of Figure 5 by its largest mean (default: percent)",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        arguments = _arguments(argv)
        experiments = (arguments.experiment,) if arguments.experiment else EXPERIMENTS
        path, text = write_report(
            *(arguments.runs, arguments.out, experiments, arguments.scale),
            figures=not arguments.no_figures,
            normalised=arguments.normalised,
            comparisons=not arguments.no_comparisons,
            subspaces=arguments.subspaces,
            studies=[read_study(path) for path in arguments.study],
        )
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without ± or † shows their codes, not a traceback
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.stdout.write(f"{text}\nreport: {os.fspath(path)}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Writes the tables and figures of the runs: ``python -m analysis.report --runs runs --out reports``.

Each table becomes ``<out>/<experiment>/<scale>/<protocol>/<table>.{md,csv,tex}``, each figure
``<figure>.{md,csv,pdf,svg,png}`` there; ``<out>/report.md`` holds them all. The same runs give the same bytes. The
comparisons of methods and the verdict on the paper's claims alone read the answers item by item.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from moslora_core.errors import UserError
from moslora_core.record import write_atomic

from . import figure5, table4, table5
from .figure5 import Figure
from .load import LeftOut, Run, load_runs
from .paper import PaperNumbers, load_paper_numbers
from .tables import bullets
from .task_table import Document

Build = Callable[[Sequence[Run], Sequence[LeftOut], PaperNumbers], Sequence[Document | Figure]]

# Experiment -> the tables made from its runs, and the figures.
TABLES: dict[str, tuple[Build, ...]] = {
    "commonsense_reasoning": (table4.build,),
    "visual_instruction": (table5.build,),
}
FIGURES: dict[str, tuple[Callable[..., Sequence[Figure]], ...]] = {"visual_instruction": (figure5.build,)}


def write_report(
    runs_dir: Path,
    out: Path,
    experiments: Sequence[str] = tuple(TABLES),
    scale: str | None = None,
    figures: bool = True,
    normalised: bool = False,
    comparisons: bool = True,
    subspaces: bool = False,
) -> tuple[Path, str]:
    """Writes every table and figure and the report that holds them; returns the report's path and text.

    Args:
        normalised: divide every axis of a radar by its largest mean.
        comparisons: compare the methods and judge the paper's claims.
        subspaces: draw what the mixers do inside the adapters, which reads their weights.

    Raises:
        UserError: if there is no run at all, or a folder cannot be read or written.
    """
    numbers = load_paper_numbers()
    sections = []
    for experiment in experiments:
        runs, left_out = load_runs(runs_dir, experiment, scale) if runs_dir.is_dir() else ([], [])
        builds = [*TABLES[experiment]]
        if comparisons:
            from .comparisons import build as compared  # statsmodels takes a second to import

            builds.append(partial(compared, experiment, runs_dir))
        if figures:
            builds += [partial(build, normalised=normalised) for build in FIGURES.get(experiment, ())]
        if subspaces:
            from .subspace_figures import build as inside  # it needs torch

            builds.append(partial(inside, experiment, runs_dir))
        for document in [document for build in builds for document in build(runs, left_out, numbers)]:
            base = f"{experiment}/{document.folder}/{document.name}"
            for suffix, content in document.files().items():
                write_atomic(out / f"{base}.{suffix}", content)
            files = ", ".join(f"[{suffix}]({base}.{suffix})" for suffix in document.files())
            sections.append(f"{document.section(base)}\nFiles: {files}\n")
        tabled = {run.scale for run in runs}
        for untabled in sorted({entry.scale for entry in left_out} - tabled):
            sections.append(_only_left_out(experiment, untabled, left_out))
    if not sections:
        what = f"{' or '.join(experiments)}{f' at scale {scale}' if scale else ''}"
        commands = ", or: ".join(_commands(experiment, scale or "smoke") for experiment in experiments)
        raise UserError(f"no runs of {what} under {runs_dir}; make the first with: {commands}")
    text = "\n".join(["# Report\n", *sections])
    path = out / "report.md"
    write_atomic(path, text)
    return path, text


def _commands(experiment: str, scale: str) -> str:
    """The command line that makes a first run of an experiment."""
    run = f"scale={scale} method=moslora seed=1"
    stages = {"prepare_data": f"scale={scale}", "train": run, "evaluate": run}
    return " && ".join(f"python -m {experiment}.{stage} {arguments}" for stage, arguments in stages.items())


def _only_left_out(experiment: str, scale: str, left_out: Sequence[LeftOut]) -> str:
    entries = bullets(f"{entry.path}: {entry.reason}" for entry in left_out if entry.scale == scale)
    return f"## {experiment}: scale {scale}\n\nNo run can be used. Left out:\n\n{entries}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="python -m analysis.report", description="Write the tables and figures.", allow_abbrev=False)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of run records (default: runs)")
    parser.add_argument("--out", type=Path, default=Path("reports"), help="folder to write to (default: reports)")
    parser.add_argument("--experiment", choices=tuple(TABLES), help="only this experiment")
    parser.add_argument("--scale", help="only this scale, such as smoke")
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
        experiments = (arguments.experiment,) if arguments.experiment else tuple(TABLES)
        path, text = write_report(
            *(arguments.runs, arguments.out, experiments, arguments.scale),
            figures=not arguments.no_figures,
            normalised=arguments.normalised,
            comparisons=not arguments.no_comparisons,
            subspaces=arguments.subspaces,
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

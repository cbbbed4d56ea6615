"""Writes the tables of the runs: ``python -m analysis.report --runs runs --out reports``.

Each table becomes ``<out>/<experiment>/<scale>/<protocol>/<table>.{md,csv,tex}``; ``<out>/report.md`` holds them all.
The same runs give the same bytes.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from moslora_core.errors import UserError
from moslora_core.record import write_atomic

from . import table4
from .load import LeftOut, Run, load_runs
from .paper import PaperNumbers, load_paper_numbers
from .tables import bullets

Build = Callable[[Sequence[Run], Sequence[LeftOut], PaperNumbers], list[table4.Document]]

# Experiment -> the tables made from its runs.
TABLES: dict[str, tuple[Build, ...]] = {"commonsense_reasoning": (table4.build,)}


def write_report(
    runs_dir: Path, out: Path, experiments: Sequence[str] = tuple(TABLES), scale: str | None = None
) -> tuple[Path, str]:
    """Writes every table and the report that holds them; returns the report's path and text.

    Raises:
        UserError: if there is no run at all, or a folder cannot be read or written.
    """
    numbers = load_paper_numbers()
    sections = []
    for experiment in experiments:
        runs, left_out = load_runs(runs_dir, experiment, scale) if runs_dir.is_dir() else ([], [])
        documents = [document for build in TABLES[experiment] for document in build(runs, left_out, numbers)]
        for document in documents:
            folder = out / experiment / document.folder
            for suffix, text in (("md", document.markdown), ("csv", document.csv), ("tex", document.latex)):
                write_atomic(folder / f"{document.name}.{suffix}", text)
            base = f"{experiment}/{document.folder}/{document.name}"
            files = ", ".join(f"[{suffix}]({base}.{suffix})" for suffix in ("md", "csv", "tex"))
            sections.append(f"{document.markdown}\nFiles: {files}\n")
        tabled = {run.scale for run in runs}
        for untabled in sorted({entry.scale for entry in left_out} - tabled):
            sections.append(_only_left_out(experiment, untabled, left_out))
    if not sections:
        what = f"{' or '.join(experiments)}{f' at scale {scale}' if scale else ''}"
        overrides = f"scale={scale or 'smoke'} method=moslora seed=1"
        commands = " && ".join(f"python -m {experiments[0]}.{stage} {overrides}" for stage in ("train", "evaluate"))
        raise UserError(f"no runs of {what} under {runs_dir}; make the first with: {commands}")
    text = "\n".join(["# Report\n", *sections])
    path = out / "report.md"
    write_atomic(path, text)
    return path, text


def _only_left_out(experiment: str, scale: str, left_out: Sequence[LeftOut]) -> str:
    entries = bullets(f"{entry.path}: {entry.reason}" for entry in left_out if entry.scale == scale)
    return f"## {experiment}: scale {scale}\n\nNo run can be used. Left out:\n\n{entries}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="python -m analysis.report", description="Write the tables of the runs.", allow_abbrev=False)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of run records (default: runs)")
    parser.add_argument("--out", type=Path, default=Path("reports"), help="folder to write to (default: reports)")
    parser.add_argument("--experiment", choices=tuple(TABLES), help="only this experiment")
    parser.add_argument("--scale", help="only this scale, such as smoke")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        arguments = _arguments(argv)
        experiments = (arguments.experiment,) if arguments.experiment else tuple(TABLES)
        path, text = write_report(arguments.runs, arguments.out, experiments, arguments.scale)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without ± or † shows their codes, not a traceback
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.stdout.write(f"{text}\nreport: {os.fspath(path)}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

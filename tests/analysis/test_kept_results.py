"""The results that the repository holds: their report is what the report of their records is."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from analysis.report import write_report
from analysis.study_plan import MISSING, Progress, read_study

ROOT = Path(__file__).parents[2]
RUNS, REPORT = ROOT / "results" / "runs", ROOT / "results" / "report"
STUDIES = sorted(RUNS.glob("studies/*.yaml"))
AS_TEXT = (".md", ".tex")
PICTURES = (".pdf", ".svg", ".png", ".html")


def files(folder: Path) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_kept_studies_are_whole_and_as_the_repository_defines_them(path):
    assert path.read_bytes() == (ROOT / "analysis" / "studies" / path.name).read_bytes()
    assert Progress(read_study(path), RUNS).of_state(MISSING) == []


@pytest.mark.slow
def test_the_kept_report_is_the_report_of_the_kept_runs(tmp_path, monkeypatch):
    """Words and numbers of every page. Pictures are the same bytes on one machine; another's rounding may differ."""
    monkeypatch.chdir(ROOT)  # the pages name the studies by the paths that the command was given
    runs_dir = RUNS.relative_to(ROOT)
    studies = [read_study(path.relative_to(ROOT)) for path in STUDIES]
    write_report(runs_dir, tmp_path, subspaces=True, studies=studies)
    kept, made = files(REPORT), files(tmp_path)
    assert STUDIES and kept.keys() == made.keys()
    for name, path in kept.items():
        if path.suffix in AS_TEXT:
            assert path.read_text(encoding="utf-8") == made[name].read_text(encoding="utf-8"), name
        elif path.suffix == ".csv":
            assert_same_numbers(path, made[name])
        else:
            assert path.suffix in PICTURES and made[name].stat().st_size > 0, name


def assert_same_numbers(first: Path, second: Path) -> None:
    with open(first, newline="", encoding="utf-8") as one, open(second, newline="", encoding="utf-8") as other:
        for row, again in zip(csv.reader(one), csv.reader(other), strict=True):
            for cell, value in zip(row, again, strict=True):
                assert cell == value or math.isclose(float(cell), float(value), rel_tol=1e-6, abs_tol=1e-9), first

"""The command: files, exit status, messages, repeatability."""

from __future__ import annotations

import os
import subprocess
import sys

from analysis.report import main


def call(runs, out, *more):
    return main(["--runs", str(runs.root), "--out", str(out), *more])


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_writes_and_prints_every_table(runs, tmp_path, capsys):
    runs.add("lora", protocol=("paper", "corrected"))
    out = tmp_path / "reports"
    assert call(runs, out) == 0
    files = contents(out)
    base = "commonsense_reasoning/smoke"
    tables = {f"{base}/{protocol}/table4.{s}" for protocol in ("paper", "corrected") for s in ("md", "csv", "tex")}
    assert set(files) == tables | {"report.md"}
    report = files["report.md"].decode()
    for protocol in ("paper", "corrected"):
        assert files[f"{base}/{protocol}/table4.md"].decode() in report
        assert f"]({base}/{protocol}/table4.csv)" in report
    assert capsys.readouterr().out == f"{report}\nreport: {out / 'report.md'}\n"


def test_same_runs_same_bytes(runs, tmp_path):
    for seed in (3, 1, 2):
        runs.add("moslora", seed, accuracies=0.1 * seed, settings={"b": seed, "a": 1}, commit=f"{seed:040x}")
    runs.add("dora").set_status("failed", "train")
    assert call(runs, tmp_path / "one") == 0
    command = [sys.executable, "-m", "analysis.report", "--runs", str(runs.root), "--out", str(tmp_path / "two")]
    process = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert process.returncode == 0, process.stderr
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert str(tmp_path) not in (tmp_path / "one" / "report.md").read_text("utf-8")


def test_a_terminal_without_unicode_gets_the_report(runs, tmp_path):
    runs.add("lora")
    command = [sys.executable, "-m", "analysis.report", "--runs", str(runs.root), "--out", str(tmp_path / "out")]
    process = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert process.returncode == 0, process.stderr
    assert rb"1\u2020" in process.stdout


def test_a_scale_can_be_chosen(runs, tmp_path):
    runs.add("lora", scale="smoke")
    runs.add("lora", scale="small")
    assert call(runs, tmp_path / "out", "--experiment", "commonsense_reasoning", "--scale", "small") == 0
    assert {path.split("/")[1] for path in contents(tmp_path / "out") if "/" in path} == {"small"}


def test_runs_that_can_all_not_be_used_are_reported(runs, tmp_path, capsys):
    runs.add("lora").set_status("failed", "train", "RuntimeError: out of memory")
    runs.add("lora", scale="small")
    assert call(runs, tmp_path / "out") == 0
    text = capsys.readouterr().out
    assert "## commonsense_reasoning: scale smoke\n\nNo run can be used." in text
    assert "smoke/lora/default/seed-1: failed at stage train: RuntimeError: out of memory" in text


def failure(capsys):
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err


def test_no_runs_is_one_line_with_the_command_that_makes_them(runs, tmp_path, capsys):
    assert call(runs, tmp_path / "out") == 2
    assert f"no runs of commonsense_reasoning under {runs.root}" in (text := failure(capsys))
    assert "python -m commonsense_reasoning.train scale=smoke method=moslora seed=1" in text
    runs.root.mkdir()
    assert call(runs, tmp_path / "out", "--scale", "small") == 2
    assert "at scale small" in (text := failure(capsys)) and "scale=small method" in text
    assert not (tmp_path / "out").exists()


def test_wrong_arguments_are_one_line(runs, tmp_path, capsys):
    assert call(runs, tmp_path, "--experiment", "cooking") == 2
    assert "'cooking'" in failure(capsys)
    assert call(runs, tmp_path, "--sclae", "smoke") == 2
    assert "--sclae" in failure(capsys)


def test_an_output_that_cannot_be_written_is_one_line(runs, tmp_path, capsys):
    runs.add("lora")
    (tmp_path / "file").write_text("")
    assert call(runs, tmp_path / "file") == 2
    assert "cannot write" in failure(capsys)


def test_no_temporary_file_stays(runs, tmp_path):
    runs.add("lora")
    assert call(runs, tmp_path / "out") == 0 and call(runs, tmp_path / "out") == 0
    assert not [name for name in contents(tmp_path / "out") if name.split("/")[-1].startswith(".")]

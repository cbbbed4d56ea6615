"""The command: files, exit status, messages, repeatability."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from analysis.report import main

COMPARISONS = ("comparisons", "verdict")
TABLES = ("table3", "table4")  # that one row of LoRA is in


def call(runs, out, *more):
    return main(["--runs", str(runs.root), "--out", str(out), *more])


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_writes_every_table_and_prints_the_measured_ones(runs, tmp_path, capsys):
    runs.add("lora", protocol=("paper", "corrected"))
    out = tmp_path / "reports"
    assert call(runs, out) == 0
    files = contents(out)
    base = "commonsense_reasoning/smoke"
    pages = [f"{base}/{protocol}/{page}" for protocol in ("paper", "corrected") for page in (*COMPARISONS, *TABLES)]
    tables = {f"{page}.{suffix}" for page in [*pages, "table2"] for suffix in ("md", "csv", "tex")}
    assert set(files) == tables | {"report.md", "report.html"}
    report, printed = files["report.md"].decode(), capsys.readouterr().out
    for protocol in ("paper", "corrected"):
        page = files[f"{base}/{protocol}/table4.md"].decode()
        assert page in report
        assert f"]({base}/{protocol}/table4.csv)" in report
        (row,) = (line for line in page.split("\n") if line.startswith("| lora "))
        assert f"## Commonsense reasoning: scale smoke, evaluation protocol {protocol}\n" in printed and row in printed
    assert "† one seed" in printed and "LLaMA-3" not in printed
    assert "Missing: Table 1, Figure 4, Table 5, Figure 5, Figure 6, Table 6, Automatic metrics.\n" in printed
    assert printed.endswith(f"\nreport: {out / 'report.html'}\n")


def test_of_many_tables_a_terminal_gets_the_first(runs, tmp_path, capsys):
    for number in range(130):
        runs.add("lora", label=f"training.max_steps={number}", protocol=("a", "b"))
    assert call(runs, tmp_path, "--no-comparisons") == 0
    printed = capsys.readouterr().out
    assert "protocol a\n" in printed and "protocol b\n" not in printed
    assert "1 more tables are in the report.\n" in printed


def test_writes_the_table_and_the_figure_of_visual_instruction(visual, tmp_path):
    visual.add("lora", accuracies=0.5)
    assert call(visual, tmp_path, "--experiment", "visual_instruction") == 0
    base = "visual_instruction/smoke/exact"
    written = {name for name in contents(tmp_path) if name.startswith("visual_instruction")}
    tables = {f"{base}/{page}.{suffix}" for page in (*COMPARISONS, "table5") for suffix in ("md", "csv", "tex")}
    assert written == tables | {f"{base}/figure5-smoke.{suffix}" for suffix in ("md", "csv", "pdf", "svg", "png")}
    report = (tmp_path / "report.md").read_text("utf-8")
    links = re.findall(r"\]\(([^)]+)\)", report)
    assert set(links) == written | {f"table2.{suffix}" for suffix in ("md", "csv", "tex")} and "![Figure 5" in report
    page = tmp_path / f"{base}/figure5-smoke.md"
    (picture,) = re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text("utf-8"))
    assert (page.parent / picture).exists()
    assert call(visual, tmp_path / "tables", "--no-figures", "--experiment", "visual_instruction") == 0
    assert {name for name in contents(tmp_path / "tables") if "/" in name} == tables


def test_both_experiments_stand_in_one_report(runs, visual, tmp_path):
    runs.add("lora")
    visual.add("lora")
    assert call(runs, tmp_path / "out") == 0
    report = (tmp_path / "out" / "report.md").read_text("utf-8")
    order = [
        report.index(f"## {title}: scale smoke") for title in ("Commonsense reasoning", "Visual instruction tuning")
    ]
    assert order == sorted(order)


def test_comparisons_can_be_left_out(runs, tmp_path):
    runs.add("lora")
    assert call(runs, tmp_path / "out", "--no-comparisons") == 0
    pages = {name.split("/")[-1].split(".")[0] for name in contents(tmp_path / "out")}
    assert pages == {"report", "table2", *TABLES}


def test_matplotlib_is_loaded_for_a_figure_alone(runs, visual, tmp_path):
    runs.add("lora")
    visual.root = tmp_path / "visual"
    visual.add("lora")
    code = """
import sys
from analysis.report import main
runs, visual, out = sys.argv[1:]
assert main(["--runs", runs, "--out", out]) == 0
assert main(["--runs", visual, "--out", out, "--no-figures"]) == 0
assert "matplotlib" not in sys.modules
assert main(["--runs", visual, "--out", out]) == 0
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    command = [sys.executable, "-c", code, str(runs.root), str(visual.root), str(tmp_path / "out")]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_same_runs_same_bytes(runs, visual, tmp_path):
    for seed in (3, 1, 2):
        runs.add("moslora", seed, accuracies=0.1 * seed, settings={"b": seed, "a": 1}, commit=f"{seed:040x}")
        runs.add("lora", seed, right={task: [seed > i % 4 for i in range(20)] for task in runs.tasks})
        runs.add("moslora_folded", seed, right={task: [seed > i % 3 for i in range(20)] for task in runs.tasks})
        visual.add("moslora", seed, accuracies=0.1 * seed)
    runs.add("dora").set_status("failed", "train")
    assert call(runs, tmp_path / "one") == 0
    command = [sys.executable, "-m", "analysis.report", "--runs", str(runs.root), "--out", str(tmp_path / "two")]
    process = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert process.returncode == 0, process.stderr
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    for name in ("report.md", "report.html"):
        assert str(tmp_path) not in (tmp_path / "one" / name).read_text("utf-8")


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
    names = "commonsense_reasoning or visual_instruction or subject_driven_t2i"
    assert f"no runs of {names} under {runs.root}" in (text := failure(capsys))
    for experiment in names.split(" or "):
        run = "scale=smoke method=moslora seed=1"
        generate = [f"generate {run}"] * (experiment == "subject_driven_t2i")
        stages = ["prepare_data scale=smoke", f"train {run}", *generate, f"evaluate {run}"]
        assert " && ".join(f"python -m {experiment}.{stage}" for stage in stages) in text
    runs.root.mkdir()
    assert call(runs, tmp_path / "out", "--scale", "small") == 2
    assert "at scale small" in (text := failure(capsys)) and "scale=small method" in text
    assert call(runs, tmp_path / "out", "--experiment", "visual_instruction") == 2
    assert "no runs of visual_instruction under" in (text := failure(capsys)) and "commonsense" not in text
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

"""Table 4 against values computed independently from the same records."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from analysis.load import load_runs
from analysis.paper import PROVENANCE_MARKS, load_paper_numbers
from analysis.table4 import build

NUMBERS = load_paper_numbers()


def pages(runs):
    return {page.folder: page for page in build(*load_runs(runs.root, "commonsense_reasoning"), NUMBERS)}


def page_of(runs, folder="smoke/corrected"):
    return pages(runs)[folder]


def grids(markdown):
    """The pipe tables of a page, as frames indexed by their first column."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in block.splitlines()]
        found.append(pd.DataFrame(rows[2:], columns=rows[0]).set_index("Method"))
    return found


def measured(page):
    return grids(page.markdown)[0]


def csv_of(page):
    frame = pd.read_csv(io.StringIO(page.csv))
    return frame[frame.origin == "measured"], frame[frame.origin == "paper"]


def test_means_and_deviations_over_seeds(runs):
    rng = np.random.default_rng(0)
    values = rng.random((3, 8)).round(3)
    seconds, peaks = rng.uniform(10, 20, 3), rng.integers(2**29, 2**30, 3)
    for seed in range(3):
        runs.add(
            "moslora",
            seed,
            accuracies=dict(zip(runs.tasks, values[seed].tolist(), strict=True)),
            seconds=float(seconds[seed]),
            memory=(int(peaks[seed]), "cuda"),
            unparsed=0.02 * seed,
            parameters=28_352_512,
        )
    page = page_of(runs)
    expected = pd.DataFrame(100 * values, columns=runs.titles)
    expected["Avg."] = expected.mean(axis=1)
    row = measured(page).loc["moslora"]
    for title in (*runs.titles, "Avg."):
        assert row[title] == f"{expected[title].mean():.1f} ± {expected[title].std():.1f}"
    assert row["n"] == "3"
    assert row["Params (M)"] == "28.4"
    assert row["Train (s)"] == f"{seconds.mean():.1f} ± {seconds.std(ddof=1):.1f}"
    assert row["Peak GiB (cuda)"] == f"{peaks.mean() / 2**30:.2f} ± {peaks.std(ddof=1) / 2**30:.2f}"
    assert row["Unparsed (%)"] == "2.0 ± 2.0"
    assert "†" not in page.markdown and "‡" not in page.markdown

    ours, _ = csv_of(page)
    ours = ours.set_index("column")
    assert ours.loc[list(runs.tasks), "value"].to_numpy() == pytest.approx(100 * values.mean(axis=0))
    assert ours.loc[list(runs.tasks), "sd"].to_numpy() == pytest.approx(100 * values.std(axis=0, ddof=1))
    assert ours.loc["avg", "value"] == pytest.approx(expected["Avg."].mean())
    assert ours.loc["avg", "sd"] == pytest.approx(expected["Avg."].std())
    assert ours.loc["parameters", "value"] == 28_352_512
    assert set(ours["n"]) == {3} and ours.loc["avg", "tasks"] == 8


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 100), min_size=16, max_size=16), st.integers(0, 10**6))
def test_any_two_seeds_average_as_numpy_does(runs, counts, salt):
    label = f"salt={salt}"
    values = np.array(counts).reshape(2, 8) / 100
    for seed, row in enumerate(values):
        runs.add("lora", seed, label, accuracies=dict(zip(runs.tasks, row.tolist(), strict=True)))
    ours, _ = csv_of(page_of(runs))
    average = ours[(ours.label == label) & (ours.column == "avg")].iloc[0]
    assert average["value"] == pytest.approx(100 * values.mean(axis=1).mean(), abs=1e-9)
    assert average["sd"] == pytest.approx(100 * values.mean(axis=1).std(ddof=1), abs=1e-9)


def test_one_seed_is_marked_and_has_no_deviation(runs):
    runs.add("lora", 1, accuracies=0.5)
    page = page_of(runs)
    row = measured(page).loc["lora"]
    assert row["n"] == "1†" and row["Avg."] == "50.0"
    assert not any("±" in cell for cell in row)
    assert "† one seed, so no standard deviation." in page.markdown
    assert r"1$^{\dagger}$" in page.latex
    assert csv_of(page)[0]["sd"].isna().all()


def test_rows_come_in_the_fixed_order_defaults_first(runs):
    order = [
        *("majority", "none", "base", "lora", "lora_scaled", "two_subspaces", "moslora", "moslora_frozen"),
        *("moslora_folded", "dora", "rslora", "pissa", "adalora", "lokr", "loha", "lora_plus", "another", "zz"),
    ]
    for method in sorted(order, reverse=True):
        runs.add(method, training=None if method in order[:3] else "default")
    runs.add("moslora", label="adapter.r=8")
    names = measured(page_of(runs)).index.tolist()
    shown = {"none": "none (no adapter)", "base": "base (no adapter)"}
    expected = [shown.get(method, method) for method in order]
    expected.insert(order.index("moslora") + 1, "moslora (adapter.r=8)")
    assert names == expected


def test_a_reference_has_no_cost(runs):
    runs.add("none", training=None, accuracies=0.25)
    runs.add("lora")
    row = measured(page_of(runs)).loc["none (no adapter)"]
    assert (row["Params (M)"], row["Train (s)"], row["Peak GiB (rss)"], row["Avg."]) == ("-", "-", "-", "25.0")


def test_protocols_and_scales_have_pages_of_their_own(runs):
    runs.add("lora", 1, protocol="paper", accuracies=0.25)
    runs.add("lora", 2, protocol=("corrected",), accuracies=0.75)
    runs.add("lora", 1, scale="small", protocol=("corrected", "paper"), accuracies=1.0)
    found = pages(runs)
    assert list(found) == ["small/corrected", "small/paper", "smoke/corrected", "smoke/paper"]
    averages = {folder: measured(page).loc["lora", "Avg."] for folder, page in found.items()}
    assert averages == {
        "small/corrected": "100.0",
        "small/paper": "100.0",
        "smoke/corrected": "75.0",
        "smoke/paper": "25.0",
    }
    for folder, page in found.items():
        scale, protocol = folder.split("/")
        assert f"scale {scale}, evaluation protocol {protocol}" in page.markdown.splitlines()[0]
        ours, _ = csv_of(page)
        assert set(ours.scale) == {scale} and set(ours.protocol) == {protocol}


def test_an_average_over_fewer_tasks_is_marked_and_named(runs):
    runs.add("lora", 1, accuracies=0.5)
    some = dict.fromkeys(runs.tasks[:5], 0.9)
    runs.add("dora", 1, accuracies=some)
    runs.add("dora", 2, accuracies=some | {"piqa": 0.1})
    page = page_of(runs)
    row = measured(page).loc["dora"]
    assert row["Avg."] == "90.0 ± 0.0‡"  # over the five tasks that both seeds have
    assert row["PIQA"] == "10.0 (n=1)" and row["BoolQ"] == "-"
    assert "‡ dora: Avg. is over 5 of 8 tasks (without PIQA, BoolQ, HellaS)" in page.markdown
    assert measured(page).loc["lora", "Avg."] == "50.0"
    ours, _ = csv_of(page)
    assert ours[(ours.method == "dora") & (ours.column == "avg")]["tasks"].item() == 5


def test_an_incomplete_seed_does_not_enter_the_average_of_complete_ones(runs):
    runs.add("lora", 1, accuracies=0.5)
    runs.add("lora", 2, accuracies=0.7)
    runs.add("lora", 3, accuracies=dict.fromkeys(runs.tasks[:-1], 1.0))
    page = page_of(runs)
    row = measured(page).loc["lora"]
    assert row["Avg."] == "60.0 ± 14.1 (n=2)" and row["HellaS"] == "60.0 ± 14.1 (n=2)"
    assert row["n"] == "3" and row["ARC-e"].startswith("73.3")
    assert "lora: Avg. is over the seeds that have all 8 tasks." in page.markdown
    assert "commonsense_reasoning/smoke/lora/default/seed-3 lacks HellaS." in page.markdown


def test_seeds_without_a_common_task_have_no_average(runs):
    runs.add("lora", 1, accuracies={"piqa": 0.5})
    runs.add("lora", 2, accuracies={"boolq": 0.7})
    assert measured(page_of(runs)).loc["lora", "Avg."] == "-"


def test_the_unparsed_share_counts_responses_not_tasks(runs):
    record = runs.add("lora", accuracies={"piqa": 0.5, "boolq": 0.5}, items={"piqa": 30, "boolq": 10}, unparsed=0.0)
    results = record.results()
    results.evaluations["corrected"].tasks["boolq"].unparsed = 1.0
    record.write_results(results)
    assert measured(page_of(runs)).loc["lora", "Unparsed (%)"] == "25.0"


def test_kinds_of_memory_have_columns_of_their_own(runs):
    runs.add("lora", 1, memory=(2**30, "rss"))
    runs.add("lora", 2, memory=(2**31, "cuda"))
    page = page_of(runs)
    row = measured(page).loc["lora"]
    assert (row["Peak GiB (cuda)"], row["Peak GiB (rss)"]) == ("2.00 (n=1)", "1.00 (n=1)")
    assert "Peak memory: cuda (allocated on the device), rss (whole process)." in page.markdown


def test_the_facts_of_the_runs_are_stated(runs):
    runs.add("lora", 1, items=17)
    runs.add("lora", 2, items=17, commit="f" * 40 + "+dirty")
    runs.add("moslora", 1, items=17, commit=None)
    for text in (page_of(runs).markdown, page_of(runs).latex):
        assert "ARC-e 17, OBQA 17, SIQA 17, ARC-c 17, WinoG 17, PIQA 17, BoolQ 17, HellaS 17." in text
        assert "Seeds per row (n): 1 or 2." in text
        assert "0123456789ab, ffffffffffff+dirty, not recorded in 1 of 3 runs." in text
        assert "Metric: accuracy" in text


def test_what_makes_runs_incomparable_is_warned_of(runs):
    runs.add("lora", 1, items=10, settings={"beams": 4, "batch": 1})
    runs.add("lora", 2, items=20, settings={"beams": 1, "batch": 1}, parameters=13_000)
    runs.add("dora", 1, items=20, settings={"batch": 1}, metric="acc_norm")
    text = page_of(runs).markdown
    assert "Warning: the runs have different numbers of items in ARC-e, OBQA" in text
    assert "Warning: the runs have different metrics in ARC-e" in text
    assert "Warning: the runs differ in the evaluation setting beams: 1 or 4 or unset." in text
    assert "setting batch" not in text
    assert "Warning: lora: the seeds differ in their trainable parameters." in text
    assert measured(page_of(runs)).loc["lora", "Params (M)"] == "0.0123 or 0.0130"


def test_tasks_of_no_column_are_named_and_not_averaged(runs):
    runs.add("lora", accuracies=dict.fromkeys(runs.tasks, 0.5) | {"copa": 1.0})
    runs.add("dora", accuracies={"copa": 1.0})
    page = page_of(runs)
    assert measured(page).loc["lora", "Avg."] == "50.0"
    assert measured(page).index.tolist() == ["lora"]
    assert "Evaluated, but no column of this table: copa." in page.markdown
    assert "smoke/dora/default/seed-1: corrected has no task of this table" in page.markdown


def test_left_out_runs_stand_below_the_table_and_in_no_number(runs):
    runs.add("lora", 1, accuracies=0.5)
    runs.add("lora", 2, accuracies=1.0).set_status("failed", "train", "OSError: disk | full")
    page = page_of(runs)
    assert measured(page).loc["lora", "Avg."] == "50.0" and measured(page).loc["lora", "n"] == "1†"
    line = "commonsense_reasoning/smoke/lora/default/seed-2: failed at stage train: OSError: disk"
    assert f"Left out:\n\n- {line} \\| full\n" in page.markdown
    assert f"% Left out: {line} | full\n" in page.latex


def test_a_later_evaluation_that_stopped_costs_none_of_the_earlier_ones(runs):
    runs.add("lora", 1, accuracies=0.5)
    runs.add("lora", 2, accuracies=0.7).set_status("failed", "evaluate", "OSError: disk full")
    runs.add("lora", 3, accuracies=0.9).set_status("running", "evaluate")
    page = page_of(runs)
    assert measured(page).loc["lora", "Avg."] == "70.0 ± 20.0" and "Left out" not in page.markdown
    path = "commonsense_reasoning/smoke/lora/default"
    assert (
        f"{path}/seed-2: a later stage did not finish (failed at stage evaluate: OSError: disk full)." in page.markdown
    )
    assert f"{path}/seed-3: a later stage did not finish (running at stage evaluate)." in page.markdown


def test_every_number_of_the_paper_keeps_its_mark_in_every_format(runs):
    runs.add("lora", accuracies=0.123)
    page = page_of(runs)
    paper = NUMBERS.tables["table4"]
    theirs = grids(page.markdown)[1]
    assert len(theirs) == len(paper.rows)
    for row in paper.rows:
        for column in paper.columns:
            shown = theirs.loc[row.title, column.title]
            assert shown.count("ʳ") == sum(claim.provenance == "RECALLED" for claim in row.cells.get(column.id, ()))
    recalled = sum(claim.provenance == "RECALLED" for claim in paper.claims())
    table = page.latex.split(r"\begin{tabular}")[2].split(r"\end{tabular}")[0]
    assert table.count(r"$^{\mathrm{r}}$") == recalled
    numbers = re.findall(r"\d+(?:\.\d+)?(?:-\d+(?:\.\d+)?)?(\$\^\{\\mathrm\{[pscdr]\}\}\$)?", table)
    assert len(numbers) == len(paper.claims()) and all(numbers)
    _, lines = csv_of(page)
    assert (lines.provenance == "RECALLED").sum() == recalled
    assert lines.provenance.isin(list(PROVENANCE_MARKS)).all() and lines.source.notna().all()


def test_our_numbers_and_the_papers_share_no_grid(runs):
    runs.add("lora", accuracies=0.123)
    page = page_of(runs)
    ours, theirs = grids(page.markdown)
    assert "LoRA" not in ours.index and "lora" not in theirs.index
    assert not any(mark in ours.to_string() for mark in PROVENANCE_MARKS.values())
    assert "### Paper, LLaMA-3 8B" in page.markdown


def test_latex_is_well_formed(runs):
    runs.add("two_subspaces", label="a_b=50,c=1")
    text = page_of(runs).latex
    assert r"two\_subspaces (a\_b=50,c=1)" in text
    for command in (r"\toprule", r"\midrule", r"\bottomrule", r"\begin{tabular}", r"\end{tabular}"):
        assert text.count(command) == 2
    code = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    assert not re.search(r"(?<!\\)%", code)
    bare = re.sub(r"\\[{}]", "", code)
    assert bare.count("{") == bare.count("}")
    assert code.isascii()


SMALL_PAPER = """
sources:
  recalled: {provenance: RECALLED, text: from memory}
  KR: {provenance: SECONDARY, text: a rendering}
tables:
  table4:
    title: "Table 4"
    setting: LLaMA-3 8B
    columns:
      parameters: {title: Params (M), unit: million}
      piqa: {title: PIQA, unit: percent}
      boolq: {title: BoolQ, unit: percent}
      avg: {title: Avg., unit: percent}
    rows:
      lora:
        title: LoRA
        cells:
          piqa: {value: 86.7, provenance: RECALLED, source: recalled}
          avg: [{value: 85.2, provenance: RECALLED, source: recalled}, {high: 85.6, provenance: SECONDARY, source: KR}]
    notes:
      - {text: A note, provenance: SECONDARY, source: KR}
"""


@pytest.mark.parametrize("suffix", ["md", "csv", "tex"])
def test_the_page_has_the_expected_bytes(runs, tmp_path, suffix):
    """Every kind of cell, fact and note once. After a change on purpose: write ``files()`` to ``expected/``."""
    settings = {"beams": 4, "limit": None}
    for seed, (piqa, boolq) in enumerate([(0.5, 0.25), (0.625, 0.75)]):
        kind = "rss" if seed else "cuda"
        given = {"settings": settings, "unparsed": 0.125 * seed, "memory": (2**30, kind), "seconds": 999.0 + seed}
        runs.add("moslora", seed, "method.mixer_init=orthogonal", accuracies={"piqa": piqa, "boolq": boolq}, **given)
    runs.add("moslora", 0, accuracies={"piqa": 0.5, "copa": 1.0}, items=50, settings={"beams": 1}, commit=None)
    runs.add("lora", 0, accuracies={"piqa": 0.1, "boolq": 0.2}, parameters=28_311_552, metric="acc_norm")
    runs.add("lora", 1, accuracies={"piqa": 0.3}, parameters=28_311_553, commit="f" * 40 + "+dirty")
    runs.add("base", 0, accuracies={"piqa": 0.0, "boolq": 0.0}, training=None)
    runs.add("dora", 0, accuracies={"copa": 0.5})
    runs.add("dora", 1, accuracies={"piqa": 1.5})
    runs.add("dora", 2).set_status("failed", "train", "OSError: a | b")
    (tmp_path / "numbers.yaml").write_text(SMALL_PAPER, encoding="utf-8")
    numbers = load_paper_numbers(tmp_path / "numbers.yaml")
    (page,) = build(*load_runs(runs.root, "commonsense_reasoning"), numbers)
    expected = Path(__file__).with_name("expected") / f"table4.{suffix}"
    assert page.files()[suffix] == expected.read_text("utf-8")


def test_the_csv_is_one_table(runs):
    runs.add("moslora", label="x=1,y=2")
    ours, theirs = csv_of(page_of(runs))
    assert set(ours.label) == {"x=1,y=2"} and set(ours.provenance) == {"MEASURED"}
    assert set(theirs.method) == {row.id for row in NUMBERS.tables["table4"].rows}

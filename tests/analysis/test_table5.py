"""Table 5 against values computed independently from the same records."""

from __future__ import annotations

import io
import re

import numpy as np
import pandas as pd
import pytest

from analysis.load import load_runs
from analysis.paper import load_paper_numbers
from analysis.table5 import build

NUMBERS = load_paper_numbers()
NINE = ("mmbench_en", "mmbench_cn", "seed_bench", "ai2d", "sciqa", "textvqa", "mathvista", "mmvet", "mme")
TITLES = (
    "MMBench EN",
    "MMBench CN",
    "SEED-Bench",
    "AI2D",
    "SciQA",
    "TextVQA",
    "MathVista",
    "MM-Vet",
    "MME (rescaled)",
)


def pages(visual):
    return {page.folder: page for page in build(*load_runs(visual.root, "visual_instruction"), NUMBERS)}


def page_of(visual, folder="smoke/exact"):
    return pages(visual)[folder]


def grids(markdown):
    """The pipe tables of a page; ours are indexed by base and method."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in block.splitlines()]
        frame = pd.DataFrame(rows[2:], columns=[header.strip() for header in rows[0]])
        found.append(frame.set_index(["Base", "Method"] if "Base" in frame else ["Method"]))
    return found


def measured(page):
    return grids(page.markdown)[0]


def csv_of(page):
    frame = pd.read_csv(io.StringIO(page.csv), keep_default_na=False, na_values=[""])
    return frame[frame.origin == "measured"], frame[frame.origin == "paper"]


def test_smoke_tasks_are_the_columns_and_average_over_seeds(visual):
    values = np.random.default_rng(0).random((3, 6)).round(3)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(6)  # the columns do not depend on the records' order
        accuracies = {visual.tasks[i]: float(values[seed, i]) for i in order}
        visual.add("moslora", seed, accuracies=accuracies, unparsed=0.01, seconds=10.0 + seed, memory=(2**30, "rss"))
    page = page_of(visual)
    frame = measured(page)
    assert list(frame.columns) == [
        *("n", "Params (M)", "Train (s)", "Peak GiB (rss)"),
        *visual.titles,
        *("Avg.", "Unparsed (%)"),
    ]
    row = frame.loc["smoke", "moslora"]
    expected = pd.DataFrame(100 * values, columns=visual.titles)
    expected["Avg."] = expected.mean(axis=1)
    for title in (*visual.titles, "Avg."):
        assert row[title] == f"{expected[title].mean():.1f} ± {expected[title].std():.1f}"
    assert (row["n"], row["Params (M)"], row["Train (s)"], row["Peak GiB (rss)"], row["Unparsed (%)"]) == (
        *("3", "0.0123", "11.0 ± 1.0", "1.00 ± 0.00", "1.0 ± 0.0"),
    )
    ours, _ = csv_of(page)
    ours = ours.set_index("column")
    assert ours.loc[list(visual.tasks), "value"].to_numpy() == pytest.approx(100 * values.mean(axis=0))
    assert ours.loc[list(visual.tasks), "sd"].to_numpy() == pytest.approx(100 * values.std(axis=0, ddof=1))
    assert ours.loc["avg", "value"] == pytest.approx(100 * values.mean())
    assert set(ours.base) == {"smoke"} and set(ours.quantization) == {"none"}


def test_the_papers_benchmarks_are_the_columns_where_a_run_has_one(visual):
    visual.add("lora", accuracies=dict.fromkeys(NINE[::-1], 0.5) | {"smoke_count": 1.0}, scale="paper")
    page = page_of(visual, "paper/exact")
    frame = measured(page)
    assert list(frame.columns)[4:-2] == list(TITLES)
    assert frame.loc["smoke", "lora"]["Avg."] == "50.0"
    assert "Evaluated, but no column of this table: smoke_count." in page.markdown
    assert "MMBench (EN or CN not stated)" not in frame.columns


def test_rows_are_grouped_by_base_and_quantisation_and_do_not_say_so_twice(visual):
    nf4, orthogonal = "model.quantization=nf4", "method.mixer_init=orthogonal"
    visual.add("moslora", label=f"{orthogonal},{nf4}", quantization="nf4")
    visual.add("moslora", label=nf4, quantization="nf4")
    visual.add("lora", label=nf4, quantization="nf4")
    visual.add("base", label=nf4, quantization="nf4", training=None, accuracies=0.1)
    visual.add("moslora", label=f"adapter.llm.r=8,{orthogonal}")
    visual.add("moslora")
    visual.add("moslora", label=orthogonal)
    visual.add("lora")
    visual.add("base", training=None, accuracies=0.1)
    visual.add("lora", label="model=internlm2_7b", base="internlm2_7b", quantization="nf4")
    visual.add("moslora", label=f"{orthogonal},model=internlm2_7b", base="internlm2_7b", quantization="nf4")
    visual.add("moslora", label="model=internlm2_7b", base="internlm2_7b", quantization="nf4")
    page = page_of(visual)
    assert measured(page).index.tolist() == [
        *(("internlm2_7b", name) for name in ("lora, NF4", "moslora, NF4", "moslora (orthogonal), NF4")),
        *(("smoke", name) for name in ("base (no adapter)", "lora", "moslora")),
        *(("smoke", name) for name in ("moslora (adapter.llm.r=8; orthogonal)", "moslora (orthogonal)")),
        *(("smoke", name) for name in ("base (no adapter), NF4", "lora, NF4", "moslora, NF4")),
        ("smoke", "moslora (orthogonal), NF4"),
    ]
    assert "NF4: rows whose base model is quantised; the paper calls NF4's QLoRA and QMoSLoRA." in page.markdown
    table = page.latex.split(r"\begin{tabular}")[1].split(r"\end{tabular}")[0]
    assert table.startswith("{ll") and table.count(r"\midrule") == 2
    assert table.split(r"\midrule")[2].strip().startswith("smoke & base (no adapter) & ")
    ours, _ = csv_of(page)
    assert {tuple(pair) for pair in ours[["base", "quantization"]].to_numpy()} == {
        *(("internlm2_7b", "nf4"), ("smoke", "nf4"), ("smoke", "none"))
    }


def test_rows_whose_short_names_meet_keep_their_labels(visual):
    visual.add("lora", 1, accuracies=0.25)
    visual.add("lora", 1, "model.name=smoke", accuracies=0.75)
    frame = measured(page_of(visual))
    assert frame.loc["smoke", "lora (default)"]["Avg."] == "25.0"
    assert frame.loc["smoke", "lora (model.name=smoke)"]["Avg."] == "75.0"


def test_a_label_that_was_cut_short_is_shown_as_it_is(visual):
    label = "data.files=a_b,model.quantization=nf4~0123456789ab"
    visual.add("lora", label=label, quantization="nf4")
    assert measured(page_of(visual)).index.tolist() == [("smoke", f"lora ({label}), NF4")]


def test_the_untrained_base_stands_beside_its_methods(visual):
    visual.add("base", 0, training=None, accuracies=0.25)
    visual.add("lora", 1)
    row = measured(page_of(visual)).loc["smoke", "base (no adapter)"]
    assert (row["n"], row["Params (M)"], row["Train (s)"], row["Avg."]) == ("1†", "-", "-", "25.0")


def test_one_seed_is_marked_and_has_no_deviation(visual):
    visual.add("lora")
    page = page_of(visual)
    row = measured(page).loc["smoke", "lora"]
    assert row["n"] == "1†" and not any("±" in cell for cell in row)
    assert "† one seed, so no standard deviation." in page.markdown
    assert csv_of(page)[0]["sd"].isna().all()


def test_protocols_and_scales_never_share_a_table(visual):
    visual.add("lora", 1, protocol="exact", accuracies=0.25)
    visual.add("lora", 2, protocol="vlmevalkit", accuracies=0.5)
    visual.add("lora", 3, protocol=("exact", "lmms_eval"), accuracies=0.75, scale="small")
    averages = {
        folder: measured(page).loc["smoke", "lora"][["n", "Avg."]].tolist() for folder, page in pages(visual).items()
    }
    assert averages == {
        "small/exact": ["1†", "75.0"],
        "small/lmms_eval": ["1†", "75.0"],
        "smoke/exact": ["1†", "25.0"],
        "smoke/vlmevalkit": ["1†", "50.0"],
    }
    for folder, page in pages(visual).items():
        ours, _ = csv_of(page)
        assert set(ours.scale + "/" + ours.protocol) == {folder}


def test_benchmarks_that_no_run_has_are_named_once(visual):
    exact = dict.fromkeys((task for task in NINE if task not in ("mathvista", "mmvet")), 0.5)
    for seed in range(3):
        visual.add("lora", seed, accuracies=exact, scale="paper")
        visual.add("moslora", seed, accuracies=exact, scale="paper")
    page = page_of(visual, "paper/exact")
    row = measured(page).loc["smoke", "lora"]
    assert (row["MathVista"], row["MM-Vet"], row["Avg.‡"]) == ("-", "-", "50.0 ± 0.0")
    assert page.markdown.count("MathVista or MM-Vet") == 1
    assert "‡ Avg. is over 7 of 9 benchmarks: no run has MathVista or MM-Vet." in page.markdown
    assert "lacks" not in page.markdown
    ours, _ = csv_of(page)
    assert set(ours[ours.column == "avg"].tasks) == {7}


def test_an_incomplete_run_is_named_and_its_row_marked(visual):
    visual.add("lora", 1, accuracies=0.5)
    visual.add("moslora", 1, accuracies=dict.fromkeys(visual.tasks[:4], 0.9))
    page = page_of(visual)
    row = measured(page).loc["smoke", "moslora"]
    assert row["Avg."] == "90.0‡" and row["Position"] == "-"
    assert "‡ smoke: moslora: Avg. is over 4 of 6 tasks (without Position, Background)" in page.markdown
    assert "visual_instruction/smoke/moslora/default/seed-1 lacks Position, Background." in page.markdown


def test_parts_of_benchmarks_stand_below(visual):
    rng = np.random.default_rng(1)
    parts = rng.random((2, 4)).round(3)
    for seed, (circular, perception, cognition, ability) in enumerate(parts.tolist()):
        breakdown = {
            "mmbench_cn": {"circular": circular, "attribute_reasoning": ability},
            "mme": {"cognition": cognition, "perception": perception},
        }
        visual.add("lora", seed, accuracies=dict.fromkeys(NINE, 0.5), scale="paper", breakdown=breakdown)
    visual.add("moslora", 0, accuracies=dict.fromkeys(NINE, 0.5), scale="paper")
    page = page_of(visual, "paper/exact")
    below = grids(page.markdown)[1]
    titles = ("MMBench CN circular", "MME perception (of 2000 points)", "MME cognition (of 800 points)")
    assert list(below.columns) == ["n", *titles]
    assert below.index.tolist() == [("smoke", "lora")]
    scaled = parts[:, :3] * [100, 2000, 800]
    for title, column in zip(titles, scaled.T, strict=True):
        assert below.loc["smoke", "lora"][title] == f"{column.mean():.1f} ± {column.std(ddof=1):.1f}"
    ours, _ = csv_of(page)
    lines = ours[ours.column.str.contains("/")].set_index("column")
    assert lines.index.tolist() == ["mmbench_cn/circular", "mme/perception", "mme/cognition"]
    assert lines["value"].to_numpy() == pytest.approx(scaled.mean(axis=0))
    assert lines["unit"].tolist() == ["percent", "points", "points"]
    assert r"MME perception (of 2000 points)" in page.latex
    assert len(grids(page.markdown)) == 3 and page.latex.count(r"\begin{tabular}") == 3


def test_without_parts_there_is_no_table_of_them(visual):
    visual.add("lora")
    assert len(grids(page_of(visual).markdown)) == 2
    assert "Parts of the benchmarks" not in page_of(visual).markdown


@pytest.mark.parametrize("value", [float("nan"), 73.8])
def test_a_bad_number_is_named_and_left_out(visual, value):
    visual.add("lora", 1, accuracies=0.5)
    bad = visual.add("lora", 2, accuracies=0.5)
    text = (bad.path / "results.json").read_text("utf-8")
    (bad.path / "results.json").write_text(text.replace('"value": 0.5', f'"value": {value}', 1).replace("nan", "NaN"))
    page = page_of(visual)
    assert measured(page).loc["smoke", "lora"]["n"] == "1†"
    left_out = r"Left out:\n\n- visual_instruction/smoke/lora/default/seed-2: results.json: (evaluations\.)?exact\."
    assert re.search(left_out, page.markdown)
    assert measured(page).loc["smoke", "lora"]["Colour"] == "50.0"


def test_settings_that_follow_the_base_model_are_no_warning(visual):
    visual.add("lora", 1, base="llama3_8b", settings={"template": "llama3", "limit": None})
    visual.add("lora", 2, base="llama3_8b", settings={"template": "llama3", "limit": 100})
    visual.add("lora", 1, "model=internlm2_7b", base="internlm2_7b", settings={"template": "internlm2", "limit": None})
    text = page_of(visual).markdown
    assert "Warning: the runs differ in the evaluation setting limit: 100 or null." in text
    assert 'By setting, the evaluation\'s template is "internlm2" or "llama3".' in text
    assert text.count("Warning") == 1


def test_settings_that_name_files_of_a_run_are_no_warning(visual):
    for seed in (1, 2):
        found = {
            "sources": {"mme": f"run{seed}_MME_score.csv"},
            "model_name": f"run{seed}",
            "judge_date": f"day {seed}",
        }
        visual.add("lora", seed, protocol="vlmevalkit", settings=found)
    text = page_of(visual, "smoke/vlmevalkit").markdown
    assert re.findall(r"evaluation setting (\w+)", text) == ["judge_date"]


def test_metrics_are_stated_by_task(visual):
    record = visual.add("lora")
    results = record.results()
    results.evaluations["exact"].tasks["smoke_existence"].metric = "share_of_points"
    record.write_results(results)
    metrics = "accuracy (Colour, Shape, Count, Position, Background); share_of_points (Existence)"
    assert f"- Metrics, in percent: {metrics}.\n" in page_of(visual).markdown


def test_a_run_that_does_not_record_its_base_is_warned_of(visual):
    visual.add("lora", 1, base=None, quantization=None)
    page = page_of(visual)
    assert measured(page).index.tolist() == [("not recorded", "lora")]
    assert "Warning: 1 of 1 runs do not record their base model." in page.markdown


def test_the_papers_numbers_stand_apart_with_their_marks(visual):
    visual.add("lora", accuracies=0.123)
    page = page_of(visual)
    ours, theirs = grids(page.markdown)
    assert theirs.loc["InternLM2 + ViT, MoSLoRA", "Avg."] == "59.5ˢ"
    assert theirs.loc["InternLM2 + ViT, LoRA", "Avg."] == "57.8ᵈ"
    assert "ˢ" not in ours.to_string() and "12.3" not in theirs.to_string()
    _, lines = csv_of(page)
    assert len(lines) == len(NUMBERS.tables["table5"].claims()) and lines.source.notna().all()


def test_latex_is_well_formed(visual):
    visual.add("two_subspaces", label="a_b=50,c=1", base="my_base")
    visual.add("lora", base="your&base")
    code = "\n".join(line for line in page_of(visual).latex.splitlines() if not line.startswith("%"))
    assert r"two\_subspaces (a\_b=50; c=1)" in code and r"your\&base" in code
    bare = re.sub(r"\\[{}]", "", code)
    assert bare.count("{") == bare.count("}") and code.isascii()
    assert code.count(r"\begin{tabular}") == code.count(r"\end{tabular}") == 2

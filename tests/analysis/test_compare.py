"""The page of comparisons: which rows are paired, and every number against an independent computation."""

from __future__ import annotations

import io
import json
import re

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from analysis.comparisons import build
from analysis.formats import interval, p_value, points
from analysis.load import load_runs
from analysis.paper import load_paper_numbers

NUMBERS = load_paper_numbers()
COMMONSENSE = "commonsense_reasoning"


def documents(runs, experiment=COMMONSENSE):
    found = build(experiment, runs.root, *load_runs(runs.root, experiment), NUMBERS)
    return {(document.folder, document.name): document for document in found}


def page_of(runs, experiment=COMMONSENSE, folder="smoke/corrected"):
    return documents(runs, experiment)[folder, "comparisons"]


def rows_of(page, number=0):
    """A grid of the page, as a frame by the name of the pair."""
    block = re.findall(r"(?:^\|.*\n)+", page.markdown, re.MULTILINE)[number]
    rows = [[cell.strip() for cell in line.strip("|\n").split(" | ")] for line in block.splitlines()]
    return pd.DataFrame(rows[2:], columns=rows[0]).set_index("First - second")


def lines_of(page):
    return pd.read_csv(io.StringIO(page.csv))


def right(rng, tasks, share, items=40):
    return {task: rng.random(items) < share for task in tasks}


@pytest.fixture
def pair(runs):
    """LoRA and MoSLoRA in five common seeds, with the answers: [method][seed][task]."""
    rng = np.random.default_rng(7)
    answers = {"lora": {}, "moslora": {}}
    for seed in range(5):
        for method, share in (("lora", 0.7), ("moslora", 0.8)):
            answers[method][seed] = right(rng, runs.tasks, share + rng.normal(0, 0.05))
            runs.add(method, seed, right=answers[method][seed])
    return answers


def differences(pair, task):
    return np.array([pair["moslora"][s][task].astype(int) - pair["lora"][s][task] for s in range(5)])


def test_the_mean_over_the_tasks_by_an_independent_computation(runs, pair):
    by_task = np.array([differences(pair, task).mean(axis=1) for task in runs.tasks])
    mean = 100 * by_task.mean(axis=0)
    lines = lines_of(page_of(runs))
    line = lines[(lines["column"] == "avg") & lines["seed"].isna()].iloc[0]
    assert (line["first"], line["second"], line["n"], line["items"], line["tasks"]) == ("moslora", "lora", 5, 320, 8)
    assert line["value"] == pytest.approx(mean.mean()) and line["sd"] == pytest.approx(mean.std(ddof=1))
    result = stats.ttest_rel(
        *[[np.mean([100 * pair[m][s][t].mean() for t in runs.tasks]) for s in range(5)] for m in ("moslora", "lora")]
    )
    assert tuple(line[["low", "high"]]) == pytest.approx(tuple(result.confidence_interval(0.95)))
    assert line["p_wilcoxon"] == pytest.approx(stats.wilcoxon(mean).pvalue)
    flips = np.array(np.meshgrid(*[(1, -1)] * 5)).reshape(5, -1).T
    assert line["p_seed"] == pytest.approx(np.mean(np.abs(flips @ mean) >= abs(mean.sum()) - 1e-9))
    assert line["smallest_p_seed"] == pytest.approx(1 / 16)
    # Items are independent here: the exchange of items is a normal with the variance of the items' sums.
    sums = [differences(pair, task).sum(axis=0) for task in runs.tasks]
    z = sum(s.sum() for s in sums) / np.sqrt(sum((s**2).sum() for s in sums))
    assert line["p_item"] == pytest.approx(2 * stats.norm.sf(abs(z)), abs=0.02)
    assert line["bootstrap_low"] < line["value"] < line["bootstrap_high"]
    seeds = lines[(lines["column"] == "avg") & lines["seed"].notna()]
    assert seeds["value"].to_numpy() == pytest.approx(mean)


def test_every_task_by_an_independent_computation(runs, pair):
    lines = lines_of(page_of(runs))
    tasks = lines[lines["seed"].isna()].set_index("column").loc[list(runs.tasks)]
    for task in runs.tasks:
        of_task = 100 * differences(pair, task).mean(axis=1)
        assert tasks.loc[task, "value"] == pytest.approx(of_task.mean())
        assert tasks.loc[task, "items"] == 40 and tasks.loc[task, "items_add_up"] == "yes"
    for raw, adjusted in (("p_seed", "p_seed_holm"), ("p_item", "p_item_holm")):
        expected = multipletests(tasks[raw], method="holm")[1]
        assert tasks[adjusted].to_numpy() == pytest.approx(expected)
    one = lines[(lines["column"] == "piqa") & (lines["seed"] == 3)].iloc[0]
    first, second = pair["moslora"][3]["piqa"], pair["lora"][3]["piqa"]
    table = pd.crosstab(first, second).to_numpy()
    assert (one["only_first"], one["only_second"]) == ((first & ~second).sum(), (second & ~first).sum())
    assert one["p_mcnemar"] == pytest.approx(mcnemar(table, exact=True).pvalue)


def test_the_page_shows_what_the_csv_has(runs, pair):
    page = page_of(runs)
    line = lines_of(page).iloc[0]
    row = rows_of(page).loc["moslora - lora"]
    assert row["n"] == "5" and row["Difference"] == f"{line['value']:+.1f}"
    assert row["95% over seeds"] == f"{line['low']:+.1f} to {line['high']:+.1f}"
    assert row["95% over seeds and items"] == f"{line['bootstrap_low']:+.1f} to {line['bootstrap_high']:+.1f}"
    assert row["p by seed"] == f"{line['p_seed']:.3f}" and row["Detectable"] == f"{line['detectable']:.1f}"
    assert row["Collapsed"] == "0 of 5; 0 of 5"
    means = [100 * np.mean([pair[m][s][t].mean() for s in range(5) for t in runs.tasks]) for m in ("moslora", "lora")]
    assert [row["First"], row["Second"]] == [f"{mean:.1f}" for mean in means]
    cell = rows_of(page, 1).loc["moslora - lora", "PIQA"]
    assert re.fullmatch(r"[+-]\d+\.\d \(\d\.\d{3}; (\d\.\d{3}|<0\.001)\)", cell)
    for piece in ("2 / 2^n", "It speaks of the methods", "Git commits"):
        assert piece in page.markdown
    assert r"\textasciicircum" in page.latex and "moslora - lora" in page.latex


def test_one_pair_of_seeds_is_marked_and_gets_no_test(runs):
    rng = np.random.default_rng(0)
    for method in ("lora", "moslora"):
        runs.add(method, 1, right=right(rng, runs.tasks, 0.5))
    page = page_of(runs)
    row = rows_of(page).loc["moslora - lora"]
    assert row["n"] == "1†"
    untested = ("95% over seeds", "95% over seeds and items", "p by seed", "p by item", "Detectable")
    assert all(row[column] == "-" for column in untested)
    assert "(" not in rows_of(page, 1).loc["moslora - lora", "PIQA"]
    assert "† one pair of seeds, so no interval and no test." in page.markdown
    lines = lines_of(page)
    assert lines.filter(regex="^p_|low|high|detectable|sd|only").isna().all(axis=None)


def names(runs, experiment=COMMONSENSE, folder="smoke/corrected"):
    return rows_of(page_of(runs, experiment, folder)).index.tolist()


def test_rows_are_compared_with_lora_and_moslora_with_its_controls(runs):
    for method in (
        "lora",
        "lora_scaled",
        "two_subspaces",
        "moslora",
        "moslora_frozen",
        "moslora_folded",
        "dora",
        "none",
    ):
        runs.add(method, training=None if method == "none" else "default")
    runs.add("lora", label="adapter.r=9")
    assert sorted(names(runs)) == sorted(
        [
            *(f"{m} - lora" for m in ("lora_scaled", "two_subspaces", "moslora", "moslora_frozen", "moslora_folded")),
            *("dora - lora", "lora (adapter.r=9) - lora", "moslora - lora (adapter.r=9)"),
            *(f"moslora - {m}" for m in ("moslora_folded", "moslora_frozen", "lora_scaled", "two_subspaces")),
        ]
    )


def test_rows_of_the_same_overrides_are_compared_before_the_defaults(runs):
    rate = "training.learning_rate=0.001"
    for method, label in (("lora", "default"), ("lora", rate), ("moslora", rate), ("moslora_frozen", rate)):
        runs.add(method, label=label)
    runs.add("moslora", label=f"method.mixer_init=orthogonal,{rate}")
    runs.add("dora", label="adapter.r=4")
    assert set(names(runs)) == {
        f"lora ({rate}) - lora",
        f"moslora ({rate}) - lora ({rate})",
        f"moslora ({rate}) - moslora_frozen ({rate})",
        f"moslora_frozen ({rate}) - lora ({rate})",
        f"moslora (method.mixer_init=orthogonal,{rate}) - lora ({rate})",
        f"moslora ({rate}) - moslora (method.mixer_init=orthogonal,{rate})",  # a claim of Table 3
        "dora (adapter.r=4) - lora",
    }


def test_the_pairs_of_the_claims_are_there_once(runs):
    for label in ("method.mixer_init=kaiming_uniform", "method.mixer_init=orthogonal", "method.mixer_init=identity"):
        runs.add("moslora", label=label)
    runs.add("lora")
    found = names(runs)
    assert len(found) == len(set(found)) == 6
    assert "moslora (method.mixer_init=orthogonal) - moslora (method.mixer_init=identity)" in found


def test_settings_are_not_mixed(visual):
    rng = np.random.default_rng(0)
    for base, quantization, label in (
        ("smoke", "none", "default"),
        ("big", "nf4", "model=big,model.quantization=nf4"),
    ):
        for method in ("lora", "moslora"):
            for seed in (1, 2):
                answers = right(rng, visual.tasks, 0.5)
                visual.add(method, seed, label, base=base, quantization=quantization, right=answers)
    page = page_of(visual, "visual_instruction", "smoke/exact")
    block = re.findall(r"(?:^\|.*\n)+", page.markdown, re.MULTILINE)[0].splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:3]] for line in block]
    assert cells[0] == ["Base", "First - second"]
    assert cells[2:] == [["big", "moslora, NF4 - lora, NF4"], ["smoke", "moslora - lora"]]
    assert set(lines_of(page)["quantization"]) == {"none", "nf4"}


def test_missing_seeds_tasks_and_answers_are_named(runs, pair):
    runs.add("moslora", 9, right=right(np.random.default_rng(0), runs.tasks, 0.5))
    rng = np.random.default_rng(1)
    for seed in (0, 1, 2):
        runs.add("dora", seed, right=right(rng, [t for t in runs.tasks if t != "piqa" or seed < 2], 0.5))
    runs.add("lora_plus", 0, items=40), runs.add("lora_plus", 1, items=40)
    page = page_of(runs)
    assert "moslora - lora: lora lacks the seed 9 of moslora." in page.markdown
    assert "dora - lora: dora lacks the seeds 3, 4 of lora." in page.markdown
    assert "dora - lora: the mean leaves out seed 2, which not all tasks have." in page.markdown
    assert rows_of(page).loc["dora - lora", "n"] == "2"
    assert rows_of(page, 1).loc["dora - lora", "BoolQ"].endswith(" n=3")
    assert "No tests by item for commonsense_reasoning/smoke/lora_plus/default/seed-0 and 1 other: " in page.markdown
    row = rows_of(page).loc["lora_plus - lora"]
    assert row["p by item"] == "-" and row["95% over seeds and items"] != "-"


def test_a_task_that_no_seed_has_leaves_the_mean_marked(runs):
    some = [task for task in runs.tasks if task != "hellaswag"]
    runs.add("lora", 1), runs.add("lora", 2)
    for seed in (1, 2):
        runs.add("dora", seed, accuracies=dict.fromkeys(some, 0.25 * seed))
    page = page_of(runs)
    assert rows_of(page).loc["dora - lora", "Difference"].endswith("‡")
    assert "‡ dora - lora: the mean is without HellaS." in page.markdown
    assert rows_of(page, 1).loc["dora - lora", "HellaS"] == "-"


BARRIERS = {
    "settings": ({"settings": {"limit": 10}}, "the runs differ in the evaluation setting limit: 10 or unset"),
    "metrics": ({"metric": "points"}, "piqa: the runs have different metrics"),
    "numbers": ({"items": 50}, "piqa: the runs have different numbers of items"),
}


@pytest.mark.parametrize("name", BARRIERS)
def test_what_is_not_comparable_is_said(runs, name):
    given, expected = BARRIERS[name]
    runs.add("lora"), runs.add("moslora", **given)
    page = page_of(runs)
    assert "moslora - lora!" in names(runs) and f"! not comparable: moslora - lora: {expected}." in page.markdown
    assert set(lines_of(page)["comparable"]) == {"no"}


def test_a_batch_size_is_no_barrier_and_a_version_a_note(runs):
    runs.add("lora", settings={"batch_size": 1, "lm_eval": "0.4.13"}, commit="1" * 40)
    runs.add("moslora", settings={"batch_size": 8, "lm_eval": "0.4.14"}, commit="2" * 40)
    page = page_of(runs)
    assert "moslora - lora" in names(runs) and "not comparable" not in page.markdown
    assert "different versions of lm_eval" in page.markdown and "come from different commits" in page.markdown


def test_other_items_are_not_paired(runs):
    rng = np.random.default_rng(0)
    for seed in (1, 2):
        runs.add("lora", seed, right=right(rng, runs.tasks, 0.5))
        record = runs.add("moslora", seed, right=right(rng, runs.tasks, 0.5))
    rows = [json.loads(line) for line in record.predictions_path.read_text().splitlines()]
    rows[0]["gold"], rows[1]["id"] = "z", f"{rows[1]['task']}/999"
    record.predictions_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = page_of(runs)
    assert f"{rows[0]['task']}: 1 items have different right answers in the runs" in page.markdown
    assert f"{rows[0]['task']}: only 39 items are in all runs, of up to 40" in page.markdown
    assert lines_of(page).set_index("column").loc[rows[0]["task"], "items"].iloc[0] == 38


def test_points_that_right_answers_do_not_add_up_to_are_not_resampled_by_item(visual):
    rng = np.random.default_rng(0)
    for seed in (1, 2, 3):
        for method, value in (("lora", 0.3 + 0.01 * seed), ("moslora", 0.35 + 0.02 * seed)):
            record = visual.add(method, seed, right=right(rng, ("mme",), 0.5), metric="share_of_points")
            results = json.loads((record.path / "results.json").read_text())
            results["evaluations"]["exact"]["tasks"]["mme"]["value"] = value
            (record.path / "results.json").write_text(json.dumps(results))
    page = page_of(visual, "visual_instruction", "smoke/exact")
    line = lines_of(page).iloc[0]
    assert line["items_add_up"] == "no" and line["value"] == pytest.approx(7.0)
    assert (line["bootstrap_low"], line["bootstrap_high"]) == pytest.approx((6.0, 8.0))  # the three seeds alone
    assert "* right answers, which are not what the task's number adds up" in page.markdown


def test_collapsed_runs_are_counted_and_named(runs):
    fine = {task: [True, False, True] * 4 for task in runs.tasks}
    for seed in (1, 2):
        runs.add("lora", seed, right=fine)
    runs.add("moslora", 1, right=fine)
    runs.add("moslora", 2, right=fine | {"piqa": [True] * 4 + [False] * 8})  # golds a, b: chance is a half
    runs.add("dora", 1, accuracies=0.1, items=12)
    runs.add("none", 1, training=None, accuracies=0.2)
    page = page_of(runs)
    assert rows_of(page).loc["moslora - lora", "Collapsed"] == "1 of 2; 0 of 2"
    assert rows_of(page).loc["dora - lora", "Collapsed"] == "1 of 1; 0 of 2"
    assert "smoke/moslora/default/seed-2 collapsed: piqa 33.3, chance 50.0." in page.markdown
    assert "smoke/dora/default/seed-1 collapsed: mean 10.0 below the untrained model's 20.0." in page.markdown


def test_a_run_that_cannot_be_used_is_left_out_by_name(runs, pair):
    path = runs.add("moslora", 7).path / "results.json"
    path.write_text(path.read_text().replace("0.5", "NaN", 1))
    page = page_of(runs)
    assert "smoke/moslora/default/seed-7: results.json:" in page.markdown
    assert rows_of(page).loc["moslora - lora", "n"] == "5"


def test_one_method_alone_and_validation_files(runs):
    runs.add("lora", protocol=("corrected", "corrected-validation"))
    found = documents(runs)
    assert set(found) == {("smoke/corrected", "comparisons"), ("smoke/corrected", "verdict")}
    assert "Nothing to compare: the runs are of one method." in found["smoke/corrected", "comparisons"].markdown


def test_the_papers_differences_stand_apart(runs, visual):
    runs.add("lora"), visual.add("lora")
    assert "85.6ˢ against 82.8ˢ" in page_of(runs).markdown
    assert "59.5ˢ against 57.8ᵈ" in page_of(visual, "visual_instruction", "smoke/exact").markdown


def test_formats():
    assert [points(share) for share in (0.028, -0.0004, 0.0, -0.1)] == ["+2.8", "0.0", "0.0", "-10.0"]
    assert interval((-0.01, 0.028)) == "-1.0 to +2.8" and interval(None) == "-"
    assert [p_value(p) for p in (None, 0.0004, 0.0125, 1.0)] == ["-", "<0.001", "0.013", "1.000"]

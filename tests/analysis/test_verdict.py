"""Every outcome of a verdict, forced by chosen numbers; the paragraph says what the numbers say."""

from __future__ import annotations

import io
import re

import numpy as np
import pandas as pd
import pytest

from analysis import verdict
from analysis.claims import STATEMENTS, Arm, Gap, Statement, paper_gap
from analysis.comparisons import build
from analysis.load import load_runs
from analysis.paper import load_paper_numbers

NUMBERS = load_paper_numbers()
COMMONSENSE = "commonsense_reasoning"
ITEMS = 200


def page_of(runs, experiment=COMMONSENSE, folder="smoke/corrected", **given):
    found = build(experiment, runs.root, *load_runs(runs.root, experiment), NUMBERS, **given)
    (page,) = [document for document in found if (document.folder, document.name) == (folder, "verdict")]
    return page


def outcomes(page):
    return pd.read_csv(io.StringIO(page.csv)).set_index("claim")["outcome"].to_dict()


def paragraph(page, beginning="MoSLoRA is better than LoRA"):
    (found,) = [line for line in page.markdown.splitlines() if line.startswith(f"**{beginning}")]
    return found


def add(runs, method, shares, label="default", **given):
    """A run a seed with that share of right answers in every task, spread over the items by chance."""
    rng = np.random.default_rng(len(method))
    for seed, share in enumerate(shares):
        answers = {}
        for task in runs.tasks:
            answers[task] = np.arange(ITEMS) < round(share * ITEMS)
            rng.shuffle(answers[task])
        runs.add(method, seed, label, right=answers, **given)


FLAT = (0.70, 0.71, 0.69, 0.70, 0.72)


def test_a_clear_gain_holds(runs):
    add(runs, "lora", FLAT)
    add(runs, "moslora", [share + gain for share, gain in zip(FLAT, (0.10, 0.11, 0.12, 0.10, 0.09), strict=True)])
    page = page_of(runs)
    assert outcomes(page)["mean"] == verdict.HOLDS
    text = paragraph(page)
    assert ": holds here.**" in text and "a difference of +10.4 points over 5 pairs of seeds" in text
    assert "5 pairs cannot have a p below 0.062" in text and "+2.8 (85.6ˢ against 82.8ˢ)" in text


def test_a_clear_loss_is_the_opposite(runs):
    add(runs, "lora", FLAT)
    add(runs, "moslora", [share - loss for share, loss in zip(FLAT, (0.10, 0.11, 0.12, 0.10, 0.09), strict=True)])
    page = page_of(runs)
    assert outcomes(page)["mean"] == verdict.OPPOSITE and "-10.4 points" in paragraph(page)


def test_a_wide_scatter_cannot_be_told(runs):
    add(runs, "lora", FLAT)
    add(runs, "moslora", (0.9, 0.5, 0.8, 0.6, 0.85))
    page = page_of(runs)
    assert outcomes(page)["mean"] == verdict.OPEN
    found = re.search(
        r"The smallest detectable difference is ([\d.]+) points, larger than the paper's gap", paragraph(page)
    )
    assert float(found.group(1)) > 2.8


def test_no_difference_with_enough_power_is_no_gap_of_the_papers_size(runs):
    add(runs, "lora", FLAT)
    add(runs, "moslora", [share + gain for share, gain in zip(FLAT, (0.005, -0.005, 0.0, 0.005, -0.005), strict=True)])
    page = page_of(runs)
    assert outcomes(page)["mean"] == verdict.SMALLER
    assert "which would have been found. The interval over seeds lies below it as well." in paragraph(page)


def test_one_pair_of_seeds_is_not_tested(runs):
    add(runs, "lora", FLAT[:1])
    add(runs, "moslora", (0.99,))
    page = page_of(runs)
    assert outcomes(page)["mean"] == verdict.ONE_SEED
    assert "95%" not in paragraph(page) and " p by " not in paragraph(page)


def test_pairs_that_all_differ_by_the_same_amount_tell_nothing_of_chance(runs):
    for seed in (1, 2):
        runs.add("lora", seed, accuracies=0.5), runs.add("moslora", seed, accuracies=0.6)
    page = page_of(runs)
    assert outcomes(page)["mean"] == verdict.OPEN and "differ by the same amount" in paragraph(page)


def test_other_settings_are_not_comparable(runs):
    add(runs, "lora", FLAT)
    add(runs, "moslora", [share + 0.1 for share in FLAT], settings={"limit": 200})
    page = page_of(runs)
    assert outcomes(page)["mean"] == verdict.NOT_COMPARABLE and "the evaluation setting limit" in paragraph(page)


def test_what_was_not_run_comes_with_its_command(runs):
    add(runs, "lora", FLAT[:3])
    page = page_of(runs)
    assert set(outcomes(page).values()) == {verdict.NOT_RUN}
    command = "python -m commonsense_reasoning.train -m scale=smoke method=moslora seed=0,1,2"
    assert f"No runs of MoSLoRA. To run it: {command} && " in paragraph(page).replace("\\", "")
    assert "method=moslora method.mixer_init=identity seed=0,1,2" in page.markdown.replace("\\", "")
    assert "evaluation.mode" not in page.markdown


def test_no_seed_in_common_is_not_run(runs):
    runs.add("lora", 1), runs.add("moslora", 2)
    page = page_of(runs)
    assert outcomes(page)["mean"] == verdict.NOT_RUN and "no seed in common" in paragraph(page)
    assert "seed=1,2" in paragraph(page)


def test_enough_pairs_must_satisfy_the_exact_test_too(runs):
    # Six pairs could reach 0.05, and do not with one against the others, however narrow the intervals are.
    base, gains = (*FLAT, 0.70), (0.10, 0.10, 0.10, 0.10, 0.10, -0.005)
    add(runs, "lora", base)
    add(runs, "moslora", [share + gain for share, gain in zip(base, gains, strict=True)])
    line = pd.read_csv(io.StringIO(page_of(runs).csv)).set_index("claim").loc["mean"]
    assert line["low"] > 0 and line["bootstrap_low"] > 0 and line["p_seed"] == 4 / 64
    assert line["outcome"] == verdict.OPEN


def test_collapsed_runs_are_told(runs):
    add(runs, "lora", FLAT)
    add(runs, "moslora", (0.2, *FLAT[1:]))
    assert "Collapsed runs: 1 of 5 of MoSLoRA; they are part of these numbers." in paragraph(page_of(runs))


def test_a_control_is_measured_by_the_gap_of_the_headline(runs):
    add(runs, "moslora", FLAT)
    add(runs, "moslora_folded", (0.5, 0.9, 0.7, 0.6, 0.8))
    page = page_of(runs)
    text = paragraph(page, "A learned mixer is more than another start of A")
    assert outcomes(page)["folded"] == verdict.OPEN and "the paper's gap of MoSLoRA over LoRA, +2.8" in text
    assert pd.read_csv(io.StringIO(page.csv)).set_index("claim").loc["folded", "paper_gap"] != 2.8


def test_the_default_start_may_be_named(runs):
    add(runs, "lora", FLAT)
    add(runs, "moslora", FLAT, label="method.mixer_init=kaiming_uniform")
    assert outcomes(page_of(runs))["mean"] != verdict.NOT_RUN


def test_the_published_protocol_has_a_verdict_of_its_own(runs):
    for method in ("lora", "moslora"):
        add(runs, method, FLAT, label="protocol=paper")
    page = page_of(runs)
    assert "(Table 4) [protocol=paper]: " in paragraph(page).replace("\\", "")
    assert "scale=smoke protocol=paper method=two_subspaces seed=0,1,2,3,4" in page.markdown.replace("\\", "")


def test_a_study_can_name_the_arms_that_it_chose(runs):
    rate = "training.learning_rate=0.001"
    add(runs, "lora", FLAT)
    add(runs, "moslora", FLAT, label=rate)
    chosen = Statement(
        "best", "The best MoSLoRA is better", "here", Arm("MoSLoRA", "moslora", (rate,)), Arm("LoRA", "lora")
    )
    assert outcomes(page_of(runs, statements=[chosen])) != {"best": verdict.NOT_RUN}


def test_visual_settings_are_judged_apart(visual):
    add(visual, "lora", FLAT)
    add(visual, "moslora", FLAT[::-1])
    add(visual, "lora", FLAT, label="model=big", base="big", quantization="nf4")
    page = page_of(visual, "visual_instruction", "smoke/exact")
    assert "(Table 5) [smoke]: " in page.markdown.replace("\\", "") and "[big, NF4]: not run" in page.markdown.replace(
        "\\", ""
    )
    assert "+1.7 (59.5ˢ against 57.8ᵈ)" in page.markdown


@pytest.mark.parametrize("scale", ["smoke", "small", "other"])
def test_the_reminder_of_what_a_scale_cannot_say_is_always_there(runs, scale):
    runs.add("lora", scale=scale)
    page = page_of(runs, folder=f"{scale}/corrected")
    assert f"These runs are of scale {scale}" in page.markdown and "cannot say whether" in page.markdown
    assert "cannot say whether" in page.latex


def test_runs_of_the_papers_scale_need_no_such_reminder():
    assert "cannot say whether" not in verdict.reminder_of("paper")


def test_the_gap_is_the_difference_of_the_papers_cells():
    assert paper_gap(Gap("table4", "moslora", "lora"), NUMBERS)[0] == pytest.approx(2.8)
    assert paper_gap(Gap("table3", "orthogonal", "identity"), NUMBERS) is None and paper_gap(None, NUMBERS) is None
    for statements in STATEMENTS.values():
        assert len({statement.id for statement in statements}) == len(statements)
        for gap in (gap for statement in statements for gap in (statement.gap, statement.yardstick) if gap):
            assert {gap.first, gap.second} <= {row.id for row in NUMBERS.tables[gap.table].rows}

"""Figure 4: shares, intervals, the gap, and what cannot be drawn."""

from __future__ import annotations

import io

import pandas as pd
import pytest
from scipy import stats

from analysis import figure4, table1
from analysis.commands import FULL
from analysis.load import load_runs
from analysis.paper import load_paper_numbers
from commonsense_reasoning.tasks import PUBLISHED_TRAIN_ITEMS

NUMBERS = load_paper_numbers()
RATE = "training.learning_rate"
FULL_SET = "data:\n  train_items: 2400\n"
LORA, MOSLORA = (0.50, 0.55, 0.57), (0.60, 0.63, 0.69)


def loaded(runs):
    return load_runs(runs.root, "commonsense_reasoning")[0]


def built(runs):
    return figure4.build(loaded(runs), [], NUMBERS)


def add(runs, method, values, items=None, rate=None, **given):
    parts = [f"data.train_items={items}"] * (items is not None) + [f"{RATE}={rate}"] * (rate is not None)
    for seed, value in enumerate(values):
        runs.add(method, seed, ",".join(parts) or "default", accuracies=value, **given)


@pytest.fixture
def figure(runs):
    for method, values in (("lora", LORA), ("moslora", MOSLORA)):
        add(runs, method, values, 1200)
        add(runs, method, [value + 0.1 for value in values], config=FULL_SET)
    (found,) = built(runs)
    return found


def test_points_are_means_over_the_seeds_with_their_intervals_at_their_shares(figure):
    csv = pd.read_csv(io.StringIO(figure.csv))
    ours = csv[(csv.origin == "measured") & (csv.column == "avg")]
    assert [*zip(ours.method, ours["share"], strict=True)] == [
        *(("lora", 50), ("lora", 100), ("moslora", 50), ("moslora", 100))
    ]
    point = ours.iloc[0]
    expected = stats.ttest_1samp([100 * value for value in LORA], 0).confidence_interval(0.95)
    assert (point.value, point.low, point.high) == pytest.approx((54, *expected))
    assert point["n"] == 3 and point["items"] == 1200
    assert set(figure.pictures) == {"pdf", "svg", "png"}


def test_the_papers_points_are_marked_and_their_contradiction_is_shown(figure, runs):
    csv = pd.read_csv(io.StringIO(figure.csv))
    theirs = csv[csv.origin == "paper"]
    assert [*zip(theirs.method, theirs["share"], theirs.value, strict=True)] == [
        ("lora", 100, 81.8),
        ("moslora", 50, 83.6),
    ]
    assert theirs.provenance.tolist() == ["SECONDARY", "SECONDARY"]
    assert "81.8ˢ" in figure.markdown and "contradicts the 82.8" in figure.markdown
    curves = figure4._curves(loaded(runs), "corrected", runs.tasks)
    drawn = figure4.compose(curves, 2400, NUMBERS.tables["figure4"], figure4._other_full(NUMBERS))
    words = {text.get_text() for text in drawn.axes[1].texts}
    assert words >= {"LoRA 81.8ˢ", "MoSLoRA 83.6ˢ", "LoRA in Table 4 82.8ˢ"}
    assert not drawn.axes[0].texts  # none of them among our points


def test_the_gap_is_paired_by_seed(figure):
    csv = pd.read_csv(io.StringIO(figure.csv))
    gap = csv[csv.column == "gap"].iloc[0]
    differences = [100 * (ours - theirs) for ours, theirs in zip(MOSLORA, LORA, strict=True)]
    expected = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert (gap.value, gap.low, gap.high) == pytest.approx((10, *expected))
    assert "MoSLoRA is above LoRA at 2 of 2 sizes" in figure.markdown and "cannot be told" in figure.markdown


@pytest.mark.parametrize(("more", "expected"), [(0.1, "it widens here"), (-0.1, "it narrows here")])
def test_whether_the_gap_widens_can_come_out_either_way(runs, more, expected):
    for method, values in (("lora", (0.5, 0.52, 0.54)), ("moslora", (0.5, 0.53, 0.54))):
        add(runs, method, values, 600)
        add(runs, method, [value + more * (method == "moslora") for value in values], config=FULL_SET)
    (figure,) = built(runs)
    assert expected in figure.markdown


def test_one_seed_has_no_interval(runs):
    add(runs, "lora", [0.5], 600)
    add(runs, "lora", [0.6], config=FULL_SET)
    (figure,) = built(runs)
    assert "50.0†" in figure.markdown and "† one seed, so no interval." in figure.markdown
    assert ",nan" not in figure.csv.lower()


def test_without_the_size_of_the_full_set_nothing_is_drawn(runs):
    add(runs, "lora", LORA, 600)
    (figure,) = built(runs)
    assert figure.pictures == {} and "Not drawn: how many items 100% are is not known" in figure.markdown
    assert "600 items" in figure.markdown
    add(runs, "lora", LORA)  # its configuration is not there
    assert built(runs)[0].pictures == {}


def test_all_of_the_published_set_is_known_by_its_size(runs):
    add(runs, "lora", LORA, PUBLISHED_TRAIN_ITEMS // 2)
    add(runs, "lora", LORA, config="data:\n  train_items: null\n  published_sizes: true\n")
    csv = pd.read_csv(io.StringIO(built(runs)[0].csv))
    assert csv[csv.origin == "measured"]["share"].tolist() == [50, 100]


def test_runs_without_a_share_and_on_validation_items_make_no_figure(runs):
    add(runs, "lora", LORA, config=FULL_SET)
    add(runs, "lora", LORA, 600, protocol="corrected-validation")
    assert built(runs) == []


def test_points_are_those_of_the_one_rate(runs):
    add(runs, "lora", [0.2], 600, rate=0.1)
    add(runs, "lora", [0.6], rate=0.1, config=FULL_SET)
    csv = pd.read_csv(io.StringIO(built(runs)[0].csv))
    assert csv[csv.origin == "measured"].value.tolist() == pytest.approx([20, 60])
    add(runs, "lora", [0.4], 600, rate=0.2)
    csv = pd.read_csv(io.StringIO(built(runs)[0].csv))  # at 25% none of the two rates is chosen
    assert csv[csv.origin == "measured"].value.tolist() == pytest.approx([60])


@pytest.mark.parametrize("damaged", [None, "adapter: ["])
def test_a_run_without_a_readable_configuration_is_named_and_not_counted(runs, damaged):
    """In the figure and in Table 1, which both ask the configuration for what the overrides do not say."""
    config = FULL_SET + "adapter:\n  r: 8\n"
    add(runs, "lora", [0.5, 0.5], 600)
    add(runs, "lora", [0.6, 0.7], config=config)
    runs.add("lora", 2, accuracies=0.1, config=damaged)
    runs.add("dora", 2, config=damaged)  # neither shows it anyway
    name = "commonsense_reasoning/smoke/lora/default/seed-2: config.yaml cannot be read: not counted here"
    for (document,) in (built(runs), table1.build(loaded(runs), [], NUMBERS)):
        assert document.markdown.count(name) == document.markdown.count("cannot be read") == 1
        csv = pd.read_csv(io.StringIO(document.csv))
        average = csv[(csv.origin == "measured") & (csv.column == "avg") & (csv.label == "default")]
        assert average.value.tolist() == pytest.approx([65])


def test_the_claims_name_shares_and_half_the_data_is_held_against_all_of_it(runs):
    for method in ("lora", "moslora"):
        add(runs, method, LORA, 300)
        add(runs, method, LORA, 1200)
        add(runs, method, LORA, config=FULL_SET)
    found = {statement.id: statement for statement in figure4.statements(loaded(runs))}
    assert list(found) == ["data_300", "data_1200", "data_half"]
    assert "12.5% of the training data" in found["data_300"].text
    assert found["data_half"].second.labels == ("default",)


def test_sizes_of_the_full_sets_are_those_of_the_experiment():
    from hydra import compose, initialize_config_module

    from commonsense_reasoning import config
    from moslora_core import launch

    assert FULL["commonsense_reasoning", "paper"] == PUBLISHED_TRAIN_ITEMS
    launch.register(config.Config)
    with initialize_config_module(config.CONF_MODULE, version_base="1.3"):
        smoke = compose("config", overrides=["scale=smoke", "method=lora"])
    assert FULL["commonsense_reasoning", "smoke"] == smoke.data.train_items

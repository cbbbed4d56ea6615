"""The table of subject-driven generation: averages and intervals against independent computations, marks, notes."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from analysis.load import load_runs
from analysis.paper import load_paper_numbers
from analysis.subject_driven import average, label_without_subject
from analysis.t2i_table import build

from . import subject_runs
from .subject_runs import METRICS, ORACLE

NUMBERS = load_paper_numbers()
SUBJECTS = ("can", "dog", "teapot")
SEEDS = (0, 1, 2)


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    return folder


def documents(root):
    return {(found.folder, found.name): found for found in build(*load_runs(root, "subject_driven_t2i"), NUMBERS)}


def document_of(root):
    (found,) = documents(root).values()
    return found


def csv_of(document) -> pd.DataFrame:
    return pd.read_csv(io.StringIO(document.csv), keep_default_na=False, na_values=[""])


def table_of(document, number: int = 0) -> pd.DataFrame:
    """A table of the Markdown, as text; the row names as its index."""
    blocks = [list(lines) for is_table, lines in _blocks(document.markdown) if is_table]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in blocks[number]]
    return pd.DataFrame(cells[2:], columns=cells[0]).set_index(cells[0][0])


def _blocks(markdown):
    return itertools.groupby(markdown.split("\n"), key=lambda line: line.startswith("|"))


def draw_values(seed: int, low: float = -0.2, high: float = 0.9) -> np.ndarray:
    """(seeds, subjects, tasks)"""
    return np.random.default_rng(seed).uniform(low, high, (len(SEEDS), len(SUBJECTS), 3)).round(3)


def add_all(root, method, values, overrides="", subjects=SUBJECTS, **given) -> None:
    for i, seed in enumerate(SEEDS[: len(values)]):
        for j, subject in enumerate(subjects):
            of_run = dict(zip(METRICS, values[i, j].tolist(), strict=True))
            subject_runs.add(root, method, subject, of_run, seed, overrides, **given)


# ----------------------------------------------------------------------------------------------------- the numbers


def test_subjects_are_averaged_within_a_seed_before_the_seeds(root):
    values = {"lora": draw_values(0), "moslora": draw_values(1)}
    for method, of_method in values.items():
        add_all(root, method, of_method)
    lines = csv_of(document_of(root))
    for method, of_method in values.items():
        found = lines[(lines.method == method) & lines.subject.isna()].set_index("column")
        of_seeds = of_method.mean(axis=1)  # (seeds, tasks)
        for number, task in enumerate(METRICS):
            assert found.loc[task, "value"] == pytest.approx(of_seeds[:, number].mean())
            assert found.loc[task, "sd"] == pytest.approx(of_seeds[:, number].std(ddof=1))
            assert (found.loc[task, "n"], found.loc[task, "subjects"]) == (3, 3)
            by_subject = lines[(lines.method == method) & (lines.column == task)].dropna(subset="subject")
            assert by_subject.set_index("subject").loc[list(SUBJECTS), "value"].to_numpy() == pytest.approx(
                of_method.mean(axis=0)[:, number]
            )
    assert set(lines[lines.origin == "measured"].unit) == {"cosine", "seconds", "GiB", "parameters"}


def test_the_interval_is_that_of_all_resamples_of_the_subjects(root):
    values = draw_values(2)
    add_all(root, "lora", values)
    found = csv_of(document_of(root)).query("column == 'dino'").iloc[0]
    by_subject = values[:, :, 0].mean(axis=0)
    every = [np.mean(chosen) for chosen in itertools.product(by_subject, repeat=3)]  # all 27 are equally likely
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(every, (0.025, 0.975))), abs=0.02)
    assert min(every) <= found.low < found.value < found.high <= max(every)


def test_cells_name_mean_deviation_and_interval(root):
    values = draw_values(3)
    add_all(root, "lora", values)
    document = document_of(root)
    line = csv_of(document).query("column == 'clip_i'").iloc[0]
    cell = table_of(document).loc["lora", "CLIP-I"]
    assert cell == f"{line.value:.3f} ± {line.sd:.3f} ({line.low:.3f} to {line.high:.3f})"
    assert table_of(document).loc["lora", "n"] == "3" and table_of(document).loc["lora", "Subjects"] == "3"


def test_accuracies_are_in_percent(root):
    for subject, share in zip(SUBJECTS, (0.25, 0.5, 1.0), strict=True):
        subject_runs.add(root, "lora", subject, dict.fromkeys(ORACLE, share), protocol="oracle")
    document = document_of(root)
    table = table_of(document)
    assert list(table.columns)[-4:] == ["Shape (%)", "Colour (%)", "Core (%)", "Background (%)"]
    assert table.loc["lora", "Shape (%)"].startswith("58.3 (")
    lines = csv_of(document).set_index(["column", "subject"])
    assert lines.loc[("background", "can"), "value"] == 25.0 and lines.loc[("background", "can"), "unit"] == "percent"


def test_the_real_images_have_a_row_that_no_seed_enters(root):
    values, real = draw_values(4), np.array([[0.8, 0.9], [0.7, 0.8], [0.6, 0.7]])
    for j, subject in enumerate(SUBJECTS):
        add_all(root, "lora", values[:, j : j + 1], subjects=[subject], real=dict(zip(METRICS, real[j], strict=False)))
    document = document_of(root)
    row = table_of(document).loc["real images"]
    assert row["DINO"].startswith("0.700 (") and row["CLIP-I"].startswith("0.800 (") and row["CLIP-T"] == "-"
    assert (row["n"], row["Subjects"], row["Params (M)"], row["Train (s)"]) == ("-", "3", "-", "-")
    lines = csv_of(document).query("method == 'real_images'")
    assert lines.n.isna().all() and set(lines.column) == {"dino", "clip_i"}
    assert "different scores" not in document.markdown


def test_real_images_that_differ_between_the_runs_are_named(root):
    for seed, score in ((1, 0.8), (2, 0.7)):
        subject_runs.add(root, "lora", "dog", {"dino": 0.5}, seed, real={"dino": score})
    assert "Warning: the real images of dog have different scores in DINO, from 0.700 to 0.800" in (
        document_of(root).markdown
    )


def test_costs_are_those_of_one_training(root):
    for seed in (1, 2):
        for subject, seconds in (("can", 10.0), ("dog", 30.0)):
            subject_runs.add(root, "lora", subject, {"dino": 0.5}, seed, seconds=seconds + seed, memory=2**30 * seed)
    row = table_of(document_of(root)).loc["lora"]
    assert (row["Train (s)"], row["Peak GiB (rss)"], row["Params (M)"]) == ("21.5 ± 0.7", "1.50 ± 0.71", "0.00100")


# ----------------------------------------------------------------------------------------------------- against LoRA


def test_differences_are_paired_by_seed_and_subject(root):
    lora, moslora = draw_values(5), draw_values(6)
    add_all(root, "lora", lora)
    add_all(root, "moslora", moslora[:2])  # the third seed is not there yet
    document = document_of(root)
    difference = (moslora - lora)[:2]
    table = table_of(document, 1).reset_index().set_index("Metric")
    for number, (task, title) in enumerate(zip(METRICS, ("DINO", "CLIP-I", "CLIP-T"), strict=True)):
        row, of_seeds = table.loc[title], difference[:, :, number].mean(axis=1)
        assert row["First - second"] == "moslora - lora"
        assert float(row["First"]) == pytest.approx(moslora[:2, :, number].mean(), abs=6e-4)
        assert float(row["Second"]) == pytest.approx(lora[:2, :, number].mean(), abs=6e-4)
        assert float(row["Difference"]) == pytest.approx(of_seeds.mean(), abs=6e-4)
        assert (row["n"], row["Subjects"]) == ("2", "3")
        low, high = stats.t.interval(0.95, 1, of_seeds.mean(), stats.sem(of_seeds))
        assert row["95% over seeds"] == f"{low:+.3f} to {high:+.3f}"
        assert row["Subjects ahead"] == f"{(difference[:, :, number].mean(axis=0) > 0).sum()} of 3"
        line = csv_of(document).query(f"column == '{task} - lora' and subject.isna()").iloc[0]
        assert line.value == pytest.approx(of_seeds.mean())
        assert row["95% over subjects"] == f"{line.low:+.3f} to {line.high:+.3f}"


def test_every_arm_is_compared_with_lora_of_its_own_settings(root):
    for method, overrides in (
        *(("lora", ""), ("lora", "adapter.r=8"), ("moslora", ""), ("base", "")),
        *(("moslora", "adapter.r=8,method.mixer_init=orthogonal"), ("moslora", "adapter.r=16")),
    ):
        subject_runs.add(root, method, "dog", {"dino": 0.5}, overrides=overrides)
    names = list(table_of(document_of(root), 1).index)
    assert names == [
        "lora (adapter.r=8) - lora",
        "moslora - lora",
        "moslora (adapter.r=16) - lora",
        "moslora (adapter.r=8; orthogonal) - lora (adapter.r=8)",
    ]


def test_without_lora_nothing_is_compared(root):
    subject_runs.add(root, "moslora", "dog", {"dino": 0.5})
    subject_runs.add(root, "base", "dog", {"dino": 0.3})
    document = document_of(root)
    assert "Against LoRA" not in document.markdown and list(table_of(document).index) == [
        "base (no adapter)",
        "moslora",
    ]


# ----------------------------------------------------------------------------------------- what is missing or unlike


def test_a_row_of_fewer_subjects_is_marked(root):
    add_all(root, "lora", draw_values(7))
    add_all(root, "moslora", draw_values(8)[:, :2], subjects=SUBJECTS[:2])
    document = document_of(root)
    assert list(table_of(document)["Subjects"]) == ["3", "2‡"]
    assert "‡ moslora: over 2 of 3 subjects (without teapot) and not comparable with an average over all 3." in (
        document.markdown
    )
    assert set(table_of(document, 1)["Subjects"]) == {"2"}  # LoRA's average over the same two


def test_only_complete_seeds_enter_where_there_are_any(root):
    values = draw_values(9)
    add_all(root, "lora", values)
    (root / "subject_driven_t2i/smoke/lora/data.subject=dog/seed-2/results.json").unlink()
    document = document_of(root)
    line = csv_of(document).query("column == 'dino'").iloc[0]
    assert (line.n, line.value) == (2, pytest.approx(values[:2, :, 0].mean()))
    assert "lora: over the 2 of 3 seeds that have all subjects." in document.markdown
    assert "Left out:" in document.markdown and "data.subject=dog/seed-2: " in document.markdown


def test_one_seed_is_marked(root):
    add_all(root, "lora", draw_values(10)[:1])
    document = document_of(root)
    assert table_of(document).loc["lora", "n"] == "1†" and "† one seed" in document.markdown
    assert "†" not in table_of(document).loc["lora", "DINO"]


def test_a_single_subject_has_no_interval_over_subjects(root):
    add_all(root, "lora", draw_values(11)[:, :1], subjects=["dog"])
    assert "(" not in table_of(document_of(root)).loc["lora", "DINO"]
    assert csv_of(document_of(root)).low.isna().all()


def test_runs_without_a_subject_or_of_the_same_are_left_out(root):
    subject_runs.add(root, "lora", None, {"dino": 0.5}, label="default")
    subject_runs.add(root, "lora", "dog", {"dino": 0.4})
    subject_runs.add(root, "lora", "dog", {"dino": 0.4}, label="default", seed=2)
    subject_runs.add(root, "lora", "dog", {"dino": 0.4}, seed=2)
    document = document_of(root)
    assert csv_of(document).query("column == 'dino' and subject.isna() and method == 'lora'").n.tolist() == [1]
    assert "lora/default/seed-1: its evaluation does not say its subject" in document.markdown
    assert document.markdown.count("one of 2 runs of dog with seed 2 and the same settings") == 2


def test_runs_drawn_or_compared_otherwise_are_a_warning_but_other_subjects_are_not(root):
    add_all(root, "lora", draw_values(12))
    assert "Warning" not in document_of(root).markdown
    subject_runs.add(root, "moslora", "dog", {"dino": 0.5}, settings={"drawing": {"steps": 50, "subject": "dog"}})
    markdown = document_of(root).markdown
    assert "Warning: the runs differ in the evaluation setting drawing.steps: 25 or 50." in markdown
    assert markdown.count("Warning") == 1


def test_every_scale_and_protocol_has_a_page_of_its_own(root):
    subject_runs.add(root, "lora", "dog", {"dino": 0.5})
    subject_runs.add(root, "lora", "dog", dict.fromkeys(ORACLE, 0.5), protocol="oracle")
    subject_runs.add(root, "lora", "dog", {"dino": 0.5}, scale="paper")
    assert sorted(documents(root)) == [
        ("paper/dreambooth", "metrics"),
        ("smoke/dreambooth", "metrics"),
        ("smoke/oracle", "metrics"),
    ]


def test_the_paper_has_no_numbers_and_the_page_says_so(root):
    add_all(root, "lora", draw_values(13))
    document = document_of(root)
    assert "No automatic metric is published" in document.markdown
    assert "No automatic metric is published" in document.latex
    assert set(csv_of(document).origin) == {"measured"}


def test_the_models_and_metrics_are_named(root):
    add_all(root, "lora", draw_values(14))
    markdown = document_of(root).markdown
    assert "Models: DINO: facebook/dino-vits16; CLIP: openai/clip-vit-base-patch32." in markdown
    for title, metric in zip(("DINO", "CLIP-I", "CLIP-T"), METRICS.values(), strict=True):
        assert f"{title}: {metric}" in markdown
    assert "Subjects: can, dog, teapot; images of each: 8." in markdown


def test_the_same_runs_give_the_same_bytes_in_every_format(root):
    add_all(root, "lora", draw_values(15))
    add_all(root, "moslora", draw_values(16), "method.mixer_init=orthogonal")
    first, second = document_of(root), document_of(root)
    assert first == second
    assert r"\label{tab:subjects-smoke-dreambooth}" in first.latex and "moslora (orthogonal)" in first.latex


# ------------------------------------------------------------------------------------------------------- identities


@given(st.dictionaries(st.tuples(st.integers(0, 3), st.sampled_from("abc")), st.floats(-1, 1), min_size=1))
def test_an_average_is_over_the_same_subjects_in_every_seed(values):
    found = average(values, "abc")
    seeds = {seed for seed, _ in values}
    complete = [seed for seed in seeds if all((seed, subject) in values for subject in "abc")]
    if found is None:
        assert not complete and not set.intersection(*({s for at, s in values if at == seed} for seed in seeds))
        return
    assert set(found.by_seed) == set(complete or seeds)
    for seed, value in found.by_seed.items():
        assert value == pytest.approx(np.mean([values[seed, subject] for subject in found.by_subject]))
    assert found.summary.mean == pytest.approx(np.mean(list(found.by_subject.values())))


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("data.subject=dog", "default"),
        ("adapter.r=8,data.subject=dog,method.mixer_init=orthogonal", "adapter.r=8,method.mixer_init=orthogonal"),
        ("default", "default"),
        ("data.subject=dog,training.x=~0123456789ab", "data.subject=dog,training.x=~0123456789ab"),
    ],
)
def test_the_subject_is_taken_from_the_label(label, expected):
    assert label_without_subject(label) == expected

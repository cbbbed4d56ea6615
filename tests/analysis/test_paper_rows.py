"""Tables 1 and 3, whose rows are the paper's, and Table 2, which is computed."""

from __future__ import annotations

import io
import re

import numpy as np
import pandas as pd
import pytest

from analysis import table1, table2, table3
from analysis.load import load_runs
from analysis.markdown import Table, blocks
from analysis.paper import load_paper_numbers
from moslora_core import MIXER_INITS
from moslora_core.config import MIXERS

RATE = "training.learning_rate"
NUMBERS = load_paper_numbers()


def built(table, runs):
    found, left_out = load_runs(runs.root, "commonsense_reasoning")
    return table.build(found, left_out, NUMBERS)


def grid(page):
    """Row title -> column title -> cell, of the first table."""
    table = next(block for block in blocks(page.markdown) if isinstance(block, Table))
    return {row[0]: dict(zip(table.headers, row, strict=True)) for row in table.rows}


def of_rank(r):
    return f"adapter:\n  r: {r}\n"


def test_table_1_finds_the_ranks_of_its_rows(runs):
    for seed, value in enumerate((0.5, 0.6, 0.7)):
        runs.add("lora", seed, accuracies=value, config=of_rank(8))
        runs.add("two_subspaces", seed, "adapter.lora_alpha=32,adapter.r=16", accuracies=value / 2)
        runs.add("lora", seed, "adapter.r=4", accuracies=0.9)
        runs.add("lora", seed, "adapter.r=16,training.max_steps=7", accuracies=0.9)
        runs.add("moslora", seed, config=of_rank(8), accuracies=0.9)
    (page,) = built(table1, runs)
    rows = grid(page)
    names = [f"{method}, r = {r}" for r in (8, 16) for method in ("LoRA", "Two-subspaces mixing")]
    assert list(rows) == names
    assert [row["n"] for row in rows.values()] == ["3", "0", "0", "3"]
    assert rows["LoRA, r = 8"]["Avg."] == f"60.0 ± {100 * np.std([0.5, 0.6, 0.7], ddof=1):.1f}"
    assert rows["Two-subspaces mixing, r = 16"]["HellaS"] == "30.0 ± 5.0"
    assert set(rows["LoRA, r = 16"].values()) == {"LoRA, r = 16", "0", "-"}
    assert "91.4ˢ" in page.markdown and "93.3ˢ" in page.markdown
    lacking = "python -m commonsense_reasoning.train -m scale=smoke method=lora adapter.lora_alpha=32 adapter.r=16"
    assert f"LoRA, r = 16: no runs. To run it: {lacking} seed=0,1,2 && " in page.markdown.replace("\\", "")
    csv = pd.read_csv(io.StringIO(page.csv))
    average = csv[(csv.origin == "measured") & (csv.column == "avg")]
    assert average.value.tolist() == pytest.approx([60, 30])
    assert csv[csv.origin == "paper"].provenance.notna().all()


def test_a_row_shows_its_one_rate_and_names_a_choice_that_is_open(runs):
    for rate in (0.1, 0.2):
        runs.add("moslora", 1, f"method.mixer_init=orthogonal,{RATE}={rate}")
    assert built(table3, runs) == []  # nothing can be shown, and nothing is made up
    runs.add("lora", 1, f"{RATE}=0.2", accuracies=0.4)
    (page,) = built(table3, runs)
    rows = grid(page)
    assert rows["LoRA (identity, fixed)"]["Avg."] == "40.0" and rows["Orthogonal"]["n"] == "0"
    assert "Learning rates: LoRA (identity, fixed): 0.2." in page.markdown
    assert "Orthogonal: run at the learning rates 0.1, 0.2, of which none is chosen" in page.markdown
    assert "python -m analysis.study" in page.markdown


def test_table_3_has_every_start_in_the_papers_order_beside_its_average(runs):
    runs.add("lora", accuracies=0.5)
    runs.add("moslora", 1, "method.mixer_init=kaiming_uniform", accuracies=0.6)
    runs.add("moslora", 1, "method.mixer_init=zero", accuracies=0.1)
    (page,) = built(table3, runs)
    rows = grid(page)
    assert [*rows] == ["LoRA (identity, fixed)", *(table3.TITLES[init] for init in table3.INITS)]
    assert set(table3.INITS) == set(MIXER_INITS)
    assert [row["Paper, Avg."] for row in rows.values()] == ["82.8ˢ", "-", "82.6ˢ", "-", "-", "85.6ˢ"]
    assert [row["Avg."] for row in rows.values()] == ["50.0", "10.0", "-", "-", "-", "60.0"]


def test_evaluations_on_validation_items_have_no_table_of_the_paper(runs):
    runs.add("lora", protocol="generate-corrected-validation", config=of_rank(8))
    assert built(table1, runs) == built(table3, runs) == []


def test_rows_of_two_protocols_are_two_pages(runs):
    runs.add("lora", 1, protocol=("a", "b"))
    assert [page.folder for page in built(table3, runs)] == ["smoke/a", "smoke/b"]


def test_contexts_are_told_apart(runs):
    runs.add("lora", 1, accuracies=0.5)
    runs.add("lora", 1, "model.name=other", accuracies=0.6)
    (page,) = built(table3, runs)
    rows = grid(page)
    assert rows["LoRA (identity, fixed)"]["Avg."] == "50.0"
    assert rows["LoRA (identity, fixed) [model.name=other]"]["Avg."] == "60.0"


@pytest.mark.parametrize("table", [table1, table3])
def test_latex_is_a_tabular_with_the_rules_of_booktabs(runs, table):
    runs.add("lora", config=of_rank(8))
    (page,) = built(table, runs)
    for tabular in re.findall(r"\\begin\{tabular\}\{(\w+)\}\n(.+?)\\end\{tabular\}", page.latex, flags=re.DOTALL):
        columns, body = tabular
        lines = [line for line in body.strip().split("\n") if not re.fullmatch(r"\\(top|mid|bottom)rule", line)]
        assert all(len(re.findall(r"(?<!\\)&", line)) == len(columns) - 1 for line in lines)
        assert body.count(r"\toprule") == body.count(r"\bottomrule") == 1
    assert page.latex.isascii() or not set(page.latex) & set("±†‡ΔʳˢᵈᶜᵖΔ²")


def test_table_2_is_what_the_mixers_are():
    (page,) = table2.build(NUMBERS)
    found = {mixer.method: mixer for mixer in table2.mixers()}
    assert len(found) == len(MIXERS)
    for number, r in enumerate(table2.RANKS):
        butterfly = np.kron(np.ones((2, 2)), np.eye(r // 2))
        expected = {"lora": np.eye(r), "two_subspaces": butterfly, "moslora": np.random.default_rng(r).random((r, r))}
        for method, matrix in expected.items():
            assert found[method].subspaces[number] == np.count_nonzero(matrix)
            assert found[method].rank[number] == np.linalg.matrix_rank(matrix)
        assert found["moslora"].parameters[number] == r * r and found["moslora_frozen"].parameters[number] == 0
    rows = grid(page)
    shown = {method: (row["Learned"], row["Mixed subspaces"], row["Rank of M"]) for method, row in rows.items()}
    assert shown == {
        "lora": ("no", "r", "r"),
        "two_subspaces": ("no", "2r", "r/2"),
        "moslora_frozen": ("no", "r²", "r"),
        "moslora": ("yes", "r²", "r"),
    }
    paper = {row.id: row.cells["subspaces"][0].value for row in NUMBERS.tables["table2"].rows}
    assert paper == {method: found[method].subspaces[table2.RANKS.index(16)] for method in paper}

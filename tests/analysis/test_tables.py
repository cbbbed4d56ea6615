"""Number formats, and that every grid is read back from each of its formats as it was."""

from __future__ import annotations

import io
import math
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.aggregate import summarize
from analysis.tables import Grid, bullets, csv_text, escape_latex, latex_tabular, markdown_table, mean_sd, significant

finite = st.floats(-1e6, 1e6, allow_nan=False)
texts = st.text(st.characters(blacklist_categories=("Cs", "Cc")), max_size=20)


@given(st.lists(finite, min_size=1, max_size=8))
def test_summary_is_the_mean_and_the_sample_deviation(values):
    summary = summarize(values)
    assert summary.n == len(values)
    assert summary.mean == pytest.approx(np.mean(values), rel=1e-9, abs=1e-9)
    if len(values) == 1:
        assert summary.sd is None
    else:
        assert summary.sd == pytest.approx(np.std(values, ddof=1), rel=1e-6, abs=1e-6)


def test_nothing_has_no_summary():
    assert summarize([]) is None
    assert mean_sd(None, 1) == "-"


def test_mean_and_deviation_are_scaled_together():
    assert mean_sd(summarize([0.80, 0.82, 0.84]), 1, 100) == "82.0 ± 2.0"
    assert mean_sd(summarize([0.8]), 1, 100) == "80.0"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0, "0"), (28.352512, "28.4"), (0.012288, "0.0123"), (0.00256, "0.00256"), (113.901568, "114")),
        *(
            (8030.26, "8030"),
            (9.999, "10.0"),
            (0.9999, "1.00"),
            (99.96, "100"),
            (1234567, "1230000"),
            (1e-6, "0.00000100"),
        ),
    ],
)
def test_three_significant_digits(value, text):
    assert significant(value) == text


@given(st.integers(1, 10**11))
def test_significant_digits_are_close_and_never_exponential(count):
    text = significant(count / 1e6)
    assert re.fullmatch(r"\d+(\.\d+)?", text)
    assert float(text) == pytest.approx(count / 1e6, rel=0.005)


def markdown_cells(line: str) -> list[str]:
    """The cells of a pipe table's line as a Markdown reader takes them: an escaped character stands for itself."""
    cells = re.findall(r"((?:\\.|[^|\\])*)\|", line.removeprefix("|"))
    return [re.sub(r"\\(.)", r"\1", cell.strip()) for cell in cells]


@given(st.lists(st.tuples(texts, texts, texts), max_size=4))
def test_markdown_gives_the_cells_back(rows):
    grid = Grid(["Method", "a|b", "c"], rows)
    lines = markdown_table(grid).rstrip("\n").split("\n")
    assert len({len(line) for line in lines}) == 1
    header, rule, *body = [markdown_cells(line) for line in lines]
    assert header == ["Method", "a|b", "c"]
    assert all(set(cell) <= {"-", ":"} for cell in rule)
    assert body == [[" ".join(cell.split()) for cell in row] for row in rows]


def test_markdown_leaves_names_readable():
    assert bullets(["two_subspaces <85.6 <b> *x* _y_"]) == "- two_subspaces <85.6 \\<b> \\*x\\* \\_y\\_\n"


def brace_depths(text: str) -> list[int]:
    depth, depths = 0, []
    for brace in re.findall(r"[{}]", re.sub(r"\\[{}\\]", "", text)):
        depth += 1 if brace == "{" else -1
        depths.append(depth)
    return depths


@given(texts)
def test_latex_escapes_leave_no_special_character(text):
    escaped = escape_latex(text)
    depths = brace_depths(escaped)
    assert not depths or (min(depths) >= 0 and depths[-1] == 0)
    symbols = r"\$\\(pm|Delta|cdot)\$|\$\^\{(\\d?dagger|\\mathrm\{\w\}|2)\}\$"
    bare = re.sub(rf"\\[&%$#_{{}}]|\\text\w+\{{\}}|{symbols}", "", escaped)
    assert not set(bare) & set("&%$#_{}\\~^")


@given(st.lists(st.tuples(texts, texts), max_size=4))
def test_latex_rows_have_as_many_cells_as_columns(rows):
    lines = latex_tabular(Grid(["Method", "Avg."], rows)).splitlines()
    assert lines[0] == r"\begin{tabular}{lr}" and lines[-1] == r"\end{tabular}"
    assert [lines.index(rule) for rule in (r"\toprule", r"\midrule")] == [1, 3]
    body = lines[4 : lines.index(r"\bottomrule")]
    assert len(body) == len(rows)
    assert all(len(re.findall(r"(?<!\\)&", line)) == 1 and line.endswith(r" \\") for line in body)


def test_latex_marks():
    assert escape_latex("81.0 ± 0.4† 87.7ʳ 50%") == r"81.0 $\pm$ 0.4$^{\dagger}$ 87.7$^{\mathrm{r}}$ 50\%"


@given(st.lists(st.tuples(texts, finite), min_size=1, max_size=4))
def test_csv_gives_the_values_back_unrounded(rows):
    text = csv_text(("name", "value", "empty"), [{"name": name, "value": value} for name, value in rows])
    frame = pd.read_csv(io.StringIO(text), keep_default_na=False, dtype={"name": str})
    assert frame["name"].tolist() == [name for name, _ in rows]
    assert all(math.isclose(a, b, rel_tol=1e-12) for a, (_, b) in zip(frame["value"], rows, strict=True))
    assert set(frame["empty"]) == {""}


def test_a_row_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match="a row of 1 cells under 2 headers"):
        Grid(["a", "b"], [["x"]])

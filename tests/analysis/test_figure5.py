"""Figure 5: its numbers against values computed independently, what is drawn of them, and the files themselves."""

from __future__ import annotations

import io
import math
import re
import subprocess
import sys
import zlib
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from analysis.figure5 import ABILITIES, build
from analysis.load import load_runs
from analysis.paper import load_paper_numbers
from analysis.radar import Line, Panel, Scale, compose, scale_for
from analysis.style import COLUMN, PALETTE, TEXT, publication

NUMBERS = load_paper_numbers()
AXES = tuple(ABILITIES)


def figures(visual, **options):
    found = build(*load_runs(visual.root, "visual_instruction"), NUMBERS, **options)
    return {f"{figure.folder}/{figure.name}": figure for figure in found}


def figure_of(visual, **options):
    (figure,) = figures(visual, **options).values()
    return figure


def csv_of(figure):
    return pd.read_csv(io.StringIO(figure.csv), keep_default_na=False, na_values=[""])


def add_seeds(visual, method, values, label="default", **given):
    """A run per row of ``values``, a column per smoke task."""
    for seed, row in enumerate(values.tolist()):
        visual.add(method, seed, label, accuracies=dict(zip(visual.tasks, row, strict=True)), **given)


def add_abilities(visual, method, values, **given):
    """A run per row of ``values``: six abilities of MMBench EN, then six of CN."""
    for seed, row in enumerate(values.tolist()):
        halves = {"mmbench_en": row[:6], "mmbench_cn": row[6:]}
        breakdown = {task: dict(zip(AXES, half, strict=True)) for task, half in halves.items()}
        breakdown["mmbench_en"]["circular"] = 0.01
        visual.add(method, seed, accuracies=dict.fromkeys(halves, 0.5), breakdown=breakdown, scale="paper", **given)


# ----------------------------------------------------------------------------------------------------- the numbers


def test_the_data_are_the_means_and_deviations_over_seeds(visual):
    rng = np.random.default_rng(0)
    values = {method: rng.uniform(0.4, 0.8, (3, 6)).round(3) for method in ("lora", "moslora", "dora")}
    for method, of_method in values.items():
        add_seeds(visual, method, of_method)
    lines = csv_of(figure_of(visual))
    assert len(lines) == 18
    for method, of_method in values.items():
        found = lines[lines.method == method].set_index("axis").loc[list(visual.tasks)]
        mean, sd = 100 * of_method.mean(axis=0), 100 * of_method.std(axis=0, ddof=1)
        assert found["value"].to_numpy() == pytest.approx(mean)
        assert found["sd"].to_numpy() == pytest.approx(sd)
        assert found["plotted"].to_numpy() == pytest.approx(mean)
        assert found["plotted_low"].to_numpy() == pytest.approx(mean - sd)
        assert found["plotted_high"].to_numpy() == pytest.approx(mean + sd)
    assert set(lines.normalisation) == {"none"} and set(lines.drawn) == {"yes"} and set(lines.n) == {3}


def test_normalised_axes_are_shares_of_their_largest_mean(visual):
    rng = np.random.default_rng(1)
    values = {method: rng.uniform(0.2, 0.6, (2, 6)).round(3) for method in ("lora", "moslora")}
    for method, of_method in values.items():
        add_seeds(visual, method, of_method)
    figure = figure_of(visual, normalised=True)
    lines = csv_of(figure)
    largest = np.max([of_method.mean(axis=0) for of_method in values.values()], axis=0)
    for method, of_method in values.items():
        found = lines[lines.method == method].set_index("axis").loc[list(visual.tasks)]
        assert found["plotted"].to_numpy() == pytest.approx(of_method.mean(axis=0) / largest)
        assert found["plotted_high"].to_numpy() - found["plotted"].to_numpy() == pytest.approx(
            of_method.std(axis=0, ddof=1) / largest
        )
        assert found["value"].to_numpy() == pytest.approx(100 * of_method.mean(axis=0))
    assert lines.groupby("axis")["plotted"].max().to_numpy() == pytest.approx(1.0)
    assert set(lines.normalisation) == {"axis / its largest mean"}
    assert "Normalised: every axis is divided by the largest mean" in figure.markdown
    assert "In percent, the same scale on every axis, from" in figure_of(visual).markdown


def test_an_axis_that_is_zero_for_all_cannot_be_normalised(visual):
    values = np.full((2, 6), 0.5)
    values[:, 2] = 0.0
    add_seeds(visual, "lora", values)
    lines = csv_of(figure_of(visual, normalised=True)).set_index("axis")
    assert math.isnan(lines.loc["smoke_count", "plotted"]) and lines.loc["smoke_shape", "plotted"] == 1.0
    assert csv_of(figure_of(visual)).set_index("axis").loc["smoke_count", "plotted"] == 0.0


def test_mmbench_abilities_have_a_panel_a_language(visual):
    values = np.random.default_rng(2).uniform(0.3, 0.9, (3, 12)).round(3)
    add_abilities(visual, "lora", values)
    figure = figure_of(visual)
    lines = csv_of(figure)
    assert set(lines.axis) == set(AXES)  # the circular score is no ability
    for panel, half in (("EN", values[:, :6]), ("CN", values[:, 6:])):
        found = lines[lines.panel == panel].set_index("axis").loc[list(AXES)]
        assert found["value"].to_numpy() == pytest.approx(100 * half.mean(axis=0))
    assert "Axes: the six abilities of MMBench, EN and CN." in figure.markdown
    assert png_size(figure)[0] == round(300 * TEXT)


def test_short_names_of_abilities_are_understood(visual):
    breakdown = {"mmbench_cn": dict(zip(("AR", "RR", "LR", "CP", "FP-S", "FP-C"), np.arange(1, 7) / 10, strict=True))}
    visual.add("lora", accuracies={"mmbench_cn": 0.5}, breakdown=breakdown, scale="paper", protocol="vlmevalkit")
    figure = figure_of(visual)
    lines = csv_of(figure)
    assert lines.axis.tolist() == list(AXES) and set(lines.panel) == {"CN"}
    assert lines.value.to_numpy() == pytest.approx(np.arange(10, 70, 10))
    assert png_size(figure)[0] == round(300 * COLUMN)


def test_every_setting_and_protocol_has_a_figure_of_its_own(visual):
    visual.add("lora", 1, accuracies=0.2)
    visual.add("lora", 1, "model.quantization=nf4", quantization="nf4", accuracies=0.3)
    visual.add("lora", 1, "model=other", base="other/base", accuracies=0.4)
    visual.add("lora", 2, protocol="lmms_eval", accuracies=0.5)
    found = figures(visual)
    other = next(name for name in found if "other" in name)
    assert list(found) == [
        *(f"smoke/exact/{name}" for name in (other.split("/")[-1], "figure5-smoke", "figure5-smoke-nf4")),
        "smoke/lmms_eval/figure5-smoke",
    ]
    assert re.fullmatch(r"smoke/exact/figure5-other_base~\w+", other)  # it is a file name
    values = {name: set(csv_of(figure).value) for name, figure in found.items()}
    assert list(values.values()) == [{40.0}, {20.0}, {30.0}, {50.0}]
    assert "base model smoke, NF4" in found["smoke/exact/figure5-smoke-nf4"].markdown.splitlines()[0]


def test_validation_has_a_table_but_no_figure(visual):
    visual.add("lora", protocol=("exact", "exact-validation"))
    assert list(figures(visual)) == ["smoke/exact/figure5-smoke"]


def test_a_bad_record_enters_no_number(visual):
    add_seeds(visual, "lora", np.full((2, 6), 0.5))
    add_abilities(visual, "lora", np.full((2, 12), 1.5))
    add_seeds(visual, "moslora", np.full((1, 6), 0.5))
    record = visual.add("lora", 7, accuracies=0.75)
    text = (record.path / "results.json").read_text("utf-8").replace("0.75", "NaN", 1)
    (record.path / "results.json").write_text(text, "utf-8")
    lines = csv_of(figure_of(visual))
    assert set(lines.value) == {50.0} and set(lines.scale) == {"smoke"}


# ----------------------------------------------------------------------------------------------- what is drawn of them


def test_one_seed_is_marked_and_has_no_band(visual):
    add_seeds(visual, "lora", np.full((3, 6), 0.5))
    visual.add("moslora", accuracies=0.75)
    figure = figure_of(visual)
    lines = csv_of(figure)
    single = lines[lines.method == "moslora"]
    assert single.sd.isna().all() and (single.plotted_low == single.plotted_high).all()
    assert "† one seed, so no standard deviation." in figure.markdown
    assert "| moslora |  1† |" in figure.markdown


def test_an_incomplete_row_is_drawn_where_it_has_values_and_named(visual):
    add_seeds(visual, "lora", np.full((2, 6), 0.5))
    visual.add("moslora", accuracies=dict.fromkeys(visual.tasks[:5], 0.5))
    figure = figure_of(visual)
    assert "moslora lacks Background: its line is open there." in figure.markdown
    lines = csv_of(figure)
    assert lines[lines.method == "moslora"].axis.tolist() == list(visual.tasks[:5])
    assert figure.pictures


def test_references_and_what_there_is_no_room_for_are_in_the_data_only(visual):
    visual.add("base", training=None, accuracies=0.1)
    for method in ("two_subspaces", "moslora_frozen", "moslora_folded", "dora", "lora_scaled", "lora", "moslora"):
        visual.add(method)
    figure = figure_of(visual)
    assert "Not drawn, but in the data: base (no adapter), moslora_frozen, moslora_folded, dora." in figure.markdown
    lines = csv_of(figure)
    drawn = set(lines[lines.drawn == "yes"].method)
    assert drawn == {"lora", "lora_scaled", "two_subspaces", "moslora"}
    assert lines[lines.drawn == "no"].plotted.isna().all()
    assert set(lines[lines.drawn == "no"].method) == {"base", "moslora_frozen", "moslora_folded", "dora"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"accuracies": {"smoke_count": 0.5, "smoke_shape": 0.5}}, "Not drawn: 2 axes are too few"),
        (
            {"accuracies": {"ai2d": 0.5}},
            "Not drawn: no run has abilities of MMBench; evaluate mmbench_en or mmbench_cn",
        ),
        ({"method": "base", "training": None}, "Not drawn: no trained run has any of the axes."),
    ],
)
def test_a_figure_that_cannot_be_drawn_says_what_is_missing(visual, given, expected):
    visual.add(**given)
    figure = figure_of(visual)
    assert expected in figure.markdown
    assert figure.pictures == {} and set(figure.files()) == {"md", "csv"} and "![" not in figure.section("x")


def test_the_papers_claims_stand_below(visual):
    visual.add("lora")
    text = figure_of(visual).markdown
    assert "### Paper, visual instruction tuning (Figure 5" in text
    assert "MoSLoRA is above LoRA on all six abilities in both languages, most on reasoning. ˢ" in text
    assert "numbers)" not in text and not NUMBERS.tables["figure5"].claims()


percent = st.floats(0, 100)


@given(st.tuples(percent, percent).map(sorted))
def test_a_scale_holds_its_values_in_round_rings(ends):
    low, high = ends
    scale = scale_for(low, high, 100.0, limit=100.0)
    assert 2 <= len(scale.rings) <= 6
    assert 0 <= scale.centre <= low + 1e-9 and high <= scale.rings[-1] + 1e-9 <= 100 + 1e-6
    steps = np.diff([scale.centre, *scale.rings])
    assert np.allclose(steps, steps[0]) and any(math.isclose(steps[0], step) for step in (5, 10, 20, 50, 100))
    assert all(math.isclose(ring / steps[0], round(ring / steps[0])) for ring in scale.rings)
    assert 0 <= scale.radius(low) <= scale.radius(high) <= 1


def test_close_lines_get_a_scale_that_tells_them_apart():
    assert scale_for(62, 71, 100.0, limit=100.0) == Scale(55.0, (60.0, 65.0, 70.0, 75.0))
    assert scale_for(38, 82, 100.0, limit=100.0).centre == pytest.approx(30)
    assert scale_for(12, 97, 100.0, limit=100.0) == Scale(0.0, (20.0, 40.0, 60.0, 80.0, 100.0))
    assert scale_for(100, 100, 100.0, limit=100.0).rings[-1] == 100


# ----------------------------------------------------------------------------------------------------- the picture


def lines_of(count, label="moslora (method.variant={})"):
    return [
        Line(label.format(i), PALETTE[i], "o", [50.0 + i] * 6, [(45.0 + i, 55.0 + i)] * 6, single=i == 0)
        for i in range(count)
    ]


def labelled(text):
    return Panel("EN", [text] * 6, lines_of(4))


LAYOUTS = {
    "one panel": [Panel("", ["Colour", "Shape", "Count", "Existence", "Position", "Background"], lines_of(4))],
    "two panels": [labelled("Fine-grained,\nsingle-instance"), labelled("Fine-grained,\nsingle-instance")],
    "long names": [
        Panel("", ["An unusually\nlong name"] * 6, lines_of(6, "moslora (" + 12 * "key.name=" + "{}), NF4"))
    ],
    "three axes": [Panel("", ["A", "B", "C"], [Line("lora", PALETTE[0], "o", [1.0] * 3, [(1.0, 1.0)] * 3, True)])],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_text_leaves_the_page_or_covers_another(layout):
    """Everything that is read: the axes' names, the panels' names and the legend."""
    with publication():
        figure = compose(LAYOUTS[layout], Scale(30.0, (40.0, 50.0, 60.0)))
        figure.set_dpi(300)
        figure.draw_without_rendering()
        names = {name for panel in LAYOUTS[layout] for name in (*panel.axes, panel.name)}
        texts = [text for axes in figure.axes for text in axes.texts if text.get_text() in names - {""}]
        boxes = [text.get_window_extent() for text in texts] + [figure.legends[0].get_window_extent()]
    for number, box in enumerate(boxes):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height
        assert not any(box.overlaps(other) for other in boxes[:number])
    assert figure.get_figwidth() == (COLUMN if len(LAYOUTS[layout]) == 1 else TEXT)


def test_an_open_line_has_a_gap_and_a_single_seed_is_dashed():
    line = Line(
        "lora", PALETTE[0], "o", [50.0, None, 50.0, 50.0], [(40.0, 60.0), None, (40.0, 60.0), (40.0, 60.0)], True
    )
    with publication():
        figure = compose([Panel("", ["a", "b", "c", "d"], [line])], Scale(0.0, (50.0, 100.0)))
        (axes,) = figure.axes
        (drawn,) = [found for found in axes.lines if found.get_marker() == "o"]
        assert drawn.get_linestyle() == "--"
        assert np.isnan(drawn.get_xdata()).tolist() == [False, True, False, False, False]
        assert drawn.get_ydata()[[0, 2]].tolist() == pytest.approx([0.5, -0.5])
        bands = [patch for patch in axes.patches if patch.get_alpha() is not None]
    assert len(bands) == 2  # between c and d, and between d and a


def png_size(figure):
    return Image.open(io.BytesIO(figure.pictures["png"])).size


def pdf_streams(pdf):
    """Every stream of a PDF, unpacked."""
    for match in re.finditer(rb"stream\r?\n(.*?)\r?\nendstream", pdf, re.DOTALL):
        try:
            yield zlib.decompress(match.group(1))
        except zlib.error:
            yield match.group(1)


def test_pdf_embeds_true_type_fonts_and_has_no_date(visual):
    add_seeds(visual, "moslora", np.full((2, 6), 0.5))
    pdf = figure_of(visual).pictures["pdf"]
    assert pdf.startswith(b"%PDF") and b"/FontFile2" in pdf
    assert b"/Type3" not in pdf and b"/FontFile3" not in pdf
    assert any(stream[:4] == b"\x00\x01\x00\x00" and b"glyf" in stream[:400] for stream in pdf_streams(pdf))
    assert b"CreationDate" not in pdf and b"atplotlib" not in pdf
    (box,) = re.findall(rb"/MediaBox \[ ?([\d. ]+?) ?\]", pdf)
    assert float(box.split()[2]) == pytest.approx(72 * COLUMN)


def test_svg_is_well_formed_and_has_no_date(visual):
    visual.add("lora")
    svg = figure_of(visual).pictures["svg"]
    root = ElementTree.fromstring(svg)
    assert root.tag.endswith("svg") and float(root.get("width").removesuffix("pt")) == pytest.approx(72 * COLUMN)
    assert b"<dc:date" not in svg and b"atplotlib" not in svg.replace(b"matplotlib.org", b"")


def test_png_is_at_publication_size(visual):
    visual.add("lora")
    figure = figure_of(visual)
    assert png_size(figure)[0] == round(300 * COLUMN)
    picture = Image.open(io.BytesIO(figure.pictures["png"]))
    assert picture.info["dpi"] == pytest.approx((300, 300), abs=0.1) and "Software" not in picture.info


def test_another_process_with_other_settings_writes_the_same_bytes(visual, tmp_path):
    add_seeds(visual, "lora", np.random.default_rng(3).random((3, 6)))
    (tmp_path / "matplotlibrc").write_text(
        "font.size: 20\ntext.color: red\nsvg.fonttype: none\npdf.fonttype: 3\nsavefig.dpi: 50\n"
    )
    code = """
import sys
from pathlib import Path
from analysis.figure5 import build
from analysis.load import load_runs
from analysis.paper import load_paper_numbers
(figure,) = build(*load_runs(Path(sys.argv[1]), "visual_instruction"), load_paper_numbers())
for suffix, content in figure.pictures.items():
    Path(sys.argv[2], suffix).write_bytes(content)
"""
    process = subprocess.run(
        [sys.executable, "-c", code, str(visual.root), str(tmp_path)], cwd=tmp_path, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    for suffix, content in figure_of(visual).pictures.items():
        assert (tmp_path / suffix).read_bytes() == content, suffix

"""The subspace figures: their data against the adapters, what is drawn of partial results, and their files."""

from __future__ import annotations

import csv
import io
import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from analysis import subspace_figures, subspace_plots
from analysis.load import load_runs
from analysis.paper import load_paper_numbers
from analysis.report import main
from analysis.style import COLUMN, TEXT

from . import adapters
from .conftest import Runs

NUMBERS = load_paper_numbers()
KEPT = (0, 25)
PICTURES = {"pdf", "svg", "png"}


def figures(runs, experiment="commonsense_reasoning"):
    found = subspace_figures.build(experiment, runs.root, *load_runs(runs.root, experiment), NUMBERS)
    return {f"{figure.folder}/{figure.name}": figure for figure in found}


def of(runs, name, **given):
    return figures(runs, **given)[f"smoke/subspaces/{name}"]


def csv_of(figure):
    return pd.read_csv(io.StringIO(figure.csv), keep_default_na=False, na_values=[""])


def width_of(figure) -> int:
    return Image.open(io.BytesIO(figure.pictures["png"])).size[0]


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    runs = Runs(tmp_path_factory.mktemp("few") / "runs")
    for seed in (1, 2):
        adapters.add(runs, "lora", seed, kept=KEPT)
        adapters.add(runs, "moslora", seed, kept=KEPT)
    adapters.add(runs, "moslora", 1, "method.mixer_init=orthogonal")
    return runs


@pytest.fixture(scope="module")
def drawn(few):
    return figures(few)


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures that cost no time, for tests of the data."""
    monkeypatch.setattr(subspace_plots, "pictures", lambda figure: dict.fromkeys(PICTURES, b"picture"))


# ------------------------------------------------------------------------------------------------------- what there is


def test_a_group_of_figures_a_setting(drawn):
    found = drawn
    names = ("shares", "mixers-moslora", "mixers-moslora-method.mixer_init=orthogonal", "course", "spectra", "angles")
    assert list(found) == [f"smoke/subspaces/{name}" for name in (*names, "knock-out")]
    for figure in list(found.values())[:-1]:
        assert set(figure.files()) == PICTURES | {"md", "csv"}
        assert figure.pictures["pdf"].startswith(b"%PDF") and b"<svg" in figure.pictures["svg"]
        assert len(list(csv.reader(io.StringIO(figure.csv)))) > 1
        assert figure.title.endswith(": scale smoke")


def test_base_models_do_not_share_a_figure(visual, undrawn):
    adapters.add(visual, "moslora", 1)
    adapters.add(visual, "moslora", 1, "model.quantization=nf4", quantization="nf4")
    adapters.add(visual, "moslora", 1, "model=other", base="other/base", protocol=("exact", "exact-validation"))
    found = figures(visual, "visual_instruction")
    shares = [name for name in found if "/shares-" in name]
    assert [re.sub(r"~\w+", "~", name) for name in shares] == [
        "smoke/subspaces/shares-other_base~",
        "smoke/subspaces/shares-smoke",
        "smoke/subspaces/shares-smoke-nf4",
    ]
    assert found["smoke/subspaces/shares-smoke-nf4"].title.endswith("base model smoke, NF4")
    assert all(len(csv_of(found[name])) == len(adapters.MODULES) for name in shares)
    assert not any("exact" in name for name in found)


def test_same_adapters_same_bytes(runs, monkeypatch):
    def pixels(figure):  # the formats' own bytes are tested with the style
        figure.set_dpi(50)
        figure.canvas.draw()
        return {"png": bytes(figure.canvas.buffer_rgba())}

    monkeypatch.setattr(subspace_plots, "pictures", pixels)
    adapters.add(runs, "moslora", 1, kept=KEPT)
    adapters.add(runs, "moslora", 2)
    first, second = ([figure.files() for figure in figures(runs).values()] for _ in range(2))
    assert first == second and "png" in first[1]


# --------------------------------------------------------------------------------------------------------- the numbers


def test_the_data_of_the_shares_are_those_of_every_module(drawn):
    lines = csv_of(drawn["smoke/subspaces/shares"]).set_index(["method", "label", "seed", "module"])
    assert len(lines) == 5 * len(adapters.MODULES)
    for number, module in enumerate(adapters.MODULES):
        A, M, B = (matrix.astype(float) for matrix in adapters.matrices(200 + number))
        line = lines.loc["moslora", "default", 2, module]
        diagonal, mixed = B @ np.diag(np.diag(M)) @ A, B @ (M - np.diag(np.diag(M))) @ A
        square = np.linalg.norm(diagonal + mixed) ** 2
        assert line["diagonal"] == pytest.approx(np.linalg.norm(diagonal) ** 2 / square, rel=1e-4)
        assert line["mixed"] == pytest.approx(np.linalg.norm(mixed) ** 2 / square, rel=1e-4)
        assert line["diagonal"] + line["mixed"] + line["cross"] == pytest.approx(1, abs=1e-4)
        assert line["scale_of_A"] == pytest.approx(np.linalg.norm(M @ A) / np.linalg.norm(A), rel=1e-4)
        assert (line["layer"], line["kind"]) == (int(module.split(".")[2]), module.split(".")[-1])
    lora = lines.loc["lora"]
    assert lora["rank"].isna().all() and (lora["diagonal"] == 1).all() and (lora["mixed"] == 0).all()


def test_the_data_of_a_mixer_are_its_weights_at_both_ends(drawn):
    figure = drawn["smoke/subspaces/mixers-moslora"]
    lines = csv_of(figure)
    assert set(lines.seed) == {1} and "moslora, seed 1." in figure.markdown
    for moment, seed in (("start", 1001), ("end", 1)):
        found = lines[(lines.moment == moment) & (lines.module == adapters.MODULES[3])].sort_values("i")
        expected = np.abs(adapters.matrices(100 * seed + 3)[1])
        np.testing.assert_allclose(found[["j0", "j1", "j2"]], expected, rtol=1e-5)
    assert width_of(figure) == round(300 * TEXT)
    alone = drawn["smoke/subspaces/mixers-moslora-method.mixer_init=orthogonal"]
    assert set(csv_of(alone).moment) == {"end"} and width_of(alone) == round(300 * COLUMN)
    assert "The start was not kept; train with training.keep_steps" in alone.markdown


def test_the_course_has_the_kept_steps_and_the_end(drawn):
    figure = drawn["smoke/subspaces/course"]
    lines = csv_of(figure)
    assert set(lines.label) == {"default"}  # the orthogonal one has no copies
    of_mixers = lines[(lines.method == "moslora") & (lines.quantity == "distance")].set_index("step")
    assert of_mixers.index.tolist() == [0, 25, 50] and of_mixers.loc[0, "mean"] == 0 and set(of_mixers.n) == {2}
    distances = []
    for seed in (1, 2):
        pairs = [
            (adapters.matrices(100 * seed + n)[1], adapters.matrices(100 * (seed + 1000) + n)[1])
            for n in range(len(adapters.MODULES))
        ]
        distances.append(np.mean([np.linalg.norm(end - start) / np.linalg.norm(start) for end, start in pairs]))
    assert of_mixers.loc[50, "mean"] == pytest.approx(np.mean(distances), rel=1e-4)
    assert of_mixers.loc[50, "sd"] == pytest.approx(np.std(distances, ddof=1), rel=1e-3)
    assert set(lines[lines.method == "lora"].quantity) == {"update_rank"}
    shares = lines[(lines.quantity == "mixed_share") & (lines.method == "moslora")]
    assert shares.step.tolist() == [25, 50]  # an update of zero has none


def test_lora_appears_in_spectra_and_angles(drawn):
    spectra = csv_of(drawn["smoke/subspaces/spectra"])
    assert set(spectra[spectra.method == "lora"].matrix) == {"update"}
    assert set(spectra[(spectra.method == "moslora") & (spectra.matrix == "M")].moment) == {"start", "end"}
    assert spectra[spectra.matrix == "update"].groupby(["method", "label"])["index"].max().tolist() == [3, 3, 3]
    angles = csv_of(drawn["smoke/subspaces/angles"])
    assert len(angles) == 5 * 4 / 2 and angles[["columns", "rows"]].stack().between(0, 90).all()
    assert "lora" in set(angles.method) | set(angles.other_method)


# ----------------------------------------------------------------------------------------------------- partial results


def test_without_copies_the_course_says_how_to_make_them(runs, undrawn):
    adapters.add(runs, "moslora", 1)
    course = of(runs, "course")
    assert course.pictures == {} and "Not drawn: no run has copies" in course.markdown
    assert "training.keep_steps" in course.markdown
    assert of(runs, "angles").pictures == {} and "no two runs" in of(runs, "angles").markdown
    assert set(of(runs, "shares").pictures) == set(of(runs, "spectra").pictures) == PICTURES


def test_lora_alone_has_no_mixers_to_draw(runs, undrawn):
    for seed in (1, 2):
        adapters.add(runs, "lora", seed)
    found = figures(runs)
    assert [name.split("/")[-1] for name in found] == ["shares", "course", "spectra", "angles", "knock-out"]
    assert "Not drawn: no run has a mixer" in of(runs, "shares").markdown
    assert set(of(runs, "spectra").pictures) == set(of(runs, "angles").pictures) == PICTURES


def test_runs_without_adapters_are_named(runs, undrawn):
    runs.add("base")
    assert figures(runs) == {}
    runs.add("moslora", 1)
    figure, _ = figures(runs).values()
    assert figure.pictures == {} and "no run has an adapter that can be read" in figure.markdown
    assert "moslora/default/seed-1: no adapter and no subspaces.json beside the record." in figure.markdown
    adapters.add(runs, "moslora", 2)
    assert "moslora/default/seed-1: no adapter and no subspaces.json beside the record." in of(runs, "shares").markdown
    assert "one seed" in of(runs, "shares").markdown


def test_what_does_not_fit_is_said(runs, undrawn):
    layers = tuple(f"model.layers.{n}.mlp.up_proj" for n in range(20))
    for number, seed in enumerate((1, 2, 3)):
        for label in ("default", *(f"adapter.r={r}" for r in range(6))):
            adapters.add(runs, "moslora", seed, label, modules=layers if number == 0 else layers[:1])
    found = figures(runs)
    mixers = found["smoke/subspaces/mixers-moslora"]
    assert "8 of 20 layers are drawn" in mixers.markdown
    assert csv_of(mixers).module.nunique() == 20
    assert "Not drawn, but in the data: moslora (adapter.r=5)." in found["smoke/subspaces/shares"].markdown
    assert "mixers-moslora-adapter.r=5" not in "".join(found) and "smoke/subspaces/mixers-moslora-adapter.r=4" in found
    assert "18 of 21 runs, alike by group" in found["smoke/subspaces/angles"].markdown
    assert len(csv_of(found["smoke/subspaces/angles"])) == 18 * 17 / 2


def test_ranks_may_differ_between_modules_and_runs(runs):
    adapters.add(runs, "moslora", 1, "adapter.r=4", r=4)
    record = adapters.add(runs, "moslora", 1)
    mixed = adapters.trained(1) | {"model.layers.0.mlp.up_proj": adapters.matrices(9, r=2)}
    for path in record.adapter_path.iterdir():
        path.unlink()
    adapters.write(record.adapter_path, mixed)
    found = figures(runs)
    assert csv_of(found["smoke/subspaces/mixers-moslora"])["j2"].isna().sum() == 2
    assert all(figure.pictures for name, figure in found.items() if not name.endswith(("course", "knock-out")))
    assert "Equal terms" not in found["smoke/subspaces/shares"].markdown


# -------------------------------------------------------------------------------------------------------- the pictures


def test_nothing_lies_outside_a_picture(runs, monkeypatch):
    long = "method.mixer_init=orthogonal,training.learning_rate=0.0003"
    for method, label in (("lora", "default"), ("moslora", "default"), ("moslora", long)):
        adapters.add(runs, method, 1, label, kept=KEPT)
    outside = []

    def look(figure):
        figure.canvas.draw()
        box = figure.get_tightbbox()  # inches
        (width, height), slack = figure.get_size_inches(), 0.01
        inside = box.x0 > -slack and box.y0 > -slack and box.x1 < width + slack and box.y1 < height + slack
        outside.append(None if inside else (box, width, height))
        return dict.fromkeys(PICTURES, b"")

    monkeypatch.setattr(subspace_plots, "pictures", look)
    figures(runs)
    assert outside == [None] * 6


# -------------------------------------------------------------------------------------------------------------- report


def test_the_report_draws_them_when_asked(few, tmp_path, capsys, undrawn):
    command = ["--runs", str(few.root), "--no-comparisons", "--out"]
    assert main([*command, str(tmp_path / "plain")]) == 0
    assert not list((tmp_path / "plain").rglob("subspaces"))
    assert main([*command, str(tmp_path / "out"), "--subspaces"]) == 0
    text = (tmp_path / "out" / "report.md").read_text("utf-8")
    links = set(re.findall(r"\]\(([^)]+)\)", text))
    written = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")}
    assert {name for name in written if not name.startswith("report.")} == links
    assert len([link for link in links if "/subspaces/" in link]) == 6 * 5 + 2
    assert main([*command, str(tmp_path / "out"), "--subspaces", "--no-figures"]) == 2
    assert "not allowed with" in capsys.readouterr().err

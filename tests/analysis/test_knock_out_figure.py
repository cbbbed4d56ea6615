"""The knock-out figure: its data against the curves of the records, what is left out, what is missing."""

from __future__ import annotations

import io
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from analysis import knock_out_figure, subspace_plots
from analysis.load import load_runs
from analysis.style import TEXT
from moslora_core.record import KnockOut, KnockOutPoint

from .conftest import Runs

TASKS = ("boolq", "piqa")
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
NAME = "generate-corrected+pairs"
FIGURE = "knock-out-generate-corrected-pairs"


def accuracy(seed: int, order: str, share: float, draw: int = 0) -> dict[str, float]:
    """Chosen numbers, all different."""
    if order in ("none", "all"):
        draw = 0
    steep = {"none": 0, "all": 0, "weakest": 1, "random": 2, "strongest": 3, "diagonal": 4, "mixed": 5}[order]
    base = 0.9 - 0.5 * share - 0.03 * steep + 0.01 * seed + 0.002 * draw
    return {task: base - 0.1 * number for number, task in enumerate(TASKS)}


def add(runs, method: str, seed: int, label: str = "default", *, unit: str = "pairs", tasks=TASKS, limit=None, **more):
    """A run with a curve of three orders, two random draws, and of a mixer the parts."""
    record = runs.add(method, seed, label)
    points = [
        KnockOutPoint(order, draw, share, round(64 * share), accuracy(seed, order, share, draw), unparsed=share / 2)
        for order, draws in (("weakest", 1), ("strongest", 1), ("random", 2))
        for draw in range(draws)
        for share in SHARES[1:-1]
    ]
    points = [
        KnockOutPoint("none", 0, 0.0, 0, accuracy(seed, "none", 0), 0.0),
        *points,
        KnockOutPoint("all", 0, 1.0, 64, accuracy(seed, "all", 1), 1.0),
    ]
    if method != "lora" and unit == "pairs":
        points += [
            KnockOutPoint(part, 0, share, 0, accuracy(seed, part, share), 0.0)
            for part, share in (("diagonal", 0.125), ("mixed", 0.875))
        ]
    for point in points:
        point.tasks = {task: point.tasks[task] for task in tasks}
    settings = {"limit": limit, "batch_size": 16 + seed, **more}
    name = f"generate-corrected+{unit}" + ("" if limit is None else f"+limit={limit}")
    items = dict.fromkeys(tasks, 100)
    record.write_knock_out(name, KnockOut("generate-corrected", unit, 64, items, points, 1.0, settings, "f"))
    return record


def figures(runs):
    found = knock_out_figure.build(
        "commonsense_reasoning", runs.root, *load_runs(runs.root, "commonsense_reasoning"), None
    )
    return {figure.name: figure for figure in found}


def csv_of(figure):
    return pd.read_csv(io.StringIO(figure.csv), keep_default_na=False, na_values=[""])


@pytest.fixture
def undrawn(monkeypatch):
    """The panels that would be drawn, without the time of drawing."""
    drawn = []
    monkeypatch.setattr(knock_out_figure, "draw_lines", lambda charts, columns: drawn.append(charts) or {"png": b""})
    return drawn


def test_the_data_are_means_over_tasks_draws_and_seeds(runs, undrawn):
    for seed in (1, 2, 3):
        add(runs, "lora", seed)
        add(runs, "moslora", seed)
    lines = csv_of(figures(runs)[FIGURE]).set_index(["method", "order", "share"])
    assert len(lines) == 3 * 5 + 3 * 5 + 2
    for method in ("lora", "moslora"):
        for order in ("weakest", "random", "strongest"):
            for share in SHARES:
                of = "none" if share == 0 else "all" if share == 1 else order
                draws = (0, 1) if order == "random" else (0,)
                seeds = [
                    100 * np.mean([np.mean(list(accuracy(s, of, share, d).values())) for d in draws])
                    for s in (1, 2, 3)
                ]
                line = lines.loc[method, order, share]
                assert line["mean"] == pytest.approx(np.mean(seeds), rel=1e-4)
                assert line["sd"] == pytest.approx(np.std(seeds, ddof=1), rel=1e-4) and line["n"] == 3
                assert line["unparsed"] == pytest.approx(100 if share == 1 else 50 * share)
    assert lines.loc["moslora", "mixed", 0.875]["mean"] == pytest.approx(
        100 * np.mean([np.mean(list(accuracy(s, "mixed", 0.875).values())) for s in (1, 2, 3)]), rel=1e-4
    )
    first, second = undrawn[0]
    assert (first.name, second.name) == ("lora", "moslora") and first.limits == second.limits
    assert [curve.label for curve in second.curves] == [
        *("weakest first", "in random order", "strongest first", "all diagonal terms", "all mixed terms")
    ]
    x, y, low, high = second.curves[0].points[1]
    assert (x, y) == (25, pytest.approx(lines.loc["moslora", "weakest", 0.25]["mean"], rel=1e-4))
    assert (high - low) / 2 == pytest.approx(lines.loc["moslora", "weakest", 0.25]["sd"], rel=1e-4)


def test_the_table_has_half_and_the_parts(runs, undrawn):
    for seed in (1, 2):
        add(runs, "moslora", seed)
    text = figures(runs)[FIGURE].markdown
    half = [100 * np.mean([np.mean(list(accuracy(s, "weakest", 0.5).values())) for s in (1, 2)])]
    assert f"{half[0]:.1f} ± 0.7" in text and "half gone, weakest first" in text and "without all mixed terms" in text
    assert "100 items of each of 2 tasks" in text and "†" not in text and "Missing" not in text


def test_curves_of_other_names_have_figures_of_their_own(runs, undrawn):
    add(runs, "moslora", 1)
    add(runs, "moslora", 1, limit=20)
    add(runs, "moslora", 1, unit="ranks")
    assert list(figures(runs)) == [FIGURE, f"{FIGURE}-limit=20", "knock-out-generate-corrected-ranks"]
    assert "one seed" in figures(runs)[FIGURE].markdown
    assert "without all" not in figures(runs)["knock-out-generate-corrected-ranks"].markdown


def test_what_cannot_be_averaged_is_named(runs, undrawn):
    for seed in (1, 2):
        add(runs, "moslora", seed)
    add(runs, "moslora", 3, tasks=TASKS[:1])
    add(runs, "moslora", 4, num_beams=4)
    path = add(runs, "moslora", 5).knock_out_path(NAME)
    path.write_text(path.read_text().replace("0.25", "NaN", 1))
    text = figures(runs)[FIGURE].markdown
    for seed, reason in ((3, "other tasks or settings"), (4, "other tasks or settings"), (5, "knock_out/")):
        assert f"Left out: commonsense_reasoning/smoke/moslora/default/seed-{seed}: {reason}" in text
    assert set(csv_of(figures(runs)[FIGURE]).n) == {2} and str(runs.root) not in text


def test_what_is_missing_has_its_command(runs, undrawn):
    runs.add("base")
    assert figures(runs) == {}
    runs.add("moslora", 3, "method.mixer_init=orthogonal")
    only = figures(runs)["knock-out"]
    command = "python -m commonsense_reasoning.knock_out -m scale=smoke method=moslora method.mixer_init=orthogonal"
    assert "Not drawn" in only.markdown and f"{command} seed=3." in only.markdown and only.pictures == {}
    add(runs, "moslora", 1, unit="ranks", limit=20)
    text = figures(runs)["knock-out-generate-corrected-ranks-limit=20"].markdown
    assert f"Missing: {command} seed=3 evaluation.limit=20 evaluation.knock_out.unit=ranks." in text


def test_a_studys_run_is_knocked_out_at_its_learning_rate(runs, undrawn):
    add(runs, "lora", 1)
    runs.add("moslora", 2)
    found, left_out = load_runs(runs.root, "commonsense_reasoning")
    found = [replace(run, rate="training.learning_rate=0.002") for run in found]
    (figure,) = knock_out_figure.build("commonsense_reasoning", runs.root, found, left_out, None)
    assert "knock_out -m scale=smoke method=moslora training.learning_rate=0.002 seed=2" in figure.markdown


def test_the_picture_needs_no_adapters_and_is_the_same_every_time(tmp_path, monkeypatch):
    runs = Runs(tmp_path / "runs")
    for method, label in (("lora", "default"), ("moslora", "default"), ("moslora", "method.mixer_init=orthogonal")):
        add(runs, method, 1, label)
    found = figures(runs)[FIGURE]
    assert set(found.pictures) == {"pdf", "svg", "png"} and not list(runs.root.rglob("adapter"))
    assert Image.open(io.BytesIO(found.pictures["png"])).size[0] == round(300 * TEXT)
    shutil.copytree(runs.root, tmp_path / "again")
    assert figures(Runs(tmp_path / "again"))[FIGURE].files() == found.files()


def test_nothing_lies_outside_the_picture(runs, monkeypatch):
    long = "method.mixer_init=orthogonal,training.learning_rate=0.0003"
    for method, label in (("lora", "default"), ("moslora", "default"), ("moslora", long), ("moslora", "adapter.r=4")):
        add(runs, method, 1, label)
    seen = []

    def look(figure):
        figure.canvas.draw()
        box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
        seen.append(box.x0 > -0.01 and box.y0 > -0.01 and box.x1 < width + 0.01 and box.y1 < height + 0.01)
        return {}

    monkeypatch.setattr(subspace_plots, "pictures", look)
    figures(runs)
    assert seen == [True]

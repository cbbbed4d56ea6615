"""The numbers as files: the same figures without the adapters, what is stale or damaged, the command."""

from __future__ import annotations

import json
import math
import shutil

import pytest

from analysis import subspace_figures, subspace_plots
from analysis.load import load_runs
from analysis.subspace import read_trace
from analysis.subspace_files import decode, encode, load_trace, load_traces, main
from moslora_core.errors import UserError

from . import adapters

KEPT = (0, 25)


def fill(runs) -> None:
    for seed in (1, 2):
        adapters.add(runs, "lora", seed, kept=KEPT)
        adapters.add(runs, "moslora", seed, kept=KEPT)
    adapters.add(runs, "moslora", 1, "method.mixer_init=orthogonal")


def files_of(runs, experiment="commonsense_reasoning"):
    found = subspace_figures.build(experiment, runs.root, *load_runs(runs.root, experiment), None)
    return {figure.name: figure.files() for figure in found}


def without_adapters(runs):
    for folder in [*runs.root.rglob("adapter"), *runs.root.rglob("adapters")]:
        shutil.rmtree(folder)


def only(runs):
    (run,) = load_runs(runs.root, "commonsense_reasoning")[0]
    return run


def traces_of(runs):
    return load_traces(load_runs(runs.root, "commonsense_reasoning")[0], runs.root)


def test_figures_are_the_same_without_the_adapters(runs, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(subspace_plots, "pictures", lambda figure: drawn.append(figure) or {"png": b"picture"})
    fill(runs)
    before, traces = files_of(runs), traces_of(runs)
    assert main(["--runs", str(runs.root)]) == 0
    assert capsys.readouterr().out == "commonsense_reasoning: numbers of 5 runs, angles between 10 pairs of them\n"
    assert files_of(runs) == before and traces_of(runs) == traces
    without_adapters(runs)
    assert files_of(runs) == before and traces_of(runs) == traces
    assert len(drawn) == 3 * 6 and len(traces[0]) == 5 and traces[1] == []


def test_writing_again_changes_nothing_and_files_are_small(runs):
    record = adapters.add(runs, "moslora", 1, kept=KEPT)
    other = adapters.add(runs, "moslora", 2)
    angles = runs.root / "commonsense_reasoning" / "smoke" / "subspace-angles.json"
    assert main(["--runs", str(runs.root)]) == 0
    before = [path.read_bytes() for path in (record.subspaces_path, other.subspaces_path, angles)]
    assert main(["--runs", str(runs.root)]) == 0
    assert [path.read_bytes() for path in (record.subspaces_path, other.subspaces_path, angles)] == before
    # 6 modules of 9 weights at both ends, 6 numbers at the ends and 11 at three steps: 8 bytes each, and names.
    assert len(before[0]) < 6 * (2 * 15 + 3 * 11) * 10 + 1500
    without_adapters(runs)
    assert main(["--runs", str(runs.root)]) == 0
    assert [path.read_bytes() for path in (record.subspaces_path, other.subspaces_path, angles)] == before


def test_numbers_come_back_to_six_digits(runs):
    record = adapters.add(runs, "moslora", 1, kept=KEPT)
    exact = read_trace(only(runs), record)
    found = decode(json.loads(json.dumps(encode(exact))), only(runs), "here")
    assert (found.digest, found.kept, found.sizes, list(found.steps)) == (
        exact.digest,
        exact.kept,
        exact.sizes,
        [*KEPT, 50],
    )
    for step, modules in exact.steps.items():
        for module, numbers in modules.items():
            for name in ("distance", "rank", "condition", "scale", "update_rank", "mixed_share", "cosine", "cross"):
                one, other = getattr(numbers, name), getattr(found.steps[step][module], name)
                assert other == (None if one is None else pytest.approx(one, rel=1e-5, abs=1e-8)), (step, name)
    assert found.last[adapters.MODULES[0]].mixer_values == pytest.approx(
        exact.last[adapters.MODULES[0]].mixer_values, rel=1e-5
    )
    for module in adapters.MODULES:
        for ours, theirs in ((found.start, exact.start), (found.end, exact.end)):
            assert [list(map(float, row)) for row in ours[module]] == [
                pytest.approx(row, rel=1e-5) for row in theirs[module]
            ]


def test_infinite_condition_numbers_survive(runs):
    record = adapters.add(runs, "moslora", 1)
    A, M, B = adapters.matrices(1)
    M[:] = 1.0
    shutil.rmtree(record.adapter_path)
    adapters.write(record.adapter_path, {adapters.MODULES[0]: (A, M, B)})
    assert main(["--runs", str(runs.root)]) == 0
    assert "Infinity" not in record.subspaces_path.read_text()
    without_adapters(runs)
    assert math.isinf(load_trace(only(runs), record).last[adapters.MODULES[0]].condition)


def test_a_file_of_another_adapter_is_passed_over(runs, monkeypatch):
    monkeypatch.setattr(subspace_plots, "pictures", lambda figure: {})
    record, other = (adapters.add(runs, "moslora", seed) for seed in (1, 2))
    assert main(["--runs", str(runs.root)]) == 0
    before = files_of(runs)
    shutil.rmtree(record.adapter_path)
    adapters.write(record.adapter_path, adapters.trained(7))
    changed = files_of(runs)
    assert changed["shares"]["csv"] != before["shares"]["csv"] and changed["angles"]["csv"] != before["angles"]["csv"]
    # Its numbers are written; the other adapter is gone by then, so that the angle between them cannot be measured.
    shutil.rmtree(other.adapter_path)
    assert main(["--runs", str(runs.root)]) == 0
    found = files_of(runs)
    assert found["shares"]["csv"] == changed["shares"]["csv"]
    assert "1 pairs were not measured" in found["angles"]["md"] and "png" not in found["angles"]


@pytest.mark.parametrize(
    ("harm", "complaint"),
    [
        (lambda raw: raw.update(schema_version=0), "subspaces.json: schema_version 0, expected 1"),
        (lambda raw: raw.pop("modules"), "subspaces.json is damaged: lacks 'modules'"),
        (lambda raw: raw["steps"]["50"].pop("rank"), "damaged: lacks 'rank'"),
        (
            lambda raw: raw["steps"]["50"].update(rank=["x"] * 6),
            "a number: expected a finite number, found 'x'",
        ),
        (lambda raw: raw["steps"].update({"60": raw["steps"]["50"]}), "its last step is 60, the training had 50"),
        (lambda raw: raw["end"].pop(), "is damaged"),
    ],
)
def test_a_damaged_file_is_named_unless_the_adapter_is_there(runs, harm, complaint):
    record = adapters.add(runs, "moslora", 1)
    assert main(["--runs", str(runs.root)]) == 0
    whole = load_trace(only(runs), record)
    raw = json.loads(record.subspaces_path.read_text())
    harm(raw)
    record.subspaces_path.write_text(json.dumps(raw))
    assert load_trace(only(runs), record) == whole
    without_adapters(runs)
    with pytest.raises(UserError, match=complaint) as caught:
        load_trace(only(runs), record)
    assert "python -m analysis.subspace_files" in str(caught.value)


def test_damaged_angles_are_told(runs, capsys):
    for seed in (1, 2):
        adapters.add(runs, "moslora", seed)
    path = runs.root / "commonsense_reasoning" / "smoke" / "subspace-angles.json"
    path.write_text('{"schema_version": 1, "adapters": {}, "angles": [["a", "b", 1, 2]]}')
    assert main(["--runs", str(runs.root)]) == 2
    assert f"error: {path} is damaged: 'a'" in capsys.readouterr().err


def test_the_command_names_what_it_leaves_out(runs, tmp_path, capsys):
    adapters.add(runs, "moslora", 1)
    runs.add("moslora", 2)
    runs.add("base")
    assert main(["--runs", str(runs.root)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "commonsense_reasoning: numbers of 1 runs, angles between 0 pairs of them"
    assert out[1].startswith("left out: commonsense_reasoning/smoke/moslora/default/seed-2: no adapter and no")
    assert len(out) == 2
    (tmp_path / "empty").mkdir()
    assert main(["--runs", str(tmp_path / "empty")]) == 2 and main(["--runs", str(tmp_path / "none")]) == 2
    assert main(["--more"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3 and all(error.startswith("error: ") for error in errors)

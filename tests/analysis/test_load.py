"""Which runs enter a table: every other one is named with its reason, and nothing raises."""

from __future__ import annotations

import json
import re

import pytest

from analysis.load import load_runs
from moslora_core.errors import UserError
from moslora_core.record import Evaluation, Results, TaskResult

EXPERIMENT = "commonsense_reasoning"


def only_left_out(runs):
    found, left_out = load_runs(runs.root, EXPERIMENT)
    assert found == []
    (entry,) = left_out
    assert "\n" not in entry.reason and str(runs.root) not in entry.reason
    return entry


def test_a_run_is_read_with_what_its_path_says(runs):
    record = runs.add("moslora", 3, "method.mixer_init=orthogonal", protocol=("paper", "corrected"))
    (run,), left_out = load_runs(runs.root, EXPERIMENT)
    assert left_out == []
    assert (run.scale, run.method, run.label, run.seed) == ("smoke", "moslora", "method.mixer_init=orthogonal", 3)
    assert run.path == record.path.relative_to(runs.root).as_posix()
    assert sorted(run.evaluations) == ["corrected", "paper"]
    assert run.commits == {runs.commit}


def test_runs_of_other_experiments_and_scales_are_not_read(runs):
    runs.add(seed=1)
    runs.add(seed=1, scale="small")
    runs.add(seed=1, experiment="visual_instruction")
    runs.add(seed=1, scale=".smoke.new")  # of copies that were being written when they were killed
    assert {run.scale for run in load_runs(runs.root, EXPERIMENT)[0]} == {"smoke", "small"}
    assert [run.scale for run in load_runs(runs.root, EXPERIMENT, "small")[0]] == ["small"]


@pytest.mark.parametrize(
    ("state", "stage", "reason", "expected"),
    [
        ("running", "train", None, "running at stage train"),
        ("failed", "train", "OutOfMemoryError: 80 GiB", "failed at stage train: OutOfMemoryError: 80 GiB"),
    ],
)
def test_an_unfinished_run_is_left_out(runs, state, stage, reason, expected):
    runs.add().set_status(state, stage, reason)
    assert only_left_out(runs).reason == expected


@pytest.mark.parametrize("stage", ["evaluate", "import_results"])
def test_a_stage_that_stopped_after_a_complete_evaluation_is_noted(runs, stage):
    runs.add().set_status("failed", stage, "OSError: disk full")
    (run,), left_out = load_runs(runs.root, EXPERIMENT)
    assert left_out == [] and run.stopped == f"failed at stage {stage}: OSError: disk full"
    assert sorted(run.evaluations) == ["corrected"]


def test_a_first_evaluation_that_stopped_is_left_out(runs):
    record = runs.add()
    edit(record.path / "results.json", lambda raw: raw.update(evaluations={}))
    record.set_status("failed", "evaluate", "OSError: disk full")
    assert only_left_out(runs).reason == "failed at stage evaluate: OSError: disk full"


def edit(path, change):
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def task(raw):
    return raw["evaluations"]["corrected"]["tasks"]["piqa"]


def breakdown(raw, **changed):
    task(raw).update(breakdown={"circular": {"metric": "accuracy", "value": 0.5, "n": 10, **changed}})


DAMAGE = {
    "older schema": (lambda raw: raw.update(schema_version=0), "schema_version 0, expected 1"),
    "no schema": (lambda raw: raw.pop("schema_version"), "schema_version None"),
    "NaN": (lambda raw: task(raw).update(value=float("nan")), "value must be a finite number, found nan"),
    "infinite unparsed": (lambda raw: task(raw).update(unparsed=float("inf")), "unparsed must be a finite number"),
    "value is null": (lambda raw: task(raw).update(value=None), "found None"),
    "value in percent": (lambda raw: task(raw).update(value=87.7), "must be a share in [0, 1], found 87.7"),
    "unparsed in percent": (lambda raw: task(raw).update(unparsed=3.0), "unparsed must be a share"),
    "no items": (lambda raw: task(raw).update(n=0), "n must be positive"),
    "metric is no name": (lambda raw: task(raw).update(metric=None), "metric must be text"),
    "NaN in a part": (lambda raw: breakdown(raw, value=float("nan")), "breakdown.circular.value must be a finite"),
    "part in percent": (lambda raw: breakdown(raw, value=73.8), "piqa.breakdown.circular: value must be a share"),
    "part in points": (lambda raw: breakdown(raw, value=1500), "must be a share in [0, 1], found 1500"),
    "part without items": (lambda raw: breakdown(raw, n=0), "breakdown.circular: n must be positive"),
    "unknown key": (lambda raw: task(raw).update(accuracy=1), "unknown key 'accuracy'"),
    "missing key": (lambda raw: task(raw).pop("metric"), "metric"),
    "tasks are a list": (lambda raw: raw["evaluations"]["corrected"].update(tasks=[]), "tasks must be an object"),
    "settings are text": (lambda raw: raw["evaluations"]["corrected"].update(settings="greedy"), "settings"),
    "evaluation is null": (lambda raw: raw["evaluations"].update(corrected=None), "found None"),
    "protocol leaves the folder": (lambda raw: raw["evaluations"]["corrected"].update(protocol="../up"), "'../up'"),
    "protocol is null": (lambda raw: raw["evaluations"]["corrected"].update(protocol=None), "protocol must be"),
    "seconds are NaN": (lambda raw: raw["training"].update(seconds=float("nan")), "seconds must be a finite number"),
    "parameters are text": (lambda raw: raw["training"].update(trainable_parameters="28M"), "found '28M'"),
    "no training": (lambda raw: raw.update(training=None), "no training summary"),
    "no evaluation": (lambda raw: raw.update(evaluations={}), "not evaluated yet"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_bad_result_is_left_out_with_its_reason(runs, name):
    damage, expected = DAMAGE[name]
    edit(runs.add().path / "results.json", damage)
    entry = only_left_out(runs)
    assert entry.path == "commonsense_reasoning/smoke/moslora/default/seed-1"
    assert expected in entry.reason


@pytest.mark.parametrize("file", ["results.json", "status.json", "environment.json"])
@pytest.mark.parametrize("content", [b'{"state": ', b"[]", b"null", b"\xff\xfe", b""])
def test_a_damaged_file_is_left_out_by_name(runs, file, content):
    (runs.add().path / file).write_bytes(content)
    assert file in only_left_out(runs).reason


def test_a_run_without_results_or_status_is_left_out(runs):
    record = runs.add()
    (record.path / "results.json").unlink()
    assert "no training summary" in only_left_out(runs).reason
    (record.path / "status.json").unlink()
    assert "status.json is missing" in only_left_out(runs).reason


def test_a_folder_that_names_no_seed_is_left_out(runs):
    runs.add(seed="one")
    assert "expected seed-<number>" in only_left_out(runs).reason


def test_runs_of_the_same_seed_are_all_refused(runs):
    runs.add(seed=1)
    runs.add(seed="01")
    runs.add(seed=2)
    found, left_out = load_runs(runs.root, EXPERIMENT)
    assert [run.seed for run in found] == [2]
    assert [entry.path[-7:] for entry in left_out] == ["seed-01", "/seed-1"]
    assert all(re.search(r"duplicate of \S+seed-0?1: same", entry.reason) for entry in left_out)


def test_two_evaluations_of_one_protocol_are_refused(runs):
    record = runs.add()
    results = record.results()
    results.evaluations["again"] = Evaluation("corrected", {"piqa": TaskResult("accuracy", 0.1, 10)}, 1.0)
    record.write_results(results)
    assert "'corrected' and 'again' are both of 'corrected'" in only_left_out(runs).reason


def test_a_reference_needs_no_training(runs):
    for method in ("none", "base", "majority"):
        runs.add(method, training=None)
    found, left_out = load_runs(runs.root, EXPERIMENT)
    assert {run.method for run in found} == {"none", "base", "majority"} and left_out == []


def test_a_missing_environment_costs_only_the_commit(runs):
    runs.add(commit=None)
    (run,), _ = load_runs(runs.root, EXPERIMENT)
    assert run.commits == frozenset()


def test_no_folder_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no folder of runs"):
        load_runs(tmp_path / "absent", EXPERIMENT)


def test_empty_results_of_a_finished_run(runs):
    runs.add("none", training=None).write_results(Results())
    assert only_left_out(runs).reason == "not evaluated yet; the last finished stage is evaluate"


def test_knocking_out_subspaces_is_no_part_of_what_made_the_numbers(runs):
    record = runs.add()
    stages = json.loads((record.path / "environment.json").read_text()) | {"knock_out": {"git_commit": "f" * 40}}
    (record.path / "environment.json").write_text(json.dumps(stages))
    (run,), _ = load_runs(runs.root, EXPERIMENT)
    assert run.commits == {runs.commit}

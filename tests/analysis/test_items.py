"""Predictions as pairs of answers: what a number counts is paired, everything else is named."""

from __future__ import annotations

import json

import pytest

from analysis.items import Reader
from analysis.load import load_runs

ANSWERS = {"piqa": [True, False, True, True], "boolq": [False, True]}


def read(runs, experiment="commonsense_reasoning", protocol="corrected"):
    (run,), left_out = load_runs(runs.root, experiment)
    assert left_out == []
    return Reader(runs.root).items(run, protocol)


def change(record, edit):
    rows = [json.loads(line) for line in record.predictions_path.read_text().splitlines()]
    rows = edit(rows) or rows
    record.predictions_path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_answers_by_task_in_the_order_of_their_ids(runs):
    record = runs.add(right=ANSWERS)
    change(record, lambda rows: rows[::-1])
    found = read(runs)
    assert found.faults == () and set(found.answers) == {"piqa", "boolq"}
    assert found.answers["piqa"].ids == tuple(f"piqa/{i}" for i in range(4))
    assert found.answers["piqa"].golds == ("a", "b", "a", "b")
    assert found.answers["piqa"].right.tolist() == ANSWERS["piqa"]
    assert found.answers["piqa"].chance == 0.5


def test_each_protocol_has_its_own_answers_by_the_name_of_its_evaluation(runs):
    record = runs.add(right=ANSWERS, protocol=("paper", "corrected"))
    (run,), _ = load_runs(runs.root, "commonsense_reasoning")
    reader = Reader(runs.root)
    for protocol in ("paper", "corrected", "paper"):
        assert reader.items(run, protocol).answers["boolq"].right.tolist() == [False, True]
    results = json.loads((record.path / "results.json").read_text())
    results["evaluations"] = {"again": results["evaluations"]["paper"]}
    (record.path / "results.json").write_text(json.dumps(results))
    assert "predictions.jsonl has 0 items" in read(runs, protocol="paper").faults[0]
    change(record, lambda rows: [row | {"evaluation": "again"} for row in rows[:6]])
    assert read(runs, protocol="paper").answers["boolq"].right.tolist() == [False, True]


def test_rotations_that_the_number_does_not_count_are_left_out(visual):
    record = visual.add(right={"mmbench_en": [True, False, True]})

    def rotate(rows):
        turned = [{**row, "id": f"mmbench_en/{k * 1_000_000 + i}"} for k in (1, 2) for i, row in enumerate(rows)]
        return rows + turned

    change(record, rotate)
    found = read(visual, "visual_instruction", "exact")
    assert found.answers["mmbench_en"].right.tolist() == [True, False, True]


def test_a_large_index_is_no_rotation_where_the_number_counts_it(visual):
    record = visual.add(right={"seed_bench": [True, False]})
    change(record, lambda rows: [row | {"id": f"seed_bench/{1_500_000 + i}"} for i, row in enumerate(rows)])
    assert len(read(visual, "visual_instruction", "exact").answers["seed_bench"].ids) == 2


def drop(key):
    return lambda rows: rows[0].pop(key) and None


FAULTS = {
    "an item too few": (lambda rows: rows[1:], "piqa: predictions.jsonl has 3 items, its number counts 4"),
    "an item twice": (lambda rows: [rows[1], *rows[1:]], "piqa: predictions.jsonl has item piqa/1 twice"),
    "no id": (drop("id"), "line 1: id must be str, found None"),
    "correct is a number": (lambda rows: rows[0].update(correct=0.6), "line 1: correct must be bool, found 0.6"),
    "correct is NaN": (lambda rows: rows[0].update(correct=float("nan")), "line 1: correct must be bool, found nan"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_answers_that_cannot_be_used_are_named(runs, name):
    edit, expected = FAULTS[name]
    change(runs.add(right=ANSWERS), edit)
    found = read(runs)
    assert "piqa" not in found.answers
    (fault,) = found.faults
    assert fault.startswith("commonsense_reasoning/smoke/moslora/default/seed-1: ") and expected in fault


def test_a_damaged_file_is_named_without_the_machines_path(runs):
    record = runs.add(right=ANSWERS)
    text = record.predictions_path.read_text()
    record.predictions_path.write_text("{broken\n" + text)
    (fault,) = read(runs).faults
    assert "predictions.jsonl line 1 is damaged" in fault and str(runs.root) not in fault


def test_a_run_without_predictions_is_named(runs):
    runs.add()
    assert read(runs).faults == ("commonsense_reasoning/smoke/moslora/default/seed-1: predictions.jsonl is missing",)


def test_a_line_torn_by_a_kill_costs_its_task_alone(runs):
    record = runs.add(right=ANSWERS)
    record.predictions_path.write_text(record.predictions_path.read_text()[:-20])
    found = read(runs)
    assert set(found.answers) == {"piqa"} and "boolq: predictions.jsonl has 1 items" in found.faults[0]

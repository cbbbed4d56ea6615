"""The run record: atomic writes, damage, locks, labels, round trips."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moslora_core import UserError, record
from moslora_core.record import (
    Evaluation,
    Prediction,
    RunRecord,
    TaskResult,
    Training,
    append_jsonl,
    find_runs,
    override_label,
    read_json,
    read_jsonl,
    repair_jsonl,
    write_atomic,
    write_json,
)

TRAINING = Training(12.5, 40, 1 << 30, "rss", 512, 4096, final_loss=0.25, validation_loss=None)


@pytest.fixture
def run(tmp_path) -> RunRecord:
    return RunRecord.locate(tmp_path / "runs", "commonsense_reasoning", "smoke", "moslora", "default", 3)


def evaluation(value: float) -> Evaluation:
    return Evaluation("corrected", {"boolq": TaskResult("accuracy", value, 2, 0.1)}, 1.5, {"num_beams": 1})


def predictions(name: str, *answers: str) -> list[Prediction]:
    return [Prediction(name, "boolq", f"boolq/{i}", "true", a, a == "true") for i, a in enumerate(answers)]


# -------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch, failing):
    path = tmp_path / "file.json"
    write_json(path, {"old": 1})

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, failing, interrupt)
        write_json(path, {"new": 2})
    assert read_json(path) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path], "no temporary file stays"


@pytest.mark.parametrize("again", ["stage", "settle"])
def test_a_write_that_was_killed_leaves_nothing_for_long(tmp_path, again):
    run = RunRecord(tmp_path / "seed-0")
    run.set_status("running", "train")
    before = {path.name for path in run.path.iterdir()}
    if (killed := os.fork()) == 0:
        os.replace = lambda *paths: os._exit(9)
        write_json(run.path / "images" / "facts.json", {})
    assert os.waitstatus_to_exitcode(os.waitpid(killed, 0)[1]) == 9
    assert list((run.path / "images").iterdir())
    if again == "settle":
        run.settle("train")
    else:
        with run.stage("train"):
            pass
    assert not list((run.path / "images").iterdir()) and run.status().state == "finished"
    assert {path.name for path in run.path.iterdir()} == before | {".lock", "environment.json", "images"}


def test_a_full_disk_is_told_in_a_line(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for write in (lambda p: write_atomic(p, "x"), lambda p: append_jsonl(p, [{}])):
        with pytest.raises(UserError, match="No space left on device"):
            write(tmp_path / "file")


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"cannot write {tmp_path}/file/a.json"):
        write_json(tmp_path / "file" / "a.json", {})
    with (
        pytest.raises(UserError, match="cannot write run folder"),
        RunRecord(tmp_path / "file" / "run").stage("train"),
    ):
        pass


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_lacks_are_refused_by_their_key(tmp_path, run, number):
    with pytest.raises(UserError, match=rf"tasks\.boolq\.1 is {number}; expected finite"):
        write_json(tmp_path / "a.json", {"tasks": {"boolq": [1.0, number]}})
    with pytest.raises(UserError, match="loss is"):
        append_jsonl(tmp_path / "a.jsonl", [{"step": 1, "loss": number}])
    with pytest.raises(UserError, match=r"results\.json: training\.final_loss is"):
        run.set_training(Training(1.0, 1, 1, "rss", 1, 1, final_loss=number))
    assert not list(tmp_path.rglob("*.json*"))


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', '{"answer": "é'.encode()[:-1], b'{"step": 3}'])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    path = tmp_path / "log.jsonl"
    append_jsonl(path, [{"step": 1, "text": "é"}, {"step": 2}])
    with open(path, "ab") as file:
        file.write(torn)
    assert read_jsonl(path) == [{"step": 1, "text": "é"}, {"step": 2}]
    assert repair_jsonl(path, keep=lambda row: row["step"] < 2) == [{"step": 1, "text": "é"}]
    append_jsonl(path, [{"step": 9}])
    assert read_jsonl(path) == [{"step": 1, "text": "é"}, {"step": 9}]


def test_predictions_are_read_plain_or_compressed(tmp_path):
    record = RunRecord(tmp_path)
    assert record.predictions() == []
    row = asdict(Prediction("generate", "boolq", "boolq/0", "true", None, False))
    line = json.dumps(row).encode() + b"\n"
    compressed = tmp_path / "predictions.jsonl.gz"
    compressed.write_bytes(gzip.compress(line))
    assert record.predictions_file() == compressed and record.predictions() == [row]
    for damage in (line, gzip.compress(line)[:-9]):
        compressed.write_bytes(damage)
        with pytest.raises(UserError, match=r"predictions\.jsonl\.gz is damaged: expected a gzip file"):
            record.predictions()
    record.predictions_path.write_bytes(line * 2)  # the plain one is the one that evaluations write
    assert len(record.predictions()) == 2


@pytest.mark.parametrize("damage", [b"{torn", b"[1]", b"\xff\xfe", b""])
def test_damage_elsewhere_is_named_by_file_and_line(tmp_path, damage):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 3}\n')
    for read in (read_jsonl, repair_jsonl):
        with pytest.raises(UserError, match=rf"{path} line 2 is damaged: expected a JSON object"):
            read(path)


def test_damaged_json_is_named(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("{")
    with pytest.raises(UserError, match=f"{path} is damaged"):
        read_json(path)
    with pytest.raises(UserError, match=r"cannot read .*absent\.json"):
        read_json(tmp_path / "absent.json")


# -------------------------------------------------------------------------------------------------------------- stage


def test_a_stage_is_running_then_finished(run):
    assert run.status() is None
    with run.stage("train"):
        assert (run.status().state, run.status().stage) == ("running", "train")
        assert read_json(run.path / "environment.json")["train"]["end"] is None
    assert (run.status().state, run.status().reason) == ("finished", None)
    with run.stage("evaluate"):
        pass
    stages = read_json(run.path / "environment.json")
    assert stages.keys() == {"train", "evaluate"}
    for stage in stages.values():
        assert stage["start"] <= stage["end"] and stage["packages"]["peft"] and stage["hardware"]["cpu_count"] > 0


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("bad luck\nin two lines"), "ValueError: bad luck"),
        (UserError("training diverged at step 3"), "UserError: training diverged at step 3"),
        (RuntimeError(), "RuntimeError: "),
        (KeyboardInterrupt(), "interrupted"),
    ],
)
def test_a_failed_stage_says_why_and_frees_the_folder(run, error, reason):
    with pytest.raises(type(error)), run.stage("train"):
        raise error
    status = run.status()
    assert (status.state, status.stage, status.reason) == ("failed", "train", reason)
    with run.stage("train"):
        pass
    assert (run.status().state, run.status().reason) == ("finished", None)


def test_a_second_process_is_locked_out(run):
    script = (
        "import sys; from pathlib import Path; from moslora_core.record import RunRecord\n"
        "try:\n"
        "    with RunRecord(Path(sys.argv[1])).stage('train'): print('entered')\n"
        "except ValueError as error: print(error)\n"
    )

    with run.stage("evaluate"):
        done = subprocess.run(
            [sys.executable, "-c", script, str(run.path)], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"run folder {run.path} is in use by another process; wait for it or stop it\n"
        assert run.status().stage == "evaluate", "the one locked out writes nothing"


def test_a_fresh_stage_empties_the_folder_that_it_holds(run):
    run.set_training(TRAINING)
    (run.path / "adapter").mkdir()
    (run.path / "adapter" / "weights").write_text("old")
    with run.stage("evaluate"), pytest.raises(UserError, match="in use"), run.stage("train", fresh=True):
        pass
    assert run.is_trained() and (run.path / "adapter" / "weights").exists()
    with run.stage("train", fresh=True):
        assert {path.name for path in run.path.iterdir()} == {".lock", "status.json", "environment.json"}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"state": "asleep", "stage": "train"}', "state must be one of"),
        ('{"state": "failed"}', "stage is missing"),
        ('{"state": "failed", "stage": "train", "mood": 1}', "unknown key 'mood'"),
        ("[]", "expected an object"),
    ],
)
def test_a_damaged_status_is_named(run, content, expected):
    write_atomic(run.path / "status.json", content)
    with pytest.raises(UserError, match=expected) as caught:
        run.status()
    assert str(run.path / "status.json") in str(caught.value)


def test_a_stopwatch_never_goes_back(monkeypatch):
    """Whatever the clock on the wall does, also over the sittings of a resumed run."""
    wall = itertools.count(2e9, -3600)
    monkeypatch.setattr(time, "time", lambda: next(wall))
    first = record.Stopwatch()
    seconds = [first.seconds for _ in range(3)]
    again = record.Stopwatch(before=seconds[-1])
    seconds += [again.seconds for _ in range(3)]
    assert seconds == sorted(seconds) and seconds[0] >= 0 and seconds[-1] < 60


# ------------------------------------------------------------------------------------------------------------- labels

_KEYS = st.sampled_from(["adapter.r", "model.path", "seed", "method.mixer_init"])
_OVERRIDES = st.frozensets(st.builds("{}={}".format, _KEYS, st.text(max_size=60)), max_size=6)


@pytest.mark.parametrize(
    ("overrides", "label"),
    [
        ([], "default"),
        (["adapter.r=8"], "adapter.r=8"),
        (["training.learning_rate=3e-4", "adapter.r=8"], "adapter.r=8,training.learning_rate=3e-4"),
    ],
)
def test_plain_overrides_are_their_own_label(overrides, label):
    assert override_label(overrides) == label


@given(_OVERRIDES)
def test_a_label_is_one_safe_folder_name_whatever_the_order(overrides):
    label = override_label(overrides)
    assert label == override_label(sorted(overrides, reverse=True))
    assert 0 < len(label.encode()) <= 160
    assert not set(label) - set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.,=+-~")
    assert label not in (".", "..") and not label.startswith("."), "find_runs and ls hide such a folder"


@given(_OVERRIDES, _OVERRIDES)
@example(frozenset({"model.path=a/b"}), frozenset({"model.path=a_b"}))
@example(frozenset({"adapter.target_modules=[q,v]"}), frozenset({"adapter.target_modules=_q,v_"}))
@example(frozenset({"a=1,b=2"}), frozenset({"a=1", "b=2"}))
@example(frozenset({"a=" + "x" * 200}), frozenset({"a=" + "x" * 201}))
@example(frozenset({"a=" + "/" * 200}), frozenset({"a=" + "/" * 201}))
def test_different_overrides_have_different_labels(first, second):
    assert (override_label(first) == override_label(second)) == (first == second)


# ------------------------------------------------------------------------------------------------------------ results


def test_results_come_back_as_written(run):
    assert run.results() == record.Results() and not run.is_trained()
    run.set_training(TRAINING)
    run.add_evaluation("generate", evaluation(0.5), predictions("generate", "true", "false"))
    results = run.results()
    assert results.training == TRAINING and run.is_trained()
    assert results.evaluations == {"generate": evaluation(0.5)}
    assert [row["correct"] for row in run.predictions()] == [True, False]


BROKEN_DOWN = TaskResult(
    "accuracy",
    0.5,
    4,
    0.25,
    lenient=0.75,
    breakdown={
        "Attribute Reasoning": TaskResult("accuracy", 1.0, 2, 0.0),
        "circular": TaskResult("circular_accuracy", 0.25, 4, unparsed=0.5),
    },
)


def test_a_breakdown_comes_back_as_results(run):
    written = Evaluation("exact", {"mmbench_en": BROKEN_DOWN, "textvqa": TaskResult("vqa_accuracy", 0.3, 10)}, 1.5)
    run.add_evaluation("exact", written, [])
    read = run.results().evaluations["exact"]
    assert read == written
    assert all(type(part) is TaskResult for part in read.tasks["mmbench_en"].breakdown.values())
    assert read.mean == pytest.approx(0.4), "parts are no tasks of their own"


def test_a_result_from_before_breakdowns_is_read(run):
    run.add_evaluation("generate", evaluation(0.5), [])
    path = run.path / "results.json"
    raw = json.loads(path.read_text())
    del raw["evaluations"]["generate"]["tasks"]["boolq"]["breakdown"]
    path.write_text(json.dumps(raw))
    assert run.results().evaluations == {"generate": evaluation(0.5)}


@pytest.mark.parametrize(
    ("breakdown", "expected"),
    [
        ([], "exact.tasks.mmbench_en.breakdown must be an object, found []"),
        ({"AR": 0.5}, "exact.tasks.mmbench_en.breakdown.AR must be an object with metric"),
        ({"AR": {"metric": "accuracy", "value": 1.0}}, "breakdown.AR.n is missing"),
        ({"AR": {"metric": "accuracy", "value": 1.0, "n": 2, "of": 3}}, "breakdown.AR: unknown key 'of'"),
        ({"AR": {"metric": "accuracy", "value": math.nan, "n": 2}}, "breakdown.AR.value must be a finite number"),
        (
            {"AR": {"metric": "accuracy", "value": 1.0, "n": 2, "lenient": math.inf}},
            "breakdown.AR.lenient must be a finite number, found inf",
        ),
        (
            {"AR": {"metric": "accuracy", "value": 1.0, "n": 2, "breakdown": {}}},
            "exact.tasks.mmbench_en.breakdown.AR has a breakdown inside a breakdown; expected none",
        ),
    ],
)
def test_a_damaged_breakdown_is_named(run, breakdown, expected):
    run.add_evaluation("exact", Evaluation("exact", {"mmbench_en": BROKEN_DOWN}, 1.5), [])
    path = run.path / "results.json"
    raw = json.loads(path.read_text())
    raw["evaluations"]["exact"]["tasks"]["mmbench_en"]["breakdown"] = breakdown
    path.write_text(json.dumps(raw))
    with pytest.raises(UserError) as caught:
        run.results()
    assert expected in str(caught.value) and str(path) in str(caught.value)


def test_an_evaluation_replaces_its_own_and_keeps_the_others(run):
    run.set_training(TRAINING)
    run.add_evaluation("generate", evaluation(0.5), predictions("generate", "true", "false"))
    run.add_evaluation("loglikelihood", evaluation(0.0), predictions("loglikelihood", "false"))
    append_jsonl(run.partial_predictions_path("generate"), [{}])
    run.add_evaluation("generate", evaluation(1.0), predictions("generate", "true"))
    assert run.results().training == TRAINING
    assert run.results().evaluations == {"generate": evaluation(1.0), "loglikelihood": evaluation(0.0)}
    rows = sorted((row["evaluation"], row["prediction"]) for row in run.predictions())
    assert rows == [("generate", "true"), ("loglikelihood", "false")]
    assert not run.partial_predictions_path("generate").exists()


def test_the_mean_is_over_tasks_not_over_items():
    tasks = {"boolq": TaskResult("accuracy", 1.0, 1), "piqa": TaskResult("accuracy", 0.0, 99)}
    assert Evaluation("corrected", tasks, 1.0).mean == 0.5


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda r: r.update(schema_version=99), "schema_version 99, expected 1"),
        (lambda r: r.pop("schema_version"), "schema_version None, expected 1"),
        (lambda r: r["training"].update(speed=1), "training: unknown key 'speed'"),
        (lambda r: r["training"].pop("steps"), "training.steps is missing"),
        (lambda r: r["training"].update(seconds="long"), "training.seconds must be a finite number, found 'long'"),
        (lambda r: r["evaluations"]["generate"].update(tasks=[]), r"generate.tasks must be an object"),
        (
            lambda r: r["evaluations"]["generate"]["tasks"]["boolq"].update(value=math.nan),
            "generate.tasks.boolq.value",
        ),
        (lambda r: r.update(evaluations=[]), "evaluations must be an object"),
    ],
)
def test_damaged_results_are_named(run, change, expected):
    run.set_training(TRAINING)
    run.add_evaluation("generate", evaluation(0.5), [])
    path = run.path / "results.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(UserError, match=expected) as caught:
        run.results()
    assert str(path) in str(caught.value)


# --------------------------------------------------------------------------------------------------------------- runs


def test_runs_are_found_in_order(tmp_path):
    root = tmp_path / "runs"
    places = [("visual", "smoke", "lora", "default", 0), ("common", "smoke", "moslora", "adapter.r=8", 1)]
    places += [("common", "smoke", "lora", "default", seed) for seed in (1, 0)]
    for place in places:
        RunRecord.locate(root, *place).set_status("finished", "train")
    (root / "common" / "smoke" / "lora" / "default" / "seed-7").mkdir()  # nothing ran there
    RunRecord.locate(root, "common", ".smoke.new", "lora", "default", 0).set_status("finished", "train")
    found = [str(run.path.relative_to(root)) for run in find_runs(root)]
    assert found == [
        "common/smoke/lora/default/seed-0",
        "common/smoke/lora/default/seed-1",
        "common/smoke/moslora/adapter.r=8/seed-1",
        "visual/smoke/lora/default/seed-0",
    ]
    assert [run.path for run in find_runs(root, "visual")] == [root / found[-1]]
    with pytest.raises(UserError, match="no folder of runs at"):
        find_runs(tmp_path / "absent")


def test_paths_follow_the_layout():
    run = RunRecord.locate("runs", "e", "smoke", "lora", "adapter.r=8", 2)
    assert run.path == Path("runs/e/smoke/lora/adapter.r=8/seed-2")
    names = [run.config_path, run.metrics_path, run.adapter_path, run.predictions_path]
    assert [path.name for path in names] == ["config.yaml", "metrics.jsonl", "adapter", "predictions.jsonl"]

"""Studies: their definition, the choice of rates, the sweeps that make what is missing, and a whole study run."""

from __future__ import annotations

import fcntl
import importlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_module

from analysis import rates_figure
from analysis.load import load_runs
from analysis.results import main as main_results
from analysis.study import Runner, jobs_of, listing, main
from analysis.study_plan import COMPARISON, DONE, FAILED, GRID, MISSING, Progress, choose, read_study, state_of
from analysis.study_view import missing, study_runs
from analysis.task_table import rates_fact
from moslora_core import launch
from moslora_core.errors import UserError
from moslora_core.record import Evaluation, Prediction, RunRecord, TaskResult, Training, append_jsonl

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "analysis" / "studies").glob("*.yaml"))
DEFINITION = {
    "name": "toy",
    "question": "Does it run?",
    "experiment": "toy_experiment",
    "settings": {"scale": "smoke", "data.dir": "data/toy"},
    "seeds": [0, 1],
    "evaluation": "exact",
    "train": {"training.keep_steps": 5},
    "rates": {
        "key": "training.learning_rate",
        "values": ["1e-3", 0.002, 0.004],
        "extend": 1,
        "seeds": [10, 11],
        "choose_by": "exact-validation",
        "evaluate": {"evaluation.split": "validation"},
        "fixed": {"zero": 0.002},
    },
    "arms": {
        "lora": {"method": "lora"},
        "orthogonal": {"method": "moslora", "method.mixer_init": "orthogonal"},
        "zero": {"method": "moslora", "method.mixer_init": "zero"},
    },
    "variants": {
        "half": {"arms": ["lora"], "overrides": {"data.train_items": 8}, "settings": {"data.dir": "data/half"}}
    },
    "references": ["base"],
}


@pytest.fixture
def define(tmp_path):
    """Writes a definition with some keys changed (None removes one) and reads it."""

    def write(**changes):
        given = {key: value for key, value in (DEFINITION | changes).items() if value is not None}
        path = tmp_path / "toy.yaml"
        path.write_text(yaml.safe_dump(given, sort_keys=False))
        return read_study(path)

    return write


def finish(run, runs_dir: Path, mean: float) -> None:
    record = run.record(runs_dir)
    results = record.results()
    results.training = Training(1.0, 1, 1, "rss", 1, 2)
    results.evaluations[run.evaluation] = Evaluation(run.evaluation, {"task": TaskResult("accuracy", mean, 10)}, 1.0)
    record.write_results(results)
    record.set_status("finished", "evaluate")


def finish_all(study, runs_dir: Path, score) -> Progress:
    """Finishes whatever is missing, again and again, with ``score(arm, rate)``."""
    while left := (progress := Progress(study, runs_dir)).of_state(MISSING):
        for run in left:
            rate = float(dict(run.overrides).get(study.rates.key, 0))
            finish(run, runs_dir, score(run.arm.name, rate))
    return progress


# ---------------------------------------------------------------------------------------------------------- definition


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"arm": {}}, "unknown key 'arm'; expected name, question, experiment"),
        ({"seeds": None}, "seeds is missing"),
        ({"seeds": []}, "seeds is empty"),
        ({"seeds": [0, 0]}, "a seed stands there twice: [0, 0]"),
        ({"seeds": [-1]}, "seeds.0 must be a whole number of at least 0, found -1"),
        ({"seeds": [10]}, "rates.seeds has 10, a seed of the comparison"),
        ({"settings": {"data.dir": "x"}}, "settings has no scale"),
        ({"arms": {"lora": {"adapter.r": 8}}, "variants": None, "rates": DEFINITION["rates"] | {"fixed": {}}},
         "arms.lora: method is missing"),
        ({"rates": DEFINITION["rates"] | {"values": [1e-3, 2e-3]}}, "at least three values that rise by a constant"),
        ({"rates": DEFINITION["rates"] | {"values": [1e-3, 2e-3, 8e-3]}}, "rise by a constant factor"),
        ({"rates": DEFINITION["rates"] | {"values": [4e-3, 2e-3, 1e-3]}}, "rise by a constant factor"),
        ({"rates": DEFINITION["rates"] | {"values": ["fast", 1, 2]}}, "must be a positive number, found 'fast'"),
        ({"rates": DEFINITION["rates"] | {"fixed": {"nobody": 1}}}, "rates.fixed names 'nobody', which is no arm"),
        ({"rates": DEFINITION["rates"] | {"choose": "x"}}, "rates: unknown key 'choose'"),
        ({"variants": {"v": {"arms": ["nobody"], "overrides": {}}}}, "variants.v: 'nobody' is no arm; expected some"),
    ],
)  # fmt: skip
def test_a_wrong_definition_is_told_in_a_line(define, tmp_path, changes, complaint):
    with pytest.raises(UserError) as raised:
        define(**changes)
    assert complaint in str(raised.value) and str(tmp_path / "toy.yaml") in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["name: [", "- a\n- b\n", None])
def test_a_file_that_is_no_definition_is_told_in_a_line(tmp_path, capsys, text):
    path = tmp_path / "broken.yaml"
    if text is not None:
        path.write_text(text)
    assert main([str(path), "--list"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_studies_are_sound_and_name_their_runs_as_the_experiment_does(path, tmp_path):
    """A label that differs from the experiment's own would leave the study waiting for runs that are elsewhere."""
    study = read_study(path)
    assert len(study.rates.values) >= 5 and len(study.seeds) >= 5
    config = importlib.import_module(f"{study.experiment}.config")
    progress = finish_all(study, tmp_path, lambda arm, rate: 1 / (1 + abs(rate - study.rates.values[2])))
    assert progress.runs
    composed = set()
    for run in progress.runs:
        given = [f"{key}={value}" for key, value in (*run.overrides, *run.settings, *run.train, *run.evaluate)]
        if run.trained:
            assert launch._label([f"method={run.arm.method}", *given], config.NOT_IN_LABEL) == run.label
        composed.add((f"method={run.arm.method}", *given))
    launch.register(config.Config)
    with initialize_config_module(config.CONF_MODULE, version_base="1.3"):
        for overrides in sorted(composed)[:: max(1, len(composed) // 12)]:
            launch.instantiate(config.Config, compose("config", overrides=list(overrides)))


# -------------------------------------------------------------------------------------------------------------- choice


@pytest.mark.parametrize(
    ("tried", "best", "inside"),
    [
        ({1.0: 0.2, 2.0: 0.5, 4.0: 0.3}, 2.0, True),
        ({1.0: 0.5, 2.0: 0.5, 4.0: 0.3}, 1.0, False),  # of equals the smaller
        ({1.0: 0.2, 2.0: 0.3, 4.0: 0.4}, 4.0, False),
        ({1.0: 0.2, 2.0: 0.3, 4.0: None}, 2.0, True),  # a failed training is a worse rate
        ({1.0: None, 2.0: 0.1, 4.0: None}, 2.0, True),
    ],
)
def test_the_best_mean_is_chosen(define, tried, best, inside):
    choice = choose(define().arms[0], tried)
    assert (choice.best, choice.inside) == (best, inside)


def test_an_arm_that_always_fails_has_no_rate(define):
    with pytest.raises(UserError, match=r"arm lora: trials failed at every learning rate: 1, 2"):
        choose(define().arms[0], {1.0: None, 2.0: None})


def test_a_best_rate_at_an_end_extends_the_grid_but_not_for_ever(define, tmp_path):
    study = define()
    progress = finish_all(study, tmp_path, lambda arm, rate: rate if arm == "lora" else 0.5 - abs(rate - 0.0005))
    up, down = progress.choices["lora"], progress.choices["orthogonal"]
    assert list(up.tried) == [0.001, 0.002, 0.004, 0.008] and up.best == 0.008 and not up.inside
    assert list(down.tried) == [0.0005, 0.001, 0.002, 0.004] and down.best == 0.0005 and not down.inside
    assert "at the grid's end" in listing(progress)
    (figure,) = rates_figure.build(progress)
    assert "Warning: the best rate is at an end of the grid for lora (0.008), orthogonal (0.0005)." in figure.markdown


def test_no_comparison_before_its_rate_is_chosen(define, tmp_path):
    study = define()
    progress = Progress(study, tmp_path)
    by_arm = {(run.arm.name, run.part) for run in progress.runs}
    assert by_arm == {
        ("lora", GRID), ("orthogonal", GRID), ("zero", COMPARISON), ("base", "references"),
    }  # fmt: skip
    assert progress.choices["lora"].best is None and progress.choices["zero"].best == 0.002
    for run in progress.of_state(MISSING)[:-1]:
        if run.arm.name == "lora" and run.part == GRID:
            finish(run, tmp_path, 0.5 if "0.002" in run.label else 0.1)
    runs = Progress(study, tmp_path).runs
    compared = {run.label for run in runs if run.arm.name == "lora" and run.part != GRID}
    assert compared == {"training.learning_rate=0.002", "data.train_items=8,training.learning_rate=0.002"}


# ---------------------------------------------------------------------------------------------------------------- jobs


def test_a_sweep_makes_the_missing_runs_and_no_other(define, tmp_path):
    study = define()
    first = next(run for run in Progress(study, tmp_path).runs if run.label.endswith("0.002") and run.seed == 10)
    finish(first, tmp_path, 0.5)
    jobs = [job for job in jobs_of(Progress(study, tmp_path).of_state(MISSING)) if job.runs[0].arm.name == "lora"]
    made = []
    for job in jobs:
        train, evaluate = (
            dict(word.split("=", 1) for word in line if "=" in word) for line in job.commands(tmp_path, ())
        )
        assert train["runs_dir"] == str(tmp_path) and train["on_finished"] == evaluate["on_finished"] == "skip"
        assert evaluate["evaluation.split"] == "validation" and "training.keep_steps" not in train
        made += [
            (rate, seed) for rate in train["training.learning_rate"].split(",") for seed in train["seed"].split(",")
        ]
    expected = {(rate, seed) for rate in ("0.001", "0.002", "0.004") for seed in ("10", "11")} - {("0.002", "10")}
    assert sorted(made) == sorted(expected)


# ------------------------------------------------------------------------------------------------------- a whole study

# Stands for an experiment: the same verbs, arguments and records, numbers out of the air.
_STAGE = """
import itertools, json, sys
from pathlib import Path

sweep = {key: value.split(",") for key, value in (word.split("=", 1) for word in sys.argv[1:] if "=" in word)}
unnamed = ("method", "scale", "seed", "runs_dir", "on_finished", "data.dir", "training.keep_steps", "evaluation.split")
with open("calls.txt", "a") as calls:
    calls.write(f"{STAGE} {' '.join(sys.argv[1:])}\\n")
if STAGE == "prepare_data":
    folder = Path(sweep["data.dir"][0])
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    sys.exit()
for values in itertools.product(*sweep.values()):
    given = dict(zip(sweep, values))
    named = sorted(f"{key}={value}" for key, value in given.items() if key not in unnamed)
    folder = Path(given["runs_dir"], "toy_experiment", given["scale"], given["method"], ",".join(named) or "default")
    folder /= f"seed-{given['seed']}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    results = {"schema_version": 1, "training": None, "evaluations": {}}
    if path.exists():
        results = json.loads(path.read_text())

    def status(state, reason=None):
        (folder / "status.json").write_text(json.dumps({"state": state, "stage": STAGE, "reason": reason}))

    rate = float(given.get("training.learning_rate", 0))
    if STAGE == "train":
        if results["training"]:
            continue
        assert Path(given["data.dir"], "manifest.json").is_file()
        if rate > 0.003:
            status("failed", "training diverged at step 3: loss is nan")
            sys.exit("error: training diverged at step 3: loss is nan")
        results["training"] = {"seconds": 1.0, "steps": 3, "peak_memory_bytes": 1, "peak_memory_kind": "rss",
                               "trainable_parameters": 10, "total_parameters": 100}
    else:
        name = "exact-validation" if given.get("evaluation.split") == "validation" else "exact"
        if name in results["evaluations"]:
            continue
        if given["method"] != "base" and not results["training"]:
            sys.exit(f"error: no adapter at {folder}")
        tasks = {"task": {"metric": "accuracy", "value": 100 * rate, "n": 10}}
        results["evaluations"][name] = {"protocol": name, "tasks": tasks, "seconds": 1.0}
    path.write_text(json.dumps(results))
    status("finished")
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A working directory with the stand-in for an experiment."""
    package = tmp_path / "toy_experiment"
    package.mkdir()
    (package / "__init__.py").touch()
    for stage in ("prepare_data", "train", "evaluate"):
        (package / f"{stage}.py").write_text(f"STAGE = {stage!r}\n{_STAGE}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    monkeypatch.setattr("analysis.study.POLL_SECONDS", 0.05)
    return tmp_path


def test_a_study_is_run_to_its_end(define, toy):
    study, runs = define(), Path("runs")
    assert Runner(study, runs, jobs=2).run() == {}
    progress = Progress(study, runs)
    assert progress.of_state(MISSING) == []
    # Every training at 0.004 diverges: that is a result, it ends nothing else, and the best rate is below it.
    assert {dict(run.overrides)[study.rates.key] for run in progress.of_state(FAILED)} == {"0.004"}
    assert {name: choice.best for name, choice in progress.choices.items()} == dict.fromkeys(
        ("lora", "orthogonal", "zero"), 0.002
    )
    parts = {(run.arm.name, run.part, run.seed) for run in progress.of_state(DONE) if run.part != GRID}
    assert parts == {
        *((arm, COMPARISON, seed) for arm in ("lora", "orthogonal", "zero") for seed in (0, 1)),
        *(("lora", "half", seed) for seed in (0, 1)),
        ("base", "references", 0),
    }
    calls = Path("calls.txt").read_text().splitlines()
    prepared = [call for call in calls if call.startswith("prepare_data")]
    assert sorted(prepared) == [
        "prepare_data data.dir=data/half scale=smoke data.train_items=8",
        "prepare_data data.dir=data/toy scale=smoke",
    ]
    kept = [call for call in calls if "training.keep_steps=5" in call]
    assert kept and all(call.startswith("train") and "seed=0,1" in call for call in kept)
    # Nothing is left to do, and nothing is done again.
    assert Runner(study, runs).run() == {} and Path("calls.txt").read_text().splitlines() == calls


def test_a_run_that_cannot_be_made_ends_nothing_else(define, toy, capsys):
    (toy / "toy_experiment" / "train.py").write_text(
        "import sys\nif 'method=moslora' in sys.argv:\n    sys.exit('error: no such mixer')\n"
        + (toy / "toy_experiment" / "train.py").read_text()
    )
    define()
    assert main(["toy.yaml"]) == 1
    told = capsys.readouterr().err.splitlines()
    assert [line for line in told if line.startswith("error: runs/toy_experiment/smoke/moslora/")]
    assert all(line.endswith(": no such mixer") for line in told if line.startswith("error: runs"))
    states = Progress(define(), Path("runs")).runs
    assert all(state.state != MISSING for run, state in states.items() if run.arm.name in ("lora", "base"))


def test_a_second_runner_is_refused_and_a_dead_one_is_not_waited_for(define, toy):
    study, runs = define(), Path("runs")
    lock = runs / "studies" / "toy" / "lock"
    lock.parent.mkdir(parents=True)
    code = "import fcntl, os, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
    code += "print(os.getpid(), file=f, flush=True); print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"process {holder.pid} is running this study"):
            Runner(study, runs).run()
    finally:
        holder.kill()
        holder.wait()
    assert Runner(study, runs, jobs=2).run() == {}


def start_runner(study, toy: Path, runs: Path) -> multiprocessing.Process:
    """A runner in a process of its own, whose first training waits for a file ``go``."""
    train = toy / "toy_experiment" / "train.py"
    waits = "import time\nfrom pathlib import Path\nPath('trains').touch()\n"
    waits += "while not Path('go').exists():\n    time.sleep(0.02)\n"
    train.write_text(waits + train.read_text())
    runner = multiprocessing.get_context("fork").Process(target=Runner(study, runs).run)
    runner.start()
    while not Path("trains").exists():
        time.sleep(0.02)
    return runner


def test_a_stopped_runner_ends_what_it_has_started(define, toy):
    runner = start_runner(define(), toy, Path("runs"))
    os.kill(runner.pid, signal.SIGINT)
    runner.join()
    with open("runs/studies/toy/commands.lock", "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert Progress(define(), Path("runs")).of_state(FAILED) == []


def test_what_a_killed_runner_left_behind_is_waited_for(define, toy, caplog):
    """Only the runner is killed: its sweep goes on, and no second process works on the same runs meanwhile."""
    study, runs = define(), Path("runs")
    runner = start_runner(study, toy, runs)
    runner.kill()
    runner.join()

    def let_go():
        deadline = time.monotonic() + 20
        while "waiting for its end" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.02)
        Path("go").touch()

    threading.Thread(target=let_go, daemon=True).start()
    assert Runner(study, runs).run() == {}
    assert Progress(study, runs).of_state(MISSING) == [] and "waiting for its end" in caplog.text
    calls = Path("calls.txt").read_text().splitlines()
    trained = [call for call in calls if call.startswith("train ")]
    assert len(trained) == len(set(trained)), "what was left behind is not made a second time"


def test_runs_that_were_stopped_by_hand_have_not_failed(define, tmp_path):
    run = Progress(define(), tmp_path).of_state(MISSING)[0]
    for stopped, state in ((KeyboardInterrupt(), MISSING), (UserError("no such model"), FAILED)):
        with pytest.raises(type(stopped)), run.record(tmp_path).stage("train"):
            raise stopped
        assert state_of(run, tmp_path).state == state


def test_a_sweep_that_was_killed_is_told_as_such(define, toy, capsys):
    (toy / "toy_experiment" / "train.py").write_text(
        "import os\nprint('step 1', flush=True)\nos.kill(os.getpid(), 9)\n"
    )
    define()
    assert main(["toy.yaml"]) == 1
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: runs/")]
    assert told and all(line.endswith(": killed by signal 9") for line in told)
    assert Progress(define(), Path("runs")).of_state(FAILED) == []


@pytest.mark.parametrize("options", [[], ["--background"]])
@pytest.mark.parametrize("blocked", ["runs", "runs/studies/toy"])
def test_a_folder_that_cannot_be_written_is_told_in_a_line(define, toy, capsys, blocked, options):
    """A file in the place of a folder, which keeps root out too."""
    define()
    Path(blocked).parent.mkdir(parents=True, exist_ok=True)
    Path(blocked).touch()
    assert main(["toy.yaml", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: cannot write runs/studies/toy/") and line.endswith("; expected a writable folder")


# ---------------------------------------------------------------------------------------------------------------- view


def test_tables_show_each_arm_at_its_rate_and_nothing_else(define, tmp_path):
    study = define()
    progress = finish_all(study, tmp_path, lambda arm, rate: 0.5 - abs(rate - 0.002))
    (stranger,) = [run for run in progress.runs if run.part == COMPARISON and run.arm.name == "lora" and run.seed == 0]
    alien = stranger.record(tmp_path).path.parent.parent / "default" / "seed-7"
    alien.parent.mkdir()
    shutil.copytree(stranger.record(tmp_path).path, alien)
    runs, left_out = load_runs(tmp_path, study.experiment)
    shown, unused = study_runs(progress, runs, left_out)
    rows = {(run.method, run.label, run.rate) for run in shown}
    rate = "training.learning_rate=0.002"
    assert rows == {
        ("lora", "default", rate),
        ("lora", "data.train_items=8", rate),
        ("moslora", "method.mixer_init=orthogonal", rate),
        ("moslora", "method.mixer_init=zero", rate),
        ("base", "default", None),
    }
    assert {run.seed for run in shown if run.method != "base"} == {0, 1}
    assert {name for run in shown for name in run.evaluations} == {"exact"}  # not what the rates were chosen by
    assert [(entry.path, entry.reason) for entry in unused] == [
        ("toy_experiment/smoke/lora/default/seed-7", "no part of the study toy")
    ]
    assert missing(progress) == []


def test_a_table_says_which_rate_was_chosen_for_which_row(define, tmp_path):
    study = define()
    best = {"lora": 0.002, "orthogonal": 0.001}
    progress = finish_all(study, tmp_path, lambda arm, rate: 0.5 - abs(rate - best.get(arm, 0)))
    shown, _ = study_runs(progress, *load_runs(tmp_path, study.experiment))
    (fact,) = rates_fact(shown)
    assert fact.endswith(
        ": 0.001 (moslora (method.mixer_init=orthogonal)); "
        "0.002 (lora (data.train_items=8), lora, moslora (method.mixer_init=zero))."
    )
    assert rates_fact([run for run in shown if run.method == "lora"]) == [
        "Learning rates, each chosen on validation items for its method: 0.002 (all)."
    ]
    assert rates_fact([replace(run, rate=None) for run in shown]) == []


def test_what_is_missing_is_said(define, tmp_path):
    study = define()
    lines = missing(Progress(study, tmp_path))
    assert "lora, learning rates: 6 runs missing" in lines
    assert "the comparison of lora, orthogonal: the learning rates are not chosen yet" in lines
    assert rates_figure.build(Progress(study, tmp_path)) == []


def test_the_figure_of_the_rates_has_the_numbers_and_the_same_bytes(define, tmp_path):
    study = define()
    finish_all(study, tmp_path, lambda arm, rate: {0.001: 0.25, 0.002: 0.75, 0.004: 0.5}[rate] if rate else 0.0)
    (figure,), (again,) = (rates_figure.build(Progress(study, tmp_path)) for _ in range(2))
    assert figure.files() == again.files() and {"pdf", "svg", "png", "csv", "md"} == set(figure.files())
    lines = figure.csv.splitlines()
    header = lines[0].split(",")
    found = [dict(zip(header, line.split(","), strict=True)) for line in lines[1:]]
    lora = {row["rate"]: (row["mean"], row["chosen"]) for row in found if row["arm"] == "lora"}
    assert lora == {"0.001": ("25.0", "0"), "0.002": ("75.0", "1"), "0.004": ("50.0", "0")}
    assert "zero" not in {row["arm"] for row in found}
    assert f"python -m analysis.study {study.path.as_posix()}" in figure.markdown


# ------------------------------------------------------------------------------------------------------------- results


def test_kept_results_are_small_records_that_show_the_same(define, tmp_path, capsys):
    study, runs_dir, out = define(), tmp_path / "runs", tmp_path / "results"
    progress = finish_all(study, runs_dir, lambda arm, rate: 0.5 - abs(rate - 0.002))
    compared = next(run for run in progress.runs if run.part == COMPARISON).record(runs_dir)
    tried = next(run for run in progress.runs if run.part == GRID).record(runs_dir)
    for record, evaluation in ((compared, "exact"), (tried, "exact-validation")):
        (record.path / "adapter").mkdir()
        (record.path / "adapter" / "adapter_model.safetensors").write_bytes(b"0" * 10**6)
        row = asdict(Prediction(evaluation, "task", "task/0", "a", "a", True, response="a long response"))
        append_jsonl(record.predictions_path, [row])
    for _ in range(2):  # the second takes the place of the first
        assert main_results(["--runs", str(runs_dir), "--out", str(out), str(study.path)]) == 0
    assert sum(path.stat().st_size for path in out.rglob("*")) < 10**6
    again = Progress(study, out)
    assert again.of_state(MISSING) == [] and again.choices == progress.choices
    shown, kept = (study_runs(of, *load_runs(of.runs_dir, study.experiment))[0] for of in (progress, again))
    assert [replace(run, folder=None) for run in shown] == [replace(run, folder=None) for run in kept]
    assert read_study(out / "studies" / "toy.yaml") == replace(study, path=out / "studies" / "toy.yaml")
    (row,) = RunRecord(out / compared.path.relative_to(runs_dir)).predictions()
    assert row["correct"] is True and "response" not in row
    assert RunRecord(out / tried.path.relative_to(runs_dir)).predictions() == []


def test_an_unfinished_study_has_no_results_to_keep(define, tmp_path, capsys):
    study = define()
    assert main_results(["--runs", str(tmp_path), "--out", str(tmp_path / "results"), str(study.path)]) == 2
    assert "runs of the study toy are missing" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()

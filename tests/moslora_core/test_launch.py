"""The command line: what it composes, how it names a run, and one line for each mistake."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("hydra")

from hydra.core.global_hydra import GlobalHydra

from commonsense_reasoning.config import CONF_MODULE, NOT_IN_LABEL, Config
from moslora_core import UserError, launch


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    """Hydra sets up logging, the arguments and a global state of its own; and it must write nothing here."""
    monkeypatch.setattr(sys, "argv", ["train"])
    monkeypatch.chdir(tmp_path)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    GlobalHydra.instance().clear()


def run(*arguments: str, main=None) -> list[Config]:
    """The configurations that the command line gives to ``main``."""
    seen: list[Config] = []

    def record(config: Config) -> None:
        seen.append(config)
        if main is not None:
            main(config)

    launch.run(record, Config, CONF_MODULE, not_in_label=NOT_IN_LABEL, argv=arguments)
    return seen


def refusal(capsys, *arguments: str, main=None) -> str:
    """The one line on stderr with which the command line ends."""
    with pytest.raises(SystemExit) as caught:
        run(*arguments, main=main)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and error.endswith("\n"), error
    return error


def test_overrides_reach_main_as_the_schema(tmp_path):
    (config,) = run("method=moslora", "method.mixer_init=orthogonal", "seed=3", "training.max_steps=7")
    assert isinstance(config, Config)
    assert (config.method.name, config.method.mixer_init, config.method.mixer) == ("moslora", "orthogonal", "learned")
    assert (config.seed, config.training.max_steps, config.scale.name) == (3, 7, "smoke")
    assert list(tmp_path.iterdir()) == [], "a run writes its record and nothing beside it"


@pytest.mark.parametrize(
    ("arguments", "label"),
    [
        (("method=moslora", "scale=paper", "seed=3", "runs_dir=x", "on_finished=skip"), "default"),
        (("evaluation.limit=5", "evaluation.tasks=[boolq]", "data.dir=x", "model.cache_dir=y"), "default"),
        (("training.max_steps=7", "adapter.r=8", "evaluation.limit=5"), "adapter.r=8,training.max_steps=7"),
        (("adapter.r=8", "adapter.r=4"), "adapter.r=4"),
        (("adapter.r=4", "adapter.r=8"), "adapter.r=8"),
        (("data.train_items=50",), "data.train_items=50"),
        (("protocol=paper",), "protocol=paper"),
        (("run_name=mine", "adapter.r=8"), "mine"),
        (("training.keep_steps=5",), "default"),
    ],
)
def test_a_run_is_named_by_what_makes_it_another_run(arguments, label):
    assert [config.run_name for config in run(*arguments)] == [label]


def test_dry_run_is_a_flag():
    assert [config.dry_run for config in run("--dry-run", "seed=1")] == [True]
    assert [config.dry_run for config in run("seed=1")] == [False]


def test_multirun_runs_every_combination(tmp_path):
    configs = run("-m", "seed=0,1", "method=lora,moslora", "training.max_steps=7", f"runs_dir={tmp_path}/runs")
    assert [(c.seed, c.method.name) for c in configs] == [(0, "lora"), (0, "moslora"), (1, "lora"), (1, "moslora")]
    assert {c.run_name for c in configs} == {"training.max_steps=7"}
    assert {path.name for path in tmp_path.iterdir()} <= {"runs"}, "nothing beside the runs"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("training.learning_rat=1",), "learning_rat"),
        (("sead=1",), "sead"),
        (("seed=one",), "one"),
        (("training.epochs=many",), "many"),
        (("method=moslorra",), "moslorra"),
        (("method=1.5",), "method=1.5"),
        (("method=[[]]",), "method=[[]]"),
        ((f"{'x' * 300}=1",), "File name too long"),
        (("scale=huge",), "huge"),
        (("protocol=mine",), "mine"),
        (("seed",), "seed"),
        (("adapter.target_modules=[q_proj",), "[q_proj"),
        (("seed=0,1",), "seed"),  # a sweep without -m
        (("-m", "seed=0,1", "method=lora,moslorra"), "moslorra"),
        (("-m", "sead=0,1"), "sead"),
        (("-m", "seed=0,one"), "one"),
        (("--rerun=nowhere",), "no config.yaml in that folder"),
    ],
    ids=" ".join,
)
def test_a_mistake_is_one_line_and_status_2(capsys, arguments, expected):
    assert expected in refusal(capsys, *arguments)


def test_a_sweep_into_a_folder_that_cannot_be_written_is_one_line_and_status_2(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    expected = f"error: cannot write runs_dir={tmp_path}/file/runs: Not a directory; expected a writable folder\n"
    assert refusal(capsys, "-m", "seed=0,1", f"runs_dir={tmp_path}/file/runs") == expected


def test_a_user_error_of_main_is_one_line_and_status_2(capsys):
    def main(config: Config) -> None:
        raise UserError("data.dir=x: no prepared data\nin two lines")

    assert refusal(capsys, "seed=1", main=main) == "error: data.dir=x: no prepared data in two lines\n"
    assert refusal(capsys, "-m", "seed=0,1", main=main) == "error: data.dir=x: no prepared data in two lines\n"


def test_a_dumped_configuration_runs_again(tmp_path):
    (first,) = run("method=moslora", "adapter.r=8", "+adapter.rank_pattern={q_proj:4}", "seed=3", "protocol=paper")
    folder = tmp_path / "runs" / "seed-3"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(launch.dump(first))
    assert run(f"--rerun={folder}") == [first]
    assert run("--rerun=runs/seed-3") == [first], "a path from where the command runs"
    (moved,) = run(f"--rerun={folder}", "runs_dir=again", "seed=4")
    assert (moved.runs_dir, moved.seed, moved.run_name, moved.adapter) == ("again", 4, first.run_name, first.adapter)
    assert os.listdir(tmp_path) == ["runs"] and os.listdir(folder) == ["config.yaml"]


@pytest.mark.parametrize(("line", "expected"), [("sead: 1", "sead"), ("seed: one", "one"), ("a: [", "")])
def test_a_damaged_configuration_is_refused(capsys, tmp_path, line, expected):
    (config,) = run()
    kept = [text for text in launch.dump(config).splitlines() if not text.startswith("seed:")]
    (tmp_path / "config.yaml").write_text("\n".join([*kept, line]))
    assert expected in refusal(capsys, f"--rerun={tmp_path}")


def test_differences_name_the_settings(tmp_path):
    (config,) = run("seed=1", "adapter.r=4")
    path = Path(tmp_path, "config.yaml")
    path.write_text(launch.dump(config))
    assert launch.differences(config, path) == []
    (other,) = run("seed=2", "adapter.r=8", "evaluation.limit=3")
    assert launch.differences(other, path, ignore=("evaluation", "run_name")) == [
        "adapter.r was 4, is 8",
        "seed was 1, is 2",
    ]
    assert launch.differences(other, path, ignore=("adapter.r", "evaluation", "run_name")) == ["seed was 1, is 2"]
    path.write_text("a: [")
    with pytest.raises(UserError, match=r"config\.yaml is damaged: expected YAML"):
        launch.differences(config, path)


def test_one_of_several_processes_ends_without_finalising(tmp_path):
    """Its buffers are written, and what waits for the interpreter's end is not called: it could abort there."""
    code = (
        "import atexit, sys; from moslora_core import launch; atexit.register(print, 'finalised');"
        "sys.stdout.write('done '); launch.end_process()"
    )

    def told(**environment: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True
        )
        return done.returncode, done.stdout

    assert told(WORLD_SIZE="2") == (0, "done ")
    assert told(WORLD_SIZE="1") == (0, "done finalised\n")

"""Which runs a study is made from: those of both methods, complete and comparable, or one line that says why not."""

from __future__ import annotations

import re
import shutil

import pytest
import yaml

from moslora_core.errors import UserError
from moslora_core.record import RunRecord, write_json
from subject_driven_t2i.human_study.runs import find_arms

from .study_runs import place_data, place_run, place_runs, rewrite_manifest

FIRST, SECOND = ["method=moslora"], ["method=lora"]
TWO = ("rex", "fizz")


@pytest.fixture
def runs(tmp_path):
    return place_runs(tmp_path, TWO)


def find(runs, first=FIRST, second=SECOND, subjects=TWO, seed=1):
    return find_arms(first, second, runs, "smoke", subjects, seed)


def refusal(*args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        find(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def run_of(runs, method, subject) -> RunRecord:
    return RunRecord(runs / f"subject_driven_t2i/smoke/{method}/data.subject={subject}/seed-1")


def test_methods_are_found_by_their_arguments_or_by_the_folders_of_their_runs(runs):
    first, second = find(runs)
    assert [*first] == [*second] == [*TWO]
    assert {run.name for run in first.values()} == {"moslora"} and {run.name for run in second.values()} == {"lora"}
    assert first["rex"].images.keys() == {(prompt, index) for prompt in range(10) for index in range(2)}
    folders = [[str(run_of(runs, method, subject).path) for subject in TWO] for method in ("moslora", "lora")]
    assert find(runs, *folders, subjects=()) == (first, second)
    assert [*find(runs, *folders, subjects=("fizz",))[0]] == ["fizz"]


def test_overrides_are_those_of_the_training_and_name_the_method(tmp_path):
    place_data(tmp_path / "data")
    override = "method.mixer_init=orthogonal"
    place_run(tmp_path, "moslora", "rex", overrides=[override])
    place_run(tmp_path, "lora", "rex")
    first, _ = find(tmp_path / "runs", [*FIRST, override], subjects=["rex"])
    assert first["rex"].name == "moslora (method.mixer_init=orthogonal)" and first["rex"].label == override


def test_every_missing_run_is_named_with_its_subject_and_side(runs):
    shutil.rmtree(run_of(runs, "lora", "rex").path)
    (run_of(runs, "moslora", "fizz").path / "generation.json").unlink()
    message = refusal(runs)
    assert message.startswith("incomplete pair of runs: rex, --second: no run at ")
    assert "data.subject=rex/seed-1; fizz, --first: images of " in message
    assert message.endswith("are not all drawn, by its generation.json; run generate")


def test_a_subject_that_one_side_lacks_is_named(runs):
    folders = [str(run_of(runs, "moslora", subject).path) for subject in TWO]
    other = [str(run_of(runs, "lora", "rex").path)]
    assert refusal(runs, folders, other, ()) == "incomplete pair of runs: fizz: no run of it in --second"
    assert "tom: no run of it in --first; tom: no run of it in --second" in refusal(
        runs, folders, folders, (*TWO, "tom")
    )


def test_a_run_whose_images_are_not_all_drawn_is_named(runs):
    write_json(run_of(runs, "lora", "fizz").path / "generation.json", {"fingerprint": "0", "finished": False})
    assert re.search("fizz, --second: images of .* are not all drawn", refusal(runs))


def test_images_that_one_run_lacks_are_named(runs):
    rewrite_manifest(run_of(runs, "lora", "rex"), lambda rows: rows.pop(3))
    assert re.search(r"rex, --second: \S+ lacks prompt 1 image 1, which \S+moslora\S+ has", refusal(runs))
    rewrite_manifest(run_of(runs, "lora", "rex"), lambda rows: [rows.pop(0) for _ in range(6)])
    assert "lacks prompt 0 image 0, prompt 0 image 1, prompt 1 image 0 and 4 more" in refusal(runs)


def test_a_file_that_is_gone_is_named(runs):
    (run_of(runs, "moslora", "rex").path / "images" / "002-01.png").unlink()
    assert re.search(r"rex, --first: \S+ lacks the file of prompt 2 image 1", refusal(runs))


@pytest.mark.parametrize(
    ("column", "value"), [("noise_seed", 7), ("prompt", "a sks dog elsewhere"), ("class_prompt", "a dog elsewhere")]
)
def test_images_of_other_noise_or_another_prompt_are_no_pair(runs, column, value):
    rewrite_manifest(run_of(runs, "lora", "fizz"), lambda rows: rows[5].update({column: value}))
    message = refusal(runs)
    assert message.startswith(f"fizz, prompt 2 image 1: {column} is ") and message.endswith("; expected the same")


def test_images_that_were_drawn_in_another_way_are_no_pair(tmp_path):
    place_data(tmp_path / "data")
    place_run(tmp_path, "moslora", "rex", drawing={"steps": 50, "images_per_prompt": 8})
    place_run(tmp_path, "lora", "rex", drawing={"steps": 25})
    assert refusal(tmp_path / "runs", subjects=["rex"]).startswith("rex: drawn with steps, which is 50 in ")
    place_run(tmp_path, "lora", "rex", seed=2, drawing={"steps": 50})
    lora = tmp_path / "runs/subject_driven_t2i/smoke/lora/data.subject=rex/seed-2"
    moslora = tmp_path / "runs/subject_driven_t2i/smoke/moslora/data.subject=rex/seed-1"
    find(tmp_path / "runs", [str(moslora)], [str(lora)], ())


def test_one_method_against_itself_is_no_study(runs):
    assert refusal(runs, FIRST, FIRST) == "--first and --second are both moslora; expected two methods"


def test_a_side_has_one_method_for_all_subjects(runs):
    mixed = [str(run_of(runs, "lora", "rex").path), str(run_of(runs, "moslora", "fizz").path)]
    assert "differ in their settings of method; expected one method for all subjects" in refusal(runs, mixed, SECOND)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda rows: rows[1].update(index=0), "image 0 of prompt 0 is there twice"),
        (lambda rows: rows[1].update(file="../../secret.png"), "line 2: file must lie in "),
        (lambda rows: rows[1].update(index="1"), "line 2: index must be a whole number, found '1'"),
        (lambda rows: rows[1].update(index=True), "line 2: index must be a whole number, found True"),
        (lambda rows: rows[1].pop("sha256"), "line 2: sha256 is missing"),
    ],
)
def test_a_damaged_manifest_is_named(runs, damage, expected):
    rewrite_manifest(run_of(runs, "moslora", "rex"), damage)
    message = refusal(runs)
    assert expected in message and "images.jsonl" in message


def test_a_run_without_images_is_named(runs):
    rewrite_manifest(run_of(runs, "moslora", "rex"), lambda rows: rows.clear())
    assert re.search(r"rex, --first: \S+ has no images", refusal(runs))


def test_folders_that_are_no_runs_of_this_scale_are_refused(runs, tmp_path):
    assert "no run there; expected method=<name>, or folders of runs" in refusal(runs, [str(tmp_path)], SECOND)
    assert "which subjects?" in refusal(runs, subjects=())
    rex = str(run_of(runs, "moslora", "rex").path)
    assert "are both of rex; expected one a subject" in refusal(runs, [rex, rex], SECOND)
    config = run_of(runs, "lora", "rex").config_path
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text("utf-8")) | {"scale": {"name": "paper"}}))
    assert "a run of scale.name=paper; expected smoke" in refusal(runs)

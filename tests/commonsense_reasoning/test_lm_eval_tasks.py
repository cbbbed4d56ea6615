"""The task files: four protocols of eight tasks, their prompts byte for byte, the published answer extraction."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from lm_eval.tasks import TaskManager

from commonsense_reasoning import conf
from commonsense_reasoning.extraction import first_answer, last_answer
from commonsense_reasoning.lm_eval_tasks import harness
from commonsense_reasoning.lm_eval_tasks.functions import read_items, score_response
from commonsense_reasoning.prompts import EVALUATE_PROMPTS, RESPONSE_MARK
from commonsense_reasoning.tasks import TASKS
from moslora_core.errors import UserError

MODES = ("generate", "loglikelihood")
PROTOCOLS = ("paper", "corrected")
REAL_DATA = Path(os.environ.get("MOSLORA_DATA", Path(__file__).parents[3] / "shared" / "data")) / "commonsense"


def requests(task, indices):
    """The requests that lm-eval makes of the items at ``indices``."""
    task.build_all_requests(samples=list(indices), rank=0, world_size=1)
    return task.instances


# --------------------------------------------------------------------------------------------------------- task files


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_protocol_has_the_eight_tasks_with_a_version(mode, protocol, data_dir):
    manager = TaskManager(
        include_path=str(harness.TASKS_DIR), include_defaults=False, metadata={"data_dir": str(data_dir)}
    )
    loaded = manager.load(f"llm_adapters_{mode}_{protocol}")
    assert list(loaded["tasks"]) == [f"llm_adapters_{mode}_{protocol}_{name}" for name in TASKS]
    assert all(task.VERSION for task in loaded["tasks"].values())
    group = loaded["groups"][f"llm_adapters_{mode}_{protocol}"]
    assert {aggregate.weight_by_size for aggregate in group.aggregate_metric_list} == {False}, "a plain mean"
    assert group.metadata["version"]


def test_only_the_named_tasks_need_data(data_dir):
    (data_dir / "test" / "hellaswag.json").unlink()
    assert list(harness.load_tasks("generate", "paper", ["piqa", "boolq"], str(data_dir))) == ["piqa", "boolq"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_generation_settings_are_those_of_the_configuration(protocol, data_dir):
    shipped = yaml.safe_load((Path(conf.__file__).parent / "protocol" / f"{protocol}.yaml").read_text())
    settings = harness.load_tasks("generate", protocol, ["boolq"], str(data_dir))["boolq"].config.generation_kwargs
    assert settings["max_gen_toks"] == shipped["max_new_tokens"]
    assert settings.get("num_beams", 1) == shipped["num_beams"]
    assert settings["do_sample"] is False
    assert settings["until"] == [RESPONSE_MARK]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", TASKS)
def test_generation_asks_the_prompt_byte_for_byte(protocol, name, data_dir, items):
    task = harness.load_tasks("generate", protocol, [name], str(data_dir))[name]
    asked = [request.args[0] for request in requests(task, range(6))]
    assert asked == [EVALUATE_PROMPTS[protocol](item["instruction"]) for item in items[name]]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", TASKS)
def test_loglikelihood_scores_the_offered_labels_after_the_response_up_to_them(protocol, name, data_dir, items):
    task = harness.load_tasks("loglikelihood", protocol, [name], str(data_dir))[name]
    asked = ["".join(request.args) for request in requests(task, range(6))]
    assert asked == [
        f"{EVALUATE_PROMPTS[protocol](item['instruction'])}the correct answer is {label}"
        for item in items[name]
        for label in item["instruction"].rsplit("Answer format: ", 1)[1].split("/")
    ]


def test_nothing_in_an_item_is_read_as_a_template(data_dir):
    """lm-eval renders text fields as Jinja templates and reads digits as choices; items must pass through."""
    path = data_dir / "test" / "boolq.json"
    rows = json.loads(path.read_text())
    rows[0]["instruction"] = "is {{ 1 + 1 }} {% raw %} \\n 2?  \n\nAnswer format: true/false"
    rows[1]["instruction"] = "7"
    path.write_text(json.dumps(rows))
    for protocol in PROTOCOLS:
        task = harness.load_tasks("generate", protocol, ["boolq"], str(data_dir))["boolq"]
        for row, request in zip(rows, requests(task, [0, 1]), strict=False):
            assert request.args[0] == EVALUATE_PROMPTS[protocol](row["instruction"])


def test_an_input_reaches_the_prompt(data_dir):
    path = data_dir / "test" / "boolq.json"
    rows = json.loads(path.read_text())
    rows[0]["input"] = "a passage"
    path.write_text(json.dumps(rows))
    task = harness.load_tasks("generate", "corrected", ["boolq"], str(data_dir))["boolq"]
    assert "### Input:\na passage" in requests(task, [0])[0].args[0]


# --------------------------------------------------------------------------------------------------------- extraction


@pytest.mark.parametrize(
    "task, response, published, lenient",
    [
        ("ARC-Easy", "the correct answer is answer3", "answer3", "answer3"),
        ("ARC-Easy", "", None, None),
        ("ARC-Easy", "  \n answer2 \n", "answer2", "answer2"),
        ("ARC-Easy", "Answer1", None, "answer1"),  # the published rule is case-sensitive
        ("ARC-Easy", "answer10", "answer1", None),  # and knows no word boundaries
        ("ARC-Easy", "answer6", None, None),
        ("ARC-Easy", "not answer1 but answer2", "answer1", "answer2"),  # the first against the last
        ("ARC-Easy", "answer5", "answer5", "answer5"),  # counts as an answer where four are offered
        ("boolq", "untrue", "true", None),
        ("boolq", "It is not false, it is true", "false", "true"),
        ("boolq", "TRUE", None, "true"),
        ("piqa", "answer1 solution2", "solution2", "solution2"),  # another family is not read
        ("piqa", "answer1", None, None),
        ("winogrande", "option3", None, None),
        ("hellaswag", "ending4.", "ending4", "ending4"),
        ("boolq", "maybe\n### Response:\ntrue", None, None),  # cut at a second mark, as published
        ("boolq", "true\n### Response:\nfalse", "true", "true"),
    ],
)
def test_extraction(task, response, published, lenient):
    assert first_answer(task, response) == published
    assert last_answer(task, response) == lenient
    # The published code itself, on a whole output.
    after = f"prompt {RESPONSE_MARK}{response}".split(RESPONSE_MARK)[1].strip()
    assert (re.findall(TASKS[task].pattern, after) or [None])[0] == published


def test_a_response_is_scored_by_both_rules():
    doc = {"task": "boolq", "answer": "true"}
    assert score_response(doc, ["false? true"]) == {"acc": 0.0, "acc_lenient": 1.0, "unparsed": 0.0}
    assert score_response(doc, ["True"]) == {"acc": 0.0, "acc_lenient": 1.0, "unparsed": 1.0}


# -------------------------------------------------------------------------------------------------------------- items


def test_unprepared_data_names_the_command(tmp_path):
    with pytest.raises(UserError, match=r"boolq\.json.*commonsense_reasoning\.prepare_data"):
        read_items(tmp_path, "boolq")


def test_an_answer_that_an_item_does_not_offer_stays_choosable(data_dir, items):
    path = data_dir / "test" / "openbookqa.json"
    rows = json.loads(path.read_text())
    rows[0] |= {"answer": "answer5", "output": "the correct answer is answer5"}
    path.write_text(json.dumps(rows))
    task = harness.load_tasks("loglikelihood", "corrected", ["openbookqa"], str(data_dir))["openbookqa"]
    assert len(requests(task, [0])) == 5 and len(requests(task, [1])) == 4


@pytest.mark.shared_data
@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="no real items beside the repository or at MOSLORA_DATA")
def test_real_items_are_asked_byte_for_byte(tmp_path):
    (tmp_path / "test").mkdir()
    for path in REAL_DATA.glob("*-test.json"):
        name = path.name.removesuffix("-test.json")
        rows = [{"id": f"{name}/{i}", **row} for i, row in enumerate(json.loads(path.read_text())[:20])]
        (tmp_path / "test" / f"{name}.json").write_text(json.dumps(rows))
        for protocol in PROTOCOLS:
            task = harness.load_tasks("generate", protocol, [name], str(tmp_path))[name]
            asked = [request.args[0] for request in requests(task, range(len(rows)))]
            assert asked == [EVALUATE_PROMPTS[protocol](row["instruction"]) for row in rows]


# --------------------------------------------------------------------------------------------------- lm-eval's command


@pytest.mark.slow  # lm-eval indexes all of its own tasks first
def test_the_lm_eval_command_runs_the_task_files(tmp_path, data_dir, fluent_llama_dir):
    command = [
        *(sys.executable, "-m", "lm_eval", "--model", "hf", "--batch_size", "4", "--limit", "3"),
        *("--model_args", f"pretrained={fluent_llama_dir}", "--device", "cpu"),
        *("--include_path", str(harness.TASKS_DIR), "--output_path", str(tmp_path / "out")),
        *("--tasks", "llm_adapters_generate_corrected,llm_adapters_loglikelihood_paper_boolq"),
        *("--metadata", json.dumps({"data_dir": str(data_dir)})),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    (written,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(written.read_text())["results"]
    per_task = [results[f"llm_adapters_generate_corrected_{name}"]["acc,none"] for name in TASKS]
    assert results["llm_adapters_generate_corrected"]["acc,none"] == pytest.approx(sum(per_task) / 8)
    assert "acc,none" in results["llm_adapters_loglikelihood_paper_boolq"]


def test_without_a_data_folder_the_command_says_how_to_give_one():
    manager = TaskManager(include_path=str(harness.TASKS_DIR), include_defaults=False)
    with pytest.raises(UserError, match="--metadata"):
        manager.load("llm_adapters_generate_paper_boolq")


def test_the_names_of_lm_evals_own_tasks_exist():
    shipped = Path(harness.lm_eval.tasks.__file__).parent
    for name, (task, folder) in harness.HARNESS_TASKS.items():
        assert name in TASKS
        manager = TaskManager(include_path=str(shipped / folder), include_defaults=False)
        assert task in manager.all_tasks
    assert len(harness.HARNESS_TASKS) == 8


def test_lm_evals_own_tasks_without_a_hub_are_refused_in_a_line(monkeypatch):
    def unreachable(*arguments, **settings):
        raise ConnectionError("Couldn't reach 'x' on the Hub\nsecond line")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(UserError, match="hub, which failed: Couldn't reach") as raised:
        harness.load_harness_tasks(["boolq"])
    assert "\n" not in str(raised.value)

"""Evaluation: scores against plain transformers, batches, resuming, the run record, mistakes of the user."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from lm_eval import evaluator
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from commonsense_reasoning import evaluate as evaluation
from commonsense_reasoning.config import CONF_MODULE, NOT_IN_LABEL, Config
from commonsense_reasoning.extraction import first_answer
from commonsense_reasoning.lm_eval_tasks import harness
from commonsense_reasoning.models import load_adapted
from commonsense_reasoning.prompts import EVALUATE_PROMPTS, RESPONSE_MARK
from commonsense_reasoning.tasks import TASKS, offered_labels
from moslora_core import MoSLoraConfig, launch
from moslora_core.base_models import adapter_digest
from moslora_core.errors import UserError
from moslora_core.evaluations import assert_evaluating
from moslora_core.fold import fold_adapter
from moslora_core.methods import peft_config
from moslora_core.record import RunRecord

TARGETS = ["q_proj", "v_proj", "down_proj"]


def save_adapter(base: Path, folder: Path, config: LoraConfig | None = None, seed: int = 0) -> Path:
    """An adapter with a B that is not zero, so that it changes the answers."""
    config = config or LoraConfig(r=4, lora_alpha=8, lora_dropout=0.5, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "hada_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter_dir(tmp_path_factory, fluent_llama_dir) -> Path:
    return save_adapter(fluent_llama_dir, tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def make_config(tmp_path, data_dir, fluent_llama_dir):
    """The configuration that a command line gives."""

    def make(*overrides: str, **settings: str) -> Config:
        launch.register(Config)
        common = [f"data.dir={data_dir}", f"model.path={fluent_llama_dir}", f"runs_dir={tmp_path / 'runs'}"]
        with initialize_config_module(CONF_MODULE, version_base="1.3"):
            return launch.instantiate(Config, compose("config", overrides=[*common, *overrides]))

    return make


@pytest.fixture
def trained(make_config, adapter_dir):
    """Puts the adapter where train would have left it; returns the run record."""

    def place(config: Config, adapter: Path = adapter_dir) -> RunRecord:
        record = evaluation.locate(config)
        shutil.copytree(adapter, record.adapter_path, dirs_exist_ok=True)
        return record

    return place


def predictions(record: RunRecord) -> list[dict]:
    return record.predictions()


def reference_model(config: Config, adapter: Path):
    base = AutoModelForCausalLM.from_pretrained(config.model.path)
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    return PeftModel.from_pretrained(base, adapter).eval(), tokenizer


# ------------------------------------------------------------------------------------------ against plain transformers


@pytest.mark.parametrize("protocol", ["paper", "corrected"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_generation_is_what_transformers_generates_for_each_item_alone(
    protocol, batch_size, make_config, trained, adapter_dir, items
):
    names = ["boolq", "winogrande", "ARC-Easy"]
    config = make_config(
        f"protocol={protocol}", f"evaluation.batch_size={batch_size}", f"evaluation.tasks=[{','.join(names)}]"
    )
    record = trained(config)
    evaluation.main(config)

    model, tokenizer = reference_model(config, adapter_dir)
    expected = {}
    for name in names:
        for item in items[name]:
            inputs = tokenizer(EVALUATE_PROMPTS[protocol](item["instruction"]), return_tensors="pt")
            output = model.generate(
                **inputs,
                do_sample=False,
                num_beams=config.protocol.num_beams,
                max_new_tokens=config.protocol.max_new_tokens,
            )
            response = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            expected[item["id"]] = response.split(RESPONSE_MARK)[0]
    found = {row["id"]: row["response"] for row in predictions(record)}
    assert found == expected
    assert len(set(found.values())) > 4, "the fixture's responses should differ"
    for row in predictions(record):
        assert row["prediction"] == first_answer(row["task"], row["response"])
        assert row["correct"] == (row["prediction"] == row["gold"])


@pytest.mark.parametrize("protocol", ["paper", "corrected"])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_loglikelihood_picks_the_label_that_the_model_likes_best(
    protocol, batch_size, make_config, trained, adapter_dir, items
):
    names = ["boolq", "ARC-Challenge"]
    config = make_config(
        "evaluation.mode=loglikelihood",
        f"protocol={protocol}",
        f"evaluation.batch_size={batch_size}",
        f"evaluation.tasks=[{','.join(names)}]",
    )
    record = trained(config)
    evaluation.main(config)

    model, tokenizer = reference_model(config, adapter_dir)
    for row in predictions(record):
        item = next(item for item in items[row["task"]] if item["id"] == row["id"])
        context = f"{EVALUATE_PROMPTS[protocol](item['instruction'])}the correct answer is"
        start = len(tokenizer(context)["input_ids"])
        scores = []
        for label in offered_labels(item["instruction"]):
            tokens = tokenizer(f"{context} {label}", return_tensors="pt")["input_ids"]
            with torch.no_grad():
                logs = model(tokens).logits.log_softmax(-1)
            chosen = logs[0, start - 1 : -1].gather(1, tokens[0, start:, None])
            scores.append(chosen.sum().item())
        assert row["prediction"] == offered_labels(item["instruction"])[scores.index(max(scores))]
        assert row["response"] is None
    result = record.results().evaluations[f"loglikelihood-{protocol}"]
    assert all(task.unparsed is None for task in result.tasks.values())


@pytest.mark.parametrize("protocol", ["paper", "corrected"])
def test_the_prompts_that_reach_the_model_are_whole_and_masked(protocol, make_config, trained, items, monkeypatch):
    seen = []
    original = AutoModelForCausalLM.from_pretrained

    def spying(*arguments, **settings):
        model = original(*arguments, **settings)
        generate = model.generate

        def spy(**inputs):
            seen.append(inputs)
            return generate(**inputs)

        model.generate = spy
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spying)
    config = make_config("method=base", f"protocol={protocol}", "evaluation.tasks=[social_i_qa,hellaswag]")
    evaluation.main(config)

    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    asked = set()
    for inputs in seen:
        assert inputs["num_beams"] == config.protocol.num_beams and inputs["do_sample"] is False
        new_tokens = inputs["max_length"] - inputs["input_ids"].shape[1]
        assert new_tokens == config.protocol.max_new_tokens
        for tokens, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            assert (tokens[mask == 0] == tokenizer.pad_token_id).all() and mask[-1] == 1
            prompt = tokens[mask == 1]
            assert prompt[0] == tokenizer.bos_token_id
            asked.add(tokenizer.decode(prompt[1:]))
    assert asked == {
        EVALUATE_PROMPTS[protocol](item["instruction"])
        for name in ("social_i_qa", "hellaswag")
        for item in items[name]
    }
    assert any((inputs["attention_mask"] == 0).any() for inputs in seen), "the items differ in length"


@pytest.mark.parametrize("mode, metric", [("generate", "unparsed"), ("loglikelihood", "acc")])
def test_numbers_are_those_of_lm_evals_own_aggregation(mode, metric, make_config, trained):
    config = make_config(f"evaluation.mode={mode}", "evaluation.chunk=4")
    record = trained(config)
    evaluation.main(config)
    found = record.results().evaluations[f"{mode}-corrected"]

    tasks = harness.load_tasks(mode, "corrected", list(TASKS), config.data.dir)
    model, tokenizer = reference_model(config, record.adapter_path)
    results = evaluator.evaluate(
        lm=harness.wrap(model, tokenizer, 3),
        task_dict={"tasks": {task.config.task: task for task in tasks.values()}},
        bootstrap_iters=100,
    )["results"]
    for name, task in tasks.items():
        theirs = results[task.config.task]
        assert found.tasks[name].value == pytest.approx(theirs["acc,none"])
        assert found.tasks[name].stderr == pytest.approx(theirs["acc_stderr,none"])
        assert found.tasks[name].n == 6
        if mode == "generate":
            assert found.tasks[name].unparsed == pytest.approx(theirs["unparsed,none"])
            assert found.tasks[name].lenient == pytest.approx(theirs["acc_lenient,none"])
    values = {task.value for task in found.tasks.values()}
    assert len(values) > 1 and max(values) > 0, "the fixture should be right at times"


def test_lm_evals_stop_rule_is_not_asked_during_generation(make_config, trained, monkeypatch):
    """It looks at the first rows alone, which under beam search are hypotheses of the first items."""

    def refuse(*arguments):
        raise AssertionError("a stopping criterion that depends on the batch")

    monkeypatch.setattr("lm_eval.models.huggingface.stop_sequences_criteria", refuse)
    config = make_config("protocol=paper", "evaluation.tasks=[boolq]")
    trained(config)
    evaluation.main(config)


@pytest.mark.parametrize("mode", ["generate", "loglikelihood"])
def test_texts_are_tokenised_at_once_as_lm_eval_does_one_by_one(mode, fluent_llama_dir, data_dir, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(fluent_llama_dir)
    lm = harness.wrap(AutoModelForCausalLM.from_pretrained(fluent_llama_dir).eval(), tokenizer, 8)
    asked = {}
    encode = harness.CausalLM.tok_encode

    def spy(self, string, *arguments, **settings):
        asked[string] = encode(self, string, *arguments, **settings)
        return asked[string]

    monkeypatch.setattr(harness.CausalLM, "tok_encode", spy)
    monkeypatch.setattr(harness.HFLM, "tok_encode", lambda *_, **__: pytest.fail("tokenised by itself"))
    harness.run_items(lm, harness.load_tasks(mode, "paper", ["piqa"], str(data_dir))["piqa"], [0, 1, 2])
    monkeypatch.undo()
    assert len(asked) >= 3
    alone = harness.wrap(lm.model, tokenizer, 8)
    assert asked == {text: alone.tok_encode(text) for text in asked}
    for limit in (None, 1000, 20):
        expected = alone.tok_batch_encode(list(asked), left_truncate_len=limit)
        for found, tensor in zip(lm.tok_batch_encode(list(asked), left_truncate_len=limit), expected, strict=True):
            assert torch.equal(found, tensor)


def test_all_end_tokens_of_model_and_tokenizer_end_a_response(fluent_llama_dir):
    model = AutoModelForCausalLM.from_pretrained(fluent_llama_dir)
    tokenizer = AutoTokenizer.from_pretrained(fluent_llama_dir)
    for configured, expected in ((None, [2]), (7, [2, 7]), ([9, 2], [2, 9])):
        model.generation_config.eos_token_id = configured
        assert harness.wrap(model, tokenizer, 1)._end_tokens() == expected


# ------------------------------------------------------------------------------------------------------------ adapters


def test_a_mixer_counts_and_its_folded_export_answers_alike(make_config, trained, fluent_llama_dir, tmp_path):
    mixed = save_adapter(
        fluent_llama_dir,
        tmp_path / "mixed",
        MoSLoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM", mixer="learned"),
    )
    found = []
    for seed, adapter in enumerate((mixed, fold_adapter(mixed, tmp_path / "folded"))):
        config = make_config("method=moslora", f"seed={seed}", "evaluation.tasks=[boolq,piqa]")
        record = trained(config, Path(adapter))
        evaluation.main(config)
        found.append(predictions(record))
    assert found[0] == found[1]


def test_dropout_is_off(make_config, adapter_dir):
    """The published evaluation leaves the model in training mode; scoring refuses one."""
    config = make_config()
    model = load_adapted(config.model, adapter_dir)
    assert_evaluating(model)
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    task = harness.load_tasks("loglikelihood", "corrected", ["boolq"], config.data.dir)["boolq"]
    lm = harness.wrap(model, tokenizer, 2)
    first, again = (harness.run_items(lm, task, [0, 3]) for _ in range(2))
    assert [sample["resps"] for sample in first] == [sample["resps"] for sample in again]
    model.train()
    with pytest.raises(RuntimeError, match=r"training mode.*model\.eval"):
        harness.run_items(lm, task, [0])


def test_the_base_needs_no_training_and_is_never_trained(make_config):
    config = make_config("method=base", "evaluation.tasks=[boolq]", "evaluation.mode=loglikelihood")
    evaluation.main(config)
    record = evaluation.locate(config)
    results = record.results()
    assert results.training is None and results.evaluations["loglikelihood-corrected"].tasks["boolq"].n == 6
    assert record.status().state == "finished"
    assert "tuner: none" in record.config_path.read_text()
    with pytest.raises(UserError, match="nothing to train"):
        peft_config(config.method, config.adapter, seed=0, total_steps=100)


# -------------------------------------------------------------------------------------------------------------- record


def test_evaluations_of_one_run_stand_side_by_side(make_config, trained):
    for overrides in (["protocol=corrected"], ["protocol=paper"], ["evaluation.mode=loglikelihood"]):
        config = make_config(*overrides, "evaluation.tasks=[boolq,ARC-Easy]", "evaluation.limit=4")
        record = trained(config)
        evaluation.main(config)
    results = record.results().evaluations
    assert list(results) == ["generate-corrected", "generate-paper", "loglikelihood-corrected"]
    for name, found in results.items():
        assert found.protocol == name
        assert list(found.tasks) == ["ARC-Easy", "boolq"], "in the order of the paper's table"
        assert {task.n for task in found.tasks.values()} == {4}
        assert found.settings["limit"] == 4 and found.settings["batch_size"] == 100
        assert found.settings["lm_eval"] and found.settings["task_versions"] == {"ARC-Easy": 1.0, "boolq": 1.0}
        assert not record.partial_predictions_path(name).exists()
    assert results["generate-paper"].settings["num_beams"] == 4
    assert results["generate-paper"].settings["max_new_tokens"] == 32
    assert results["generate-corrected"].settings["num_beams"] == 1
    assert len(predictions(record)) == 3 * 2 * 4
    assert predictions(record)[0]["id"] == "ARC-Easy/0"
    assert record.status().state == "finished" and record.status().stage == "evaluate"


def test_a_finished_evaluation_is_refused_kept_or_replaced(make_config, trained, caplog):
    overrides = ["evaluation.mode=loglikelihood", "evaluation.tasks=[boolq]"]
    record = trained(make_config(*overrides))
    evaluation.main(make_config(*overrides))
    with pytest.raises(UserError, match=r"loglikelihood-corrected already.*on_finished=overwrite"):
        evaluation.main(make_config(*overrides))
    before = record.results()
    with caplog.at_level(logging.INFO):
        evaluation.main(make_config(*overrides, "on_finished=skip"))
    assert "already evaluated" in caplog.text and record.results() == before
    evaluation.main(make_config(*overrides, "on_finished=overwrite", "evaluation.limit=2"))
    assert record.results().evaluations["loglikelihood-corrected"].tasks["boolq"].n == 2
    with pytest.raises(UserError, match="on_finished must be"):
        evaluation.main(make_config(*overrides, "on_finished=maybe"))


def test_one_item_has_no_standard_error(make_config, trained):
    config = make_config("evaluation.mode=loglikelihood", "evaluation.tasks=[boolq]", "evaluation.limit=1")
    record = trained(config)
    evaluation.main(config)
    assert record.results().evaluations["loglikelihood-corrected"].tasks["boolq"].stderr is None


# -------------------------------------------------------------------------------------------------------------- resume


class Stop(Exception):
    """Stands for a kill between two chunks."""


@pytest.fixture
def count_chunks(monkeypatch):
    """Counts the chunks that are run, and stops before the one that is one too many."""
    run_items = harness.run_items
    calls = []

    def counting(lm, task, indices, *, allowed):
        if len(calls) == allowed:
            raise Stop
        calls.append((task.config.task, list(indices)))
        return run_items(lm, task, indices)

    def allow(number: int | None) -> list:
        calls.clear()
        monkeypatch.setattr(harness, "run_items", lambda lm, task, at: counting(lm, task, at, allowed=number))
        return calls

    return allow


RESUMED = ["evaluation.tasks=[boolq,piqa]", "evaluation.chunk=2"]  # six items each: three chunks a task


def comparable(record: RunRecord) -> tuple:
    results = record.results()
    for found in results.evaluations.values():
        found.seconds = 0.0
    return results, predictions(record)


@pytest.mark.parametrize("mode", ["generate", "loglikelihood"])
@pytest.mark.parametrize("finished", [1, 4])
def test_a_stopped_evaluation_resumes_to_the_undisturbed_result(mode, finished, make_config, trained, count_chunks):
    undisturbed = make_config(*RESUMED, f"evaluation.mode={mode}", "seed=1")
    trained(undisturbed)
    assert len(count_chunks(None)) == 0
    evaluation.main(undisturbed)

    config = make_config(*RESUMED, f"evaluation.mode={mode}")
    record = trained(config)
    count_chunks(finished)
    with pytest.raises(Stop):
        evaluation.main(config)
    assert record.status().state == "failed" and not record.results().evaluations
    partial = record.partial_predictions_path(f"{mode}-corrected")
    with open(partial, "a") as file:
        file.write('{"task": "boolq", "items": [4')  # a line torn by a kill

    again = count_chunks(None)
    evaluation.main(config)
    assert len(again) == 6 - finished
    assert comparable(record) == comparable(evaluation.locate(undisturbed))
    assert not partial.exists()


def test_a_smaller_batch_and_another_chunk_go_on_from_the_finished_items(make_config, trained, count_chunks):
    record = trained(make_config())
    count_chunks(2)
    with pytest.raises(Stop):
        evaluation.main(make_config(*RESUMED))
    again = count_chunks(None)
    evaluation.main(make_config("evaluation.tasks=[boolq,piqa]", "evaluation.chunk=5", "evaluation.batch_size=1"))
    assert [items for _, items in again] == [[4, 5], [0, 1, 2, 3, 4], [5]]  # the rest of piqa, then boolq
    assert [row["id"] for row in predictions(record)][:6] == [f"piqa/{i}" for i in range(6)]


@pytest.mark.parametrize("change", ["settings", "adapter", "items"])
def test_what_was_scored_under_other_conditions_is_scored_again(
    change, make_config, trained, count_chunks, caplog, fluent_llama_dir, tmp_path, data_dir
):
    config = make_config(*RESUMED)
    record = trained(config)
    count_chunks(2)
    with pytest.raises(Stop):
        evaluation.main(config)
    if change == "settings":
        config = make_config(*RESUMED, "protocol.max_new_tokens=8")
        trained(config)
    elif change == "adapter":
        trained(config, save_adapter(fluent_llama_dir, tmp_path / "other", seed=1))
    else:
        path = data_dir / "test" / "piqa.json"
        path.write_text(path.read_text().replace("kettle", "teapot"))
    again = count_chunks(None)
    with caplog.at_level(logging.WARNING):
        evaluation.main(config)
    assert len(again) == 6 and "starting afresh" in caplog.text
    assert len(predictions(record)) == 12


# ---------------------------------------------------------------------------------------------------------- validation


def test_validation_files_are_an_evaluation_of_their_own(make_config, trained, data_dir):
    """Of other items, under another name: a setting chosen by it has not seen the test items."""
    overrides = ["evaluation.tasks=[boolq]", "evaluation.split=validation"]
    config = make_config(*overrides)
    record = trained(config)
    with pytest.raises(UserError, match=r"no items at .*validation/boolq\.json"):
        evaluation.main(config)
    rows = json.loads((data_dir / "test" / "boolq.json").read_text())[:3]
    (data_dir / "validation").mkdir()
    for number, row in enumerate(rows):
        row["id"] = f"validation/boolq/{number}"
    (data_dir / "validation" / "boolq.json").write_text(json.dumps(rows))
    evaluation.main(config)
    evaluation.main(make_config("evaluation.tasks=[boolq]"))
    by_name = record.results().evaluations
    assert list(by_name) == ["generate-corrected-validation", "generate-corrected"]
    assert by_name["generate-corrected-validation"].tasks["boolq"].n == 3
    told = {(row["evaluation"], row["id"]) for row in predictions(record)}
    assert {row["id"] for row in rows} == {item for name, item in told if name == "generate-corrected-validation"}


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    "override, complaint",
    [
        ("evaluation.mode=guess", r"evaluation\.mode must be one of generate, loglikelihood, harness, found 'guess'"),
        ("evaluation.split=train", r"evaluation\.split must be one of test, validation, found 'train'"),
        ("evaluation.batch_size=0", r"evaluation\.batch_size must be positive, found 0"),
        ("evaluation.chunk=-1", r"evaluation\.chunk must be positive"),
        ("evaluation.limit=0", r"evaluation\.limit must be positive"),
        ("protocol.num_beams=0", r"protocol\.num_beams must be positive"),
        ("evaluation.tasks=[boolq,mmlu]", r"unknown task 'mmlu'; data\.tasks has ARC-Easy"),
        ("evaluation.tasks=[]", "names no task"),
        ("protocol.name=mine", r"protocol\.name must be one of"),
    ],
)
def test_a_wrong_setting_is_told_in_a_line(override, complaint, make_config, trained):
    config = make_config(override)
    with pytest.raises(UserError, match=complaint) as raised:
        evaluation.main(config)
    assert "\n" not in str(raised.value)
    assert not evaluation.locate(config).path.exists()


def test_the_harness_has_no_validation_files(make_config):
    with pytest.raises(UserError, match=r"evaluation\.split=validation has none there"):
        evaluation.check(make_config("evaluation.mode=harness", "evaluation.split=validation"))


def test_a_task_outside_the_prepared_ones_is_unknown(make_config):
    with pytest.raises(UserError, match="unknown task 'piqa'"):
        evaluation.check(make_config("data.tasks=[boolq]", "evaluation.tasks=[piqa]"))
    assert evaluation.check(make_config("data.tasks=[boolq,ARC-Easy]")) == ["ARC-Easy", "boolq"]


def test_an_untrained_run_names_the_command(make_config):
    config = make_config("method=moslora", "seed=3")
    with pytest.raises(
        UserError, match=r"no adapter at .*commonsense_reasoning\.train scale=smoke method=moslora seed=3"
    ):
        evaluation.main(config)
    assert not evaluation.locate(config).path.exists()


def test_unprepared_data_names_the_command(make_config, trained, data_dir):
    config = make_config()
    record = trained(config)
    shutil.rmtree(data_dir)
    with pytest.raises(UserError, match=r"commonsense_reasoning\.prepare_data with the same scale"):
        evaluation.main(config)
    assert record.status() is None, "a run is not marked as failed for it"


def damage_weights(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-500])


def empty_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"")


def lose_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def lose_configuration(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def damage_configuration(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{")


def drop_a_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, path)


def widen(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    save_file({name: torch.cat([tensor, tensor]) for name, tensor in load_file(path).items()}, path)


def retarget(folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": ["query_key_value"]}))


@pytest.mark.parametrize(
    "harm, complaint",
    [
        (damage_weights, "damaged or cut off"),
        (empty_weights, "damaged or cut off"),
        (lose_weights, "adapter_model.safetensors: No such file"),
        (lose_configuration, "adapter_config.json: No such file"),
        (damage_configuration, "is no adapter of model.path"),
        (drop_a_tensor, "lacks weights"),
        (widen, "size mismatch"),
        (retarget, "query_key_value"),
    ],
)
def test_a_broken_adapter_is_told_in_a_line(harm, complaint, make_config, trained):
    config = make_config("evaluation.tasks=[boolq]", "evaluation.mode=loglikelihood")
    record = trained(config)
    harm(record.adapter_path)
    with pytest.raises(UserError, match=complaint) as raised:
        evaluation.main(config)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 600


def test_the_digest_of_an_adapter_sees_weights_and_configuration(adapter_dir, tmp_path):
    copy = Path(shutil.copytree(adapter_dir, tmp_path / "copy"))
    assert adapter_digest(copy) == adapter_digest(adapter_dir)
    retarget(copy)
    assert adapter_digest(copy) != adapter_digest(adapter_dir)


def test_a_dry_run_loads_and_writes_nothing(make_config, caplog):
    config = make_config("dry_run=true")
    with caplog.at_level(logging.INFO):
        evaluation.main(config)
    assert "would evaluate" in caplog.text and not evaluation.locate(config).path.exists()


def test_the_command_ends_with_one_line_and_status_2(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["evaluate"])
    with pytest.raises(SystemExit) as ended:
        launch.run(
            evaluation.main,
            Config,
            CONF_MODULE,
            not_in_label=NOT_IN_LABEL,
            argv=["method=base", "evaluation.mode=guess"],
        )
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "error: evaluation.mode must be one of generate, loglikelihood, harness, found 'guess'\n"
    )


# ------------------------------------------------------------------------------------------------- lm-eval's own tasks


def test_lm_evals_own_tasks_are_an_evaluation_of_their_own(make_config, trained, monkeypatch):
    config = make_config("evaluation.mode=harness", "evaluation.tasks=[boolq]", "protocol=paper")
    record = trained(config)
    stand_in = harness.load_tasks("loglikelihood", "corrected", ["boolq"], config.data.dir)
    monkeypatch.setattr(harness, "load_harness_tasks", lambda names: stand_in)
    evaluation.main(config)
    assert list(record.results().evaluations) == ["harness"]
    assert [row["id"] for row in predictions(record)] == [f"boolq/{i}" for i in range(6)]
    assert {row["prediction"] for row in predictions(record)} <= {"0", "1"}

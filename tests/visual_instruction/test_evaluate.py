"""Evaluation: answers against plain transformers, batches, scoring, resuming, the run record, mistakes of the user."""

from __future__ import annotations

import base64
import csv
import io
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from moslora_core import MoSLoraConfig, launch
from moslora_core.errors import UserError
from moslora_core.evaluations import assert_evaluating
from moslora_core.record import RunRecord
from visual_instruction import evaluate as evaluation
from visual_instruction.benchmarks.extraction import read_option, read_yes_no
from visual_instruction.benchmarks.questions import question_text
from visual_instruction.benchmarks.registry import find
from visual_instruction.benchmarks.tsv import read_tsv
from visual_instruction.chat import TEMPLATES, check_template
from visual_instruction.config import CONF_MODULE, NOT_IN_LABEL, Config
from visual_instruction.generation import Responder
from visual_instruction.models import load_adapted, load_processor

TARGETS = r".*\.(q_proj|v_proj|fc1|down_proj)"
PROJECTOR = "multi_modal_projector"


def save_adapter(base: Path, folder: Path, config: LoraConfig | None = None, seed: int = 0) -> Path:
    """An adapter of both towers and the projector that changes the answers."""
    settings = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.5, "target_modules": TARGETS}
    config = config or LoraConfig(**settings, modules_to_save=[PROJECTOR])
    model = get_peft_model(LlavaForConditionalGeneration.from_pretrained(base), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter_dir(tmp_path_factory, tiny_llava_dir) -> Path:
    return save_adapter(tiny_llava_dir, tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def make_config(tmp_path, prepared_dir, tiny_llava_dir):
    """The configuration that a command line gives."""

    def make(*overrides: str) -> Config:
        launch.register(Config)
        common = [
            f"data.dir={prepared_dir}",
            "data.benchmarks=[smoke_existence,smoke_colour]",
            f"model.path={tiny_llava_dir}",
            "model.template=llama3",
            f"runs_dir={tmp_path / 'runs'}",
            "evaluation.max_new_tokens=8",
        ]
        with initialize_config_module(CONF_MODULE, version_base="1.3"):
            return launch.instantiate(Config, compose("config", overrides=[*common, *overrides]))

    return make


@pytest.fixture
def trained(adapter_dir):
    """Puts the adapter where train would have left it; returns the run record."""

    def place(config: Config, adapter: Path = adapter_dir) -> RunRecord:
        record = evaluation.locate(config)
        shutil.copytree(adapter, record.adapter_path, dirs_exist_ok=True)
        return record

    return place


def picture(number: int, size: tuple[int, int] = (40, 24)) -> str:
    buffer = io.BytesIO()
    image = Image.new("RGB", size, (200, 80, 40))
    image.paste((20, 40 * number % 256, 200), (number % 20, 0, number % 20 + 12, size[1]))
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def write(folder: Path, name: str, rows: list[dict[str, str]]) -> Path:
    path = folder / "benchmarks" / f"{name}.tsv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def written_benchmarks(prepared_dir) -> dict[str, list[dict[str, str]]]:
    """One benchmark of every kind, in VLMEvalKit's columns."""

    def row(index: int, **columns: str) -> dict[str, str]:
        return {"index": str(index), "image": picture(index % 1000), **columns}

    options = {"A": "red", "B": "blue", "C": "green"}
    rotated = {"A": "green", "B": "red", "C": "blue"}
    abilities = ("attribute_reasoning", "coarse_perception")
    rows = {
        "mmbench_en": [
            row(i + 1_000_000 * k, question=f"Colour {i}?", answer="AB"[k], **(rotated if k else options))
            | {"l2-category": abilities[i % 2], "category": "colour"}
            for k in range(2)
            for i in range(4)
        ],
        "textvqa": [row(i, question="What is written?", answer=str(["stop"] * i + ["go"] * (10 - i))) for i in (1, 3)],
        "mmvet": [row(i, question="Why\tis it?", answer="<AND>", capability="ocr,math") for i in range(3)],
        "mme": [
            row(i, image_path=f"{i // 2}.png", question=f"Is it {i}? Please answer yes or no.")
            | {"answer": ("Yes", "No")[i % 2], "category": ("color", "code_reasoning")[i // 4]}
            for i in range(8)
        ],
    }
    for name, found in rows.items():
        write(prepared_dir, name, found)
    return rows


ALL = "data.benchmarks=[mme,mmvet,textvqa,mmbench_en]"


@pytest.fixture
def scripted(monkeypatch):
    """Replaces the model by a function from an item to its response."""

    def install(say) -> None:
        monkeypatch.setattr(evaluation, "load_adapted", lambda *_: torch.nn.Identity().eval())
        monkeypatch.setattr(Responder, "respond", lambda self, items, *_: [say(item) for item in items])

    return install


# ------------------------------------------------------------------------------------------ against plain transformers


@pytest.mark.parametrize("batch_size", [1, 4])
def test_answers_are_what_transformers_generates_for_each_item_alone(
    batch_size, make_config, trained, adapter_dir, tiny_llava_dir, prepared_dir
):
    wide = [{"index": str(i), "image": picture(i), "question": "Which? " * (i + 1), "answer": "red"} for i in range(5)]
    write(prepared_dir, "smoke_shape", wide)
    names = ["smoke_colour", "smoke_shape"]
    config = make_config(
        f"data.benchmarks=[{','.join(names)}]", f"evaluation.batch_size={batch_size}", "evaluation.max_new_tokens=12"
    )
    record = trained(config)
    evaluation.main(config)

    model = PeftModel.from_pretrained(
        LlavaForConditionalGeneration.from_pretrained(tiny_llava_dir), adapter_dir
    ).eval()
    processor = AutoProcessor.from_pretrained(tiny_llava_dir)
    colour = tuple(int(255 * value) for value in processor.image_processor.image_mean)
    expected = {}
    for name in names:
        path = prepared_dir / "benchmarks" / f"{name}.tsv"
        with open(path, newline="") as file:
            images = {row["index"]: row["image"] for row in csv.DictReader(file, delimiter="\t")}
        for item in read_tsv(path, find(name)):
            image = Image.open(io.BytesIO(base64.b64decode(images[item.id.split("/")[1]])))
            square = Image.new("RGB", (max(image.size),) * 2, colour)
            square.paste(image, tuple((max(image.size) - side) // 2 for side in image.size))
            text = (
                "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<image>\n"
                f"{question_text(item)}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
            )
            inputs = processor(text=text, images=square, add_special_tokens=False, return_tensors="pt")
            output = model.generate(**inputs, do_sample=False, max_new_tokens=12)
            answer = output[0, inputs["input_ids"].shape[1] :]
            expected[item.id] = processor.tokenizer.decode(answer, skip_special_tokens=True).strip()
    found = {row["id"]: row["response"] for row in record.predictions()}
    assert found == expected
    assert len(set(found.values())) > 4, "the fixture's responses should differ"


def test_the_prompts_that_reach_the_model_are_whole_masked_and_greedy(make_config, monkeypatch, prepared_dir):
    seen = []
    original = LlavaForConditionalGeneration.generate

    def spy(self, **inputs):
        seen.append((inputs, self.generation_config))
        return original(self, **inputs)

    monkeypatch.setattr(LlavaForConditionalGeneration, "generate", spy)
    names = ("smoke_existence", "smoke_shape")
    rows = [{"index": str(i), "image": picture(i), "question": "What? " * (i + 1), "answer": "red"} for i in range(4)]
    write(prepared_dir, "smoke_shape", rows)
    overrides = ["evaluation.batch_size=3", "model.template=internlm2", f"data.benchmarks=[{','.join(names)}]"]
    config = make_config("method=base", *overrides)
    evaluation.main(config)
    processor = load_processor(config.model)
    tokenizer, asked = processor.tokenizer, set()
    for inputs, settings in seen:
        assert not settings.do_sample and settings.num_beams in (None, 1) and settings.max_new_tokens == 8
        assert settings.repetition_penalty in (None, 1.0)
        assert tokenizer.convert_tokens_to_ids("<|im_end|>") in settings.eos_token_id
        assert inputs["pixel_values"].shape[0] == inputs["input_ids"].shape[0]
        for tokens, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            padding = int((mask == 0).sum())
            assert mask.tolist() == [0] * padding + [1] * (len(mask) - padding), "padding at the left, masked"
            assert tokens[:padding].tolist() == [tokenizer.pad_token_id] * padding
            asked.add(tokenizer.decode(tokens[padding:]))
    questions = [
        question_text(item)
        for name in names
        for item in read_tsv(prepared_dir / "benchmarks" / f"{name}.tsv", find(name))
    ]
    image = "<image>" * 4
    assert asked == {f"<s><|im_start|>user\n{image}\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in questions}
    assert any((inputs["attention_mask"] == 0).any() for inputs, _ in seen), "the items differ in length"


def test_an_answer_ends_at_the_end_of_the_template(make_config, tiny_llava_dir, prepared_dir, monkeypatch):
    config = make_config()
    model, processor = load_adapted(config.model, None), load_processor(config.model)
    tokenizer = processor.tokenizer
    end, other = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<s>"))
    said = [*tokenizer("Yes", add_special_tokens=False)["input_ids"], other, end]
    said += tokenizer("No", add_special_tokens=False)["input_ids"]

    def generate(**inputs):
        return torch.cat([inputs["input_ids"], torch.tensor([said] * len(inputs["input_ids"]))], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    items = read_tsv(prepared_dir / "benchmarks" / "smoke_existence.tsv", find("smoke_existence"))
    assert Responder(model, processor, TEMPLATES["internlm2"]).respond(items, 2, 8) == ["Yes"] * 5


def test_square_padding_is_that_of_the_data(make_config, trained, prepared_dir):
    rows = [{"index": str(i), "image": picture(i), "question": "What?", "answer": "red"} for i in range(6)]
    write(prepared_dir, "smoke_shape", rows)
    found = []
    for seed, square in enumerate(("true", "false")):
        config = make_config("data.benchmarks=[smoke_shape]", f"data.square_padding={square}", f"seed={seed}")
        record = trained(config)
        evaluation.main(config)
        found.append([row["response"] for row in record.predictions()])
    assert found[0] != found[1]


# ------------------------------------------------------------------------------------------------------------ adapters


def test_the_adapters_and_the_trained_projector_count(make_config, trained, adapter_dir, tmp_path):
    without = tmp_path / "without"
    shutil.copytree(adapter_dir, without)
    settings = json.loads((without / "adapter_config.json").read_text())
    (without / "adapter_config.json").write_text(json.dumps(settings | {"modules_to_save": None}))
    weights = load_file(without / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if PROJECTOR not in name}
    assert len(kept) == len(weights) - 4
    save_file(kept, without / "adapter_model.safetensors")
    found = []
    for seed, adapter in enumerate((adapter_dir, without, None)):
        config = make_config(f"seed={seed}", *(["method=base"] if adapter is None else []))
        record = evaluation.locate(config) if adapter is None else trained(config, adapter)
        evaluation.main(config)
        found.append(tuple(row["response"] for row in record.predictions()))
    assert len(set(found)) == 3


def test_a_mixer_counts(make_config, trained, tiny_llava_dir, tmp_path):
    mixed = MoSLoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, mixer="learned", modules_to_save=[PROJECTOR])
    folder = save_adapter(tiny_llava_dir, tmp_path / "mixed", mixed)
    config = make_config("method=moslora")
    record = trained(config, folder)
    evaluation.main(config)
    first = [row["response"] for row in record.predictions()]
    config = make_config("method=moslora", "seed=1")
    plain = save_adapter(tiny_llava_dir, tmp_path / "plain")
    record = trained(config, plain)
    evaluation.main(config)
    assert first != [row["response"] for row in record.predictions()]


def test_dropout_is_off(make_config, adapter_dir, prepared_dir):
    config = make_config()
    model, processor = load_adapted(config.model, adapter_dir), load_processor(config.model)
    assert_evaluating(model)
    items = read_tsv(prepared_dir / "benchmarks" / "smoke_colour.tsv", find("smoke_colour"))
    responder = Responder(model, processor, TEMPLATES["llama3"])
    assert responder.respond(items, 2, 8) == responder.respond(items, 5, 8)
    model.train()
    with pytest.raises(RuntimeError, match=r"training mode.*model\.eval"):
        responder.respond(items, 2, 8)


def test_the_base_needs_no_training(make_config):
    config = make_config("method=base")
    evaluation.main(config)
    record = evaluation.locate(config)
    results = record.results()
    assert results.training is None and results.evaluations["exact"].tasks["smoke_colour"].n == 5
    assert record.status().state == "finished" and "tuner: none" in record.config_path.read_text()


# ------------------------------------------------------------------------------------------------------------- scoring


def test_responses_are_read_and_scored_by_the_kind_of_their_benchmark(make_config, trained):
    config = make_config()
    record = trained(config)
    evaluation.main(config)
    rows = record.predictions()
    assert [row["id"] for row in rows] == [
        f"{name}/{i}" for name in ("smoke_colour", "smoke_existence") for i in range(5)
    ], "in the order of the registry"
    options = dict(zip("ABCD", ("red", "green", "blue", "yellow"), strict=True))
    for row in rows:
        choice = row["task"] == "smoke_colour"
        assert row["prediction"] == (read_option(row["response"], options) if choice else read_yes_no(row["response"]))
        assert row["correct"] == (row["prediction"] == row["gold"])
    for name, result in record.results().evaluations["exact"].tasks.items():
        of = [row for row in rows if row["task"] == name]
        assert result.value == sum(row["correct"] for row in of) / 5
        assert result.unparsed == sum(row["prediction"] is None for row in of) / 5


def test_every_kind_of_benchmark_is_scored_in_its_own_way(make_config, trained, written_benchmarks, scripted):
    rotated_wrong = {"mmbench_en/1000002"}

    def say(item):
        if item.kind == "short_answer":
            return "Stop."
        if item.kind == "yes_no":
            return "Yes, it is."
        return "C" if item.id in rotated_wrong | {"mmbench_en/1"} else f"({item.answers[0]})"

    scripted(say)
    config = make_config(ALL)
    record = trained(config)
    evaluation.main(config)
    found = record.results().evaluations["exact"]
    assert list(found.tasks) == ["mmbench_en", "textvqa", "mme"], "MM-Vet is not scored"
    mmbench = found.tasks["mmbench_en"]
    assert (mmbench.value, mmbench.n) == (0.75, 4)
    assert {name: part.value for name, part in mmbench.breakdown.items()} == {
        "attribute_reasoning": 1.0,
        "coarse_perception": 0.5,
        "circular": 0.5,
    }
    assert found.tasks["textvqa"].value == pytest.approx((0.3 + 0.9) / 2)
    assert found.tasks["mme"].value == pytest.approx(0.25), "half of the questions right, no picture with both"
    assert set(found.tasks["mme"].breakdown) == {"perception", "cognition"}
    ids = [row["id"] for row in record.predictions()]
    assert "mmbench_en/1000002" in ids and not any(name.startswith("mmvet") for name in ids)


def test_what_needs_a_judge_is_handed_over(make_config, trained, written_benchmarks, scripted, caplog):
    scripted(lambda item: f'It is "{item.id}",\nsays\ta sign.')
    config = make_config(ALL)
    record = trained(config)
    with caplog.at_level(logging.INFO):
        evaluation.main(config)
    path = record.path / "responses" / "exact" / "mmvet.tsv"
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert rows == [
        {**{name: value for name, value in row.items() if name != "image"}, "prediction": said}
        for row, said in zip(
            written_benchmarks["mmvet"], (f'It is "mmvet/{i}",\nsays\ta sign.' for i in range(3)), strict=True
        )
    ]
    assert "3 responses for a judge" in caplog.text


def test_a_judged_benchmark_alone_adds_no_evaluation(make_config, trained, written_benchmarks, scripted):
    scripted(lambda item: "because")
    config = make_config(ALL, "evaluation.benchmarks=[mmvet]")
    record = trained(config)
    evaluation.main(config)
    assert not record.results().evaluations and record.status().state == "finished"
    assert (record.path / "responses" / "exact" / "mmvet.tsv").exists()


def test_free_answers_may_be_long(make_config, trained, written_benchmarks, monkeypatch):
    limits = {}
    monkeypatch.setattr(evaluation, "load_adapted", lambda *_: torch.nn.Identity().eval())
    monkeypatch.setattr(
        Responder,
        "respond",
        lambda self, items, batch, limit: limits.update({items[0].id.split("/")[0]: limit}) or ["A"] * len(items),
    )
    config = make_config(ALL)
    trained(config)
    evaluation.main(config)
    assert limits == {"mmbench_en": 8, "textvqa": 8, "mme": 8, "mmvet": 512}


def test_a_limit_counts_questions_and_keeps_what_belongs_to_them(make_config, trained, written_benchmarks, scripted):
    scripted(lambda item: item.answers[0])
    config = make_config(ALL, "evaluation.limit=3")
    record = trained(config)
    evaluation.main(config)
    found = record.results().evaluations["exact"].tasks
    assert {name: result.n for name, result in found.items()} == {"mmbench_en": 3, "textvqa": 2, "mme": 4}
    assert found["mmbench_en"].breakdown["circular"].value == 1 and found["mme"].value == 1


# -------------------------------------------------------------------------------------------------------------- record


def test_benchmarks_and_validation_stand_side_by_side(make_config, trained, prepared_dir):
    for split in ("benchmarks", "validation"):
        config = make_config(f"evaluation.split={split}", "evaluation.limit=4", "evaluation.batch_size=2")
        record = trained(config)
        evaluation.main(config)
    results = record.results().evaluations
    assert list(results) == ["exact", "exact-validation"]
    for name, found in results.items():
        assert found.protocol == name and list(found.tasks) == ["smoke_colour", "smoke_existence"]
        assert {task.n for task in found.tasks.values()} == {4}
        expected = {"limit": 4, "batch_size": 2, "base": "smoke", "quantization": "none", "template": "llama3"}
        assert expected.items() <= found.settings.items()
        assert found.settings["max_new_tokens"] == 8 and found.settings["transformers"]
        assert not record.partial_predictions_path(name).exists()
    assert len(record.predictions()) == 2 * 2 * 4
    assert record.status().state == "finished" and record.status().stage == "evaluate"


def test_a_finished_evaluation_is_refused_kept_or_replaced(make_config, trained, caplog):
    overrides = ["evaluation.benchmarks=[smoke_existence]"]
    record = trained(make_config(*overrides))
    evaluation.main(make_config(*overrides))
    with pytest.raises(UserError, match=r"evaluation exact already.*on_finished=overwrite"):
        evaluation.main(make_config(*overrides))
    before = record.results()
    with caplog.at_level(logging.INFO):
        evaluation.main(make_config(*overrides, "on_finished=skip"))
    assert "already evaluated" in caplog.text and record.results() == before
    evaluation.main(make_config(*overrides, "on_finished=overwrite", "evaluation.limit=2"))
    assert record.results().evaluations["exact"].tasks["smoke_existence"].n == 2


# -------------------------------------------------------------------------------------------------------------- resume


class Stop(Exception):
    """Stands for a kill between two chunks."""


@pytest.fixture
def count_chunks(monkeypatch):
    """Counts the chunks that are answered, and stops before the one that is one too many."""
    respond = Responder.respond
    calls: list[list[str]] = []

    def allow(number: int | None) -> list[list[str]]:
        calls.clear()

        def counting(self, items, *rest):
            if len(calls) == number:
                raise Stop
            calls.append([item.id for item in items])
            return respond(self, items, *rest)

        monkeypatch.setattr(Responder, "respond", counting)
        return calls

    return allow


CHUNKS = "evaluation.chunk=2"  # five items each: three chunks a benchmark


def comparable(record: RunRecord) -> tuple:
    results = record.results()
    for found in results.evaluations.values():
        found.seconds = 0.0
    return results, record.predictions()


@pytest.mark.parametrize("finished", [1, 4])
def test_a_stopped_evaluation_resumes_to_the_undisturbed_result(finished, make_config, trained, count_chunks):
    undisturbed = make_config(CHUNKS, "seed=1")
    trained(undisturbed)
    evaluation.main(undisturbed)

    config = make_config(CHUNKS)
    record = trained(config)
    count_chunks(finished)
    with pytest.raises(Stop):
        evaluation.main(config)
    assert record.status().state == "failed" and not record.results().evaluations
    partial = record.partial_predictions_path("exact")
    with open(partial, "a") as file:
        file.write('{"task": "smoke_colour", "items": [4')  # a line torn by a kill

    again = count_chunks(None)
    evaluation.main(config)
    assert len(again) == 6 - finished
    assert comparable(record) == comparable(evaluation.locate(undisturbed))
    assert not partial.exists()


def test_a_smaller_batch_and_another_chunk_go_on_from_the_finished_items(make_config, trained, count_chunks):
    trained(make_config())
    count_chunks(2)
    with pytest.raises(Stop):
        evaluation.main(make_config(CHUNKS))
    again = count_chunks(None)
    evaluation.main(make_config("evaluation.chunk=9", "evaluation.batch_size=1"))
    assert again == [["smoke_colour/4"], [f"smoke_existence/{i}" for i in range(5)]]


@pytest.mark.parametrize("change", ["settings", "adapter", "items", "image"])
def test_what_was_answered_under_other_conditions_is_answered_again(
    change, make_config, trained, count_chunks, caplog, tiny_llava_dir, tmp_path, prepared_dir
):
    record = trained(make_config())
    count_chunks(2)
    with pytest.raises(Stop):
        evaluation.main(make_config(CHUNKS))
    overrides = [CHUNKS]
    path = prepared_dir / "benchmarks" / "smoke_existence.tsv"
    if change == "settings":
        overrides.append("evaluation.max_new_tokens=4")
    elif change == "adapter":
        trained(make_config(), save_adapter(tiny_llava_dir, tmp_path / "other", seed=1))
    elif change == "items":
        path.write_text(path.read_text().replace("Is there", "Is here"))
    else:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        write(prepared_dir, "smoke_existence", [row | {"image": picture(3)} for row in rows])
    again = count_chunks(None)
    with caplog.at_level(logging.WARNING):
        evaluation.main(make_config(*overrides))
    assert len(again) == 6 and "starting afresh" in caplog.text
    assert len(record.predictions()) == 10


def test_a_resumed_evaluation_with_nothing_left_loads_no_model(make_config, trained, monkeypatch):
    config = make_config()
    record = trained(config)
    monkeypatch.setattr(RunRecord, "add_evaluation", lambda *_: (_ for _ in ()).throw(Stop()))
    with pytest.raises(Stop):
        evaluation.main(config)
    monkeypatch.undo()
    monkeypatch.setattr(evaluation, "load_adapted", lambda *_: pytest.fail("there was nothing left to answer"))
    evaluation.main(config)
    assert len(record.predictions()) == 10


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    "override, complaint",
    [
        ("evaluation.split=test", r"evaluation\.split must be one of benchmarks, validation, found 'test'"),
        ("evaluation.batch_size=0", r"evaluation\.batch_size must be positive, found 0"),
        ("evaluation.chunk=-1", r"evaluation\.chunk must be positive"),
        ("evaluation.limit=0", r"evaluation\.limit must be positive"),
        ("evaluation.max_new_tokens=0", r"evaluation\.max_new_tokens must be positive"),
        (
            "evaluation.benchmarks=[mme]",
            r"unknown benchmark 'mme'; data\.benchmarks has smoke_colour, smoke_existence",
        ),
        ("evaluation.benchmarks=[]", "names no benchmark"),
        ("data.benchmarks=[mmmu]", r"data\.benchmarks: unknown benchmark 'mmmu'; expected some of mmbench_en"),
        ("data.benchmarks=[]", "names no benchmark; data.benchmarks has none"),
        ("model.template=vicuna", r"model\.template must be one of"),
        ("on_finished=maybe", "on_finished must be"),
    ],
)
def test_a_wrong_setting_is_told_in_a_line(override, complaint, make_config, trained):
    config = make_config(override)
    record = trained(config)
    with pytest.raises(UserError, match=complaint) as raised:
        evaluation.main(config)
    assert "\n" not in str(raised.value) and record.status() is None


def test_an_untrained_run_names_the_command(make_config):
    config = make_config("method=moslora", "seed=3")
    command = r"visual_instruction\.train scale=smoke method=moslora seed=3"
    with pytest.raises(UserError, match=rf"no adapter at .*{command}"):
        evaluation.main(config)
    assert not evaluation.locate(config).path.exists()


def test_unprepared_data_names_the_command(make_config, trained, prepared_dir):
    record = trained(make_config())
    (prepared_dir / "validation" / "smoke_colour.tsv").unlink()
    with pytest.raises(
        UserError, match=r"validation/smoke_colour\.tsv; run python -m visual_instruction\.prepare_data"
    ):
        evaluation.main(make_config("evaluation.split=validation"))
    assert record.status() is None, "a run is not marked as failed for it"


def test_an_unreadable_image_is_told_in_a_line_and_what_was_answered_stays(make_config, trained, prepared_dir):
    path = prepared_dir / "benchmarks" / "smoke_existence.tsv"
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    rows[4]["image"] = "A" * 120
    write(prepared_dir, "smoke_existence", rows)
    record = trained(make_config())
    with pytest.raises(UserError, match=r"smoke_existence/4") as raised:
        evaluation.main(make_config(CHUNKS))
    assert "\n" not in str(raised.value)
    assert record.partial_predictions_path("exact").read_text().count("\n") == 1 + 3 + 2
    assert record.status().state == "failed"


def test_a_template_that_does_not_fit_the_tokenizer(make_config, trained):
    config = make_config("model.template=smoke")
    trained(config)
    evaluation.main(config)  # <s> and </s> are tokens of the fixture
    tokenizer = load_processor(config.model).tokenizer
    with pytest.raises(UserError, match="does not fit the tokenizer"):
        check_template(replace(TEMPLATES["smoke"], special_tokens=("<|nowhere|>",)), tokenizer)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_broken_adapter_is_told_in_a_line(file, make_config, trained):
    config = make_config()
    record = trained(config)
    (record.adapter_path / file).unlink()
    with pytest.raises(UserError, match=rf"{file}: No such file") as raised:
        evaluation.main(config)
    assert "\n" not in str(raised.value)


def test_a_dry_run_loads_and_writes_nothing(make_config, caplog):
    config = make_config("dry_run=true")
    with caplog.at_level(logging.INFO):
        evaluation.main(config)
    assert "would evaluate" in caplog.text and not evaluation.locate(config).path.exists()


def test_the_command_ends_with_one_line_and_status_2(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["evaluate"])
    with pytest.raises(SystemExit) as ended:
        launch.run(
            evaluation.main, Config, CONF_MODULE, not_in_label=NOT_IN_LABEL, argv=["evaluation.batch_size=none"]
        )
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1

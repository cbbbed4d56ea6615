"""Answers to LLaVA's question files: in their order and layout, as the model alone gives them, and resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from moslora_core.errors import UserError
from moslora_core.record import RunRecord
from visual_instruction import answer as answering
from visual_instruction.answer import answer, main
from visual_instruction.chat import TEMPLATES
from visual_instruction.data import Collator, encode_prompt
from visual_instruction.images import image_token_count, pixel_values
from visual_instruction.models import load_adapted, load_processor
from visual_instruction.recorded import recorded_config

from .conftest import make_image
from .placed_runs import place_run

COUNT = 5


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_llava_dir) -> RunRecord:
    return place_run(tmp_path_factory.mktemp("run") / "seed-0", tiny_llava_dir)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number in range(COUNT):
        make_image(number, (28 + 5 * number, 28)).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def questions(tmp_path) -> Path:
    texts = [
        "What colour is it?",
        "Is there a circle?",
        "Describe the picture in a few words.",
        "Which shape?",
        "Why?",
    ]
    rows = [
        {"question_id": 10 - number, "image": f"{number}.png", "text": text, "category": "conv"}
        for number, text in enumerate(texts)
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_are_those_of_the_model_alone_in_the_order_of_the_questions(run, questions, images, tmp_path):
    out = tmp_path / "answers.jsonl"
    answer(run.path, questions, images, out, batch_size=2, max_new_tokens=6)
    found, asked = rows_of(out), rows_of(questions)
    assert [row["question_id"] for row in found] == [row["question_id"] for row in asked]
    assert [row["prompt"] for row in found] == [row["text"] for row in asked]
    assert {row["category"] for row in found} == {"conv"} and len({row["model_id"] for row in found}) == 1

    config = recorded_config(run)
    model, processor = load_adapted(config.model, run.adapter_path), load_processor(config.model)
    tokenizer, template = processor.tokenizer, TEMPLATES["llama3"]
    for row, question in zip(found, asked, strict=True):
        turns = [{"from": "human", "value": f"<image>\n{question['text']}"}]
        encoded = encode_prompt(turns, tokenizer, template, image_token_count(processor))
        batch = Collator(tokenizer.pad_token_id)([encoded])
        pixels = pixel_values([Image.open(images / question["image"])], processor)
        said = model.generate(**batch, pixel_values=pixels, max_new_tokens=6, do_sample=False)
        text = tokenizer.decode(said[0, batch["input_ids"].shape[1] :]).split(template.end)[0]
        for token in tokenizer.all_special_tokens:
            text = text.replace(token, "")
        assert row["text"] == text.strip()
    assert len({row["text"] for row in found}) > 1, "every answer is the same: this test shows little"


def test_a_stopped_command_goes_on_and_ends_in_the_same_bytes(run, questions, images, tmp_path, monkeypatch):
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    answer(run.path, questions, images, whole, batch_size=2, max_new_tokens=4)
    lines = whole.read_bytes().splitlines(keepends=True)
    stopped.write_bytes(lines[0] + lines[1] + lines[2][:9])  # torn by a kill
    answer(run.path, questions, images, stopped, batch_size=2, max_new_tokens=4)
    assert stopped.read_bytes() == whole.read_bytes()

    def load(*_):
        raise AssertionError("nothing is left to answer")

    monkeypatch.setattr(answering, "load_adapted", load)
    answer(run.path, questions, images, stopped)


def test_mistakes_end_in_one_line_and_write_nothing(run, questions, images, tmp_path, capsys):
    out = tmp_path / "answers.jsonl"
    common = [f"--questions={questions}", f"--out={out}"]
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"question_id": 10, "text": "x", "model_id": "another"}) + "\n")
    cases = {
        f"--run={tmp_path / 'nowhere'} --images={images}": "expected the folder of a run",
        f"--run={run.path} --images={tmp_path}": "question 10: image_missing",
        f"--run={run.path} --images={images} --batch-size=0": "--batch-size must be positive, found 0",
        f"--run={run.path} --images={images} --out={other}": "holds answers of another",
    }
    for arguments, message in cases.items():
        with pytest.raises(SystemExit) as exit_:
            main([*common, *arguments.split()])
        error = capsys.readouterr().err
        assert exit_.value.code == 2 and message in error and error.count("error:") == 1
        assert not out.exists()
    questions.write_text("{}\n")
    with pytest.raises(UserError, match="field 'question_id' is missing"):
        answer(run.path, questions, images, out)

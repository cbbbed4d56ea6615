"""The tiny base: its tokenizer, its pretraining text, its gate, and the committed checkpoint."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from commonsense_reasoning.build_smoke_base import (
    BOS,
    GATE,
    PAD,
    ROW,
    SMOKE_BASE,
    Build,
    Text,
    build_base,
    build_tokenizer,
    measure,
    prompt_words,
    words_of,
)
from commonsense_reasoning.prompts import EVALUATE_PROMPTS, TRAIN_PROMPTS, alpaca, published_train
from commonsense_reasoning.smoke_world import generate
from commonsense_reasoning.tasks import TASKS
from moslora_core.errors import UserError
from moslora_core.smoke_bases import REPORT, check_gate

MAX_BYTES = 8 * 2**20


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(SMOKE_BASE)


@pytest.fixture(scope="module")
def report() -> dict:
    return json.loads((SMOKE_BASE / REPORT).read_text())


@pytest.fixture(scope="module")
def text_ids(tokenizer) -> list[list[int]]:
    """Rows of pretraining text."""
    ids, _ = Text(tokenizer.get_vocab(), seed=0).batch(2000)
    return ids.tolist()


def test_committed_tokenizer_is_the_one_the_script_builds(tokenizer) -> None:
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()


def test_special_tokens_differ_and_a_text_begins_with_bos(tokenizer) -> None:
    special = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    assert len(set(special)) == 4
    assert tokenizer("the red hat")["input_ids"][0] == tokenizer.bos_token_id


@pytest.mark.parametrize("label", sorted({label for task in TASKS.values() for label in task.labels}))
def test_a_label_is_one_word_and_decodes_as_the_output_is_written(tokenizer, label) -> None:
    output = f"the correct answer is {label}"
    ids = tokenizer(output, add_special_tokens=False)["input_ids"]
    assert len(ids) == 5
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == output
    assert tokenizer(label.capitalize() + ":", add_special_tokens=False)["input_ids"][0] == ids[-1]


@pytest.mark.parametrize("template", [*TRAIN_PROMPTS.values(), *EVALUATE_PROMPTS.values()])
def test_every_prompt_is_in_the_vocabulary(tokenizer, template) -> None:
    for items in generate(seed=11, train_items=400, test_items=50).values():
        for item in items:
            for text in (template(item["instruction"]), template(item["instruction"], "an input"), item["output"]):
                assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"], text


def test_white_space_of_the_published_template_does_not_matter(tokenizer) -> None:
    instruction = generate(0, 8, 1)["piqa"][0]["instruction"]
    assert tokenizer(published_train(instruction))["input_ids"] == tokenizer(alpaca(instruction))["input_ids"]


def test_every_word_of_the_vocabulary_is_pretrained(tokenizer, text_ids) -> None:
    seen = Counter(token for row in text_ids for token in row)
    untrained = {word for word, token in tokenizer.get_vocab().items() if seen[token] < 20}
    assert untrained == {tokenizer.unk_token}


def test_the_instruction_format_is_never_pretrained(tokenizer, text_ids) -> None:
    """No three words of the prompt's frame follow one another in pretraining, except by the shuffle's chance."""
    frame = [
        *words_of(alpaca("Please choose the correct answer to the question:")),
        *words_of("Answer format: answer1/"),
    ]
    frame = tokenizer.convert_tokens_to_ids(frame)
    forbidden = {tuple(frame[i : i + 4]) for i in range(len(frame) - 3)}
    seen = {tuple(row[i : i + 4]) for row in text_ids for i in range(ROW - 3)}
    assert not forbidden & seen


def test_rows_have_whole_pieces_and_weigh_no_padding(tokenizer) -> None:
    ids, weights = Text(tokenizer.get_vocab(), seed=0).batch(200)
    assert ids.shape == weights.shape == (200, ROW)
    assert (ids[:, 0] == tokenizer.convert_tokens_to_ids(BOS)).all()
    assert (weights[ids == tokenizer.convert_tokens_to_ids(PAD)] == 0).all()
    last_words = [row[row != tokenizer.pad_token_id][-1].item() for row in ids]
    assert set(last_words) == {tokenizer.eos_token_id}


def test_prompt_words_are_lower_case_words() -> None:
    words = prompt_words()
    assert {"answer5", "below", "###", "_", "/", "context"} <= set(words)
    assert words == sorted({word.lower() for word in words})


def test_the_gate_names_each_measure_below_its_threshold(report) -> None:
    measures = {name: entry["measured"] for name, entry in report["gate"].items()}
    check_gate(measures, GATE)
    with pytest.raises(UserError, match=r"fact_recall 0\.100 < "):
        check_gate({**measures, "fact_recall": 0.1}, GATE)


def test_a_base_that_fails_its_gate_is_not_written(tmp_path) -> None:
    out = tmp_path / "base"
    with pytest.raises(UserError, match="failed its gate"):
        build_base(Build(steps=2, rows=2, hidden=16, layers=1, heads=2, intermediate=16), out)
    assert not out.exists()


def test_a_build_is_determined_by_its_seed(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("commonsense_reasoning.build_smoke_base.GATE", dict.fromkeys(GATE, 0.0))
    states = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        build = Build(seed=seed, steps=3, rows=2, hidden=16, layers=1, heads=2, intermediate=16)
        build_base(build, tmp_path / name)
        states.append(AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not all(torch.equal(states[0][key], states[2][key]) for key in states[0])


def test_committed_base_is_small_and_was_built_with_the_defaults(report) -> None:
    assert sum(path.stat().st_size for path in SMOKE_BASE.iterdir()) <= MAX_BYTES
    assert report["build"] == vars(Build())
    assert {"python", "torch", "transformers"} <= set(report["versions"])


def test_committed_base_passes_the_gate_as_reported(tokenizer, report) -> None:
    model = AutoModelForCausalLM.from_pretrained(SMOKE_BASE)
    measures = measure(model, tokenizer)
    check_gate(measures, GATE)
    for name, value in measures.items():
        # Another processor may round a near tie differently.
        assert value == pytest.approx(report["gate"][name]["measured"], abs=0.01)

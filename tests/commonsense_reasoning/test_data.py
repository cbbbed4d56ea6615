"""From prepared items to tokens and labels."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from commonsense_reasoning.config import DataConfig, ProtocolConfig
from commonsense_reasoning.data import IGNORED, Collator, encode, load_training
from commonsense_reasoning.prompts import alpaca, published_train
from moslora_core.errors import UserError

CORRECTED = ProtocolConfig("corrected", loss_on_prompt=False, num_beams=1, max_new_tokens=8)
PAPER = ProtocolConfig("paper", loss_on_prompt=True, num_beams=4, max_new_tokens=32)
LONG = 10_000


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_dir):
    return AutoTokenizer.from_pretrained(tiny_llama_dir)


@pytest.fixture
def item(items):
    return items["boolq"][1]


@pytest.fixture
def data(data_dir) -> DataConfig:
    return DataConfig(dir=str(data_dir), source="folder", cutoff=LONG)


def refusal(data: DataConfig, tokenizer) -> str:
    with pytest.raises(UserError) as caught:
        load_training(data, CORRECTED, tokenizer)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------------- encode


def test_corrected_puts_the_loss_on_the_response_alone(tokenizer, item):
    encoded = encode(item, tokenizer, CORRECTED, LONG)
    tokens, labels = encoded["input_ids"], encoded["labels"]
    assert tokenizer.decode(tokens) == f"<s>{alpaca(item['instruction'])}{item['output']}</s>"
    scored = [label for label in labels if label != IGNORED]
    assert tokenizer.decode(scored) == f"{item['output']}</s>"
    assert scored == tokens[-len(scored) :] and labels[: -len(scored)] == [IGNORED] * (len(tokens) - len(scored))
    assert encoded["attention_mask"] == [1] * len(tokens) and not encoded["truncated"]


def test_paper_puts_the_loss_on_every_token_that_follows_another(tokenizer, item):
    encoded = encode(item, tokenizer, PAPER, LONG)
    tokens = encoded["input_ids"]
    text = published_train(item["instruction"]) + item["output"]
    assert tokens == tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    assert tokenizer.decode(tokens) == f"<s>{text}</s>"
    assert encoded["labels"] == [IGNORED, *tokens[1:]]
    assert encoded["attention_mask"] == [1] * len(tokens)


def test_the_border_between_prompt_and_response_is_never_merged(tokenizer, items):
    """Under corrected, the response's tokens do not depend on the prompt before them."""
    for rows in items.values():
        for row in rows:
            encoded = encode(row, tokenizer, CORRECTED, LONG)
            response = tokenizer(row["output"], add_special_tokens=False)["input_ids"]
            assert encoded["labels"][-len(response) - 1 :] == [*response, tokenizer.eos_token_id]
            assert encoded["labels"][-len(response) - 2] == IGNORED


def test_the_input_field_is_part_of_the_prompt(tokenizer, item):
    encoded = encode(item | {"input": "GIVEN"}, tokenizer, CORRECTED, LONG)
    assert "### Input:\nGIVEN\n" in tokenizer.decode(encoded["input_ids"])


def test_the_cutoff_takes_from_the_prompts_left_or_from_the_right(tokenizer, item):
    for protocol in (CORRECTED, PAPER):
        whole = encode(item, tokenizer, protocol, LONG)
        size = len(whole["input_ids"])
        assert encode(item, tokenizer, protocol, size) == whole
        for cutoff in (size - 1, size // 2):
            cut = encode(item, tokenizer, protocol, cutoff)
            assert cut["truncated"] and len(cut["attention_mask"]) == cutoff
            kept = slice(None, cutoff) if protocol is PAPER else slice(size - cutoff, None)
            assert cut["input_ids"] == whole["input_ids"][kept] and cut["labels"] == whole["labels"][kept]


# ------------------------------------------------------------------------------------------------------ load_training


def test_every_item_becomes_a_sequence(data, tokenizer):
    train, validation = load_training(data, CORRECTED, tokenizer)
    assert validation is None
    assert set(train.column_names) == {"input_ids", "attention_mask", "labels"}
    rows = json.loads(Path(data.dir, "train.json").read_text())
    decoded = [tokenizer.decode(tokens) for tokens in train["input_ids"]]
    assert decoded == [f"<s>{alpaca(row['instruction'])}{row['output']}</s>" for row in rows]


def test_validation_items_are_held_out_by_their_seed(data, tokenizer):
    def split(seed: int) -> tuple[list[tuple], list[tuple]]:
        sets = load_training(replace(data, validation_items=5, validation_seed=seed), CORRECTED, tokenizer)
        return tuple([tuple(tokens) for tokens in part["input_ids"]] for part in sets)

    everything = [tuple(tokens) for tokens in load_training(data, CORRECTED, tokenizer)[0]["input_ids"]]
    train, held_out = split(42)
    assert (len(train), len(held_out)) == (27, 5)
    assert sorted(train + held_out) == sorted(everything)  # every item once, in one of the two
    assert split(42) == (train, held_out)
    assert set(split(43)[1]) != set(held_out)


def test_items_longer_than_the_cutoff_are_counted_aloud(data, tokenizer, caplog):
    train, _ = load_training(replace(data, cutoff=20), CORRECTED, tokenizer)
    assert {len(tokens) for tokens in train["input_ids"]} == {20}
    assert "32 of 32 training items were longer than data.cutoff=20 tokens" in caplog.text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"dir": "nowhere"}, "data.dir=nowhere: no prepared data; run python -m commonsense_reasoning.prepare_data"),
        ({"cutoff": 1}, "data.cutoff must be at least 2 tokens, found 1"),
        ({"validation_items": 32}, "data.validation_items=32 must be below the number of training items, 32"),
        ({"validation_items": -1}, "data.validation_items=-1"),
        ({"train_items": 8}, "data.train_items=8, but"),
    ],
    ids=str,
)
def test_bad_settings_are_named(data, tokenizer, changes, expected):
    assert expected in refusal(replace(data, **changes), tokenizer)


@pytest.mark.parametrize(
    ("prepared", "asked", "expected"),
    [
        ({"train_items": 32, "seed": 0}, {}, "data.train_items=None, but {dir} was prepared with 32"),
        ({"train_items": 32, "seed": 0}, {"train_items": 16}, "data.train_items=16, but {dir} was prepared with 32"),
        (
            {"train_items": 32, "seed": 0},
            {"train_items": 32, "subset_seed": 1},
            "data.subset_seed=1, but {dir} was prepared with 0",
        ),
    ],
)
def test_another_subset_than_the_prepared_one_is_refused(data, tokenizer, prepared, asked, expected):
    Path(data.dir, "manifest.json").write_text(json.dumps({"subset": prepared}))
    assert expected.format(dir=data.dir) in refusal(replace(data, **asked), tokenizer)


def test_the_prepared_subset_is_accepted(data, tokenizer):
    Path(data.dir, "manifest.json").write_text(json.dumps({"subset": {"train_items": 32, "seed": 5}}))
    train, _ = load_training(replace(data, train_items=32, subset_seed=5), CORRECTED, tokenizer)
    assert len(train) == 32


@pytest.mark.parametrize("content", ["[", "[]", "3"])
def test_a_damaged_manifest_is_named(data, tokenizer, content):
    Path(data.dir, "manifest.json").write_text(content)
    assert "manifest.json" in refusal(data, tokenizer)


# ------------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("protocol, computed", [(CORRECTED, "the responses'"), (PAPER, "all")])
def test_a_batch_trains_as_one_with_all_logits(protocol, computed, tiny_llama_dir, tokenizer, items):
    rows = [encode(item, tokenizer, protocol, LONG) for item in (items["boolq"][0], items["hellaswag"][2])]
    rows = [{key: row[key] for key in ("input_ids", "attention_mask", "labels")} for row in rows]
    full = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8)(rows)
    ours = Collator(tokenizer, pad_to_multiple_of=8)(rows)
    assert torch.equal(ours["input_ids"], full["input_ids"])
    longest = max(sum(label != IGNORED for label in row["labels"]) for row in rows)
    assert ours["labels"].shape == (2, longest + 1) and ours["logits_to_keep"] == longest + 1
    assert (longest + 1 < full["labels"].shape[1] / 2) == (computed != "all")

    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    found = []
    for batch in (full, ours):
        output = model(**batch)
        output.loss.backward()
        found.append((output.loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}))
        model.zero_grad()
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    for name, gradient in found[0][1].items():
        assert torch.allclose(found[1][1][name], gradient, atol=1e-6), name
    assert any(gradient.abs().max() > 1e-3 for gradient in found[0][1].values())


def test_a_batch_without_a_label_still_has_a_shape(tokenizer):
    batch = Collator(tokenizer)([{"input_ids": [5, 6], "attention_mask": [1, 1], "labels": [IGNORED] * 2}])
    assert batch["labels"].tolist() == [[IGNORED]] and batch["logits_to_keep"] == 1

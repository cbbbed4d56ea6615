"""A tiny random Llama with a byte-level tokenizer, and prepared items of all eight tasks: nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from commonsense_reasoning.prompts import EVALUATE_PROMPTS, TRAIN_PROMPTS
from commonsense_reasoning.tasks import OUTPUT_PREFIX, TASKS

TEST_ITEMS = 6  # a task
_WORDS = ("kettle", "river", "wooden spoon", "old lantern", "green hill", "paper boat")


def _instruction(task: str, number: int) -> str:
    """An instruction in the layout of the LLM-Adapters files, of a length that differs between items."""
    thing = _WORDS[number % len(_WORDS)]
    detail = " and then rests" * (number % 3)
    if task == "boolq":
        return (
            "Please answer the following question with true or false, "
            f"question: is the {thing} number {number}{detail}?\n\nAnswer format: true/false"
        )
    count = {"winogrande": 2, "piqa": 2, "social_i_qa": 3, "hellaswag": 4}.get(task, 4 + (number == 3))
    labels = TASKS[task].labels[:count]
    options = [f"{label.capitalize()}: {_WORDS[(number + i) % len(_WORDS)]}." for i, label in enumerate(labels)]
    choose = {
        "winogrande": "Please choose the correct answer to fill in the blank to complete the given sentence",
        "piqa": "Please choose the correct solution to the question",
        "hellaswag": "Please choose the correct ending to complete the given sentence",
    }.get(task, "Please choose the correct answer to the question")
    between = "\n\n" if task == "piqa" else " "
    before_format = " " if task == "winogrande" else "\n\n"
    question = f"{choose}: The {thing} number {number}{detail} is a _.\n\n{between.join(options)}"
    return f"{question}{before_format}Answer format: {'/'.join(labels)}"


def make_item(task: str, number: int) -> dict[str, str]:
    """Item ``number`` of ``task`` as prepare_data writes it."""
    instruction = _instruction(task, number)
    offered = instruction.rsplit("Answer format: ", 1)[1].split("/")
    answer = offered[number % len(offered)]
    return {
        "id": f"{task}/{number}",
        "instruction": instruction,
        "input": "",
        "output": f"{OUTPUT_PREFIX}{answer}",
        "answer": answer,
    }


@pytest.fixture(scope="session")
def items() -> dict[str, list[dict[str, str]]]:
    """Test items of every task."""
    return {task: [make_item(task, number) for number in range(TEST_ITEMS)] for task in TASKS}


@pytest.fixture
def data_dir(tmp_path: Path, items: dict[str, list[dict[str, str]]]) -> Path:
    """A folder in the layout of prepare_data: test/<task>.json, train.json, manifest.json."""
    folder = tmp_path / "data"
    (folder / "test").mkdir(parents=True)
    for task, rows in items.items():
        (folder / "test" / f"{task}.json").write_text(json.dumps(rows), encoding="utf-8")
    train = [make_item(task, number) for number in range(100, 104) for task in TASKS]
    (folder / "train.json").write_text(json.dumps(train), encoding="utf-8")
    manifest = {"source": "tests", "train": len(train), "test": {task: len(rows) for task, rows in items.items()}}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory, items: dict[str, list[dict[str, str]]]) -> Path:
    """A saved random LlamaForCausalLM (fp32, two layers) and its tokenizer.

    The tokenizer is LLaMA-3's kind (byte-level BPE, a beginning token from the template), so decoding gives back every
    byte and token boundaries fall where they do there; its merges come from the prompts, so that prompts stay short.
    """
    folder = tmp_path_factory.mktemp("tiny_llama")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [
        prompt(item["instruction"]) + item["output"]
        for rows in items.values()
        for item in rows
        for prompt in (*TRAIN_PROMPTS.values(), *EVALUATE_PROMPTS.values())
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,  # large enough that responses differ between items
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def fluent_llama_dir(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path, items: dict[str, list[dict[str, str]]]
) -> Path:
    """The tiny Llama after a few seconds of training: it answers in the right form, and not always rightly."""
    folder = tmp_path_factory.mktemp("fluent_llama")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    model = LlamaForCausalLM.from_pretrained(tiny_llama_dir)
    texts = [
        prompt(item["instruction"]) + item["output"] + tokenizer.eos_token
        for rows in items.values()
        for item in rows[1:4]
        for prompt in (EVALUATE_PROMPTS["corrected"], EVALUATE_PROMPTS["paper"])
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :40] = -100  # the prompt's fixed words teach nothing
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))
    for step in range(60):
        rows = order[torch.arange(step * 8, step * 8 + 8) % len(texts)]
        inputs = {"input_ids": batch["input_ids"][rows], "attention_mask": batch["attention_mask"][rows]}
        model(**inputs, labels=labels[rows]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

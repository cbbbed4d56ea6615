"""A tiny random LLaVA with a byte-level tokenizer, and a prepared folder of a few items: nothing is downloaded."""

from __future__ import annotations

import base64
import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

IMAGE_SIZE, PATCH_SIZE = 28, 14
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
# Those of LLaMA-3, of ChatML as InternLM2 has it (with <s> before the first turn), and of the smoke template.
SPECIAL_TOKENS = (
    *("<pad>", "<s>", "</s>"),
    *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<|im_start|>", "<|im_end|>"),
    "<image>",
)

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "yellow": (230, 220, 40)}
SHAPES = ("circle", "square")


def make_image(number: int, size: tuple[int, int] = (28, 28)) -> Image.Image:
    """Picture ``number``: one of two shapes in one of four colours on grey."""
    width, height = size
    image = Image.new("RGB", size, (128, 128, 128))
    box = (width // 4, height // 4, 3 * width // 4, 3 * height // 4)
    draw = ImageDraw.Draw(image)
    colour = list(COLOURS.values())[number % len(COLOURS)]
    (draw.ellipse if number % 2 == 0 else draw.rectangle)(box, fill=colour)
    return image


def png_bytes(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def conversation(*texts: str) -> list[dict[str, str]]:
    """Turns in LLaVA's layout, of the human and the assistant by turns."""
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def make_items() -> list[dict[str, Any]]:
    """Training items as prepare_data writes them: six with an image, one of them of two turns, and three without."""
    names, items = list(COLOURS), []
    for number in range(6):
        colour, shape = names[number % len(names)], SHAPES[number % len(SHAPES)]
        texts = [f"<image>\nWhat colour is the {shape}?", f"The {shape} is {colour}."]
        if number == 2:
            texts += ["What shape is it?", f"It is a {shape}."]
        items.append({"id": f"train/{number}", "image": f"train/{number}.png", "conversations": conversation(*texts)})
    items += [
        {"id": "train/6", "conversations": conversation("What is two and two?", "Four.")},
        {"id": "train/7", "conversations": conversation("Say hello.", "Hello!", "And again?", "Hello, once more!")},
        {"id": "train/8", "conversations": conversation("Name a colour of the sky.", "Blue, on most days.")},
    ]
    return items


def make_rows(benchmark: str, count: int, first: int) -> list[dict[str, str]]:
    """Rows of a benchmark in VLMEvalKit's layout: ``smoke_existence`` asks yes or no, the others offer options."""
    names, rows = list(COLOURS), []
    for index in range(count):
        number = first + index
        colour, shape = names[number % len(names)], SHAPES[number % len(SHAPES)]
        row = {"index": str(index), "image": base64.b64encode(png_bytes(make_image(number))).decode()}
        if benchmark == "smoke_existence":
            asked = shape if index % 2 == 0 else SHAPES[1 - number % len(SHAPES)]
            row |= {"question": f"Is there a {asked}? Please answer yes or no."}
            row |= {"answer": "Yes" if asked == shape else "No", "category": "existence"}
        else:
            row |= {"question": f"What colour is the {shape}?", **dict(zip("ABCD", names, strict=True))}
            row |= {"answer": "ABCD"[names.index(colour)], "category": "colour"}
        rows.append(row)
    return rows


def write_tsv(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


BENCHMARKS = ("smoke_existence", "smoke_colour")


@pytest.fixture
def prepared_dir(tmp_path: Path) -> Path:
    """A folder in the layout of prepare_data: train.json, images/, benchmarks/, validation/, manifest.json."""
    folder = tmp_path / "prepared"
    items = make_items()
    (folder / "images" / "train").mkdir(parents=True)
    for number, item in enumerate(items):
        if "image" in item:
            make_image(number, (28 + 4 * number, 28)).save(folder / "images" / item["image"])
    (folder / "train.json").write_text(json.dumps(items), encoding="utf-8")
    for part, first in (("benchmarks", 20), ("validation", 40)):
        for name in BENCHMARKS:
            write_tsv(folder / part / f"{name}.tsv", make_rows(name, 5, first))
    manifest = {
        "source": "tests",
        "image_root": None,
        "subset": {"train_items": None, "test_items": None, "validation_items": None, "seed": 0},
        "train": {"items": len(items)},
        "benchmarks": {name: {"items": 5} for name in BENCHMARKS},
        "validation": {name: {"items": 5} for name in BENCHMARKS},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def build_tokenizer() -> PreTrainedTokenizerFast:
    """LLaMA-3's kind (byte-level BPE, a beginning token from the template) with merges from the texts of the tests."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [turn["value"] for item in make_items() for turn in item["conversations"]]
    texts += [row["question"] for name in BENCHMARKS for row in make_rows(name, 5, 20)]
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, "user assistant system Yes No"] * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        special_tokens=[("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="right",
    )


@pytest.fixture(scope="session")
def tiny_llava_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved random LLaVA (fp32): three CLIP layers, two Llama layers, 4 image tokens; tokenizer and processor."""
    folder = tmp_path_factory.mktemp("tiny_llava")
    tokenizer = build_tokenizer()
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        ),
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,  # CLIP's class token, which the strategy "default" drops again
    )
    processor.save_pretrained(folder)
    wide = {"initializer_range": 0.3}  # large enough that answers differ between images and questions
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            projection_dim=32,
            initializer_factor=5.0,
            **wide,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=512,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **wide,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        pad_token_id=tokenizer.pad_token_id,
        **wide,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder

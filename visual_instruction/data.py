"""From prepared items to batches: tokens with labels on the assistant's words alone, and the pixels of images.

Nothing is tokenised or opened before an item is asked for. ``<image>`` stands for as many image tokens as the vision
tower gives features; transformers' LlavaForConditionalGeneration fills them, in the order of a batch, with the images
of those rows that have one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import LlavaProcessor, PreTrainedTokenizerBase

from moslora_core.errors import UserError
from moslora_core.prepared import check_subset, read_manifest
from moslora_core.running import is_main_process

from .chat import ASSISTANT, IMAGE, Template, Turn, check_template
from .config import DataConfig
from .conversations import Fault, Faults, Item, read_instructions
from .images import image_token_count, open_image, pixel_values
from .sampling import GroupedByModalityAndLength

logger = logging.getLogger(__name__)

IGNORED = -100  # label of a token that carries no loss
TRAIN_FILE = "train.json"
IMAGES_FOLDER = "images"
PREPARE = "visual_instruction.prepare_data"
OVER_LONG = ("cut", "skip", "refuse")

# ----------------------------------------------------------------------------------------------------------- encoding


def _encode_text(text: str, tokenizer: PreTrainedTokenizerBase, image_tokens: int) -> list[int]:
    """Tokens of one piece, split at its images as XTuner splits it: no tokenizer merges across an image."""
    first, *others = text.split(IMAGE)
    tokens = tokenizer(first, add_special_tokens=False)["input_ids"]
    for chunk in others:
        tokens += [tokenizer.convert_tokens_to_ids(IMAGE)] * image_tokens
        tokens += tokenizer(chunk, add_special_tokens=False)["input_ids"]
    return tokens


def encode(
    item: Item,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    image_tokens: int,
    text_limit: int | None = None,
) -> dict[str, list[int]]:
    """Tokens and labels of one conversation.

    Pieces are tokenised apart (see :meth:`Template.segments`), so that those of a prompt are the same in evaluation.
    Labels are the tokens of the answers with their end tokens, and ``IGNORED`` elsewhere, image tokens included.

    Args:
        image_tokens: what an image is expanded to.
        text_limit: tokens kept from the left, image tokens apart, as XTuner keeps them (whose limit counts the
            placeholder too: its items may have one token less). Image tokens are kept all, or dropped all where the
            image itself comes after the limit.

    Returns:
        input_ids, attention_mask, labels: lists of one length.
    """
    tokens, labels = [], []
    for text, carries_loss in template.segments(item["conversations"]):
        piece = _encode_text(text, tokenizer, image_tokens)
        tokens += piece
        labels += piece if carries_loss else [IGNORED] * len(piece)
    if text_limit is not None:
        image = tokenizer.convert_tokens_to_ids(IMAGE)
        words = [position for position, token in enumerate(tokens) if token != image]
        if len(words) > text_limit:
            tokens, labels = tokens[: words[text_limit]], labels[: words[text_limit]]
    return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels}


def encode_prompt(
    turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, template: Template, image_tokens: int
) -> dict[str, list[int]]:
    """Tokens that an answer is generated after: those that :func:`encode` puts before it in training.

    Args:
        turns: as in an item; the last is the human's.
    """
    template.prompt(turns)  # refuses what does not end with a question
    tokens = [token for text, _ in template.segments(turns) for token in _encode_text(text, tokenizer, image_tokens)]
    return {"input_ids": tokens, "attention_mask": [1] * len(tokens)}


@dataclass(frozen=True)
class Collator:
    """Pads rows to a batch.

    Attributes:
        side: right in training; left for generation, which goes on from the last token of every row.
    """

    pad_token_id: int
    side: str = "right"

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """input_ids, attention_mask and, where rows have them, labels: (rows, longest), padding masked from both.

        pixel_values: (rows with an image, 3, height, width), in the order of the rows; absent where no row has one.
        """
        longest = max(len(row["input_ids"]) for row in rows)
        fillers = {"input_ids": self.pad_token_id, "attention_mask": 0, "labels": IGNORED}
        batch = {
            key: torch.tensor([self._pad(row[key], longest, filler) for row in rows])
            for key, filler in fillers.items()
            if key in rows[0]
        }
        if images := [row["pixel_values"] for row in rows if "pixel_values" in row]:
            batch["pixel_values"] = torch.stack(images)
        return batch

    def _pad(self, values: list[int], length: int, filler: int) -> list[int]:
        padding = [filler] * (length - len(values))
        return values + padding if self.side == "right" else padding + values


# ------------------------------------------------------------------------------------------------------------ dataset


class _Packed:
    """Items as one block of bytes, which worker processes share: the pages of 665k dictionaries would be copied."""

    def __init__(self, items: Iterable[Item]):
        rows = [json.dumps(item, ensure_ascii=False).encode() for item in items]
        self._ends = np.cumsum([len(row) for row in rows])
        self._bytes = b"".join(rows)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return json.loads(self._bytes[self._ends[index - 1] if index else 0 : self._ends[index]])


class InstructionDataset(Dataset):
    """Conversations, tokenised and with their image opened when they are asked for.

    Attributes:
        lengths: (items,) characters of each conversation.
        has_image: (items,).
    """

    def __init__(
        self,
        items: Sequence[Item],
        image_root: Path,
        tokenizer: PreTrainedTokenizerBase,
        processor: LlavaProcessor,
        template: Template,
        text_limit: int | None = None,
        square_padding: bool = True,
    ):
        self.image_root, self.tokenizer, self.processor = Path(image_root), tokenizer, processor
        self.template, self.text_limit, self.square_padding = template, text_limit, square_padding
        self.image_tokens = image_token_count(processor)
        self.lengths = np.array([sum(len(turn["value"]) for turn in item["conversations"]) for item in items])
        self.has_image = np.array(["image" in item for item in items], dtype=bool)
        self._items = _Packed(items)

    def __len__(self) -> int:
        return len(self._items)

    def item(self, index: int) -> Item:
        return self._items[index]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """input_ids, attention_mask, labels, and pixel_values (3, height, width) where the tokens hold an image.

        Raises:
            UserError: an image that cannot be read.
        """
        item = self.item(index)
        row: dict[str, Any] = encode(item, self.tokenizer, self.template, self.image_tokens, self.text_limit)
        if "image" in item and self.tokenizer.convert_tokens_to_ids(IMAGE) in row["input_ids"]:
            image = open_image(self.image_root / item["image"])
            row["pixel_values"] = pixel_values([image], self.processor, self.square_padding)[0]
        return row

    def sampler(self, batch_size: int, seed: int) -> GroupedByModalityAndLength:
        """The order of training; ``batch_size`` is that of an optimiser step over all processes."""
        return GroupedByModalityAndLength(self.lengths, self.has_image, batch_size, seed)


# ------------------------------------------------------------------------------------------------------------ loading


def check_prepared(data: DataConfig) -> dict[str, Any]:
    """The manifest of ``data.dir``, after a check that it holds the subset that the configuration asks for."""
    folder = Path(data.dir)
    manifest = read_manifest(folder, PREPARE)
    check_subset(folder, manifest, data.train_items, data.subset_seed)
    return manifest


def find_image_root(data: DataConfig, manifest: dict[str, Any]) -> Path:
    """The folder of the training images: that of the configuration, else of the manifest, else of the prepared data.

    Raises:
        UserError: there is no such folder.
    """
    root = Path(data.image_root or manifest.get("image_root") or Path(data.dir) / IMAGES_FOLDER)
    if not root.is_dir():
        raise UserError(f"no folder of images {root}; expected those of {data.dir}/{TRAIN_FILE} (data.image_root)")
    return root


def load_training(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    processor: LlavaProcessor,
    template: Template,
    over_long: str = "cut",
) -> InstructionDataset:
    """The prepared training items.

    Args:
        over_long: what is done with items whose text is longer than ``data.text_limit`` tokens. cut: as XTuner, at the
            right, and said aloud; what has no word of an answer left is a fault by ``data.on_fault``. skip, refuse:
            such an item is a fault itself.

    Raises:
        UserError: unprepared or damaged data, no images, a template that does not fit the tokenizer, a text limit that
            is no number of tokens, a fault that is to be refused.
    """
    manifest = check_prepared(data)
    check_template(template, tokenizer)
    if data.text_limit < 2:
        raise UserError(f"data.text_limit must be at least 2 tokens, found {data.text_limit}")
    if over_long not in OVER_LONG:
        raise UserError(f"data.over_long must be one of {', '.join(OVER_LONG)}, found {over_long!r}")
    path = Path(data.dir) / TRAIN_FILE
    faults = Faults(str(path))
    items = list(read_instructions(path, faults).values())
    faults.settle("refuse")
    image_root = find_image_root(data, manifest) if any("image" in item for item in items) else Path(data.dir)
    items = _settle_lengths(items, str(path), tokenizer, template, data, over_long)
    return InstructionDataset(items, image_root, tokenizer, processor, template, data.text_limit, data.square_padding)


def _settle_lengths(
    items: list[Item],
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    data: DataConfig,
    over_long: str,
) -> list[Item]:
    """Items without those that are too long to keep; what is cut or left out is counted, and the first are named."""
    cut, faults = Faults(path, len(items)), Faults(path, len(items))
    kept = []
    shown = tqdm(items, desc="measuring texts", unit="item", disable=None if is_main_process() else True)
    for row, item in enumerate(shown):
        fault = _check_length(item, tokenizer, template, data.text_limit)
        if fault is None:
            kept.append(item)
        elif fault.kind == "over_long" and over_long == "cut":
            cut.add(row, fault)
            kept.append(item)
        else:
            faults.add(row, fault)
    if cut.counts:
        logger.warning("%s, cut at the right; the first: %s", cut.total(), cut.named())
    if over_long == "cut":
        faults.settle(data.on_fault)
    else:
        faults.settle(over_long, key="data.over_long")
    return kept


def _check_length(item: Item, tokenizer: PreTrainedTokenizerBase, template: Template, limit: int) -> Fault | None:
    segments = template.segments(item["conversations"])
    if sum(len(text.encode()) + 1 for text, _ in segments) <= limit:
        return None  # a token is a byte at least, and some tokenizers put a space before a piece
    encoded = encode(item, tokenizer, template, image_tokens=0)
    length = len(encoded["input_ids"])
    if length <= limit:
        return None
    expected = f"at most data.text_limit={limit}"
    if all(label == IGNORED for label in encoded["labels"][:limit]):
        return Fault("no_answer_left", f"{length} tokens, the first {limit} without a word of {ASSISTANT}", expected)
    return Fault("over_long", f"{length} tokens", expected)

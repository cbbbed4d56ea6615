"""From prepared items to token sequences."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import datasets
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from moslora_core.errors import UserError
from moslora_core.prepared import check_subset, read_manifest

from .config import DataConfig, ProtocolConfig
from .items import read_prepared
from .prepare_data import TRAIN_FILE
from .prompts import TRAIN_PROMPTS

logger = logging.getLogger(__name__)

IGNORED = -100  # label of a token that carries no loss


def encode(
    item: dict[str, str], tokenizer: PreTrainedTokenizerBase, protocol: ProtocolConfig, cutoff: int
) -> dict[str, Any]:
    """Tokens and labels of one training item: prompt, response, end of sequence.

    protocol=paper tokenises prompt and response as one text, as the published script does, and cuts at the right.
    protocol=corrected tokenises them apart, so that the response's tokens are those that evaluation scores whatever
    the tokenizer would merge across the border, and cuts the prompt at its left: the answer is never lost.

    Returns:
        input_ids, attention_mask, labels (lists of one length, at most ``cutoff``), and truncated.
    """
    prompt = TRAIN_PROMPTS[protocol.name](item["instruction"], item["input"])
    if protocol.loss_on_prompt:
        tokens = tokenizer(prompt + item["output"])["input_ids"] + [tokenizer.eos_token_id]
        labels = [IGNORED, *tokens[1:]]  # nothing precedes the first token but, in a batch, padding
        kept = slice(0, cutoff)
    else:
        head = tokenizer(prompt)["input_ids"]
        response = tokenizer(item["output"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        tokens = head + response
        labels = [IGNORED] * len(head) + response
        kept = slice(max(0, len(tokens) - cutoff), None)
    truncated = len(tokens) > cutoff
    tokens, labels = tokens[kept], labels[kept]
    return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels, "truncated": truncated}


class Collator(DataCollatorForSeq2Seq):
    """Makes a batch of sequences, and has the model compute logits at its end alone, where the labels are.

    Padding is at the left, so responses end together. Without loss on the prompt they are a few tokens of a hundred;
    logits and softmax of all the others, over the whole vocabulary, would be thrown away.

    Returns, beside what transformers' collator does: ``logits_to_keep``, one more than the longest response has
    tokens, and ``labels`` of as many positions, ``(rows, logits_to_keep)``.
    """

    def __call__(self, features: list[dict[str, Any]], return_tensors: str | None = None) -> dict[str, Any]:
        batch = super().__call__(features, return_tensors)
        labelled = (batch["labels"] != IGNORED).any(dim=0).nonzero()
        first = max(int(labelled[0]) - 1, 0) if len(labelled) else batch["labels"].shape[1] - 1
        batch["labels"] = batch["labels"][:, first:]
        batch["logits_to_keep"] = batch["labels"].shape[1]
        return batch


def check_prepared(data: DataConfig) -> None:
    """Checks that ``data.dir`` holds prepared data and that it is the subset that the configuration asks for."""
    folder = Path(data.dir)
    manifest = read_manifest(folder, "commonsense_reasoning.prepare_data")
    check_subset(folder, manifest, data.train_items, data.subset_seed)


def load_training(
    data: DataConfig, protocol: ProtocolConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Training and validation sequences of the prepared data.

    Raises:
        UserError: unprepared data, or a validation split that leaves nothing to train on.
    """
    check_prepared(data)
    if data.cutoff < 2:
        raise UserError(f"data.cutoff must be at least 2 tokens, found {data.cutoff}")
    items = read_prepared(Path(data.dir) / TRAIN_FILE)
    if not 0 <= data.validation_items < len(items):
        raise UserError(
            f"data.validation_items={data.validation_items} must be below the number of training items, {len(items)}"
        )
    encoded = datasets.Dataset.from_list(items).map(
        lambda item: encode(item, tokenizer, protocol, data.cutoff),
        remove_columns=list(items[0]),
        keep_in_memory=True,
        desc="tokenising",
    )
    if cut := sum(encoded["truncated"]):
        logger.warning("%d of %d training items were longer than data.cutoff=%d tokens", cut, len(items), data.cutoff)
    encoded = encoded.remove_columns("truncated")
    if data.validation_items == 0:
        return encoded, None
    split = encoded.train_test_split(
        test_size=data.validation_items, shuffle=True, seed=data.validation_seed, keep_in_memory=True
    )
    return split["train"], split["test"]

"""Reading a batch of prompts into the cache of keys and values without reading anything twice.

All prompts of a task begin alike (the instruction template, often the question's first words), and the beams of a
search begin with one prompt. What rows have in common is read once, as one row, and copied.

Positions follow from the attention mask, so padding may stand anywhere in a row. It is put behind the common
beginning: ``common | padding | rest``.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer


def new_cache(model: PreTrainedModel) -> DynamicCache | None:
    """An empty cache, or None where rows cannot be copied or padded inside (sliding windows, recurrence)."""
    if not model._supports_default_dynamic_cache():
        return None
    cache = DynamicCache(config=model.config)
    return cache if all(type(layer) is DynamicLayer for layer in cache.layers) else None


def common_length(rows: Sequence[Sequence[int]]) -> int:
    """Number of tokens with which all rows begin."""
    first, last = min(rows), max(rows)  # in lexicographic order; what these two share, all between them do
    for number, (one, other) in enumerate(zip(first, last, strict=False)):
        if one != other:
            return number
    return min(len(first), len(last))


def keeping(model: PreTrainedModel, positions: int) -> dict[str, int]:
    """What asks for the logits of the last positions alone, where a model can be asked for that."""
    return {"logits_to_keep": positions} if model._supports_logits_to_keep() else {}


@torch.inference_mode()
def read(model: PreTrainedModel, tokens: Sequence[int], cache: DynamicCache) -> DynamicCache:
    """``cache`` after one row of tokens; an empty one where there are none."""
    if tokens:
        row = torch.tensor([tokens], device=model.device)
        model(input_ids=row, past_key_values=cache, use_cache=True, **keeping(model, 1))
    return cache


def copies(cache: DynamicCache, rows: int) -> DynamicCache:
    """Every row of ``cache`` so many times, in a cache of its own."""
    found = copy.deepcopy(cache)
    found.batch_repeat_interleave(rows)
    return found


@torch.inference_mode()
def read_prompts(
    model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, beams: int
) -> dict[str, torch.Tensor | DynamicCache]:
    """What ``generate`` takes for a batch of prompts, with all of them read but for what it reads itself.

    Args:
        input_ids: prompts with padding at their left, ``(rows, length)``.
        attention_mask: 0 on padding, of the same shape.
        beams: rows that ``generate`` makes of each prompt.

    Returns:
        input_ids and attention_mask, perhaps with the padding elsewhere, and past_key_values where the model has a
        cache that can be shared.
    """
    if (cache := new_cache(model)) is None:
        return {"input_ids": input_ids, "attention_mask": attention_mask}
    rows = [row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)]
    # generate wants at least one token to read
    common = min(common_length(rows), min(map(len, rows)) - 1)
    input_ids, attention_mask = (
        torch.stack(
            [
                torch.cat([row[padding : padding + common], row[:padding], row[padding + common :]])
                for row, padding in zip(tensor, (attention_mask == 0).sum(1).tolist(), strict=True)
            ]
        )
        for tensor in (input_ids, attention_mask)
    )
    cache = copies(read(model, rows[0][:common], cache), len(rows))
    length = input_ids.shape[1]
    if beams > 1 and common < length - 1:
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        model(
            input_ids=input_ids[:, common:-1],
            attention_mask=attention_mask[:, :-1],
            position_ids=positions[:, common:-1],
            past_key_values=cache,
            use_cache=True,
            **keeping(model, 1),
        )
    cache.batch_repeat_interleave(beams)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "past_key_values": cache}

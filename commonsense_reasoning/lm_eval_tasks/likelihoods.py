"""Log-probabilities of continuations: the labels after a question, without reading the question once for each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from .prefill import common_length, copies, keeping, new_cache, read


@torch.inference_mode()
def continuation_likelihoods(
    model: PreTrainedModel, pairs: Sequence[tuple[list[int], list[int]]], batch_size: int, max_length: int
) -> list[tuple[float, bool]]:
    """The log-probability of each continuation after its context, and whether it is what greedy decoding gives.

    What all contexts begin with is read once; continuations that differ in their last token alone (the digit of
    ``answer1`` to ``answer5``) are scored from one row; logits are computed from where the first continuation of a
    batch begins, not for the questions.

    Args:
        pairs: tokens of context and continuation, neither empty.
        batch_size: rows that are read together, longest first.
        max_length: tokens that the model takes; longer contexts lose their beginning.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    begins = []  # position whose logits are for the continuation's first token
    for number, (context, continuation) in enumerate(pairs):
        # The continuation's last token is predicted, never read.
        tokens = tuple((context + continuation)[-(max_length + 1) : -1])
        begins.append(len(tokens) - len(continuation))
        groups.setdefault(tokens, []).append(number)
    rows = sorted(groups, key=lambda tokens: (-len(tokens), tokens))
    prompt = new_cache(model)
    common = 0 if prompt is None else min(common_length(rows), *begins)
    if common:
        read(model, rows[0][:common], prompt)

    found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        begin = min(begins[number] for tokens in batch for number in groups[tokens])
        # Padding behind a row is seen by nothing in it.
        ids = pad_sequence([torch.tensor(tokens[common:]) for tokens in batch], batch_first=True).to(model.device)
        cache = {"past_key_values": copies(prompt, len(batch))} if common else {}
        kept = common + ids.shape[1] - begin
        logits = model(input_ids=ids, use_cache=bool(common), **cache, **keeping(model, kept)).logits[:, -kept:]
        logs = logits.float().log_softmax(-1)
        likeliest = logs.argmax(-1).tolist()
        for row, tokens in enumerate(batch):
            for number in groups[tokens]:
                continuation = pairs[number][1]
                at = begins[number] - begin
                span = slice(at, at + len(continuation))
                scores = logs[row, range(at, at + len(continuation)), continuation]
                found[number] = (float(scores.sum()), likeliest[row][span] == continuation)
    return found

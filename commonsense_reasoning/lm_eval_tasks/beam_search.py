"""Ending a beam search when its answer is known.

transformers searches on until as many hypotheses as there are beams are complete and the worst of them is out of
reach, though the best alone is returned; in a batch, until that holds for every item. But the sum of log-probabilities
of a hypothesis only falls as it grows, so none that grows out of the running beams can score more than the best
running sum at the greatest length. Once the best complete hypothesis is above that, it is what will be returned.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel


def may_improve(
    running_beam_scores: torch.Tensor,
    beam_scores: torch.Tensor,
    max_length: int,
    decoder_prompt_len: int,
    length_penalty: float,
) -> torch.Tensor:
    """Whether a running beam may still become better than the best complete hypothesis, ``(items, 1)``.

    Args:
        running_beam_scores: sums of log-probabilities, best first, ``(items, beams)``.
        beam_scores: scores of complete hypotheses (sum by length to the power of ``length_penalty``), best first; far
            below any sum where there is none.
        max_length: greatest length of a hypothesis with its prompt.
    """
    longest = max_length - decoder_prompt_len if length_penalty > 0 else 1
    return running_beam_scores[:, :1] / longest**length_penalty >= beam_scores[:, :1]


@contextmanager
def ending_early(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Has ``model.generate`` under beam search stop as soon as the returned hypothesis is certain."""
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    check = model._check_early_stop_heuristic

    def checks(is_early_stop_heuristic_unsatisfied: torch.Tensor, **state: Any) -> torch.Tensor:
        known = ("running_beam_scores", "beam_scores", "max_length", "decoder_prompt_len", "length_penalty")
        going_on = check(is_early_stop_heuristic_unsatisfied=is_early_stop_heuristic_unsatisfied, **state)
        return going_on & may_improve(**{name: state[name] for name in known})

    model._check_early_stop_heuristic = checks
    try:
        yield
    finally:
        del model._check_early_stop_heuristic

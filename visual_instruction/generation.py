"""Answers of a LLaVA to questions about images: greedy, in batches, each the same as it would be alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, LlavaForConditionalGeneration, LlavaProcessor

from moslora_core.evaluations import assert_evaluating

from .benchmarks.questions import turn
from .benchmarks.tsv import Item, load_image
from .chat import Template
from .data import Collator, encode_prompt
from .images import image_token_count, pixel_values


@dataclass(frozen=True)
class Responder:
    """A model with all that a question takes on its way to it.

    Attributes:
        model: in evaluation mode.
        template: that of the training.
        square_padding: as in training.
    """

    model: LlavaForConditionalGeneration | PeftModel
    processor: LlavaProcessor
    template: Template
    square_padding: bool = True

    def respond(self, items: Sequence[Item], batch_size: int, max_new_tokens: int) -> list[str]:
        """Responses in the order of ``items``, up to the template's end of an answer.

        Raises:
            RuntimeError: the model is in training mode.
            UserError: an image that cannot be read.
        """
        assert_evaluating(self.model)
        prompts = [self._encode(item) for item in items]
        # The longest first: batches hold questions of a length, and what does not fit in memory fails at once.
        order = sorted(range(len(items)), key=lambda index: -len(prompts[index]["input_ids"]))
        responses = [""] * len(items)
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            found = self._generate([items[i] for i in indices], [prompts[i] for i in indices], max_new_tokens)
            for index, response in zip(indices, found, strict=True):
                responses[index] = response
        return responses

    def _encode(self, item: Item) -> dict[str, Any]:
        tokens = image_token_count(self.processor)
        return encode_prompt([turn(item)], self.processor.tokenizer, self.template, tokens)

    @torch.inference_mode()
    def _generate(self, items: Sequence[Item], prompts: list[dict[str, Any]], max_new_tokens: int) -> list[str]:
        tokenizer = self.processor.tokenizer
        model = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        batch = Collator(tokenizer.pad_token_id, side="left")(prompts)
        batch["pixel_values"] = pixel_values([load_image(item) for item in items], self.processor, self.square_padding)
        ends = sorted({tokenizer.convert_tokens_to_ids(self.template.end), tokenizer.eos_token_id})
        # Not the model's own settings: those of chat models sample, and may punish repetition.
        model.generation_config = GenerationConfig(
            do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
        )
        output = model.generate(**{name: tensor.to(model.device) for name, tensor in batch.items()})
        new = output[:, batch["input_ids"].shape[1] :].tolist()
        return [tokenizer.decode(_until(row, ends), skip_special_tokens=True).strip() for row in new]


def _until(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """``tokens`` before the first that ends an answer; what follows is padding."""
    return tokens[: next((at for at, token in enumerate(tokens) if token in ends), len(tokens))]

"""The PEFT tuner: PEFT's ``LoraModel``, with a mixer put into each layer that it creates."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from peft import LoraModel
from torch import nn

from . import peft_seam
from .config import DEFAULT_INIT, MoSLoraConfig
from .layers import MixedEmbedding, attach_mixer
from .mixer import init_mixer


class MoSLoraModel(LoraModel):
    """LoRA with a mixer M between A and B; created by ``get_peft_model(model, MoSLoraConfig(...))``."""

    def _create_and_replace(
        self, lora_config, adapter_name, target, target_name, parent, current_key, **kwargs
    ) -> None:
        super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, current_key, **kwargs)
        if lora_config.is_plain:
            return
        layer = getattr(parent, target_name)
        if isinstance(layer, peft_seam.ParamWrapper):
            raise TypeError(f"no mixer for {current_key}: adapters on bare parameters have no B module to hold it")
        self._attach(layer, adapter_name, lora_config, current_key)
        if isinstance(layer, peft_seam.MultiheadAttention):
            # PEFT adapts the output projection inside; it is a LoRA layer of its own.
            self._attach(layer.get_base_layer().out_proj, adapter_name, lora_config, f"{current_key}.out_proj")

    @staticmethod
    def _attach(layer: nn.Module, adapter_name: str, config: MoSLoraConfig, name: str) -> None:
        def draw(r: int, like: torch.Tensor) -> torch.Tensor:
            generator = None
            if config.mixer_seed is not None:
                # crc32 is a stable hash: the same layer gets the same mixer whatever else is adapted, in any order.
                generator = torch.Generator().manual_seed(
                    (config.mixer_seed << 32) % 2**63 + zlib.crc32(name.encode())
                )
            return init_mixer(config.start, r, dtype=like.dtype, device=like.device, generator=generator)

        attach_mixer(layer, adapter_name, draw, learned=config.mixer == "learned")

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str, *args, **kwargs):
        """PEFT's combination of adapters; the result is a plain LoRA (mixer identity) of the folded factors."""
        first = adapters[0] if adapters else None
        config = self.peft_config.get(first)
        if config is None:  # PEFT's own error names it
            return super().add_weighted_adapter(adapters, weights, adapter_name, *args, **kwargs)
        # PEFT copies the first adapter's configuration for the result, whose factors it writes itself.
        self.peft_config[first] = replace(config, mixer="identity", mixer_init=DEFAULT_INIT)
        try:
            with self._folded_embeddings():
                return super().add_weighted_adapter(adapters, weights, adapter_name, *args, **kwargs)
        finally:
            self.peft_config[first] = config

    @contextmanager
    def _folded_embeddings(self) -> Iterator[None]:
        with ExitStack() as stack:
            for module in self.model.modules():
                if isinstance(module, MixedEmbedding):
                    stack.enter_context(module.folded())
            yield

"""How much a UNet keeps for the backward pass, counted on the meta device: nothing is computed, and shapes are exact.

A step is run on tensors without storage, and every tensor that autograd keeps is added up once. Attention is taken as
fused kernels do it, which keep no scores: real runs have them, on GPUs and CPUs, and the meta device has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from peft import PeftConfig, get_peft_model
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.overrides import TorchFunctionMode

TOKENS = 77  # of CLIP's text encoders
# What gradient checkpointing computes a second time as a whole, in diffusers' UNets.
_SEGMENTS = (ResnetBlock2D, BasicTransformerBlock)


_QKV = ("query", "key", "value")


class _FusedAttention(TorchFunctionMode):
    """Attention as a kernel that has a shape on the meta device too, and keeps what fused kernels keep."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            inputs = [args[at] if at < len(args) else kwargs[name] for at, name in enumerate(_QKV)]
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*inputs)[0]
        return func(*args, **kwargs)


def saved_for_backward(
    unet: UNet2DConditionModel,
    adapter: PeftConfig,
    *,
    size: int,
    batch: int,
    dtype: torch.dtype,
    gradient_checkpointing: bool,
) -> int:
    """Bytes of activations at the peak of one training step.

    Without checkpointing: all that the forward pass keeps. With it: the inputs of the checkpointed blocks, and all
    that the largest of them keeps while it is computed again.

    Args:
        unet: on the meta device; the adapter is attached to it.
        size: width and height of the latents.
        batch: rows of one forward pass.
        dtype: of weights and activations.
    """
    nn.Module.to(unet.requires_grad_(False), dtype)  # diffusers' own warns of modules that SDXL does not have
    model = get_peft_model(unet, adapter, low_cpu_mem_usage=True).train()
    kept, segments = _keep(model, unet, size, batch, dtype)
    if not gradient_checkpointing:
        return kept
    unet.enable_gradient_checkpointing()
    inputs, _ = _keep(model, unet, size, batch, dtype)
    return inputs + max(segments, default=0)


def _keep(
    model: nn.Module, unet: UNet2DConditionModel, size: int, batch: int, dtype: torch.dtype
) -> tuple[int, list[int]]:
    """Bytes that one forward pass keeps, in all and of each segment."""
    config = unet.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    weights = {tensor.untyped_storage()._cdata for tensor in model.parameters()}
    # Storages are told apart by their addresses, so each is held until all are counted.
    kept: dict[int, torch.UntypedStorage] = {}
    segments = [0]

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights and storage._cdata not in kept:
            kept[storage._cdata] = storage
            segments[-1] += storage.nbytes()
        return tensor

    with torch.device("meta"):
        inputs = {
            "sample": torch.empty(batch, config.in_channels, size, size, dtype=dtype),
            "timestep": torch.empty(batch, dtype=torch.long),
            "encoder_hidden_states": torch.empty(batch, TOKENS, config.cross_attention_dim, dtype=dtype),
            "added_cond_kwargs": {
                "text_embeds": torch.empty(batch, pooled, dtype=dtype),
                "time_ids": torch.empty(batch, 6, dtype=dtype),
            },
        }
        with _in_segments(unet, segments), _FusedAttention(), saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model(**inputs).sample
            output.float().square().mean()
    return sum(storage.nbytes() for storage in kept.values()), segments


@contextmanager
def _in_segments(unet: nn.Module, segments: list[int]) -> Iterator[None]:
    """Begins a new entry of ``segments`` at the start of each segment and after its end."""
    hooks = []
    for module in unet.modules():
        if isinstance(module, _SEGMENTS):
            hooks.append(module.register_forward_pre_hook(lambda *_: segments.append(0)))
            hooks.append(module.register_forward_hook(lambda *_: segments.append(0)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

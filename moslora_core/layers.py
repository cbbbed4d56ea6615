"""Where the mixer lives: inside the B module of a LoRA layer, as part of its weight.

          x (.., in)
          |
      A : (r, in)          PEFT's lora_A, untouched
          |
      M : (r, r)           the mixer
          |                                              weight of lora_B := raw @ mixer = B @ M
      B : (out, r)         PEFT's lora_B: raw = B
          |
      * scaling -> added to the base layer's output

PEFT reads ``lora_B[adapter].weight`` in the forward pass, in mixed batches, in merging, in DoRA's norm and in export.
A B module that answers ``weight`` with B @ M therefore is MoSLoRA in all of them, for every layer kind and every
quantised base whose LoRA layer is built of such modules. (B M) A and B (M A) are the same product; the former costs
one (out, r) x (r, r) multiplication a call, whatever the batch.

The parameter is stored as ``raw``: FSDP, ZeRO and offloading look parameters up by name, and must not find a product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from . import peft_seam
from .mixer import fold_into_a, fold_into_b


class _MixedIntoB:
    """A B module: ``raw`` (out, r, ...), ``mixer`` (r, r), ``weight`` = raw @ mixer."""

    raw: torch.Tensor
    mixer: torch.Tensor

    @property
    def weight(self) -> torch.Tensor:
        return fold_into_b(self.raw, self.mixer)


class _MixedIntoA:
    """An A module: ``raw`` (r, in, ...), ``mixer`` (r, r), ``weight`` = mixer @ raw.

    PEFT gives B the groups of a grouped convolution: each output then sees a slice of the r channels only, and B @ M
    does not exist. M @ A does, and is the same map.
    """

    raw: torch.Tensor
    mixer: torch.Tensor

    @property
    def weight(self) -> torch.Tensor:
        return fold_into_a(self.raw, self.mixer)


class MixedLinear(_MixedIntoB, nn.Linear):
    pass


class MixedConv1d(_MixedIntoB, nn.Conv1d):
    pass


class MixedConv2d(_MixedIntoB, nn.Conv2d):
    pass


class MixedConv3d(_MixedIntoB, nn.Conv3d):
    pass


class MixedIntoAConv1d(_MixedIntoA, nn.Conv1d):
    pass


class MixedIntoAConv2d(_MixedIntoA, nn.Conv2d):
    pass


class MixedIntoAConv3d(_MixedIntoA, nn.Conv3d):
    pass


INTO_B = {nn.Linear: MixedLinear, nn.Conv1d: MixedConv1d, nn.Conv2d: MixedConv2d, nn.Conv3d: MixedConv3d}
INTO_A = {nn.Conv1d: MixedIntoAConv1d, nn.Conv2d: MixedIntoAConv2d, nn.Conv3d: MixedIntoAConv3d}


class EmbeddingMixers(nn.Module):
    """The mixers of an embedding layer by adapter name: parameters when learned, persistent buffers when fixed.

    PEFT's bookkeeping (activation, deletion) walks over ``items``; only learned mixers may be switched trainable.
    """

    def add(self, adapter_name: str, mixer: torch.Tensor, learned: bool, requires_grad: bool) -> None:
        if learned:
            self.register_parameter(adapter_name, nn.Parameter(mixer, requires_grad=requires_grad))
        else:
            self.register_buffer(adapter_name, mixer)

    def __contains__(self, adapter_name: str) -> bool:
        return adapter_name in self._parameters or adapter_name in self._buffers

    def __getitem__(self, adapter_name: str) -> torch.Tensor:
        return getattr(self, adapter_name)

    def __delitem__(self, adapter_name: str) -> None:
        delattr(self, adapter_name)

    def keys(self):
        return [*self._parameters, *self._buffers]

    def items(self):
        return self._parameters.items()


class MixedEmbedding(peft_seam.Embedding):
    """PEFT's LoRA embedding whose ``lora_embedding_B`` (out, r) is read as B @ M wherever it is computed with."""

    lora_mixer: EmbeddingMixers

    @contextmanager
    def folded(self) -> Iterator[None]:
        """Within it, ``lora_embedding_B`` holds B @ M for the adapters that have a mixer."""
        outer = self.__dict__.get("lora_embedding_B")
        raw = self._modules["lora_embedding_B"]
        self.__dict__["lora_embedding_B"] = {
            name: fold_into_b(B, self.lora_mixer[name]) if name in self.lora_mixer else B for name, B in raw.items()
        }
        try:
            yield
        finally:
            if outer is None:
                del self.__dict__["lora_embedding_B"]
            else:
                self.__dict__["lora_embedding_B"] = outer

    def forward(self, *args, **kwargs) -> torch.Tensor:
        with self.folded():
            return super().forward(*args, **kwargs)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        with self.folded():
            return super().get_delta_weight(adapter)


def attach_mixer(
    layer: nn.Module, adapter_name: str, draw: Callable[[int, torch.Tensor], torch.Tensor], learned: bool
) -> None:
    """Puts a mixer into adapter ``adapter_name`` of a LoRA layer, in place.

    Args:
        draw: (r, reference tensor for dtype and device) -> mixer (r, r).

    Raises:
        TypeError: a layer whose factors are neither linear maps, convolutions nor an embedding's.
    """
    if adapter_name in layer.lora_embedding_B:
        _attach_to_embedding(layer, adapter_name, draw, learned)
        return
    grouped = getattr(layer.get_base_layer(), "groups", 1) > 1
    host = (layer.lora_A if grouped else layer.lora_B)[adapter_name]
    mixed = (INTO_A if grouped else INTO_B).get(type(host))
    if mixed is None:
        raise TypeError(
            f"no mixer for {type(layer).__name__} on {type(layer.get_base_layer()).__name__}: its factor is a "
            f"{type(host).__name__}, expected one of {', '.join(kind.__name__ for kind in INTO_B)}"
        )
    raw = host._parameters.pop("weight")
    mixer = draw(layer.r[adapter_name], raw)
    host.__class__ = mixed
    host.raw = raw
    if learned:
        # An adapter added beside an active one is not trainable, and its mixer must not be either.
        host.mixer = nn.Parameter(mixer, requires_grad=raw.requires_grad)
    else:
        host.register_buffer("mixer", mixer)


def _attach_to_embedding(layer: nn.Module, adapter_name: str, draw, learned: bool) -> None:
    if type(layer) not in (peft_seam.Embedding, MixedEmbedding):
        raise TypeError(f"no mixer for {type(layer).__name__}: expected PEFT's LoRA embedding layer")
    if "lora_mixer" not in layer._modules:
        layer.lora_mixer = EmbeddingMixers()
        layer.adapter_layer_names = (*layer.adapter_layer_names, "lora_mixer")
        layer.__class__ = MixedEmbedding
    B = layer.lora_embedding_B[adapter_name]
    layer.lora_mixer.add(adapter_name, draw(layer.r[adapter_name], B), learned, B.requires_grad)

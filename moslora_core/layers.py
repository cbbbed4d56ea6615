"""The mixer inside PEFT's LoRA layers.

    x (.., in) --> [ A (r, in) ] --> [ M (r, r) ] --> [ B (out, r) ] --> * scaling --> + W0 x
                                     `---- one module: lora_B ----'

    delta_W = scaling * B @ M @ A                                                                             (Eq 7)

PEFT computes and merges ``lora_B(lora_A(x))``. Its module ``lora_B[adapter]`` stays, and becomes one that stores B as
``raw`` and M as ``mixer`` and answers ``weight`` with the product B @ M (out, r). Whatever PEFT does with B then
includes the mixer: forward, mixed batches, merging, DoRA, quantised bases. The product costs out * r * r operations
at each use, next to out * r for each of the tokens that go through.

    layer                    state dict
    linear, convolution      lora_A.weight              lora_B.raw            lora_B.mixer
    grouped convolution      lora_A.raw                 lora_A.mixer          lora_B.weight
    embedding                lora_embedding_A           lora_embedding_B      lora_mixer

A grouped convolution's B is (out, r / groups, 1, ..): it has no column for each rank, so that M goes into A. An
embedding has bare parameters instead of modules; it is the layer that answers with B @ M. The parameter is not called
``weight``, because a property of the name of a parameter would hide it from FSDP, ZeRO and offloading, which look
parameters up by name.

A learned mixer is a parameter, a frozen one a persistent buffer: both are saved and loaded. Where the configuration
gives a module no mixer (``mixer_pattern``), its layer stays PEFT's.

Since ``weight`` is computed, writing to ``weight.data`` changes nothing. PEFT's layers do not do so once an adapter
exists; its helper ``replace_lora_weights_loftq`` does, and is not for adapters with a mixer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from .config import MixerSetting
from .errors import UserError
from .fused import autocast_dtype, fused_linear
from .mixer import fold_into_a, fold_into_b, init_mixer, seeded_generator
from .peft_seam import LORA_LAYERS, REFUSED_LAYERS, Embedding, Linear, LoraLayer, MultiheadAttention, layer_kind

# ---------------------------------------------------------------------------------- linear layers and convolutions


class _Mixed:
    """A module whose weight is the product of the stored parameter ``raw`` and the mixer."""

    _fold = staticmethod(fold_into_b)

    @property
    def weight(self) -> torch.Tensor:
        return self._fold(self.raw, self.mixer)


class MixedLinear(_Mixed, nn.Linear):
    """B of a linear layer: ``raw`` (out, r), ``mixer`` (r, r)."""


class MixedConv1d(_Mixed, nn.Conv1d):
    """B of a convolution: ``raw`` (out, r, 1), ``mixer`` (r, r)."""


class MixedConv2d(_Mixed, nn.Conv2d):
    """B of a convolution: ``raw`` (out, r, 1, 1), ``mixer`` (r, r)."""


class MixedConv3d(_Mixed, nn.Conv3d):
    """B of a convolution: ``raw`` (out, r, 1, 1, 1), ``mixer`` (r, r)."""


class _MixedIntoA(_Mixed):
    _fold = staticmethod(fold_into_a)


class MixedConv1dA(_MixedIntoA, nn.Conv1d):
    """A of a grouped convolution: ``raw`` (r, in, k), ``mixer`` (r, r)."""


class MixedConv2dA(_MixedIntoA, nn.Conv2d):
    """A of a grouped convolution: ``raw`` (r, in, k, k), ``mixer`` (r, r)."""


class MixedConv3dA(_MixedIntoA, nn.Conv3d):
    """A of a grouped convolution: ``raw`` (r, in, k, k, k), ``mixer`` (r, r)."""


_MIXED_B = {nn.Linear: MixedLinear, nn.Conv1d: MixedConv1d, nn.Conv2d: MixedConv2d, nn.Conv3d: MixedConv3d}
_MIXED_A = {nn.Conv1d: MixedConv1dA, nn.Conv2d: MixedConv2dA, nn.Conv3d: MixedConv3dA}


# --------------------------------------------------------------------------------------------------- training faster

# What autocast casts; it leaves float64 alone.
_AUTOCAST = frozenset({torch.float32, torch.float16, torch.bfloat16})
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class FusedLinear(Linear):
    """PEFT's LoRA layer of an ``nn.Linear``, which trains an adapter with a mixer by :func:`~.fused.fused_linear`.

    Everything else goes PEFT's way.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        name = None if args or kwargs else self.fusable_adapter(x)
        if name is None:
            return super().forward(x, *args, **kwargs)
        base, A, B, dropout = self._parts(name)
        p, scaling = _drop_rate(dropout), self.scaling[name]
        return fused_linear(x, base.weight, base.bias, A.weight, B.raw, B.mixer, scaling=scaling, p=p)

    def _parts(self, name: str) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
        return self.base_layer, self.lora_A[name], self.lora_B[name], self.lora_dropout[name]

    def fusable_adapter(self, x: torch.Tensor) -> str | None:
        """The adapter with which the layer computes what ``fused_linear`` does, and nothing else; or None.

        None in evaluation, where a folded adapter is to give the same bits; without an active adapter or with several;
        for one that has no mixer, a bias, or a variant of LoRA such as DoRA; if the base trains, or is more than an
        ``nn.Linear``; if a part has hooks, a ``forward`` of its own or parameters that live elsewhere (ZeRO-3, FSDP,
        offloading); for mixed dtypes outside autocast; and under compilers and transforms of functions, which look
        into PEFT's operations.
        """
        if not self.training or self.disable_adapters or self.merged or self.lora_variant:
            return None
        names = [name for name in self.active_adapters if name in self.lora_A]
        if len(names) != 1 or self.lora_bias[names[0]] or _transformed() or _has_any_global_hook():
            return None
        base, A, B, dropout = parts = self._parts(names[0])
        p = _drop_rate(dropout)
        if not torch.is_grad_enabled() and not p:
            # Inference. With dropout it may be checkpointing's first pass, whose second has to draw the same mask.
            return None
        if type(base) is not nn.Linear or type(A) is not nn.Linear or type(B) is not MixedLinear:
            return None
        if type(dropout) not in (nn.Dropout, nn.Identity) or p >= 1:
            return None
        frozen = [base.weight] if base.bias is None else [base.weight, base.bias]
        if any(tensor.requires_grad for tensor in frozen) or not all(map(_is_bare, parts)):
            return None
        return names[0] if _agree([x, A.weight, B.raw, B.mixer, *frozen]) else None


def _drop_rate(dropout: nn.Module) -> float:
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def _transformed() -> bool:
    """Whether something looks at the operations themselves: a compiler, or a transform of functions."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def _is_bare(module: nn.Module) -> bool:
    """Whether calling a module is no more than its class's ``forward``."""
    return "forward" not in module.__dict__ and not any(getattr(module, hooks) for hooks in _HOOKS)


def _agree(tensors: list[torch.Tensor]) -> bool:
    """Whether the tensors are whole, in one place, and of dtypes that meet in one."""
    x = tensors[0]
    if any(type(tensor) not in (torch.Tensor, nn.Parameter) or hasattr(tensor, "ds_id") for tensor in tensors[1:]):
        return False
    dtypes = {tensor.dtype for tensor in tensors}
    if not (len(dtypes) == 1 if autocast_dtype(x.device) is None else dtypes <= _AUTOCAST):
        return False
    return x.is_floating_point() and all(tensor.device == x.device for tensor in tensors)


# ------------------------------------------------------------------------------------------------------- embeddings


class MixerDict(nn.ParameterDict):
    """Mixers (r, r) by adapter: learned ones are parameters, frozen ones persistent buffers.

    PEFT turns the gradients of ``items()`` on and off with the adapter, so that frozen mixers are not among them;
    they are looked up, saved, moved and deleted like the others.
    """

    def set_frozen(self, name: str, M: torch.Tensor) -> None:
        if name in self:
            del self[name]
        self.register_buffer(name, M)
        self._keys[name] = None

    def __setitem__(self, name: str, M: Any) -> None:
        if name in self._buffers:
            self._buffers[name] = M
        else:
            super().__setitem__(name, M)

    def items(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, self[name]) for name in self if name in self._parameters)

    def values(self) -> Iterator[nn.Parameter]:
        return (M for _, M in self.items())


class _Products:
    """B @ M (out, r) by adapter, or B where the adapter has no mixer; computed when asked for."""

    def __init__(self, layer: MixedEmbedding) -> None:
        self.layer = layer

    def __getitem__(self, name: str) -> torch.Tensor:
        B, mixers = self.layer.lora_embedding_B[name], self.layer.lora_mixer
        return fold_into_b(B, mixers[name]) if name in mixers else B


class _WithProducts:
    """An embedding layer as PEFT's methods should see it: ``lora_embedding_B`` holds B @ M, the rest is the layer's.

    A view rather than a change of the layer while a method runs, which a second thread would run into.
    """

    def __init__(self, layer: MixedEmbedding) -> None:
        self.layer = layer
        self.lora_embedding_B = _Products(layer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)


class MixedEmbedding(Embedding):
    """PEFT's LoRA embedding with mixers in ``lora_mixer``; adapters without one are plain LoRA."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return Embedding.forward(_WithProducts(self), x, *args, **kwargs)

    def _mixed_batch_forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return Embedding._mixed_batch_forward(_WithProducts(self), x, *args, **kwargs)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        return Embedding.get_delta_weight(_WithProducts(self), adapter)


@contextmanager
def folded_embeddings(model: nn.Module, adapters: list[str]) -> Iterator[None]:
    """Within the context, the embeddings' stored B of these adapters is B @ M and their M is I.

    For code of PEFT that reads ``lora_embedding_B`` from outside of the layer. The function that the model computes
    stays the same up to rounding; afterwards everything is as before, bit by bit.
    """
    saved = []
    try:
        for layer in model.modules():
            if not isinstance(layer, MixedEmbedding):
                continue
            for name in adapters:
                if name in layer.lora_mixer:
                    B, M = layer.lora_embedding_B[name], layer.lora_mixer[name]
                    saved += [(B, B.data), (M, M.data)]
                    B.data = fold_into_b(B.data, M.data)
                    M.data = torch.eye(len(M), dtype=M.dtype, device=M.device)
        yield
    finally:
        for tensor, data in saved:
            tensor.data = data


# -------------------------------------------------------------------------------------------------------- attaching


def attach_mixer(layer: LoraLayer, adapter_name: str, setting: MixerSetting, module_name: str) -> None:
    """Puts a new mixer into an adapter that PEFT has just created in a layer.

    Args:
        setting: which mixer; one that exists.
        module_name: name of the adapted module in the base model; decides, with ``mixer_seed``, what is drawn.

    Raises:
        UserError: a mixer cannot go into this kind of layer.
    """
    check_layer(layer, module_name)
    if isinstance(layer, Embedding):
        _attach_to_embedding(layer, adapter_name, setting, module_name)
        return
    # A grouped convolution's B is (out, r / groups, ..): no column for each of the r ranks.
    grouped = getattr(layer.lora_B[adapter_name], "groups", 1) > 1
    host, mixed = (layer.lora_A, _MIXED_A) if grouped else (layer.lora_B, _MIXED_B)
    _attach_to_module(host[adapter_name], mixed, layer.r[adapter_name], setting, module_name)
    if type(layer) is Linear and type(layer.base_layer) is nn.Linear:
        layer.__class__ = FusedLinear
    if isinstance(layer, MultiheadAttention):
        # PEFT's layer adapts the input projection itself, and the output projection by a layer of its own, whose rank
        # and alpha are the layer's; so is the mixer.
        attach_mixer(layer.base_layer.out_proj, adapter_name, setting, f"{module_name}.out_proj")


def check_layer(layer: LoraLayer, module_name: str) -> None:
    """Refuses kinds of layers that are not known to do all their work through ``lora_A`` and ``lora_B``.

    Raises:
        UserError: see above.
    """
    kind = layer_kind(layer)
    if kind in LORA_LAYERS or isinstance(layer, FusedLinear | MixedEmbedding):
        return
    reason = REFUSED_LAYERS.get(kind, "whether all of its code goes through lora_A and lora_B is not known")
    raise UserError(
        f"{module_name}: a mixer cannot go into a layer of type {'.'.join(kind)}: {reason}; leave the module out of "
        "target_modules, or give it mixer='identity', which is plain LoRA, in mixer_pattern"
    )


def _new_mixer(r: int, like: torch.Tensor, setting: MixerSetting, module_name: str) -> torch.Tensor:
    generator = None if setting.seed is None else seeded_generator(setting.seed, module_name)
    return init_mixer(setting.start, r, dtype=like.dtype, device=like.device, generator=generator)


def _attach_to_module(
    host: nn.Module, mixed: dict[type, type], r: int, setting: MixerSetting, module_name: str
) -> None:
    if type(host) not in mixed:
        raise UserError(
            f"{module_name}: a mixer cannot go into {type(host).__module__}.{type(host).__qualname__}, only into "
            f"{', '.join(f'nn.{cls.__name__}' for cls in mixed)} themselves; leave the module out of target_modules"
        )
    raw = host._parameters.pop("weight")
    host.__class__ = mixed[type(host)]
    host.register_parameter("raw", raw)
    M = _new_mixer(r, raw, setting, module_name)
    if setting.trains:
        # Not always True: an adapter that is added while another is active starts frozen.
        host.register_parameter("mixer", nn.Parameter(M, requires_grad=raw.requires_grad))
    else:
        host.register_buffer("mixer", M)


def _attach_to_embedding(layer: Embedding, adapter_name: str, setting: MixerSetting, module_name: str) -> None:
    if type(layer) is Embedding:
        layer.__class__ = MixedEmbedding
        layer.lora_mixer = MixerDict()
        layer.adapter_layer_names = (*layer.adapter_layer_names, "lora_mixer")
    B = layer.lora_embedding_B[adapter_name]
    M = _new_mixer(layer.r[adapter_name], B, setting, module_name)
    if setting.trains:
        layer.lora_mixer[adapter_name] = nn.Parameter(M, requires_grad=B.requires_grad)
    else:
        layer.lora_mixer.set_frozen(adapter_name, M)

"""Every internal of PEFT that this package relies on, in one place.

PEFT promises stability for its public functions only. What is used beyond them:

    internal                                    what for
    ------------------------------------------  -----------------------------------------------------------------------
    PeftType (an enum)                          gets the member MOSLORA: transformers reads ``peft_type.value``, and
                                                a process without this package fails on the name instead of loading
                                                the adapter as LoRA without its mixers
    peft.mapping.PEFT_TYPE_TO_*_MAPPING         the configuration, the tuner and the key prefix of that type
    LoraModel._create_and_replace               the one place where a layer gets an adapter; extended by the mixer
    LoraModel._check_new_adapter_config         where the configuration of a new adapter is checked
    LoraModel.inject_adapter,                   where all modules of a new adapter are known by name, which patterns
      targeted_module_names                     that match none of them are held against
    LoraModel.subtract_mutated_init             refused: it would difference mixers
    LoraModel._get_adapter_state_dict,          inherited: what LoRA saves beside A and B (biases, DoRA's magnitudes)
      _remap_adapter_state_dict_for_load        and under which names; PEFT 0.20 asks for the type LORA instead
    LoraLayer.lora_A, lora_B (ModuleDict)       hold, by adapter, the module of A or B; the mixer goes inside one
    LoraLayer.lora_embedding_A, _B              the same for embeddings, as bare parameters
    LoraLayer.adapter_layer_names               attributes whose entries follow the adapter: trained, saved, deleted
    LoraLayer.set_adapter, set_requires_grad    toggle the gradients of ``items()`` of these attributes
    Embedding.forward, _mixed_batch_forward,    read ``self.lora_embedding_B`` and call nothing through ``super()``
      get_delta_weight
    Linear.forward                              in training computes base_layer(x) + scaling lora_B(lora_A(dropout(x)))
                                                unless an attribute says otherwise that FusedLinear looks at
    MultiheadAttention.base_layer.out_proj      is a LoRA layer of its own inside the layer
    the layers of LORA_LAYERS                   read ``lora_B[adapter].weight`` or call ``lora_B[adapter](x)``, and
                                                never write to either after creation

``tests/moslora_core/test_peft_seam.py`` holds each of these to its word. The versions of PEFT for which that was
checked stand in ``moslora_core/versions.py``.
"""

from __future__ import annotations

from peft import LoraModel, PeftConfig, PeftType
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.lora.layer import Embedding, Linear, LoraLayer, MultiheadAttention

__all__ = ["LORA_LAYERS", "MOSLORA", "Embedding", "Linear", "LoraLayer", "LoraModel", "MultiheadAttention", "register"]

# LoRA layers that work with a mixer, by module below ``peft.tuners.lora`` and class. By name, because most of them are
# defined only where their quantisation library is installed.
LORA_LAYERS: frozenset[tuple[str, str]] = frozenset(
    {
        ("layer", "Linear"),  # nn.Linear and transformers' Conv1D
        ("layer", "Conv1d"),
        ("layer", "Conv2d"),
        ("layer", "Conv3d"),
        ("layer", "Embedding"),
        ("layer", "MultiheadAttention"),
        ("bnb", "Linear4bit"),
        ("bnb", "Linear8bitLt"),
        ("gptq", "GPTQLoraLinear"),
        ("awq", "AwqLoraLinear"),
        ("aqlm", "AqlmLoraLinear"),
        ("eetq", "EetqLoraLinear"),
        ("hqq", "HqqLoraLinear"),
        ("inc", "IncLoraLinear"),
        ("torchao", "TorchaoLoraLinear"),
        ("te", "TeLinear"),
    }
)

# Layers that PEFT knows and that a mixer cannot go into.
REFUSED_LAYERS: dict[tuple[str, str], str] = {
    ("layer", "ParamWrapper"): "it adapts a bare nn.Parameter, and a mixer is part of a module",
    ("tp_layer", "LoraParallelLinear"): "Megatron splits A or B over processes and writes to B in place",
}


def layer_kind(layer: LoraLayer) -> tuple[str, str]:
    """Name of a layer's class as in ``LORA_LAYERS``; classes of other packages keep their full module name."""
    return type(layer).__module__.removeprefix("peft.tuners.lora."), type(layer).__qualname__


def _add_peft_type(name: str) -> PeftType:
    """A new member of the enum ``PeftType``, or the existing one of that name.

    Python offers no public way to extend an enum. These are the attributes that its own metaclass sets.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member


MOSLORA = _add_peft_type("MOSLORA")


def register(config_cls: type[PeftConfig], tuner_cls: type[LoraModel]) -> None:
    """Makes PEFT know the method. Repeating it changes nothing.

    ``peft.utils.register_peft_method`` does the same for methods of PEFT itself; it refuses names outside the enum,
    and the prefix ``lora_``, which LoRA has already.
    """
    PEFT_TYPE_TO_CONFIG_MAPPING[MOSLORA] = config_cls
    PEFT_TYPE_TO_TUNER_MAPPING[MOSLORA] = tuner_cls
    PEFT_TYPE_TO_PREFIX_MAPPING[MOSLORA] = tuner_cls.prefix

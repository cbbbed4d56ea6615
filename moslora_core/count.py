"""Counts before any training: parameters, memory and optimiser steps, on the meta device, with nothing downloaded.

A model on the meta device has shapes and no storage, so that an 8B model and its adapter are counted in a second.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .errors import UserError

# Bits of a stored base weight. NF4 in blocks of 64 with double quantisation: 4 + 8 / 64 + 32 / (64 * 256)
# (Dettmers et al., QLoRA, section 3).
BITS = {"float32": 32.0, "bfloat16": 16.0, "float16": 16.0, "int8": 8.0, "nf4": 4.0 + 8 / 64 + 32 / (64 * 256)}
_FLOATS = ("float32", "bfloat16", "float16")

# ------------------------------------------------------------------------------------------------------- parameters


@dataclass(frozen=True)
class Count:
    """Parameters of a base model and its adapter.

    Attributes:
        base: parameters of the model without the adapter; tied weights count once.
        adapter: parameters that the adapter adds, trainable or not, frozen mixers included.
        trainable: parameters that are trained.
        mixer: those of ``adapter`` that are mixers, r^2 for each adapted module that has one.
        modules: number of adapted modules.
        adapted_inputs: sum of the input widths of the adapted modules; what dropout on the adapter's input copies.
    """

    base: int
    adapter: int
    trainable: int
    mixer: int = 0
    modules: int = 0
    adapted_inputs: int = 0

    @property
    def share(self) -> float:
        """Trainable parameters over all of them, base and adapter, in [0, 1]."""
        total = self.base + self.adapter
        return self.trainable / total if total else 0.0


def meta_causal_lm(config: Any) -> nn.Module:
    """A decoder language model of a transformers configuration on the meta device.

    Args:
        config: a ``PreTrainedConfig``, or its dictionary with ``model_type``.

    Raises:
        UserError: transformers does not know the model type, or it is no causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if isinstance(config, Mapping):
        values = dict(config)
        try:
            config = AutoConfig.for_model(values.pop("model_type"), **values)
        except (KeyError, ValueError) as error:
            raise UserError(f"model configuration: unknown or missing model_type ({_first_line(error)})") from None
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise UserError(f"model configuration: not a causal language model ({_first_line(error)})") from None


def count_parameters(model: Any, peft_config: PeftConfig | None) -> Count:
    """Counts what a PEFT configuration would add to a model, without touching the model or allocating weights.

    Args:
        model: an ``nn.Module`` (copied to the meta device), a function that builds one (called under
            ``torch.device("meta")``), or a transformers configuration of a causal language model, as object or
            dictionary. Weights packed by a quantiser count as stored; count the unquantised model instead.
        peft_config: any PEFT method that adds modules; None counts full fine-tuning.

    Raises:
        UserError: PEFT refuses the configuration on this model, for example for want of a target module.
    """
    base_model = _on_meta(model)
    base = sum(parameter.numel() for parameter in base_model.parameters())
    if peft_config is None:
        return Count(base=base, adapter=0, trainable=base)
    # PEFT resolves target modules in the configuration that it is given; the caller's stays as it is.
    peft_config = copy.deepcopy(peft_config)
    peft_config.inference_mode = False
    try:
        with torch.device("meta"):
            adapted = get_peft_model(base_model, peft_config, low_cpu_mem_usage=True)
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"{peft_config.peft_type}: {_first_line(error)}") from None
    parameters = dict(adapted.named_parameters())
    # Frozen mixers are buffers, which PEFT's own count of parameters leaves out.
    buffers = {name: buffer for name, buffer in adapted.named_buffers() if _is_mixer(name)}
    layers = [module for module in adapted.modules() if isinstance(module, BaseTunerLayer)]
    return Count(
        base=base,
        adapter=_numel(parameters) + _numel(buffers) - base,
        trainable=_numel({name: p for name, p in parameters.items() if p.requires_grad}),
        mixer=_numel({name: p for name, p in (parameters | buffers).items() if _is_mixer(name)}),
        modules=len(layers),
        adapted_inputs=sum(int(getattr(layer, "in_features", 0) or 0) for layer in layers),
    )


def _on_meta(model: Any) -> nn.Module:
    if isinstance(model, nn.Module):
        # deepcopy takes what the memo holds in place of a copy: the structure is copied, the storage is not.
        memo: dict[int, torch.Tensor] = {}
        for parameter in model.parameters():
            memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for buffer in model.buffers():
            memo[id(buffer)] = torch.empty_like(buffer, device="meta")
        return copy.deepcopy(model, memo)
    if isinstance(model, Callable):
        with torch.device("meta"):
            return model()
    return meta_causal_lm(model)


def _numel(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def _is_mixer(name: str) -> bool:
    return name.endswith(".mixer") or ".lora_mixer." in name


# ----------------------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True)
class DecoderShape:
    """Widths of a decoder language model of LLaMA's kind (gated MLP, grouped-query attention)."""

    hidden: int
    layers: int
    intermediate: int
    vocabulary: int
    heads: int
    kv_width: int
    tied: bool = False

    @classmethod
    def from_config(cls, config: Any) -> DecoderShape:
        """From a transformers configuration, object or dictionary; of a multimodal one, its ``text_config``."""
        if isinstance(config, Mapping):
            get = config.get
        else:
            config = getattr(config, "text_config", None) or config

            def get(key: str, default: Any = None) -> Any:
                return getattr(config, key, default)

        try:
            hidden, heads = int(get("hidden_size")), int(get("num_attention_heads"))
            head_width = int(get("head_dim") or hidden // heads)
            return cls(
                hidden=hidden,
                layers=int(get("num_hidden_layers")),
                intermediate=int(get("intermediate_size")),
                vocabulary=int(get("vocab_size")),
                heads=heads,
                kv_width=head_width * int(get("num_key_value_heads") or heads),
                tied=bool(get("tie_word_embeddings", False)),
            )
        except TypeError:
            raise UserError(
                "model configuration: not a decoder language model; expected hidden_size, num_attention_heads, "
                "num_hidden_layers, intermediate_size and vocab_size"
            ) from None


@dataclass(frozen=True)
class MemoryEstimate:
    """Training memory of one device in bytes, by part; ``activations`` and ``logits`` are None if not estimated."""

    weights: int
    adapter: int
    gradients: int
    optimiser: int
    activations: int | None = None
    logits: int | None = None

    @property
    def total(self) -> int:
        return sum(value or 0 for value in asdict(self).values())


def estimate_memory(
    count: Count,
    *,
    dtype: str = "bfloat16",
    adapter_dtype: str = "float32",
    decoder: DecoderShape | None = None,
    batch: int = 1,
    sequence: int = 1,
    gradient_checkpointing: bool = False,
    attention: str = "sdpa",
    dropout: float = 0.0,
    zero_stage: int = 0,
    devices: int = 1,
) -> MemoryEstimate:
    """Estimates the training memory of one device: an order of magnitude for choosing a batch.

    Weights take their dtype; under int8 and nf4 embeddings and output head stay in 16 bits. Gradients have the
    adapter's dtype, AdamW keeps two float32 states a trained parameter. Activations of a decoder, in elements of the
    compute dtype (float32 if the base is, else 16 bits), with hidden h, intermediate f, key-value width k, adapted
    input widths sum(in) over all layers:

        one layer, a token        6 h + 2 k + 4 f          in and out of both norms, q k v, attention, four of the MLP
          attention="eager"       + 2 * heads * sequence   scores and probabilities
          dropout > 0             + sum(in) / layers       a copy of each adapted input, and a byte of mask
        no checkpointing          layers * (one layer)
        gradient checkpointing    layers * h + (one layer) inputs of all layers, one layer recomputed
        logits, a token           vocabulary * (compute bytes + 8)   and their float32 copy and its gradient

    It follows Korthikanti et al., "Reducing activation recomputation in large transformer models" (2022), section 4,
    rewritten for gated MLPs and grouped-query attention. The frameworks' own buffers, allocator fragmentation and the
    rank-r activations inside the adapter are left out.

    Args:
        decoder: widths of the model; without it activations and logits are not estimated.
        batch: examples on the device in one forward pass.
        sequence: tokens an example.
        zero_stage: what ZeRO spreads over ``devices``: 0 nothing, 1 the optimiser's states, 2 gradients too, 3 weights
            and adapter too (Rajbhandari et al., ZeRO, section 3).

    Raises:
        UserError: an unknown dtype, attention or stage, or a size below 1.
    """
    if dtype not in BITS:
        raise UserError(f"dtype is {dtype!r}; expected one of {', '.join(BITS)}")
    if adapter_dtype not in _FLOATS:
        raise UserError(f"adapter_dtype is {adapter_dtype!r}; expected one of {', '.join(_FLOATS)}")
    if attention not in ("sdpa", "eager"):
        raise UserError(f"attention is {attention!r}; expected sdpa or eager")
    if zero_stage not in (0, 1, 2, 3):
        raise UserError(f"zero_stage is {zero_stage!r}; expected 0, 1, 2 or 3")
    for name, value in (("batch", batch), ("sequence", sequence), ("devices", devices)):
        if value < 1:
            raise UserError(f"{name} is {value}; expected at least 1")
    unquantised = 0
    if decoder is not None and dtype not in _FLOATS:
        unquantised = min(count.base, decoder.vocabulary * decoder.hidden * (1 if decoder.tied else 2))
    adapter_bytes = BITS[adapter_dtype] / 8
    parts = {
        "weights": round((count.base - unquantised) * BITS[dtype] / 8) + 2 * unquantised,
        "adapter": round(count.adapter * adapter_bytes),
        "gradients": round(count.trainable * adapter_bytes),
        "optimiser": 8 * count.trainable,
    }
    first_sharded = {"optimiser": 1, "gradients": 2, "weights": 3, "adapter": 3}
    parts |= {name: -(-parts[name] // devices) for name, stage in first_sharded.items() if zero_stage >= stage}
    if decoder is None:
        return MemoryEstimate(**parts)
    compute = 4 if dtype == "float32" else 2
    tokens = batch * sequence
    layer = compute * (6 * decoder.hidden + 2 * decoder.kv_width + 4 * decoder.intermediate)
    if attention == "eager":
        layer += compute * 2 * decoder.heads * sequence
    if dropout > 0:
        layer += (compute + 1) * count.adapted_inputs // max(1, decoder.layers)
    layers = decoder.layers * layer
    if gradient_checkpointing:
        layers = compute * decoder.layers * decoder.hidden + layer
    return MemoryEstimate(**parts, activations=tokens * layers, logits=tokens * decoder.vocabulary * (compute + 2 * 4))


# ------------------------------------------------------------------------------------------------------------ steps


def optimiser_steps(examples: int, global_batch: int, epochs: float, drop_last: bool = False) -> int:
    """Optimiser steps of a training: ceil(epochs * steps of one epoch), as transformers' Trainer counts them.

    Args:
        drop_last: leave out an epoch's last, incomplete batch.

    Raises:
        UserError: a size is not positive, or ``drop_last`` leaves no batch at all.
    """
    for name, value in (("examples", examples), ("global_batch_size", global_batch), ("epochs", epochs)):
        if value <= 0:
            raise UserError(f"{name} is {value}; expected more than 0")
    per_epoch = examples // global_batch if drop_last else math.ceil(examples / global_batch)
    if per_epoch == 0:
        raise UserError(f"{examples} examples make no batch of {global_batch}, and drop_last leaves out the rest")
    return math.ceil(epochs * per_epoch)


def accumulation_steps(global_batch: int, per_device: int, world_size: int = 1) -> int:
    """Gradient accumulation that makes up a global batch: global_batch / (per_device * world_size).

    Raises:
        UserError: a size is below 1, or the division leaves a rest.
    """
    sizes = {"global_batch_size": global_batch, "per_device_batch_size": per_device, "world_size": world_size}
    for name, value in sizes.items():
        if value < 1:
            raise UserError(f"{name} is {value}; expected at least 1")
    step = per_device * world_size
    if global_batch % step:
        raise UserError(
            f"global_batch_size {global_batch} is not a multiple of per_device_batch_size {per_device} x world_size "
            f"{world_size} = {step}: {global_batch} = {global_batch // step} x {step} + {global_batch % step}"
        )
    return global_batch // step


# ---------------------------------------------------------------------------------------------------------- dry run


@dataclass(frozen=True)
class DryRun:
    """What a run would be, for ``--dry-run``.

    Attributes:
        name: the run, for example ``commonsense_reasoning paper moslora``.
        steps: optimiser steps; None where nothing is trained by steps.
        details: further lines, name -> value.
    """

    name: str
    count: Count
    memory: MemoryEstimate | None = None
    steps: int | None = None
    global_batch: int | None = None
    accumulation: int | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        memory = None if self.memory is None else asdict(self.memory) | {"total": self.memory.total}
        return {
            "name": self.name,
            "parameters": asdict(self.count) | {"share": self.count.share},
            "memory_bytes": memory,
            "optimiser_steps": self.steps,
            "global_batch_size": self.global_batch,
            "accumulation_steps": self.accumulation,
            "details": dict(self.details),
        }

    def lines(self) -> list[str]:
        """Aligned lines for a terminal."""
        count = self.count
        rows = [
            ("trainable parameters", f"{count.trainable:,}"),
            ("share of all parameters", f"{100 * count.share:.4f} %"),
            ("adapter parameters", f"{count.adapter:,} (mixers {count.mixer:,}) on {count.modules:,} modules"),
            ("base parameters", f"{count.base:,}"),
        ]
        if self.memory is not None:
            parts = asdict(self.memory)
            estimated = [f"{name} {_gib(value)}" for name, value in parts.items() if value is not None]
            left_out = [name for name, value in parts.items() if value is None]
            total = _gib(self.memory.total) + (f" without {' and '.join(left_out)}" if left_out else "")
            rows += [("estimated memory", total), ("", ", ".join(estimated))]
        if self.steps is not None:
            rows.append(("optimiser steps", f"{self.steps:,}"))
        if self.global_batch is not None:
            accumulated = "" if self.accumulation is None else f" (accumulation {self.accumulation})"
            rows.append(("global batch size", f"{self.global_batch}{accumulated}"))
        rows += [(name.replace("_", " "), str(value)) for name, value in self.details.items()]
        width = max(len(name) for name, _ in rows)
        return [f"dry run: {self.name}", *(f"  {name:<{width}}  {value}" for name, value in rows)]


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]

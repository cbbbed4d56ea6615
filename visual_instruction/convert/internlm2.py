"""InternLM2 in Llama's layout: the same computation under other names, so that no remote code is needed.

InternLM2 fuses the projections to queries, keys and values into one matrix, in groups: for each key-value head the
rows of its query heads, then those of its key, then those of its value ("(h gs d) dim" with gs = 2 + query heads per
key-value head, in its modelling code's einops notation). Everything else is renamed. Its dynamic scaling of the rotary
base is transformers' ``dynamic`` and changes nothing up to ``max_position_embeddings``; beyond, InternLM2's code keeps
the base of the longest sequence it has met, and transformers goes back to the first for a shorter one.

**Against the paper.** The published InternLM2 adapters sit on the fused matrix: one A and one B for queries, keys and
values together, r (4096 + 6144) parameters a layer. On the converted model the three are adapted apart, with an A
each: 3 r 4096 + r (4096 + 1024 + 1024). With r = 512 that is 5.2 and 9.4 million parameters a layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from moslora_core.adapter_files import check_output, new_folder
from moslora_core.errors import UserError
from moslora_core.typed import build

from .checkpoint import CONFIG_FILE, Checkpoint, ShardWriter, open_checkpoint, parse_config, read_config
from .layout import shapes_of, write_generation_config
from .tokenizer import convert_tokenizer

MODEL_TYPE = "internlm2"
_Size = Annotated[int, 1]

# InternLM2's names and Llama's.
_OUTSIDE_LAYERS = {
    "model.tok_embeddings": "model.embed_tokens",
    "model.norm": "model.norm",
    "output": "lm_head",
}
_IN_LAYERS = {
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_FUSED = "attention.wqkv"
_QKV = tuple(f"self_attn.{part}_proj" for part in "qkv")
_LAYER = re.compile(r"(?P<layer>model\.layers\.\d+)\.(?P<module>.+)\.(?P<leaf>weight|bias)")
# Under the same name in both configurations.
_SAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
)


@dataclass(frozen=True)
class _Sizes:
    """What InternLM2's config.json has to say, beside what Llama's own checks find."""

    vocab_size: _Size
    hidden_size: _Size
    intermediate_size: _Size
    num_hidden_layers: _Size
    num_attention_heads: _Size
    num_key_value_heads: _Size | None = None
    rope_theta: Annotated[float, 1] = 10000


def convert_internlm2(source: Path, out: Path) -> Path:
    """Writes an InternLM2 folder (safetensors) as a folder of LlamaForCausalLM with its tokenizer.

    Args:
        out: folder to write, new or empty; it appears complete or not at all.

    Raises:
        UserError: ``source`` holds no InternLM2, is damaged or incomplete, holds pickled weights, has head counts that
            do not divide or a scaling of rotary positions that Llama has not; or ``out`` is not empty.
    """
    check_output(out)
    config = convert_config(read_config(source, MODEL_TYPE), source / CONFIG_FILE)
    checkpoint = open_checkpoint(source)
    checkpoint.check(_fused_shapes(shapes_of(LlamaForCausalLM, config, source), config))
    with new_folder(out) as folder:
        writer = ShardWriter(folder)
        for name, tensor in _converted(checkpoint, config):
            if name == "model.embed_tokens.weight":
                config.dtype = tensor.dtype
            writer.add(name, tensor)
        writer.close()
        config.save_pretrained(folder)
        convert_tokenizer(source, folder)
        write_generation_config(source, config, folder)
    return out


def convert_config(values: dict[str, Any], path: Path) -> LlamaConfig:
    """Llama's configuration from InternLM2's (the JSON object of ``path``).

    Raises:
        UserError: a value is missing, head counts do not divide, or an unknown scaling of rotary positions.
    """
    sizes = build(_Sizes, values, str(path), others=True)
    heads, width = sizes.num_attention_heads, sizes.hidden_size
    key_value_heads = sizes.num_key_value_heads or heads
    if heads % key_value_heads or width % heads:
        raise UserError(
            f"{path}: hidden_size {width}, num_attention_heads {heads}, num_key_value_heads {key_value_heads}; "
            "expected each to be a multiple of the next"
        )
    rope = {"rope_type": "default", "rope_theta": sizes.rope_theta}
    if (scaling := values.get("rope_scaling")) is not None:
        kind = scaling.get("type", scaling.get("rope_type")) if isinstance(scaling, dict) else scaling
        if kind not in ("dynamic", "linear"):
            raise UserError(f"{path}: rope_scaling is {scaling!r}; expected type dynamic or linear, and a factor")
        factor = build(Annotated[float, 1], scaling.get("factor"), str(path), "rope_scaling.factor")
        rope |= {"rope_type": kind, "factor": float(factor)}
    same = {name: values[name] for name in _SAME if name in values}
    bias = bool(values.get("bias", False))
    same |= {"num_key_value_heads": key_value_heads, "attention_bias": bias, "rope_parameters": rope}
    same["architectures"] = ["LlamaForCausalLM"]
    return parse_config(LlamaConfig, same, path)


def split_fused(fused: torch.Tensor, heads: int, key_value_heads: int) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values of InternLM2's ``wqkv``, weight or bias.

    Args:
        fused: (key-value heads x (group + 2) x head size, ...) with group = heads / key-value heads.

    Returns:
        (heads x head size, ...), and twice (key-value heads x head size, ...).
    """
    group = heads // key_value_heads
    rows = fused.unflatten(0, (key_value_heads, group + 2, -1))
    queries, keys, values = rows.split((group, 1, 1), dim=1)
    return queries.flatten(0, 2), keys.flatten(0, 2), values.flatten(0, 2)


def _fused_shapes(shapes: Mapping[str, tuple[int, ...]], config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """InternLM2's names and shapes of a model with Llama's ``shapes``."""
    outside = {ours: theirs for theirs, ours in _OUTSIDE_LAYERS.items()}
    inside = {ours: theirs for theirs, ours in _IN_LAYERS.items()}
    rows = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    fused = {}
    for name, shape in shapes.items():
        if (match := _LAYER.fullmatch(name)) is None:
            module, leaf = name.rsplit(".", 1)
            fused[f"{outside[module]}.{leaf}"] = shape
        elif match["module"] in _QKV:
            fused[f"{match['layer']}.{_FUSED}.{match['leaf']}"] = (rows, *shape[1:])
        else:
            fused[f"{match['layer']}.{inside[match['module']]}.{match['leaf']}"] = shape
    return fused


def _converted(checkpoint: Checkpoint, config: LlamaConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Llama's names and tensors of a checked InternLM2, in the order of its files."""
    for name, tensor in checkpoint.tensors("InternLM2"):
        if (match := _LAYER.fullmatch(name)) is None:
            module, leaf = name.rsplit(".", 1)
            yield f"{_OUTSIDE_LAYERS[module]}.{leaf}", tensor
        elif match["module"] == _FUSED:
            parts = split_fused(tensor, config.num_attention_heads, config.num_key_value_heads)
            for module, part in zip(_QKV, parts, strict=True):
                yield f"{match['layer']}.{module}.{match['leaf']}", part
        else:
            yield f"{match['layer']}.{_IN_LAYERS[match['module']]}.{match['leaf']}", tensor

"""Exact conversion of MoSLoRA adapters to plain LoRA: the mixer is multiplied into B, and is gone.

delta_W = scaling * B @ M @ A is the update of a plain LoRA with B' = B @ M (equally, with A' = M @ A). A folded
adapter therefore loads wherever LoRA does: stock PEFT, diffusers, vLLM, converters for llama.cpp.

    python -m moslora_core.fold IN OUT      # a saved adapter folder; no base model is needed

**Exactness.** The forward pass of a MoSLoRA layer multiplies by the product B @ M (M @ A for grouped convolutions).
Folding stores that product, computed by the same function from the same tensors in the same dtype. In float32 the
folded adapter's outputs equal the unfolded model's bit by bit. In bfloat16 or float16 they do too as long as the
adapter runs in that dtype. PEFT by default raises 16-bit adapters to float32 when it loads them; the unfolded adapter
then multiplies in float32, to which ``dtype=torch.float32`` (``--dtype float32``) is the exact counterpart. Under
autocast, or on another device than the fold's, equality is up to rounding.
"""

from __future__ import annotations

import copy
import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from .adapter_files import PREFIX, check_output, pattern_value, read_config, read_weights, write_adapter
from .arguments import Parser
from .config import MixerSetting, MoSLoraConfig
from .errors import UserError
from .mixer import fold_into_a, fold_into_b

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Keys on disk end in lora_B.raw, in memory in lora_B.<adapter>.raw; an embedding's parameters have no such leaf.
_RAW = re.compile(r"(?P<host>(?:.+\.)?(?P<factor>lora_A|lora_B)\.(?:[^.]+\.)?)raw$")
_MIXER = re.compile(r"(?:.+\.)?(?:(?:lora_A|lora_B)\.(?:[^.]+\.)?mixer|lora_mixer(?:\.[^.]+)?)$")
_EMBEDDING_B = re.compile(r"(?P<module>(?:.+\.)?)lora_embedding_B(?P<adapter>(?:\.[^.]+)?)$")
_FACTOR = re.compile(r"(?:.+\.)?(?:(?:lora_A|lora_B)\.(?:[^.]+\.)?(?:weight|bias)|lora_embedding_[AB](?:\.[^.]+)?)$")

# ------------------------------------------------------------------------------------------------------------ trained


def fold_to_lora(
    model: nn.Module,
    adapter_name: str = "default",
    *,
    dtype: torch.dtype | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """A plain LoRA adapter with the same function as an adapter in memory.

    Args:
        model: a ``PeftModel``, or any model that took the adapter through ``add_adapter`` (transformers, diffusers).
            It is not changed.
        dtype: see :func:`fold_state_dict`.
        state_dict: the model's whole state dict, where it has to be gathered first (FSDP, ZeRO-3).

    Returns:
        The configuration, in inference mode, and the weights under PEFT's keys without adapter name
        (``...q_proj.lora_A.weight``).

    Raises:
        UserError: the model has no such adapter, or it is no LoRA.
    """
    adapters = getattr(model, "peft_config", {})
    if adapter_name not in adapters:
        raise UserError(f"model has no adapter {adapter_name!r}; it has {sorted(adapters) or 'none'}")
    config = adapters[adapter_name]
    if not isinstance(config, LoraConfig):
        raise UserError(f"adapter {adapter_name!r} is {type(config).__name__}; expected MoSLoraConfig or LoraConfig")
    tensors = get_peft_model_state_dict(model, state_dict=state_dict, adapter_name=adapter_name)
    return plain_config(config), fold_state_dict(tensors, dtype=dtype)


@torch.no_grad()
def fold_state_dict(
    tensors: Mapping[str, torch.Tensor], *, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """Folds every mixer of an adapter's state dict; everything else passes through.

    ``lora_B.raw`` (out, r) and ``lora_B.mixer`` (r, r) become ``lora_B.weight``; for grouped convolutions
    ``lora_A.raw`` and ``lora_A.mixer`` become ``lora_A.weight``; for embeddings ``lora_embedding_B`` takes in
    ``lora_mixer``. Biases, DoRA's magnitudes and ``modules_to_save`` are kept as they are.

    Args:
        tensors: keys as on disk, or as in memory with the adapter's name (``lora_B.default.raw``).
        dtype: dtype in which the factors are multiplied and stored; None keeps that of each tensor, and with it
            bitwise equality to a model that runs the adapter in that dtype.

    Raises:
        UserError: a mixer is missing, has no matrix to go into, or has the wrong shape.
    """

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if dtype is None else tensor.to(dtype)

    folded: dict[str, torch.Tensor] = {}
    unused = {key for key in tensors if _is_mixer(key)}
    for key, tensor in tensors.items():
        if _is_mixer(key):
            continue
        if match := _RAW.match(key):
            into_a = match["factor"] == "lora_A"
            name = match["host"] + "mixer"
            mixer = _mixer_of(tensors, key, name, rank_dim=0 if into_a else 1)
            product = (fold_into_a if into_a else fold_into_b)(cast(tensor), cast(mixer))
            folded[match["host"] + "weight"] = product.contiguous()
            unused.remove(name)
        elif (match := _EMBEDDING_B.match(key)) and (
            name := f"{match['module']}lora_mixer{match['adapter']}"
        ) in tensors:
            mixer = _mixer_of(tensors, key, name, rank_dim=1)
            folded[key] = fold_into_b(cast(tensor), cast(mixer)).contiguous()
            unused.remove(name)
        else:
            folded[key] = cast(tensor) if _FACTOR.match(key) else tensor
    if unused:
        raise UserError(f"{min(unused)}: a mixer without the matrix that it mixes")
    return folded


def _is_mixer(key: str) -> bool:
    return _MIXER.match(key) is not None


def _mixer_of(tensors: Mapping[str, torch.Tensor], key: str, name: str, rank_dim: int) -> torch.Tensor:
    """The mixer under ``name`` for the factor under ``key``, whose dimension ``rank_dim`` is r."""
    factor = tensors[key]
    if factor.ndim < 2:
        raise UserError(f"{key}: has shape {tuple(factor.shape)}; expected a matrix or a convolution's kernel")
    if name not in tensors:
        raise UserError(f"{key}: its mixer {name} is missing")
    rank = factor.shape[rank_dim]
    if tuple(tensors[name].shape) != (rank, rank):
        raise UserError(f"{name}: has shape {tuple(tensors[name].shape)}; expected {(rank, rank)} beside {key}")
    return tensors[name]


def plain_config(config: LoraConfig | Mapping[str, Any]) -> LoraConfig:
    """Plain LoRA configuration of a MoSLoRA (or LoRA) one, object or JSON dictionary, in inference mode.

    Everything that LoRA knows is kept, with the name of the base model and rank and alpha patterns. What it does not
    know is left out: the mixer's settings silently, anything else with a warning.
    """
    if isinstance(config, LoraConfig):
        config = {entry.name: copy.deepcopy(getattr(config, entry.name)) for entry in fields(config) if entry.init}
    known = {entry.name for entry in fields(LoraConfig) if entry.init}
    mixer_settings = {entry.name for entry in fields(MoSLoraConfig)} - known
    if foreign := sorted(set(config) - known - mixer_settings):
        logger.warning("left out of the LoRA configuration, unknown to this version of PEFT: %s", ", ".join(foreign))
    kept = {name: value for name, value in config.items() if name in known}
    return LoraConfig(**kept | {"peft_type": "LORA", "inference_mode": True})


def fold_adapter(in_dir: str | os.PathLike, out_dir: str | os.PathLike, *, dtype: torch.dtype | None = None) -> Path:
    """Folds a saved MoSLoRA adapter into a plain LoRA adapter folder, file to file.

    A model card (``README.md``) is copied as it is. ``out_dir`` appears complete or not at all.

    Args:
        dtype: see :func:`fold_state_dict`.

    Raises:
        UserError: ``in_dir`` is no complete MoSLoRA adapter, or ``out_dir`` is not empty or cannot be written.
    """
    config = read_config(in_dir)
    if (kind := config.get("peft_type")) == "LORA":
        raise UserError(f"{in_dir}: is a plain LoRA adapter already; nothing to fold")
    if kind != "MOSLORA":
        raise UserError(f"{in_dir}: peft_type is {kind!r}; expected MOSLORA")
    check_output(out_dir)
    tensors = read_weights(in_dir)
    try:
        _check_complete(config, tensors)
        folded = fold_state_dict(tensors, dtype=dtype)
        plain = plain_config(config)
    except (TypeError, ValueError) as error:
        raise UserError(f"{in_dir}: {str(error).splitlines()[0]}") from None
    written = plain.to_dict()
    written["peft_type"] = "LORA"
    return write_adapter(out_dir, written, folded, card_from=in_dir)


def _check_complete(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Adapted modules must have a mixer where the folder's configuration promises one, and none elsewhere."""
    known = {entry.name for entry in fields(MoSLoraConfig) if entry.init}
    settings = MoSLoraConfig(**{name: value for name, value in config.items() if name in known})
    halves = {"lora_A": "lora_B", "lora_B": "lora_A"}
    found = False
    for key in tensors:
        module, _, leaf = key.rpartition(".")
        parent, _, part = module.rpartition(".")
        if leaf in ("raw", "weight") and part in halves:
            found = True
            other = f"{parent}.{halves[part]}"
            if f"{other}.raw" not in tensors and f"{other}.weight" not in tensors:
                raise UserError(f"{key}: its other factor, {other}, is missing")
            if part == "lora_A":
                continue
            promised = _mixer_setting(settings, parent)
            mixed = f"{module}.raw" in tensors or f"{other}.raw" in tensors
            if mixed:
                A = tensors[f"{other}.{'raw' if f'{other}.raw' in tensors else 'weight'}"]
                _check_rank(settings, parent, other, A)
            if mixed != promised.exists:
                has = "a" if mixed else "no"
                raise UserError(f"{key}: has {has} mixer, though the configuration says mixer={promised.mixer}")
        elif leaf == "lora_embedding_B":
            found = True
            promised = _mixer_setting(settings, module)
            if (A := tensors.get(f"{module}.lora_embedding_A")) is not None:
                _check_rank(settings, module, f"{module}.lora_embedding_A", A)
            if promised.exists and f"{module}.lora_mixer" not in tensors:
                raise UserError(f"{key}: its mixer {module}.lora_mixer is missing")
            if not promised.exists and f"{module}.lora_mixer" in tensors:
                raise UserError(f"{key}: has a mixer, though the configuration says mixer={promised.mixer}")
    if not found:
        raise UserError("weights hold no lora_A, lora_B or lora_embedding_B; expected those of a MoSLoRA adapter")


def _check_rank(config: MoSLoraConfig, module: str, key: str, A: torch.Tensor) -> None:
    rank = pattern_value(config.rank_pattern, config.r, _layer(module))
    if A.shape[:1] != (rank,):
        raise UserError(f"{key}: has shape {tuple(A.shape)}; expected rank {rank} first, as the configuration says")


def _layer(module: str) -> str:
    """Name of a module in the base model from that on disk."""
    # Multi-head attention's output projection is adapted inside the layer, with the layer's settings.
    return module.removeprefix(PREFIX).split(".base_layer.")[0]


def _mixer_setting(config: MoSLoraConfig, module: str) -> MixerSetting:
    """The mixer of a module under its name on disk."""
    return config.mixer_of(_layer(module))


# ------------------------------------------------------------------------------------------------------------- start


def fold_into_init(model: nn.Module, config: MoSLoraConfig, adapter_name: str = "default") -> PeftModel:
    """Plain LoRA that starts where MoSLoRA does: the control A0 := M0 @ A0.

    It answers whether a learned mixer is more than another initialisation of A (the "init only" run of PEFT's pull
    request 1905; proof A.2 in the authors' repository). A0 and M0 are those that ``get_peft_model(model, config)``
    would have drawn from the same seeds, and the global random generator is left where that call leaves it, so that
    what is drawn afterwards (data order, dropout) agrees as well.

    The mixer goes into the factor that is drawn at random: A for linear layers and convolutions. An embedding's A
    starts at zero in PEFT, and M0 @ 0 would lose the mixer; there it is B that starts random, and B0 := B0 @ M0.

    Args:
        model: the base model; as in ``get_peft_model`` its modules are replaced in place.
        config: the MoSLoRA whose start is wanted.

    Returns:
        A stock PEFT model of type LORA with all of A and B trainable.
    """
    if not isinstance(config, MoSLoraConfig):
        raise UserError(f"fold_into_init: config is {type(config).__name__}; expected MoSLoraConfig")
    mixed = get_peft_model(model, copy.deepcopy(config), adapter_name)
    start = get_peft_model_state_dict(mixed, adapter_name=adapter_name, save_embedding_layers=False)
    start = {key: tensor.clone() for key, tensor in start.items()}
    plain = plain_config(config)
    plain.inference_mode = False
    with torch.random.fork_rng(devices=[]):
        folded = get_peft_model(mixed.unload(), plain, adapter_name)
    set_peft_model_state_dict(folded, _fold_start(start), adapter_name)
    return folded


@torch.no_grad()
def _fold_start(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An initial MoSLoRA state dict with each mixer in the random factor."""
    folded = dict(tensors)
    for key, mixer in tensors.items():
        if key.endswith(".lora_B.mixer"):
            module = key.removesuffix(".lora_B.mixer")
            folded[f"{module}.lora_A.weight"] = fold_into_a(tensors[f"{module}.lora_A.weight"], mixer)
            folded[f"{module}.lora_B.weight"] = folded.pop(f"{module}.lora_B.raw")
            del folded[key]
    # What is left has its mixer in the random factor already: A of grouped convolutions, B of embeddings.
    return fold_state_dict(folded)


# ------------------------------------------------------------------------------------------------------ command line


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m moslora_core.fold IN OUT [--dtype float32]``; returns the exit status, 2 for bad input."""
    parser = Parser(
        prog="python -m moslora_core.fold", description="Convert a saved MoSLoRA adapter to plain LoRA, exactly."
    )
    parser.add_argument("input", metavar="IN", help="folder of a saved MoSLoRA adapter")
    parser.add_argument("output", metavar="OUT", help="folder to write; new or empty")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="multiply and store in this dtype; default: as saved")
    return parser.write(argv, lambda given: fold_adapter(given.input, given.output, dtype=DTYPES.get(given.dtype)))


if __name__ == "__main__":
    sys.exit(main())

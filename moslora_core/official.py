"""Reads adapters saved by the authors' code (https://github.com/wutaiqiang/MoSLoRA).

They call the mixer ``lora_AB``. Their update is ``lora_B.weight @ lora_AB.weight @ lora_A.weight * scaling``, so that
``lora_AB.weight`` is our M as it is. Three layouts are read:

    commonsense (PEFT 0.3)     adapter_config.json, adapter_model.bin        base_model.model.<module>.lora_AB.weight
    visual (PEFT 0.10)         adapter_config.json, adapter_model.*          the same, or .lora_AB.<adapter>.weight
    subject-driven (SDXL)      pytorch_lora_weights.safetensors, no config   unet.<module>.lora.downB.weight

The last name is no slip of ours: diffusers renames ``lora_A`` to ``lora.down`` wherever it occurs, in ``lora_AB`` too.
Their SDXL training sets alpha = r, so that the scaling without a configuration is 1.

**Modules without a mixer.** Where some of an adapter's modules have no ``lora_AB`` (convolutions, embeddings, 8-bit
layers, ``lora_use_mixer_pattern``), ``mixer_pattern`` names them as plain LoRA, which they are, and stay if training
goes on. An adapter with no ``lora_AB`` at all is refused: it is plain LoRA, or PEFT dropped its mixers when it saved
it again.

**Safety.** ``adapter_model.bin`` is a pickle. It is opened with ``weights_only=True`` alone: torch's own unpickler,
which knows tensors and containers and refuses every other type or call, so that no code in the file can run.

    python -m moslora_core.official IN OUT      # writes a MoSLoRA adapter folder; no base model is needed
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import nn

from .adapter_files import (
    CONFIG_NAME,
    PICKLE_NAME,
    PREFIX,
    WEIGHTS_NAME,
    check_output,
    pattern_value,
    read_config,
    read_pickle,
    read_safetensors,
    regex,
    write_adapter,
)
from .arguments import Parser
from .config import MoSLoraConfig
from .errors import UserError

logger = logging.getLogger(__name__)

DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"
# Fields of the authors' configurations that PEFT's LoraConfig does not have and that change nothing once read.
_THEIRS = {"lora_use_mixer", "lora_use_mixer_pattern", "merge_weights", "enable_lora"}
_FACTOR = re.compile(r"(?P<module>.+)\.(?P<part>lora_A|lora_AB|lora_B)(?:\.(?P<adapter>[^.]+))?\.weight$")
_EMBEDDING = re.compile(r"(?P<module>.+)\.(?P<part>lora_embedding_[AB])(?:\.(?P<adapter>[^.]+))?$")
_FROM_DIFFUSERS = {".lora.downB.weight": ".lora_AB.weight", ".lora.down.weight": ".lora_A.weight"} | {
    ".lora.up.weight": ".lora_B.weight"
}


def read_official(path: str | os.PathLike) -> tuple[MoSLoraConfig, dict[str, torch.Tensor]]:
    """Configuration and weights of an adapter of the authors', in this package's layout.

    Args:
        path: a saved adapter's folder, or a ``.safetensors`` file of their SDXL training.

    Returns:
        The configuration, in inference mode, and the weights (``...lora_B.raw``, ``...lora_B.mixer``, ...).

    Raises:
        UserError: what is there is missing, damaged, unsafe, plain LoRA, or ambiguous (DoRA with a mixer, see below).
    """
    path = Path(path)
    try:
        if path.is_file() or (path / DIFFUSERS_NAME).is_file():
            tensors = read_safetensors(path if path.is_file() else path / DIFFUSERS_NAME)
            config, tensors = _from_diffusers(tensors)
        else:
            config, tensors = read_config(path), _read_weights(path)
        return convert_official(config, tensors)
    except UserError as error:
        message = str(error)
        raise UserError(message if message.startswith(str(path)) else f"{path}: {message}") from None


def convert_official(
    config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> tuple[MoSLoraConfig, dict[str, torch.Tensor]]:
    """The authors' configuration (JSON dictionary) and state dict in this package's layout; tensors keep their dtype.

    Raises:
        UserError: it is no LoRA with mixers, factors are missing or do not fit, ranks contradict the configuration,
            or it used DoRA: their DoRA leaves the mixer out of the forward pass but not out of the merge, so that
            what was trained is not what would be loaded.
    """
    if config.get("peft_type") not in ("LORA", None):
        raise UserError(f"peft_type is {config.get('peft_type')!r}; expected LORA, as the authors' code writes it")
    if config.get("enable_lora"):
        raise UserError("enable_lora is set; the authors' merged layers have no mixer and PEFT no longer reads them")
    modules, rest = _group(tensors)
    mixed = [module for module, parts in modules.items() if "lora_AB" in parts]
    if not mixed:
        said = " though lora_use_mixer is true" if config.get("lora_use_mixer") else ""
        raise UserError(
            f"has no lora_AB{said}: plain LoRA, or mixers lost when saved by another PEFT; load it with PEFT"
        )
    if config.get("use_dora"):
        raise UserError(
            "use_dora with lora_AB: the authors' DoRA ignores the mixer in training and applies it in merging"
        )
    if unmixed := [module for module, parts in modules.items() if "lora_AB" not in parts]:
        logger.warning("%d of %d modules have no mixer, as in LoRA: %s ...", len(unmixed), len(modules), unmixed[0])
    # PEFT 0.3 replaced a layer where PEFT now wraps it: its trained bias is the wrapped layer's.
    converted = {
        f"{owner}.base_layer.bias" if leaf == "bias" and owner in modules else key: tensor
        for key, tensor in rest.items()
        for owner, _, leaf in (key.rpartition("."),)
    }
    for module, parts in modules.items():
        converted.update(_convert_module(config, module, parts))
    return _convert_config(config, list(modules), _mixer_pattern(mixed, unmixed)), converted


def load_official(
    model: nn.Module, path: str | os.PathLike, adapter_name: str = "default", *, is_trainable: bool = False
) -> PeftModel:
    """Attaches an adapter of the authors' to its base model.

    Args:
        model: the base model; for their SDXL adapters the UNet. As in ``get_peft_model`` its modules are replaced.
        is_trainable: train on; otherwise the adapter is frozen, as with ``PeftModel.from_pretrained``.

    Raises:
        UserError: see :func:`read_official`; or model and adapter do not belong together.
    """
    config, tensors = read_official(path)
    config.inference_mode = not is_trainable
    try:
        adapted = get_peft_model(model, config, adapter_name)
        result = set_peft_model_state_dict(adapted, tensors, adapter_name)
    except (RuntimeError, ValueError) as error:
        lines = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise UserError(f"{path}: does not fit the model ({lines})") from None
    missing = [key for key in result.missing_keys if "lora_" in key and f".{adapter_name}" in key]
    for keys, what in ((result.unexpected_keys, "the model has no"), (missing, "the adapter has no")):
        if keys:
            raise UserError(f"{path}: does not fit the model; {what} {keys[0]} ({len(keys)} such keys)")
    # As PEFT's from_pretrained: what is loaded to be used has no dropout.
    return adapted if is_trainable else adapted.eval()


def convert_folder(in_dir: str | os.PathLike, out_dir: str | os.PathLike) -> Path:
    """Writes an adapter of the authors' as a MoSLoRA adapter folder, complete or not at all.

    Raises:
        UserError: see :func:`read_official`; or ``out_dir`` is not empty or cannot be written.
    """
    check_output(out_dir)
    config, tensors = read_official(in_dir)
    written = config.to_dict()
    written["peft_type"] = config.peft_type.value
    return write_adapter(out_dir, written, tensors, card_from=in_dir)


# ---------------------------------------------------------------------------------------------------------- reading


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """``adapter_model.safetensors``, or ``adapter_model.bin`` through torch's safe unpickler."""
    if (folder / WEIGHTS_NAME).is_file():
        return read_safetensors(folder / WEIGHTS_NAME)
    path = folder / PICKLE_NAME
    if not path.is_file():
        raise UserError(f"{folder}: has neither {WEIGHTS_NAME} nor {PICKLE_NAME}; expected an adapter's weights")
    return read_pickle(path)


def _from_diffusers(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """PEFT's keys and the configuration that the authors' SDXL training stands for: the UNet, alpha = r."""
    renamed = {}
    for key, tensor in tensors.items():
        if not key.startswith("unet."):
            raise UserError(f"{key}: not of the UNet; the authors' SDXL training adapts nothing else")
        for theirs, ours in _FROM_DIFFUSERS.items():
            if key.endswith(theirs):
                key = key.removesuffix(theirs) + ours
                break
        renamed[PREFIX + key.removeprefix("unet.")] = tensor
    ranks = sorted({tensor.shape[0] for key, tensor in renamed.items() if key.endswith(".lora_A.weight")})
    if len(ranks) != 1:
        raise UserError(f"ranks {ranks}; expected one rank in all modules, as there is no configuration")
    return {"peft_type": "LORA", "lora_use_mixer": True, "r": ranks[0], "lora_alpha": ranks[0]}, renamed


# ------------------------------------------------------------------------------------------------------- converting


def _group(
    tensors: Mapping[str, torch.Tensor],
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Factors by module and part, without the adapter's name, and whatever else there is (biases, modules to save)."""
    modules: dict[str, dict[str, torch.Tensor]] = {}
    rest, adapters = {}, set()
    for key, tensor in tensors.items():
        match = _FACTOR.match(key) or _EMBEDDING.match(key)
        if match is None:
            rest[key] = tensor
            continue
        adapters.add(match["adapter"])
        module = match["module"] if match["module"].startswith(PREFIX) else PREFIX + match["module"]
        modules.setdefault(module, {})[match["part"]] = tensor
    if len(adapters) > 1:
        raise UserError(f"holds the adapters {sorted(map(str, adapters))}; expected one")
    return modules, rest


def _convert_module(
    config: Mapping[str, Any], module: str, parts: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    for name in names:
        if name not in parts:
            raise UserError(f"{module}: has no {name}")
        if parts[name].ndim < 2:
            raise UserError(f"{module}.{name}: has shape {tuple(parts[name].shape)}; expected a matrix or a kernel")
    A, B = (parts[name] for name in names)
    rank = A.shape[0]
    expected = pattern_value(config.get("rank_pattern"), config.get("r"), module.removeprefix(PREFIX))
    if rank != expected:
        raise UserError(f"{module}.{names[0]}: rank {rank}, shape {tuple(A.shape)}; the configuration says {expected}")
    M = parts.get("lora_AB")
    # A grouped convolution's B has r / groups columns, which the authors' code does not build.
    if (M is not None and tuple(M.shape) != (rank, rank)) or B.shape[1] != rank:
        mixer = "none" if M is None else tuple(M.shape)
        raise UserError(
            f"{module}: A {tuple(A.shape)}, lora_AB {mixer}, B {tuple(B.shape)} do not fit; expected "
            f"({rank}, in), ({rank}, {rank}), (out, {rank})"
        )
    if embedding:
        mixer = {} if M is None else {f"{module}.lora_mixer": M}
        return {f"{module}.lora_embedding_A": A, f"{module}.lora_embedding_B": B} | mixer
    if M is None:
        return {f"{module}.lora_A.weight": A, f"{module}.lora_B.weight": B}
    return {f"{module}.lora_A.weight": A, f"{module}.lora_B.raw": B, f"{module}.lora_B.mixer": M}


def _mixer_pattern(mixed: Sequence[str], unmixed: Sequence[str]) -> dict[str, str]:
    """The modules without a mixer: by the last part of their names where that tells them apart, else one by one."""
    last = {module.rpartition(".")[2] for module in mixed}
    keys = {}
    for module in unmixed:
        name = module.rpartition(".")[2]
        whole = f"^{re.escape(module.removeprefix(PREFIX))}"  # a tail of another module's name would match without ^
        keys[whole if name in last else re.escape(name)] = "identity"
    return keys


def _convert_config(config: Mapping[str, Any], modules: Sequence[str], mixer_pattern: dict[str, str]) -> MoSLoraConfig:
    known = {entry.name for entry in fields(LoraConfig) if entry.init} - {"peft_type", "inference_mode"}
    if foreign := sorted(set(config) - known - _THEIRS - {"peft_type", "inference_mode"}):
        logger.warning("left out of the configuration, unknown to PEFT: %s", ", ".join(foreign))
    kept = {name: value for name, value in config.items() if name in known and value is not None}
    names = sorted(module.removeprefix(PREFIX) for module in modules)
    if not _reaches(kept.get("target_modules"), names):
        # PEFT 0.3 took any module whose name ends in a target ("proj" for "q_proj"); PEFT now wants whole words.
        kept["target_modules"] = names
    for name in ("r", "lora_alpha"):
        if not isinstance(kept.get(name), (int, float)):
            raise UserError(f"{CONFIG_NAME}: {name} is {config.get(name)!r}; expected a number")
    try:
        return MoSLoraConfig(**kept, mixer="learned", mixer_pattern=mixer_pattern, inference_mode=True)
    except (TypeError, ValueError) as error:
        raise UserError(f"{CONFIG_NAME}: {str(error).splitlines()[0]}") from None


def _reaches(targets: Any, names: Sequence[str]) -> bool:
    """Whether PEFT finds every module that has weights under these target modules."""
    if isinstance(targets, str):
        return targets == "all-linear" or all(map(regex(targets, "target_modules").fullmatch, names))
    return all(any(name == target or name.endswith(f".{target}") for target in targets or ()) for name in names)


# ----------------------------------------------------------------------------------------------------- command line


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m moslora_core.official IN OUT``; returns the exit status, 2 for bad input."""
    parser = Parser(
        prog="python -m moslora_core.official",
        description="Convert an adapter saved by the authors' code (lora_AB) to this package's layout.",
    )
    parser.add_argument("input", metavar="IN", help="folder of the authors' adapter, or its .safetensors file")
    parser.add_argument("output", metavar="OUT", help="folder to write; new or empty")
    return parser.write(argv, lambda given: convert_folder(given.input, given.output))


if __name__ == "__main__":
    sys.exit(main())

"""The LLaVA of a configuration: loaded or assembled from its parts, and where the adapters of both towers go."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

import moslora_core  # noqa: F401  (registers the adapter type MOSLORA with PEFT)
from moslora_core.base_models import (
    attach_saved,
    device_map,
    from_gguf,
    loading,
    local_folder,
    made_once,
    quantization_config,
    resolve_path,
    set_padding,
    weights_dtype,
)
from moslora_core.errors import UserError
from moslora_core.evaluations import digest
from moslora_core.methods import AdapterConfig

from .chat import TEMPLATES, Template, check_template
from .config import ModelConfig, TowerConfig, TowersConfig
from .convert.assemble import assemble

PROJECTOR = "multi_modal_projector"
VISION_TOWER = "vision_tower"
# What QLoRA leaves as it is, by the beginning of its name: the published configuration quantises the LLM alone.
_NOT_QUANTIZED = [f"model.{VISION_TOWER}", f"model.{PROJECTOR}", "lm_head"]


def _name(config: ModelConfig) -> str:
    return f"model.path={config.path}" if config.path is not None else f"model.llm={config.llm}"


def template_of(config: ModelConfig) -> Template:
    """The prompt template of a base.

    Raises:
        UserError: an unknown name.
    """
    if config.template not in TEMPLATES:
        raise UserError(f"model.template must be one of {', '.join(TEMPLATES)}, found {config.template!r}")
    return TEMPLATES[config.template]


# ------------------------------------------------------------------------------------------------------------ loading


def base_path(config: ModelConfig) -> str:
    """Path or hub id of the LLaVA: assembles one below ``cache_dir`` at the first use, where parts are given.

    Raises:
        UserError: neither a path nor both towers, or parts that cannot be read.
    """
    if config.path is not None:
        return resolve_path(config.path)
    if config.llm is None or config.vision is None:
        raise UserError("model.path names a LLaVA, or model.llm and model.vision the parts of one; found neither")
    parts = [config.llm, config.revision, config.llm_gguf_file, config.vision, config.projector]
    target = Path(config.cache_dir) / f"llava-{config.name}-{digest(parts)[:12]}"
    with made_once(target) as missing:
        if missing:
            _assemble(config, target)
    return str(target)


def _assemble(config: ModelConfig, target: Path) -> None:
    llm = local_folder(config.llm, config.revision, "model.llm")
    if config.llm_gguf_file is not None:
        llm = from_gguf(str(llm), config.llm_gguf_file, config.cache_dir, "model.llm_gguf_file")
    vision = local_folder(config.vision, key="model.vision")
    assemble(llm, vision, None if config.projector is None else Path(config.projector), target)


def load_processor(config: ModelConfig) -> LlavaProcessor:
    """Image processor and tokenizer of the base, checked against the prompt template.

    Raises:
        UserError: a folder without a processor, a tokenizer without an end or that does not know the template's marks.
    """
    architecture(config)  # a path without a model is found at once; a processor is looked for under many names
    processor = loading(
        lambda: AutoProcessor.from_pretrained(base_path(config), revision=config.revision), _name(config)
    )
    if not isinstance(processor, LlavaProcessor):
        raise UserError(f"{_name(config)}: expected the processor of a LLaVA, found {type(processor).__name__}")
    set_padding(processor.tokenizer, _name(config))
    check_template(template_of(config), processor.tokenizer)
    return processor


def load_base(config: ModelConfig, device_map: dict | None = None) -> LlavaForConditionalGeneration:
    """The frozen LLaVA.

    Raises:
        UserError: a path that holds no LLaVA, an unknown dtype or quantisation.
    """
    dtype = weights_dtype(config.dtype)
    settings = {"revision": config.revision, "dtype": dtype}
    if (quantization := quantization_config(config.quantization, dtype, skip=_NOT_QUANTIZED)) is not None:
        settings["quantization_config"] = quantization
    path = base_path(config)
    architecture(config)  # transformers would load another kind of model with random weights
    return loading(
        lambda: LlavaForConditionalGeneration.from_pretrained(path, device_map=device_map, **settings), _name(config)
    )


def load_adapted(config: ModelConfig, adapter: Path | None) -> LlavaForConditionalGeneration | PeftModel:
    """The LLaVA in evaluation mode, on the GPU where there is one, with ``adapter`` on it if one is given.

    Raises:
        UserError: an adapter that is damaged, of another model, or incomplete.
    """
    model = load_base(config, device_map())
    return (model if adapter is None else attach_saved(model, adapter, _name(config))).eval()


def architecture(config: ModelConfig) -> LlavaConfig:
    """transformers' configuration of the LLaVA, from the configuration file where it is written there.

    Raises:
        UserError: no LLaVA at the path.
    """
    if config.architecture is not None:
        return LlavaConfig(**config.architecture)
    found = loading(lambda: AutoConfig.from_pretrained(base_path(config), revision=config.revision), _name(config))
    if not isinstance(found, LlavaConfig):
        raise UserError(f"{_name(config)}: expected a LLaVA (model_type llava), found model_type {found.model_type}")
    return found


# ----------------------------------------------------------------------------------------------------------- adapters


def used_vision_layers(config: LlavaConfig) -> int:
    """Number of the vision tower's layers that its features pass through.

    LLaVA takes the features of the last layer but one: the layers behind it compute nothing that is used, and an
    adapter there would never see a gradient.
    """
    layers = config.vision_config.num_hidden_layers
    selected = config.vision_feature_layer
    # hidden_states[0] is the embedding: hidden_states[n] has passed n layers.
    return max(index if index >= 0 else layers + 1 + index for index in _as_list(selected))


def _as_list(value: int | list[int]) -> list[int]:
    return [value] if isinstance(value, int) else list(value)


def adapter_config(towers: TowersConfig, config: LlavaConfig) -> AdapterConfig:
    """Both towers as one adapter, as PEFT wants it: one pattern of modules, ranks and scales of the tower apart.

    Plain names would not do: ``q_proj`` is a module of both towers.

    Raises:
        UserError: no tower to adapt, or a tower without target modules.
    """
    if towers.llm.r < 0 or towers.vision.r < 0 or not (towers.llm.r or towers.vision.r):
        raise UserError(
            f"adapter.llm.r={towers.llm.r} and adapter.vision.r={towers.vision.r}: expected ranks of at least 0, and "
            "one tower to adapt"
        )
    layers = "|".join(map(str, range(used_vision_layers(config))))
    places = {
        "llm": r"model\.language_model\.layers\.\d+",
        "vision": rf"model\.{VISION_TOWER}\.encoder\.layers\.({layers})",
    }
    adapted = {name: place for name, place in places.items() if getattr(towers, name).r}
    patterns = {name: rf"{place}\..*\.({_modules(name, getattr(towers, name))})" for name, place in adapted.items()}
    main = getattr(towers, next(iter(adapted)))
    own = {"vision": towers.vision} if len(adapted) == 2 else {}
    return AdapterConfig(
        r=main.r,
        lora_alpha=main.lora_alpha,
        lora_dropout=towers.lora_dropout,
        target_modules=["|".join(f"({pattern})" for pattern in patterns.values())],
        rank_pattern={patterns[name]: tower.r for name, tower in own.items()},
        alpha_pattern={patterns[name]: tower.lora_alpha for name, tower in own.items()},
        mixer_pattern={patterns[name]: "identity" for name in adapted if not getattr(towers, name).mixer},
        modules_to_save=[PROJECTOR] if towers.train_projector else [],
    )


def _modules(name: str, tower: TowerConfig) -> str:
    if not tower.target_modules:
        raise UserError(f"adapter.{name}.target_modules is empty; name at least one module, or set adapter.{name}.r=0")
    return "|".join(re.escape(module) for module in tower.target_modules)


def meta_llava(config: LlavaConfig) -> LlavaForConditionalGeneration:
    """A LLaVA on the meta device: shapes without weights."""
    with torch.device("meta"):
        return LlavaForConditionalGeneration(config)

"""The base model folder: a LLaVA in transformers' layout with its processor, under the names that llava-hf publishes.

transformers has moved the parts of a LLaVA about; its loaders map what they find. Three namings are read here:

    llava-hf (written)     language_model.model.*    language_model.lm_head.*   vision_tower.vision_model.*
    since 5.x, on disk     language_model.model.*    language_model.lm_head.*   vision_tower.*
    since 4.52, in memory  model.language_model.*    lm_head.*                  model.vision_tower.*
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from moslora_core.base_models import loading
from moslora_core.errors import UserError

from .checkpoint import CONFIG_FILE, Checkpoint, open_checkpoint, parse_config, read_config

LANGUAGE = "language_model."
TOWER = "vision_tower."
IMAGE_TOKEN = "<image>"

_NAMINGS = (
    (re.compile(r"(?:model\.)?vision_tower\.(?:vision_model\.)?(.+)"), TOWER + "vision_model."),
    (re.compile(r"(?:model\.)?(multi_modal_projector\..+)"), ""),
    (re.compile(r"(?:language_model\.)?(lm_head\..+)"), LANGUAGE),
    (re.compile(r"(?:model\.language_model|language_model\.model)\.(.+)"), LANGUAGE + "model."),
)


def llava_name(name: str) -> str | None:
    """The name that llava-hf publishes a LLaVA's tensor under, of any of the namings; None if it has no such name."""
    for pattern, prefix in _NAMINGS:
        if match := pattern.fullmatch(name):
            return prefix + match[1]
    return None


def shapes_of(model_class: type, config: PretrainedConfig, folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's tensors, without a tied output head.

    Raises:
        UserError: no model has the sizes of ``config``, which is that of ``folder``.
    """

    def build() -> dict[str, torch.Tensor]:
        with torch.device("meta"):
            return model_class(config).state_dict()

    tensors = loading(build, f"{folder / CONFIG_FILE}: no model has such sizes")
    if getattr(config, "tie_word_embeddings", False):
        tensors.pop("lm_head.weight", None)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def open_llava(folder: Path, config: LlavaConfig) -> Checkpoint:
    """A LLaVA's weights under llava-hf's names, complete and of the shapes of its configuration.

    Raises:
        UserError: a tensor is missing, of another shape, or not of a LLaVA.
    """
    checkpoint = open_checkpoint(folder)
    checkpoint = checkpoint.view(lambda name: llava_name(name) or name)
    if config.tie_word_embeddings:
        checkpoint = checkpoint.view(lambda name: None if name == LANGUAGE + "lm_head.weight" else name)
    shapes = shapes_of(LlavaForConditionalGeneration, config, folder)
    checkpoint.check({llava_name(name): shape for name, shape in shapes.items()})
    return checkpoint


def vision_shapes(config: CLIPVisionConfig, folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a CLIP vision tower's tensors, without any prefix."""
    shapes = shapes_of(CLIPVisionModel, config, folder)
    return {name.removeprefix("vision_model."): shape for name, shape in shapes.items()}


def read_llava_config(folder: Path) -> LlavaConfig:
    """Raises: UserError: no configuration, or not of a LLaVA with a CLIP vision tower."""
    path = folder / CONFIG_FILE
    config = parse_config(LlavaConfig, read_config(folder, "llava"), path)
    if (kind := config.vision_config.model_type) != "clip_vision_model":
        raise UserError(f"{path}: its vision tower is {kind!r}; expected clip_vision_model")
    return config


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Raises: UserError: no tokenizer that loads without remote code."""
    return loading(lambda: AutoTokenizer.from_pretrained(folder, trust_remote_code=False), str(folder))


def read_image_processor(folder: Path, config: CLIPVisionConfig) -> CLIPImageProcessorPil:
    """The image processor beside a vision tower, or CLIP's defaults at the tower's size where there is none.

    Raises:
        UserError: it makes images of another size than the tower takes.
    """
    size = config.image_size
    if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    found = loading(lambda: CLIPImageProcessorPil.from_pretrained(folder), str(folder))
    made = (found.crop_size["height"], found.crop_size["width"])
    if made != (size, size):
        raise UserError(f"{folder}: its image processor crops to {made}; its vision tower takes {(size, size)}")
    return found


def write_processor(
    folder: Path, tokenizer: PreTrainedTokenizerBase, images: CLIPImageProcessorPil, config: LlavaConfig
) -> None:
    """Writes tokenizer and image processor as a LlavaProcessor's files.

    Args:
        tokenizer: has the image token as ``config.image_token_index``.
    """
    LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        image_token=tokenizer.convert_ids_to_tokens(config.image_token_index),
        num_additional_image_tokens=1,  # CLIP's class token
    ).save_pretrained(folder)


def write_generation_config(source: Path, config: PretrainedConfig, folder: Path) -> None:
    """The generation settings of ``source`` (chat models have several end tokens there), or those of ``config``."""
    name = "generation_config.json"
    if (source / name).is_file():
        # As it is: published ones hold sampling settings that transformers reads but refuses to save.
        shutil.copyfile(source / name, folder / name)
    else:
        GenerationConfig.from_model_config(config).save_pretrained(folder)

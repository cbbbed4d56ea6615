"""The SDXL pipeline of a configuration, whole or in parts, and adapters on its UNet.

Which classes the parts have is written in the pipeline's folder (``model_index.json``): a smaller UNet or another kind
of VAE is another folder, and no other code.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
from diffusers import AutoModel, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import nn

import moslora_core  # noqa: F401  (registers the adapter type MOSLORA with PEFT)
from moslora_core.base_models import attach_saved, check_json_files, loading, resolve_path, weights_dtype
from moslora_core.errors import UserError
from moslora_core.typed import build

from . import patch_vae  # noqa: F401  (diffusers loads a class that is not its own from an imported module alone)
from .config import ModelConfig

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
PREDICTIONS = ("epsilon", "v_prediction")


def _name(config: ModelConfig) -> str:
    return f"model.path={config.path}"


def device() -> torch.device:
    """Where models run: this process's GPU, if there is one."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


# ------------------------------------------------------------------------------------------------------------ loading


def load_pipeline(config: ModelConfig, without: Sequence[str] = ()) -> StableDiffusionXLPipeline:
    """The pipeline on its device, in evaluation mode.

    Args:
        without: parts that are left out (and, of a hub's model, not downloaded); they are None in the pipeline.

    Raises:
        UserError: a path that holds no such pipeline, weights that do not fit, an unknown dtype.
    """
    if config.dtype == "auto":  # diffusers has no such thing
        raise UserError("model.dtype must be float32, bfloat16 or float16, found 'auto'")
    dtype = weights_dtype(config.dtype)
    path = resolve_path(config.path)
    if Path(path).is_dir():
        _check_folder(Path(path), without, _name(config))
    parts: dict[str, Any] = dict.fromkeys(without)
    if config.vae is not None and "vae" not in without:
        parts["vae"] = _load(
            lambda: AutoModel.from_pretrained(
                resolve_path(config.vae, "model.vae"), dtype=dtype, use_safetensors=True
            ),
            f"model.vae={config.vae}",
        )
    pipeline = _load(
        lambda: StableDiffusionXLPipeline.from_pretrained(
            path,
            revision=config.revision,
            variant=config.variant,
            dtype=dtype,
            use_safetensors=True,
            add_watermarker=False,  # images are compared, not published
            **parts,
        ),
        _name(config),
    )
    _check_parts(pipeline, _name(config))
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    return pipeline.to(device())


def _check_folder(folder: Path, without: Sequence[str], name: str) -> None:
    """Refuses a folder that lacks a part: a tokenizer would be replaced by an empty one, without a word."""
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{name}: has no model_index.json; expected a pipeline in diffusers' layout")
    for part in PARTS:
        if part not in without and not (folder / part).is_dir():
            raise UserError(f"{name}: has no folder {part}; expected SDXL's parts: {', '.join(PARTS)}")
        check_json_files(folder / part, "model.path")


@contextmanager
def _without_warnings() -> Iterator[None]:
    """diffusers warns of every VAE that is no AutoencoderKL; here :func:`_check_parts` says what does not fit."""
    logger = logging.getLogger("diffusers.pipelines.pipeline_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _load(load: Callable[[], Any], name: str) -> Any:
    with _without_warnings():
        return loading(load, name)


def _check_parts(pipeline: StableDiffusionXLPipeline, name: str) -> None:
    """Refuses parts that are incomplete or do not fit one another, before a matrix product does in its own words."""
    for part, module in pipeline.components.items():
        if isinstance(module, nn.Module) and (missing := [key for key, value in _tensors(module) if value.is_meta]):
            raise UserError(f"{name}: the weights of its {part} lack {missing[0]} and {len(missing) - 1} others")
    prediction = pipeline.scheduler.config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise UserError(f"{name}: prediction_type {prediction!r}; expected {' or '.join(PREDICTIONS)}")
    for number in ("", "_2"):
        tokenizer, encoder = pipeline.components[f"tokenizer{number}"], pipeline.components[f"text_encoder{number}"]
        # Where there are no files of a tokenizer, transformers makes one that knows no word.
        if tokenizer is not None and encoder is not None and len(tokenizer) != (size := encoder.config.vocab_size):
            raise UserError(f"{name}: its tokenizer{number} has {len(tokenizer)} tokens; expected {size}")
    if pipeline.vae is not None and "scaling_factor" in pipeline.vae.config:
        build(Annotated[float, 0], pipeline.vae.config.get("scaling_factor"), f"{name}: vae", "scaling_factor")
    if (unet := pipeline.unet) is None:
        return
    if not isinstance(unet, UNet2DConditionModel) or unet.config.addition_embed_type != "text_time":
        found = unet.config.get("addition_embed_type")
        raise UserError(f"{name}: its UNet has addition_embed_type={found}; expected SDXL's, text_time")
    sizes = {}
    if (vae := pipeline.vae) is not None:
        sizes["the latent channels of its VAE"] = (vae.config.get("latent_channels"), unet.config.in_channels)
    first, second = pipeline.text_encoder, pipeline.text_encoder_2
    if first is not None and second is not None:
        width, pooled = first.config.hidden_size + second.config.hidden_size, second.config.projection_dim
        sizes["the width of its text encoders"] = (width, unet.config.cross_attention_dim)
        conditions = 6 * unet.config.addition_time_embed_dim + pooled
        sizes["the width of its conditions"] = (conditions, unet.config.projection_class_embeddings_input_dim)
    for what, (found, expected) in sizes.items():
        if found != expected:
            raise UserError(f"{name}: {what} is {found}, while its UNet takes {expected}; expected parts that fit")


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def load_unet(config: ModelConfig) -> UNet2DConditionModel:
    """The frozen UNet alone.

    Raises:
        UserError: as :func:`load_pipeline`.
    """
    pipeline = load_pipeline(config, without=[part for part in PARTS if part not in ("unet", "scheduler")])
    return pipeline.unet


def check_resolution(pipeline: StableDiffusionXLPipeline, resolution: int, key: str) -> None:
    """Refuses a width of images that the VAE or diffusers cannot have; ``key`` is the setting.

    Raises:
        UserError: it is no multiple of what the VAE makes one latent of, or of the 8 that diffusers insists on.
    """
    step = max(8, pipeline.vae_scale_factor)
    if resolution < step or resolution % step:
        raise UserError(f"{key}={resolution}: expected a multiple of {step}")


def noise_schedule(pipeline: StableDiffusionXLPipeline) -> DDPMScheduler:
    """The noise schedule that the base was trained with, whatever its pipeline samples with."""
    return DDPMScheduler.from_config(pipeline.scheduler.config)


def adapt(unet: UNet2DConditionModel, adapter: Path | None, config: ModelConfig) -> UNet2DConditionModel:
    """``unet`` with a saved ``adapter`` put into it, in evaluation mode; as it is without one.

    Raises:
        UserError: an adapter that is damaged, of another model, or incomplete.
    """
    if adapter is not None:
        adapted = attach_saved(unet, adapter, _name(config))
        adapted.requires_grad_(False)
        unet = adapted.get_base_model()
    return unet.eval()


# ------------------------------------------------------------------------------------------------------- architecture


def architecture(config: ModelConfig) -> dict[str, Any]:
    """diffusers' configuration of the UNet, from the configuration file where it is written there.

    Raises:
        UserError: no such model.
    """
    if config.architecture is not None:
        return dict(config.architecture)
    return _load(
        lambda: UNet2DConditionModel.load_config(
            resolve_path(config.path), subfolder="unet", revision=config.revision
        ),
        _name(config),
    )


def meta_unet(config: dict[str, Any]) -> UNet2DConditionModel:
    """A UNet on the meta device, which has shapes and no storage."""
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config)

"""DreamBooth's metrics: cosine similarities of embeddings, between images and between images and prompts.

    DINO    generated against real images: class token of a self-supervised ViT-S/16
    CLIP-I  generated against real images: CLIP's image embeddings
    CLIP-T  generated images against their prompts: CLIP's image and text embeddings

Ruiz et al. (arXiv 2208.12242, section 4.1) define them as averages over pairs. They name DINO's ViT-S/16; which CLIP,
which preprocessing and which prompts are left open. Chosen here, and settable where it is a setting:

- CLIP ViT-B/32, which most reproductions take. Numbers of other CLIP models are not comparable.
- Each model's own evaluation preprocessing: bicubic to 256 pixels on the shorter side and the central 224 for DINO
  (``eval_knn.py`` of facebookresearch/dino), bicubic to 224 and the central 224 for CLIP.
- Prompts without the word that means the subject (``a dog on the beach``): CLIP never saw it. Textual Inversion (arXiv
  2208.01618) leaves its word out too, and the authors of DisenBooth state the same form (issue 6 of their repository).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ViTConfig,
    ViTModel,
)
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    PILImageResampling,
)

from moslora_core.base_models import device_map, loading, resolve_path
from moslora_core.errors import UserError

from .config import EncoderConfig

Features = Callable[[PreTrainedModel, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Encoder:
    """A model of images with its preprocessing; ``tokenizer`` where it embeds texts too.

    Attributes:
        features: pixel values (images, 3, height, width) -> embeddings (images, width).
    """

    model: PreTrainedModel
    processor: CLIPImageProcessorPil
    features: Features
    tokenizer: PreTrainedTokenizerBase | None = None


# ------------------------------------------------------------------------------------------------------------ loading


def load_dino(config: EncoderConfig) -> Encoder:
    """DINO's ViT, whose class token after the last normalisation is the embedding (as DINO's own code returns it).

    Raises:
        UserError: no ViT there, or one of another input size.
    """
    name = f"evaluation.dino.path={config.path}"
    architecture = _architecture(config, ViTConfig, name)
    _check_size(architecture.image_size, config, "dino")
    model = _weights(ViTModel, config, name, add_pooling_layer=False)
    processor = preprocessing(config, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    return Encoder(model, processor, lambda vit, pixels: vit(pixel_values=pixels).last_hidden_state[:, 0])


def load_clip(config: EncoderConfig) -> Encoder:
    """CLIP with both of its towers, whose projections are the embeddings.

    Raises:
        UserError: no CLIP there, one of another input size, or one without a tokenizer.
    """
    name = f"evaluation.clip.path={config.path}"
    architecture = _architecture(config, CLIPConfig, name)
    _check_size(architecture.vision_config.image_size, config, "clip")
    tokenizer = loading(
        lambda: AutoTokenizer.from_pretrained(resolve_path(config.path), revision=config.revision), name
    )
    # Where there are no files of a tokenizer, transformers makes one that knows no word.
    if len(tokenizer) != (size := architecture.text_config.vocab_size):
        raise UserError(f"{name}: its tokenizer has {len(tokenizer)} tokens; expected the model's {size}")
    model = _weights(CLIPModel, config, name)
    processor = preprocessing(config, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    return Encoder(
        model, processor, lambda clip, pixels: clip.get_image_features(pixel_values=pixels).pooler_output, tokenizer
    )


def preprocessing(config: EncoderConfig, mean: Sequence[float], std: Sequence[float]) -> CLIPImageProcessorPil:
    """Resizes the shorter side (bicubic, antialiased), cuts the centre and normalises with the model's statistics."""
    return CLIPImageProcessorPil(
        size={"shortest_edge": config.resize},
        crop_size={"height": config.crop, "width": config.crop},
        resample=PILImageResampling.BICUBIC,
        image_mean=list(mean),
        image_std=list(std),
    )


def _architecture(config: EncoderConfig, kind: type[PretrainedConfig], name: str) -> PretrainedConfig:
    # A model class loads a checkpoint of another kind too, with random weights for what it lacks.
    found = loading(lambda: AutoConfig.from_pretrained(resolve_path(config.path), revision=config.revision), name)
    if not isinstance(found, kind):
        raise UserError(f"{name}: expected model_type {kind.model_type}, found {found.model_type}")
    return found


def _check_size(image_size: int, config: EncoderConfig, key: str) -> None:
    if config.crop != image_size:
        raise UserError(
            f"evaluation.{key}.crop={config.crop}, but {config.path} reads images of {image_size} x {image_size}"
        )
    if config.resize < config.crop:
        raise UserError(
            f"evaluation.{key}.resize={config.resize} is below evaluation.{key}.crop={config.crop}: the crop would "
            "have black borders"
        )


def _weights(kind: type[PreTrainedModel], config: EncoderConfig, name: str, **options: Any) -> PreTrainedModel:
    model, report = loading(
        lambda: kind.from_pretrained(
            resolve_path(config.path),
            revision=config.revision,
            dtype=torch.float32,
            device_map=device_map(),
            output_loading_info=True,
            **options,
        ),
        name,
    )
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"{name}: {len(missing)} weights are missing, {missing[0]} among them; expected all of them")
    return model.eval()


# --------------------------------------------------------------------------------------------------------- embeddings


@torch.inference_mode()
def embed_images(encoder: Encoder, images: Sequence[Image.Image], batch_size: int) -> torch.Tensor:
    """Embeddings of unit length: (images, width), float64 on the CPU."""
    found = []
    for start in range(0, len(images), batch_size):
        batch = encoder.processor(list(images[start : start + batch_size]), return_tensors="pt")
        found.append(encoder.features(encoder.model, batch["pixel_values"].to(encoder.model.device)))
    return _unit(torch.cat(found))


@torch.inference_mode()
def embed_texts(encoder: Encoder, texts: Sequence[str]) -> torch.Tensor:
    """Embeddings of unit length: (texts, width), float64 on the CPU. What exceeds the model's length is cut off."""
    longest = encoder.model.config.text_config.max_position_embeddings
    batch = encoder.tokenizer(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
    inputs = {key: batch[key].to(encoder.model.device) for key in ("input_ids", "attention_mask")}
    return _unit(encoder.model.get_text_features(**inputs).pooler_output)


def _unit(embeddings: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(embeddings.double().cpu(), dim=-1)


# ------------------------------------------------------------------------------------------------------- similarities


def cosines(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Cosine similarities in [-1, 1] of all pairs of embeddings of unit length: (n, d) and (m, d) -> (n, m)."""
    return (first @ second.T).clamp(-1.0, 1.0)  # rounding must not leave the range


def to_real(generated: torch.Tensor, real: torch.Tensor) -> list[float]:
    """Of each generated image, its mean similarity to the real ones (DINO, CLIP-I).

    Args:
        generated: (n, d), of unit length.
        real: (m, d), of unit length.
    """
    return cosines(generated, real).mean(dim=1).tolist()


def to_others(real: torch.Tensor) -> list[float]:
    """Of each real image, its mean similarity to the other real ones, itself left out; empty for a single image.

    Their mean is what a method would score that draws the real images: the row "Real images" of DreamBooth's table.

    Args:
        real: (m, d), of unit length.
    """
    count = len(real)
    if count < 2:
        return []
    others = cosines(real, real).masked_fill(torch.eye(count, dtype=torch.bool), 0.0)
    return (others.sum(dim=1) / (count - 1)).tolist()


def to_prompts(generated: torch.Tensor, prompts: torch.Tensor) -> list[float]:
    """Of each generated image, its similarity to its own prompt (CLIP-T); both (n, d), of unit length."""
    return (generated * prompts).sum(dim=1).clamp(-1.0, 1.0).tolist()


# ----------------------------------------------------------------------------------------------------------- averages


def over_prompts(scores: Mapping[int, Sequence[float]]) -> tuple[float, float | None]:
    """Mean over the prompts of the means over their images, and its standard error over the prompts.

    The images of a prompt are more alike than those of two prompts, so the prompts are what the error counts; None for
    a single one.

    Args:
        scores: prompt -> a score for each of its images.
    """
    means = [statistics.fmean(of_prompt) for of_prompt in scores.values()]
    error = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None
    return statistics.fmean(means), error

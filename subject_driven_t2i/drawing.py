"""Drawing images: which there are, the noise that each starts from, and the pipeline's call, batch by batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from moslora_core.errors import UserError
from moslora_core.evaluations import assert_evaluating

from .config import Config, GenerationConfig
from .draws import seed_of
from .encoding import Captions, Embedding
from .models import check_resolution, device
from .subjects import Subject


@dataclass(frozen=True)
class Request:
    """One image to draw.

    Attributes:
        prompt_index: number of the prompt among the subject's.
        index: number of the image among those of its prompt.
        prompt: text to draw.
        class_prompt: the same without the token.
        noise_seed: of the starting noise, and of what the sampler adds on the way.
    """

    prompt_index: int
    index: int
    prompt: str
    class_prompt: str
    noise_seed: int


def noise_seed(seed: int, subject: str, prompt_index: int, index: int) -> int:
    """Seed of an image's starting noise: the same for every method and for every seed of a training."""
    return seed_of("noise", seed, subject, prompt_index, index)


def requests(subject: Subject, generation: GenerationConfig) -> list[Request]:
    """The images that a configuration asks for, prompt by prompt.

    Raises:
        UserError: a prompt that the subject does not have, or no image at all.
    """
    for key in ("images_per_prompt", "steps", "batch_size"):
        if (value := getattr(generation, key)) < 1:
            raise UserError(f"generation.{key} must be positive, found {value}")
    chosen = range(len(subject.prompts)) if generation.prompts is None else generation.prompts
    return [
        request_of(subject, prompt_index, index, generation.seed, "generation.prompts")
        for prompt_index in dict.fromkeys(chosen)
        for index in range(generation.images_per_prompt)
    ]


def request_of(subject: Subject, prompt_index: int, index: int, seed: int, key: str) -> Request:
    """One image; ``key`` is the setting that names the prompt.

    Raises:
        UserError: a prompt that the subject does not have.
    """
    if not 0 <= prompt_index < len(subject.prompts):
        last = len(subject.prompts) - 1
        raise UserError(f"{key}: no prompt {prompt_index}; {subject.name} has those from 0 to {last}")
    prompt = subject.prompts[prompt_index]
    return Request(
        prompt_index,
        index,
        prompt.text(subject.token, subject.class_name),
        prompt.text_without(subject.class_name),
        noise_seed(seed, subject.name, prompt_index, index),
    )


def resolution_of(config: Config) -> int:
    """Width and height of the images: those of the training, unless generation has its own."""
    return config.generation.resolution or config.training.resolution


def draw(
    pipeline: StableDiffusionXLPipeline,
    wanted: Sequence[Request],
    captions: Captions,
    generation: GenerationConfig,
    resolution: int,
) -> list[Image.Image]:
    """Draws images in one batch; the pipeline's text encoders are not needed.

    Raises:
        UserError: a resolution that the model cannot have, or an image that is not finite.
    """
    check_resolution(pipeline, resolution, "generation.resolution")
    prompts, seeds = [request.prompt for request in wanted], [request.noise_seed for request in wanted]
    images = sample(pipeline, prompts, seeds, captions, generation, resolution, "np")
    for request, image in zip(wanted, images, strict=True):
        if not np.isfinite(image).all():
            raise UserError(
                f"prompt {request.prompt_index}, image {request.index} is not finite; use model.dtype=bfloat16 or "
                "float32, or in float16 a VAE that bears it (model.vae=madebyollin/sdxl-vae-fp16-fix)"
            )
    return pipeline.image_processor.numpy_to_pil(images)


@torch.inference_mode()
def sample(
    pipeline: StableDiffusionXLPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    captions: Captions,
    generation: GenerationConfig,
    resolution: int,
    output: str,
) -> Any:
    """One batch of the pipeline.

    Args:
        seeds: of each image's starting noise, and of what the sampler adds on the way.
        output: ``np`` for (images, height, width, 3) in [0, 1], ``latent`` for what the VAE would decode.
    """
    assert_evaluating(pipeline.unet)

    def stacked(embeddings: Sequence[Embedding], name: str) -> torch.Tensor:
        return torch.stack([getattr(one, name) for one in embeddings]).to(device(), pipeline.unet.dtype)

    wanted, negative = [captions.prompts[prompt] for prompt in prompts], [captions.negative] * len(prompts)
    return pipeline(
        prompt_embeds=stacked(wanted, "tokens"),
        pooled_prompt_embeds=stacked(wanted, "pooled"),
        negative_prompt_embeds=stacked(negative, "tokens"),
        negative_pooled_prompt_embeds=stacked(negative, "pooled"),
        # On the CPU: the same noise whatever device draws. One for each image: the same noise whatever the batch.
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        num_inference_steps=generation.steps,
        guidance_scale=generation.guidance_scale,
        width=resolution,
        height=resolution,
        output_type=output,
    ).images

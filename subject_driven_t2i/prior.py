"""Class images for prior preservation: what the base draws of the class, before it learns one member of it.

DreamBooth trains on them beside the subject's images, so that the class is not forgotten (arXiv 2208.12242, section
3.3). The base draws them once, and only their latents are kept: below ``model.cache_dir``, for all methods and seeds.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import save_file
from tqdm import tqdm

from moslora_core.adapter_files import new_folder, read_safetensors
from moslora_core.base_models import made_once
from moslora_core.errors import UserError
from moslora_core.evaluations import digest
from moslora_core.record import write_json

from .config import Config
from .drawing import sample
from .draws import seed_of
from .encoding import Latents, encode_captions

logger = logging.getLogger(__name__)

LATENTS_FILE, FACTS_FILE = "latents.safetensors", "config.json"


def class_latents(config: Config, pipeline: StableDiffusionXLPipeline, prompt: str) -> Latents:
    """Latents of ``training.prior_images`` images that the untrained base draws of ``prompt``.

    Raises:
        UserError: a cache that cannot be written or is damaged, or latents that are not finite.
    """
    facts = _facts(config, prompt)
    target = Path(config.model.cache_dir) / f"class-{config.model.name}-{digest(facts)[:12]}"
    with made_once(target) as missing:
        if missing:
            mean = _draw(config, pipeline, prompt)
            with new_folder(target) as folder:
                save_file({"mean": mean}, folder / LATENTS_FILE)
                write_json(folder / FACTS_FILE, facts)
    path, count, resolution = target / LATENTS_FILE, config.training.prior_images, config.training.resolution
    mean = read_safetensors(path).get("mean")
    if mean is None or mean.ndim != 4 or len(mean) != count or not mean.isfinite().all():
        raise UserError(
            f"{path} is damaged: expected the latents of {count} images; remove {target} to draw them again"
        )
    time_ids = torch.tensor([[resolution, resolution, 0, 0, resolution, resolution]], dtype=torch.float32)
    return Latents(mean, torch.zeros_like(mean), time_ids.repeat(len(mean), 1))


def _facts(config: Config, prompt: str) -> dict[str, object]:
    """All that the class images depend on."""
    model, generation = config.model, config.generation
    return {
        "model": [model.path, model.revision, model.variant, model.dtype],
        "prompt": prompt,
        "images": config.training.prior_images,
        "resolution": config.training.resolution,
        "steps": generation.steps,
        "guidance_scale": generation.guidance_scale,
        "negative_prompt": generation.negative_prompt,
    }


def _draw(config: Config, pipeline: StableDiffusionXLPipeline, prompt: str) -> torch.Tensor:
    """(images, channels, height, width), as the UNet gives them: decoding and encoding again would only lose."""
    generation, count = config.generation, config.training.prior_images
    captions = encode_captions(pipeline, [prompt], generation.negative_prompt)
    seeds = [seed_of("class image", prompt, number) for number in range(count)]
    batches = [seeds[start : start + generation.batch_size] for start in range(0, count, generation.batch_size)]
    logger.info("drawing %d images of the class, once: %s", count, prompt)
    found = [
        sample(pipeline, [prompt] * len(batch), batch, captions, generation, config.training.resolution, "latent")
        .float()
        .cpu()
        for batch in tqdm(batches, "class images", unit="batch", disable=None)
    ]
    latents = torch.cat(found)
    if not latents.isfinite().all():
        raise UserError(
            f"class images: latents that are not finite; use another model.dtype than {config.model.dtype}"
        )
    return latents

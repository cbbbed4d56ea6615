"""What the UNet is trained on: images as latents and prompts as embeddings, computed once before the training.

Text encoders and VAE are frozen: to ask them at every step what they make of the same five images and the same
caption, as the published script does, costs memory and time for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from moslora_core.errors import UserError

from .models import device
from .subjects import open_image


@dataclass(frozen=True)
class Latents:
    """Images as the UNet sees them, on the CPU in float32.

    Attributes:
        mean: (images, channels, height, width), scaled to unit variance.
        std: the same; a VAE's latents are a distribution, of which each step of the training draws. Zero where it is
            a point.
        time_ids: (images, 6): size of the original image, place of the crop's corner, size of the crop, as SDXL
            wants them: height before width, top before left.
    """

    mean: torch.Tensor
    std: torch.Tensor
    time_ids: torch.Tensor

    def __len__(self) -> int:
        return len(self.mean)


@dataclass(frozen=True)
class Embedding:
    """A prompt as the UNet sees it, on the CPU in float32.

    Attributes:
        tokens: (tokens, width of both text encoders).
        pooled: (width of the second text encoder's projection,).
    """

    tokens: torch.Tensor
    pooled: torch.Tensor


def square(image: Image.Image, resolution: int) -> tuple[Image.Image, tuple[int, int]]:
    """``image`` with its shorter side scaled to ``resolution``, cropped about the centre; the crop's (top, left)."""
    scale = resolution / min(image.size)
    width, height = (max(resolution, round(side * scale)) for side in image.size)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return image.crop((left, top, left + resolution, top + resolution)), (top, left)


def pixel_values(image: Image.Image) -> torch.Tensor:
    """(3, height, width) in [-1, 1]."""
    return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1


@torch.no_grad()
def encode_images(pipeline: StableDiffusionXLPipeline, images: Sequence[Path], resolution: int) -> Latents:
    """Latents of image files.

    Raises:
        UserError: an image that cannot be read, or latents that are not finite.
    """
    vae, dtype = pipeline.vae, pipeline.vae.dtype
    upcast = vae.config.get("force_upcast") and dtype == torch.float16  # SDXL's own overflows there
    if upcast:
        vae.to(torch.float32)
    means, stds, time_ids = [], [], []
    for path in images:
        original = open_image(path)
        cropped, corner = square(original, resolution)
        found = vae.encode(pixel_values(cropped)[None].to(device(), vae.dtype)).latent_dist
        mean = found.mode()[0].float().cpu()
        if not mean.isfinite().all():
            raise UserError(f"{path}: the VAE's latents are not finite; use model.dtype=float32 or bfloat16")
        means.append(mean)
        stds.append(found.std[0].float().cpu() if hasattr(found, "std") else torch.zeros_like(mean))
        time_ids.append([original.height, original.width, *corner, resolution, resolution])
    if upcast:
        vae.to(dtype)
    mean, std = _unit_variance(pipeline, torch.stack(means), torch.stack(stds))
    return Latents(mean, std, torch.tensor(time_ids, dtype=torch.float32))


def _unit_variance(
    pipeline: StableDiffusionXLPipeline, mean: torch.Tensor, std: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of what the pipeline does before it decodes."""
    config = pipeline.vae.config
    factor = config.scaling_factor
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        shift, spread = (torch.tensor(config[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
        return (mean - shift) * factor / spread, std * factor / spread
    return mean * factor, std * factor


@dataclass(frozen=True)
class Captions:
    """Texts to draw, and what classifier-free guidance leads away from."""

    prompts: dict[str, Embedding]
    negative: Embedding


@torch.no_grad()
def encode_prompt(pipeline: StableDiffusionXLPipeline, text: str) -> Embedding:
    """A text as SDXL's two encoders read it; what is longer than their 77 tokens is cut, with a warning."""
    tokens, _, pooled, _ = pipeline.encode_prompt(text, device=device(), do_classifier_free_guidance=False)
    return Embedding(tokens[0].float().cpu(), pooled[0].float().cpu())


@torch.no_grad()
def encode_captions(
    pipeline: StableDiffusionXLPipeline, texts: Iterable[str], negative_prompt: str | None = None
) -> Captions:
    """Texts one by one, so that none depends on its neighbours.

    Args:
        negative_prompt: None for what the pipeline takes, which is zeros in SDXL's.
    """
    prompts = {text: encode_prompt(pipeline, text) for text in dict.fromkeys(texts)}
    _, tokens, _, pooled = pipeline.encode_prompt(
        "", device=device(), do_classifier_free_guidance=True, negative_prompt=negative_prompt
    )
    return Captions(prompts, Embedding(tokens[0].float().cpu(), pooled[0].float().cpu()))

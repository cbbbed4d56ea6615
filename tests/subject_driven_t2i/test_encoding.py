"""Images as latents and prompts as embeddings: crops, sizes as SDXL is told them, scales, and 16 bits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from moslora_core.errors import UserError
from subject_driven_t2i.encoding import encode_captions, encode_images, encode_prompt, pixel_values, square
from subject_driven_t2i.models import load_pipeline

from .tiny import build_pipeline

WITHOUT_UNET = ["unet"]


def gradient(width: int, height: int) -> Image.Image:
    """Red grows from left to right, green from top to bottom."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, :, 0] = np.linspace(0, 255, width)[None]
    pixels[:, :, 1] = np.linspace(0, 255, height)[:, None]
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("size", "corner"),
    [((16, 16), (0, 0)), ((64, 32), (0, 8)), ((20, 50), (12, 0)), ((8, 8), (0, 0)), ((17, 16), (0, 0))],
)
def test_an_image_is_scaled_by_its_shorter_side_and_cropped_about_the_centre(size, corner):
    found, place = square(gradient(*size), 16)
    assert found.size == (16, 16) and place == corner
    red, green, _ = np.array(found).astype(int).transpose(2, 0, 1)
    for channel, axis in ((red, 1), (green, 0)):
        assert abs(channel.mean() - 127.5) < 10, "the centre of the gradient is the centre of the crop"
        assert (np.diff(channel, axis=axis) >= -1).all()


def test_pixels_are_between_minus_one_and_one():
    values = pixel_values(Image.fromarray(np.array([[[0, 255, 127]]], np.uint8)))
    assert values.shape == (3, 1, 1)
    torch.testing.assert_close(values.flatten(), torch.tensor([-1.0, 1.0, 127 / 127.5 - 1]))


def test_sizes_are_told_height_before_width(config, tmp_path):
    gradient(40, 20).save(tmp_path / "wide.png")
    found = encode_images(load_pipeline(config.model, WITHOUT_UNET), [tmp_path / "wide.png"], 16)
    assert found.time_ids.tolist() == [[20, 40, 0, 8, 16, 16]]
    assert len(found) == 1 and found.mean.shape == found.std.shape == (1, 4, 8, 8)


@pytest.mark.parametrize("shifted", [False, True])
def test_latents_are_what_the_pipeline_decodes(tmp_path, shifted):
    """Encoding, then the pipeline's own way back to what the VAE decodes."""
    pipeline = build_pipeline()
    if shifted:
        pipeline.vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 2.0, 0.5, 1.5])
    gradient(16, 16).save(tmp_path / "image.png")
    found = encode_images(pipeline, [tmp_path / "image.png"], 16)
    with torch.no_grad():
        expected = pipeline.vae.encode(pixel_values(gradient(16, 16))[None]).latent_dist
    factor = pipeline.vae.config.scaling_factor
    latents, std = found.mean / factor, found.std / factor
    if shifted:
        scale = torch.tensor([1.0, 2.0, 0.5, 1.5]).view(1, 4, 1, 1)
        latents = found.mean * scale / factor + torch.tensor([0.1, -0.2, 0.3, 0.0]).view(1, 4, 1, 1)
        std = found.std * scale / factor
    torch.testing.assert_close(latents, expected.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(std, expected.std, atol=1e-5, rtol=1e-5)
    assert (found.std > 0).all()


def test_a_vae_that_overflows_in_float16_encodes_in_float32(config, tmp_path):
    gradient(16, 16).save(tmp_path / "image.png")
    whole = encode_images(load_pipeline(config.model, WITHOUT_UNET), [tmp_path / "image.png"], 16)
    pipeline = load_pipeline(replace(config.model, dtype="float16"), WITHOUT_UNET)
    pipeline.vae.register_to_config(force_upcast=True)
    half = encode_images(pipeline, [tmp_path / "image.png"], 16)
    assert pipeline.vae.dtype == torch.float16 and half.mean.dtype == torch.float32
    torch.testing.assert_close(half.mean, whole.mean, atol=5e-3, rtol=1e-2)
    assert not torch.equal(half.mean, half.mean.half().float()), "computed in 32 bits"
    with torch.no_grad():
        pipeline.vae.encoder.conv_in.weight.fill_(float("nan"))
    with pytest.raises(UserError, match=r"image\.png: the VAE's latents are not finite"):
        encode_images(pipeline, [tmp_path / "image.png"], 16)


def test_captions_do_not_depend_on_their_neighbours(config):
    pipeline = load_pipeline(config.model, WITHOUT_UNET)
    texts = ["a sks dog in the snow", "a red can", "a sks dog in the snow"]
    found = encode_captions(pipeline, texts)
    assert list(found.prompts) == texts[:2]
    alone = encode_prompt(pipeline, "a red can")
    assert torch.equal(found.prompts["a red can"].tokens, alone.tokens)
    assert alone.tokens.shape == (16, 20) and alone.pooled.shape == (12,)
    assert not torch.equal(alone.pooled, found.prompts[texts[0]].pooled)
    assert not found.negative.tokens.any() and not found.negative.pooled.any(), "SDXL's empty prompt is zeros"
    negative = encode_captions(pipeline, texts, "a red can").negative
    torch.testing.assert_close(negative.tokens, alone.tokens)
    torch.testing.assert_close(negative.pooled, alone.pooled)

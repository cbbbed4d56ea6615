"""The linear patch code: principal components, the interface of a VAE, and a diffusers pipeline around it."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from subject_driven_t2i.patch_vae import PatchVAE, fit
from subject_driven_t2i.smoke_world import SPRITES, draw_captioned, paint_somewhere, read

PATCH, CHANNELS = 4, 16


def pictures(seed: int, count: int) -> list[Image.Image]:
    rng = random.Random(seed)
    return [paint_somewhere(c.sprite, c.background, rng) for c in (draw_captioned(rng) for _ in range(count))]


def pixels_of(images: list[Image.Image]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 127.5 - 1


def image_of(pixels: torch.Tensor) -> Image.Image:
    values = (pixels.clamp(-1, 1).permute(1, 2, 0) + 1) * 127.5
    return Image.fromarray(values.round().byte().numpy())


@pytest.fixture(scope="module")
def vae() -> PatchVAE:
    return fit(pixels_of(pictures(0, 600)), CHANNELS, PATCH).eval()


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    """Pictures that the code was not computed from."""
    return pixels_of(pictures(1, 200))


def patches_of(pixels: torch.Tensor) -> np.ndarray:
    """All patches (patches, 3 * PATCH^2), cut by hand."""
    images = pixels.double().numpy()
    side = images.shape[-1]
    return np.array(
        [
            image[:, y : y + PATCH, x : x + PATCH].ravel()
            for image in images
            for y in range(0, side, PATCH)
            for x in range(0, side, PATCH)
        ]
    )


@torch.no_grad()
def round_trip(vae: PatchVAE, pixels: torch.Tensor) -> torch.Tensor:
    return vae.decode(vae.encode(pixels).latent_dist.mode()).sample


def test_the_code_is_that_of_the_principal_components() -> None:
    """Round trips equal projections on the components that a singular value decomposition finds."""
    fitted_on = pixels_of(pictures(2, 80))
    vae = fit(fitted_on, CHANNELS, PATCH)
    patches = patches_of(fitted_on)
    mean = patches.mean(0)
    _, _, components = np.linalg.svd(patches - mean, full_matrices=False)
    projection = components[:CHANNELS].T @ components[:CHANNELS]
    expected = mean.reshape(3, -1).mean(1).repeat(PATCH**2) + (patches - mean) @ projection
    assert np.abs(patches_of(round_trip(vae, fitted_on)) - expected).max() < 1e-4


def test_more_components_lose_less_and_all_lose_nothing() -> None:
    images = pixels_of(pictures(3, 60))
    errors = [(round_trip(fit(images, n, PATCH), images) - images).abs().mean().item() for n in (4, 16, 48)]
    assert errors[0] > 2 * errors[1] > 20 * errors[2]
    # The bias of decoding is a colour, not a patch.
    assert errors[2] < 0.01


def test_a_round_trip_keeps_what_the_oracle_reads(vae, pixels) -> None:
    after = round_trip(vae, pixels)
    assert 10 * torch.log10(4 / (after - pixels).square().mean()) > 26  # decibels
    kept = [read(image_of(each)) == read(image_of(old)) for old, each in zip(pixels, after, strict=True)]
    assert sum(kept) / len(kept) >= 0.98


def test_subjects_survive_the_code_of_other_sprites(vae) -> None:
    rng = random.Random(0)
    for sprite in SPRITES.values():
        images = [paint_somewhere(sprite, "brown", rng) for _ in range(6)]
        for image, after in zip(images, round_trip(vae, pixels_of(images)), strict=True):
            assert read(image_of(after)) == read(image)


def test_latents_survive_a_round_trip(vae) -> None:
    latents = torch.randn(3, CHANNELS, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        again = vae.encode(vae.decode(latents).sample).latent_dist.mode()
        shift = vae.encode(vae.decode(torch.zeros_like(latents)).sample).latent_dist.mode()
    # Off by the mean patch's pattern, the same everywhere, which the decoder's bias cannot hold.
    torch.testing.assert_close(again - shift, latents, atol=1e-4, rtol=0)
    assert shift.abs().max() < 0.05


def test_scaled_latents_are_centred_and_of_unit_variance_and_none_is_negligible(vae, pixels) -> None:
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
    assert latents.shape == (len(pixels), CHANNELS, 8, 8)
    assert latents.mean().abs() < 0.05 and latents.std() == pytest.approx(1, abs=0.05)
    deviations = latents.std((0, 2, 3))
    assert deviations.min() > 0.4 and deviations.max() < 3


def test_encoding_is_not_random_and_answers_as_autoencoder_kl_does(vae, pixels) -> None:
    found = vae.encode(pixels).latent_dist
    assert torch.equal(found.sample(torch.Generator().manual_seed(1)), found.mode())
    (again,) = vae.encode(pixels, return_dict=False)
    assert torch.equal(again.mode(), found.mode())
    (decoded,) = vae.decode(found.mode(), return_dict=False, generator=torch.Generator())
    assert torch.equal(decoded, vae.decode(found.mode()).sample) and decoded.shape == pixels.shape
    published = AutoencoderKL(block_out_channels=(32,), norm_num_groups=1)
    for name in ("scaling_factor", "force_upcast", "latent_channels", "in_channels", "out_channels"):
        assert hasattr(published.config, name) and hasattr(vae.config, name)
    assert vae.dtype == torch.float32 and vae.half().dtype == torch.float16
    vae.float()


def test_the_code_is_deterministic() -> None:
    images = pixels_of(pictures(4, 60))
    first, second = (fit(images, CHANNELS, PATCH).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_saved_code_loads_as_it_was(vae, pixels, tmp_path) -> None:
    vae.save_pretrained(tmp_path)
    loaded = PatchVAE.from_pretrained(tmp_path)
    assert loaded.config.scaling_factor == vae.config.scaling_factor != 1
    assert torch.equal(round_trip(loaded, pixels), round_trip(vae, pixels))

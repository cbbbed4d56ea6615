"""The smoke scale's VAE: a linear code of square patches, in the interface that diffusers' pipelines use.

A trained autoencoder of a few kilobytes loses the outlines of sprites. The principal components of 4 x 4 patches keep
them, cost one convolution in each direction, and are computed in closed form (:func:`fit`). The code is exactly
linear: nothing of it is random, and its distribution of latents is a point.

A pipeline folder names this class in its ``model_index.json``; diffusers finds it there once this module is imported.
"""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, IdentityDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import nn


class PatchVAE(ModelMixin, ConfigMixin):
    """Linear patch code with the methods of :class:`diffusers.AutoencoderKL` that pipelines and training call.

    Args:
        latent_channels: numbers kept of a patch.
        block_out_channels: only its length is read, by pipelines, which take 2 ** (length - 1) as the factor between
            pixels and latents; that is the side of a patch too.
        scaling_factor: makes latents of unit variance, as in AutoencoderKL.
        force_upcast: read by pipelines; a linear code is safe in half precision.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        latent_channels: int = 16,
        block_out_channels: tuple[int, ...] = (16, 16, 16),
        scaling_factor: float = 1.0,
        force_upcast: bool = False,
    ) -> None:
        super().__init__()
        patch = 2 ** (len(block_out_channels) - 1)
        self.encoder = nn.Conv2d(in_channels, latent_channels, patch, patch)
        self.decoder = nn.ConvTranspose2d(latent_channels, out_channels, patch, patch)

    def encode(self, x: torch.Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[IdentityDistribution]:
        """Latents (n, latent_channels, h / patch, w / patch) of pixels (n, 3, h, w) in -1..1."""
        latents = IdentityDistribution(self.encoder(x))
        return AutoencoderKLOutput(latent_dist=latents) if return_dict else (latents,)

    def decode(
        self, z: torch.Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """Pixels of latents; ``generator`` is accepted and not needed."""
        pixels = self.decoder(z)
        return DecoderOutput(sample=pixels) if return_dict else (pixels,)


def fit(pixels: torch.Tensor, latent_channels: int = 16, patch: int = 4) -> PatchVAE:
    """The code of the leading principal components of the pictures' patches.

    Variances of the components differ by orders of magnitude. Each is divided by the square root of its standard
    deviation, halfway to equal ones: denoising then has to attend to fine components too, and an error in them is
    still made smaller by decoding.

    Args:
        pixels: (n, 3, h, w) in -1..1.
        patch: its side, a power of two.
    """
    in_channels = pixels.shape[1]
    patches = nn.functional.unfold(pixels.double(), patch, stride=patch)  # (n, channels * patch^2, patches)
    patches = patches.transpose(1, 2).flatten(0, 1)
    mean = patches.mean(0)
    variances, components = torch.linalg.eigh((patches - mean).T.cov())  # ascending
    components = components.flip(1)[:, :latent_channels].T  # (latent_channels, channels * patch^2)
    # The sign of an eigenvector is arbitrary: make its largest entry positive.
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    components = components * largest.sign()
    deviations = variances.flip(0)[:latent_channels].clamp_min(1e-12).sqrt()
    gain = deviations.rsqrt()
    # Latents have mean zero, so the root of their mean variance is their standard deviation.
    scaling_factor = float((deviations * gain).square().mean().rsqrt())

    vae = PatchVAE(
        in_channels=in_channels,
        out_channels=in_channels,
        latent_channels=latent_channels,
        block_out_channels=(latent_channels,) * patch.bit_length(),
        scaling_factor=round(scaling_factor, 6),
    )
    shape = (latent_channels, in_channels, patch, patch)
    with torch.no_grad():
        vae.encoder.weight.copy_((gain[:, None] * components).view(shape))
        vae.encoder.bias.copy_(-gain * (components @ mean))
        vae.decoder.weight.copy_((components / gain[:, None]).view(shape))
        # A bias of ConvTranspose2d is one number a channel, and the mean patch of these pictures has no pattern; what
        # little it has is outside of the code.
        vae.decoder.bias.copy_(mean.view(in_channels, -1).mean(1))
    return vae

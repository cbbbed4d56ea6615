"""The training set: every example that a training will see, numbered, each made from its number and the seed alone.

Which image, which timestep and which noise follow from (seed, number). A resumed training, one on several devices, and
the trainings of all methods at one seed therefore see the same examples: methods are compared on equal noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler
from torch.utils.data import Dataset

from .encoding import Embedding, Latents


def seed_of(*parts: object) -> int:
    """A seed of 48 bits that depends on every part, and on nothing else."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6], "big")


def generator_of(*parts: object) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*parts))


@dataclass(frozen=True)
class Source:
    """Images of one caption, and the weight of their loss."""

    latents: Latents
    caption: Embedding
    weight: float = 1.0


class Draws(Dataset):
    """Examples 0 to ``count`` - 1. Each is a row of every source: the subject, and its class under prior preservation.

    Args:
        sources: the subject's images first.
        schedule: the base's noise schedule; its ``prediction_type`` says what is to be predicted.
        seed: of order, timesteps and noise.
    """

    def __init__(self, sources: Sequence[Source], schedule: DDPMScheduler, count: int, seed: int):
        self.sources = list(sources)
        self.schedule = schedule
        self.count = count
        self.seed = seed

    @property
    def rows(self) -> int:
        """Rows of an example."""
        return len(self.sources)

    def __len__(self) -> int:
        return self.count

    def image_of(self, number: int, source: int = 0) -> int:
        """Index of the image of an example: each pass over the images has an order of its own."""
        images = len(self.sources[source].latents)
        epoch, place = divmod(number, images)
        return int(torch.randperm(images, generator=generator_of("order", self.seed, source, epoch))[place])

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        """Tensors with one row a source; ``noisy`` and ``target`` are (rows, channels, height, width)."""
        rows = [self._row(number, index) for index in range(len(self.sources))]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _row(self, number: int, index: int) -> dict[str, torch.Tensor]:
        source = self.sources[index]
        generator = generator_of("example", self.seed, index, number)
        image = self.image_of(number, index)
        mean, std = source.latents.mean[image], source.latents.std[image]
        timestep = torch.randint(self.schedule.config.num_train_timesteps, (), generator=generator)
        noise = torch.randn(mean.shape, generator=generator)
        latents = mean + std * torch.randn(mean.shape, generator=generator)
        noisy = self.schedule.add_noise(latents[None], noise[None], timestep[None])[0]
        if self.schedule.config.prediction_type == "v_prediction":
            target = self.schedule.get_velocity(latents[None], noise[None], timestep[None])[0]
        else:
            target = noise
        return {
            "noisy": noisy,
            "target": target,
            "timestep": timestep,
            "tokens": source.caption.tokens,
            "pooled": source.caption.pooled,
            "time_ids": source.latents.time_ids[image],
            "weight": torch.tensor(source.weight),
        }


def collate(examples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch: the rows of all examples one after another."""
    return {name: torch.cat([example[name] for example in examples]) for name in examples[0]}

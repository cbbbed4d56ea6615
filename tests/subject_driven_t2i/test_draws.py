"""The numbered examples of a training: order, noise and targets against formulas of their own."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from subject_driven_t2i.draws import Draws, Source, collate, seed_of
from subject_driven_t2i.encoding import Embedding, Latents

SHAPE = (2, 3, 3)


def schedule(prediction: str = "epsilon") -> DDPMScheduler:
    return DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.01, beta_end=0.02, prediction_type=prediction)


def source(images: int, first: float = 0.0, std: float = 0.0, weight: float = 1.0) -> Source:
    """Images that are constant: image n has the value ``first`` + n."""
    mean = (torch.arange(images, dtype=torch.float32) + first).view(-1, 1, 1, 1).expand(images, *SHAPE).clone()
    latents = Latents(mean, torch.full_like(mean, std), torch.arange(6.0).repeat(images, 1))
    return Source(latents, Embedding(torch.full((4, 5), first), torch.full((6,), first)), weight)


@given(images=st.integers(1, 7), seed=st.integers(0, 3))
@settings(max_examples=20, deadline=None)
def test_every_pass_shows_every_image_once_in_an_order_of_its_own(images, seed):
    draws = Draws([source(images)], schedule(), 5 * images, seed)
    starts = range(0, len(draws), images)
    passes = [[draws.image_of(number) for number in range(start, start + images)] for start in starts]
    assert all(Counter(one) == Counter(range(images)) for one in passes)
    if images >= 5:
        assert len({tuple(one) for one in passes}) > 1


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noisy_latents_and_targets_follow_the_schedule(prediction):
    draws = Draws([source(3)], schedule(prediction), 12, seed=0)
    seen = set()
    for number in range(12):
        example = draws[number]
        alpha = torch.cumprod(1 - torch.linspace(0.1, 0.02**0.5, 1000) ** 2, 0)[example["timestep"]]
        clean = torch.full(SHAPE, float(draws.image_of(number)))
        noise = (example["noisy"][0] - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        target = noise if prediction == "epsilon" else alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
        torch.testing.assert_close(example["target"][0], target, rtol=1e-3, atol=2e-3)
        seen.add(int(example["timestep"]))
    assert len(seen) > 8 and max(seen) < 1000


def test_noise_is_standard_normal_and_timesteps_are_spread_over_all():
    draws = Draws([source(1)], schedule(), 400, seed=0)
    examples = [draws[number] for number in range(400)]
    noise = torch.stack([example["target"] for example in examples])
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    timesteps = torch.cat([example["timestep"] for example in examples]).float()
    assert abs(timesteps.mean() - 500) < 60 and timesteps.min() < 30 and timesteps.max() > 970


def test_latents_are_drawn_of_the_vaes_distribution():
    spread = Draws([source(1, std=0.5)], schedule(), 300, seed=0)
    values = []
    for number in range(300):
        example = spread[number]
        alpha = spread.schedule.alphas_cumprod[example["timestep"]]
        values.append((example["noisy"] - (1 - alpha).sqrt() * example["target"]) / alpha.sqrt())
    drawn = torch.stack([value for value in values if value.isfinite().all()])
    assert abs(drawn.median()) < 0.1 and 0.4 < drawn.flatten().quantile(0.8413) < 0.6


def test_an_example_follows_from_its_number_and_the_seed_alone():
    first, again, longer, other = (
        Draws([source(3)], schedule(), count, seed) for count, seed in ((8, 0), (8, 0), (80, 0), (8, 1))
    )
    for number in (5, 0, 7):  # in any order
        one, same = first[number], again[number]
        assert all(torch.equal(one[name], same[name]) for name in one)
        assert torch.equal(one["noisy"], longer[number]["noisy"])
        assert not torch.equal(one["target"], other[number]["target"])
    assert not torch.equal(first[0]["target"], first[1]["target"])


def test_class_images_are_a_row_of_their_own():
    draws = Draws([source(3), source(2, first=10.0, weight=0.5)], schedule(), 6, seed=0)
    assert draws.rows == 2
    batch = collate([draws[0], draws[1]])
    assert batch["noisy"].shape == (4, *SHAPE)
    assert batch["weight"].tolist() == [1.0, 0.5, 1.0, 0.5]
    assert batch["tokens"][:, 0, 0].tolist() == [0.0, 10.0, 0.0, 10.0]
    assert not torch.equal(batch["target"][0], batch["target"][1])
    alone = Draws([source(3)], schedule(), 6, seed=0)
    assert torch.equal(alone[0]["noisy"][0], batch["noisy"][0]), "the subject's rows are those without class images"
    assert {draws.image_of(number, 1) for number in range(2)} == {0, 1}


@given(st.tuples(st.integers(), st.text(max_size=3)), st.tuples(st.integers(), st.text(max_size=3)))
def test_seeds_tell_their_parts_apart(first, second):
    assert 0 <= seed_of(*first) < 2**48
    assert (seed_of(*first) == seed_of(*second)) == (first == second)
    assert seed_of("1", 2) != seed_of(1, "2")

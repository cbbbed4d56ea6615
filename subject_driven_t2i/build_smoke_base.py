"""Pretrain the smoke scale's base: a tiny SDXL that draws the sprites of the smoke world from their captions.

``python -m subject_driven_t2i.build_smoke_base`` rebuilds ``subject_driven_t2i/smoke_base`` from nothing, on one core:
a folder that diffusers loads as a StableDiffusionXLPipeline, with two CLIP text encoders and their tokenizers, a UNet
that is also conditioned on pooled text and picture sizes, a linear patch code as VAE, and a DDIM scheduler.

The text encoders are trained with the UNet, by the same loss; the base is the moving average of the weights. A gate
generates pictures of combinations of shape, colour and background that were never trained, reads them with the world's
oracle, and a base that does not follow its prompts is not written. A build that was stopped goes on from its last
checkpoint when it is started again: every batch follows from the seed and its step alone.
"""

from __future__ import annotations

import json
import logging
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from moslora_core.errors import UserError
from moslora_core.smoke_bases import check_gate, command, learning_rate, report_of, write_report

from .patch_vae import PatchVAE, fit
from .smoke_world import (
    BACKGROUNDS,
    CLASSES,
    COLOURS,
    PLACED,
    SHAPES,
    SIDE,
    TOKEN,
    UNPLACED,
    Reading,
    draw_captioned,
    held_out_prompts,
    hits,
    paint_somewhere,
    read,
)

log = logging.getLogger(__name__)

SMOKE_BASE = Path(__file__).parent / "smoke_base"
COMMAND = "python -m subject_driven_t2i.build_smoke_base"

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
MAX_TOKENS = 16
# Pictures that the patch code is computed from.
CODE_PICTURES = 2000
# How the gate generates: pictures a prompt, sampling steps, guidance.
GATE_IMAGES, GATE_STEPS, GATE_GUIDANCE = 8, 20, 6.0
GATE = {"shape": 0.8, "foreground": 0.9, "background": 0.9}


# --- The parts -------------------------------------------------------------------------------------------------------


def caption_words() -> list[str]:
    """Every word of captions and prompts."""
    frames = [template.format(thing="", background="") for template in (*PLACED, *UNPLACED)]
    words = {word for frame in frames for word in frame.split()}
    return sorted(words | {TOKEN, *CLASSES, *SHAPES, *COLOURS, *BACKGROUNDS})


def build_tokenizer(words: Iterable[str], pad_token: str = EOS) -> CLIPTokenizer:
    """A CLIP tokenizer that has each of ``words`` as one token, and spells others in letters.

    ``!`` has id 0 and the end of text the last one, as CLIP has them.
    """
    letters = [chr(number) for number in range(ord("a"), ord("z") + 1)]
    tokens = ["!", "!</w>", *letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in words:
        # Merges come in the order of their rank: those added here change no word before.
        pieces = _apply(merges, [*word[:-1], f"{word[-1]}</w>"])
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = _apply(merges[-1:], pieces)
    tokens += ["".join(pair) for pair in merges]
    vocabulary = {token: number for number, token in enumerate([*dict.fromkeys(tokens), BOS, EOS])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad_token, model_max_length=MAX_TOKENS)


def _apply(merges: Sequence[tuple[str, str]], pieces: list[str]) -> list[str]:
    """Byte-pair encoding of a word: the merges in the order of their rank, each wherever it fits."""
    for first, second in merges:
        at = 0
        while at < len(pieces) - 1:
            if (pieces[at], pieces[at + 1]) == (first, second):
                pieces = [*pieces[:at], first + second, *pieces[at + 2 :]]
            at += 1
    return pieces


@dataclass(frozen=True)
class Build:
    """Settings of a build.

    Attributes:
        seed: of the initialisation, the pictures and the noise.
        steps: optimiser steps.
        rows: pictures in a batch.
        lr: peak learning rate; warm-up over a twentieth of the steps, then cosine to a twentieth of it.
        ema: decay of the moving average of the weights; less in the first steps.
        drop: share of captions that are left out, for classifier-free guidance.
        narrow, wide: channels of the UNet's two levels.
        layers: residual blocks a level.
        text_hidden, text_layers: of each text encoder.
        latent_channels: numbers that the VAE keeps of a patch of 4 x 4 pixels.
        checkpoint_every: steps between checkpoints.
        threads: torch threads.
    """

    seed: int = 0
    steps: int = 5000
    rows: int = 32
    lr: float = 2e-3
    ema: float = 0.998
    drop: float = 0.1
    narrow: int = 48
    wide: int = 96
    layers: int = 1
    text_hidden: int = 64
    text_layers: int = 2
    latent_channels: int = 16
    checkpoint_every: int = 100
    threads: int = 1


def build_pipeline(build: Build) -> StableDiffusionXLPipeline:
    """The untrained stack, its VAE complete. SDXL's second tokenizer pads with ``!``, and so does this one."""
    words = caption_words()
    tokenizer, tokenizer_2 = build_tokenizer(words), build_tokenizer(words, pad_token="!")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=build.text_hidden,
        intermediate_size=4 * build.text_hidden,
        projection_dim=build.text_hidden,
        num_hidden_layers=build.text_layers,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        # CLIP pools at the first token with this id, unless it is 2.
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoders = CLIPTextModel(text), CLIPTextModelWithProjection(text)
    for encoder in encoders:
        # SDXL reads the last layer but one, of which no norm follows. CLIP's embeddings of 0.02 would drown there.
        for name, weight in encoder.named_parameters():
            if name.endswith("_embedding.weight"):
                nn.init.normal_(weight, std=0.5 if "token" in name else 0.2)
    time_embedding = 8
    unet = UNet2DConditionModel(
        sample_size=SIDE // 4,
        in_channels=build.latent_channels,
        out_channels=build.latent_channels,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(build.narrow, build.wide),
        layers_per_block=build.layers,
        norm_num_groups=8,
        attention_head_dim=4,  # heads, by the name that SDXL's configuration has for them
        cross_attention_dim=2 * build.text_hidden,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=time_embedding,
        projection_class_embeddings_input_dim=6 * time_embedding + build.text_hidden,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        # At 8 x 8 latents the last of SDXL's noise levels would still show a picture's mean colour.
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )
    return StableDiffusionXLPipeline(
        vae=_patch_code(build),
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=unet,
        scheduler=scheduler,
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def _patch_code(build: Build) -> PatchVAE:
    rng = random.Random(f"code/{build.seed}")
    pictures = [
        paint_somewhere(c.sprite, c.background, rng) for c in (draw_captioned(rng) for _ in range(CODE_PICTURES))
    ]
    return fit(pixel_values(pictures), build.latent_channels, patch=4)


def pixel_values(pictures: Sequence[Image.Image]) -> torch.Tensor:
    """Pixels (n, 3, SIDE, SIDE) in -1..1."""
    return torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2).float() / 127.5 - 1


# --- Training --------------------------------------------------------------------------------------------------------


def trained_parts(pipeline: StableDiffusionXLPipeline) -> nn.ModuleDict:
    """The modules that are trained, as one."""
    return nn.ModuleDict({name: getattr(pipeline, name) for name in ("text_encoder", "text_encoder_2", "unet")})


def encode(pipeline: StableDiffusionXLPipeline, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings (n, MAX_TOKENS, both widths) of prompts and pooled ones (n, width), as SDXL's pipeline has them."""
    found = []
    for tokenizer, encoder in (
        (pipeline.tokenizer, pipeline.text_encoder),
        (pipeline.tokenizer_2, pipeline.text_encoder_2),
    ):
        ids = tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt").input_ids
        output = encoder(ids, output_hidden_states=True)
        found.append(output.hidden_states[-2])
    return torch.cat(found, -1), output.text_embeds


def batch_loss(pipeline: StableDiffusionXLPipeline, build: Build, step: int) -> torch.Tensor:
    """Mean squared error of the predicted velocity, of a step's own pictures, captions, noise and times."""
    rng = random.Random(f"batch/{build.seed}/{step}")
    generator = torch.Generator().manual_seed(rng.getrandbits(48))
    drawn = [draw_captioned(rng) for _ in range(build.rows)]
    pixels = pixel_values([paint_somewhere(each.sprite, each.background, rng) for each in drawn])
    vae, scheduler = pipeline.vae, pipeline.scheduler
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=generator)
    times = torch.randint(scheduler.config.num_train_timesteps, (build.rows,), generator=generator)
    embeddings, pooled = encode(pipeline, [each.caption for each in drawn])
    # SDXL's pipeline takes zeros for an empty prompt.
    kept = (torch.rand(build.rows, generator=generator) >= build.drop).float()[:, None]
    predicted = pipeline.unet(
        scheduler.add_noise(latents, noise, times),
        times,
        encoder_hidden_states=embeddings * kept[..., None],
        added_cond_kwargs={"text_embeds": pooled * kept, "time_ids": _time_ids(build.rows)},
    ).sample
    return nn.functional.mse_loss(predicted, scheduler.get_velocity(latents, noise, times))


def _time_ids(rows: int) -> torch.Tensor:
    """SDXL's size conditioning (rows, 6): original size, no crop, target size."""
    return torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]], dtype=torch.float32).expand(rows, -1)


class Average:
    """Exponential moving average of a module's weights, by name."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: weight.detach().clone() for name, weight in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """After the optimiser's step ``step``, from 0. The decay grows from 0.1, or the start would linger."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, weight in module.named_parameters():
            self.weights[name].lerp_(weight, share)

    @torch.no_grad()
    def exchange(self, module: nn.Module) -> None:
        """Exchange the average and the weights of the module; a second call undoes it."""
        for name, weight in module.named_parameters():
            old = weight.clone()
            weight.copy_(self.weights[name])
            self.weights[name] = old


@dataclass
class Training:
    """All that changes while a base is trained: what a checkpoint has.

    Attributes:
        step: steps done.
        seconds: spent on them, those before a stop included.
    """

    module: nn.Module
    average: Average
    optimizer: torch.optim.Optimizer
    step: int = 0
    seconds: float = 0.0


def pretrain(pipeline: StableDiffusionXLPipeline, build: Build, unfinished: Path, log_every: int = 500) -> float:
    """Train the pipeline in place and leave the average in it, logging the gate's measures every ``log_every`` steps.

    Args:
        unfinished: folder of the checkpoint, from which a build with the same settings goes on.

    Returns:
        Seconds spent, those before a stop included.
    """
    module = trained_parts(pipeline)
    optimizer = torch.optim.AdamW(module.parameters(), lr=build.lr, betas=(0.9, 0.99), weight_decay=0.01)
    training = Training(module, Average(module, build.ema), optimizer)
    load_checkpoint(unfinished, build, training)
    start = time.monotonic() - training.seconds
    for step in range(training.step, build.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, build.steps, build.lr)
        loss = batch_loss(pipeline, build, step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        training.average.update(module, step)
        training.step, training.seconds = step + 1, time.monotonic() - start
        if training.step % build.checkpoint_every == 0:
            save_checkpoint(unfinished, build, training)
        if training.step % log_every == 0:
            training.average.exchange(module)
            measures = {name: round(value, 3) for name, value in measure(pipeline, images=2).items()}
            training.average.exchange(module)
            progress = training.step, build.steps, training.seconds, loss.item(), measures
            log.info("step %d of %d, %.0f s, loss %.4f, %s", *progress)
    training.average.exchange(module)
    return training.seconds


_STATE = "state.safetensors"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def save_checkpoint(folder: Path, build: Build, training: Training) -> None:
    """Write the state of a training; the file before it is replaced whole."""
    tensors = {}
    for name, weight in training.module.named_parameters():
        tensors |= {f"weight/{name}": weight.detach(), f"average/{name}": training.average.weights[name]}
        # Weights that nothing reads have no moments.
        if moments := training.optimizer.state[weight]:
            tensors |= {f"{key}/{name}": moments[key] for key in _MOMENTS}
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / f"new.{_STATE}"
    facts = {"step": str(training.step), "seconds": str(training.seconds), "build": json.dumps(asdict(build))}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, new, metadata=facts)
    new.replace(folder / _STATE)


@torch.no_grad()
def load_checkpoint(folder: Path, build: Build, training: Training) -> None:
    """Put into ``training`` what :func:`save_checkpoint` wrote to the folder, if there is anything.

    Raises:
        UserError: for a checkpoint of a build with other settings.
    """
    path = folder / _STATE
    if not path.exists():
        return
    with safe_open(path, "pt") as file:
        facts = file.metadata()
        if json.loads(facts["build"]) != asdict(build):
            raise UserError(f"{path}: of a build with other settings, {facts['build']}; finish that one or delete it")
        names = set(file.keys())
        for name, weight in training.module.named_parameters():
            weight.copy_(file.get_tensor(f"weight/{name}"))
            training.average.weights[name] = file.get_tensor(f"average/{name}")
            if f"{_MOMENTS[0]}/{name}" in names:
                training.optimizer.state[weight] = {key: file.get_tensor(f"{key}/{name}") for key in _MOMENTS}
    training.step, training.seconds = int(facts["step"]), float(facts["seconds"])


# --- The gate --------------------------------------------------------------------------------------------------------


def measure(pipeline: StableDiffusionXLPipeline, images: int = GATE_IMAGES) -> dict[str, float]:
    """How often generated pictures show what their prompts ask for, over the combinations that were never trained.

    Args:
        images: pictures a prompt.
    """
    asked = [each for each in held_out_prompts() for _ in range(images)]
    prompts = [each.caption for each in asked]
    counts: Counter[str] = Counter()
    for each, picture in zip(asked, generate(pipeline, prompts), strict=True):
        sprite = each.sprite
        found = hits(read(picture), Reading(sprite.shape, sprite.colour, sprite.core, each.background))
        counts.update(name for name, hit in found.items() if hit)
    return {name: counts[name] / len(asked) for name in ("shape", "foreground", "core", "background")}


def generate(pipeline: StableDiffusionXLPipeline, prompts: Sequence[str], rows: int = 48) -> list[Image.Image]:
    """A picture for each prompt, as the gate generates, ``rows`` at a time."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    pictures = []
    for start in range(0, len(prompts), rows):
        output = pipeline(
            list(prompts[start : start + rows]),
            num_inference_steps=GATE_STEPS,
            guidance_scale=GATE_GUIDANCE,
            generator=generator,
        )
        pictures += output.images
    return pictures


# --- The command -----------------------------------------------------------------------------------------------------


def build_base(build: Build, out: Path) -> dict[str, object]:
    """Build, gate and write a base: the pipeline's folder and the report of the build, which is returned.

    Checkpoints are kept in ``<out>.unfinished`` until the base is written.
    """
    torch.set_num_threads(build.threads)
    torch.manual_seed(build.seed)
    pipeline = build_pipeline(build)
    parameters = {name: sum(p.numel() for p in part.parameters()) for name, part in trained_parts(pipeline).items()}
    log.info("%s parameters, %s", parameters, build)
    unfinished = out.with_name(f"{out.name}.unfinished")
    seconds = pretrain(pipeline, build, unfinished)
    measures = measure(pipeline)
    check_gate(measures, GATE)
    facts = {"parameters": parameters, "vocabulary": len(pipeline.tokenizer)}
    report = report_of(COMMAND, build, measures, GATE, seconds, **facts)
    report["versions"]["diffusers"] = diffusers.__version__
    pipeline.save_pretrained(out)
    write_report(out, report)
    shutil.rmtree(unfinished, ignore_errors=True)
    log.info("wrote %s", out)
    return report


def main(arguments: list[str] | None = None) -> None:
    """Command line: one option for each setting of :class:`Build`, and ``--out``."""
    command(__doc__.splitlines()[0], Build, SMOKE_BASE, build_base, arguments)


if __name__ == "__main__":
    main()

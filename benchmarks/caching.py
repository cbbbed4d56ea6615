"""What computing frozen parts once is worth: ``python benchmarks/caching.py``.

Two parts of a training can be frozen while all that is behind them is trained:

- subject-driven generation: VAE and text encoders, whose latents and embeddings ``subject_driven_t2i`` computes once
  before the training, against encoding images and captions again at every step;
- visual instruction tuning: the vision tower, if ``adapter.vision.r=0`` (the paper adapts it), against a step that is
  handed the tower's features.

A step is forward, backward and optimiser. At the smoke scale it is timed; at the paper's, floating-point operations
are counted on the meta device, where a GPU would be needed to time them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import configuration, operations, out_argument, ratio, report, run, side_by_side
from diffusers import AutoencoderKL
from torch import nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import subject_driven_t2i.config as t2i
import subject_driven_t2i.train as t2i_train
import visual_instruction.config as visual
import visual_instruction.train as visual_train
from moslora_core.arguments import Parser
from moslora_core.methods import attach, peft_config
from subject_driven_t2i import prepare_data as t2i_data
from subject_driven_t2i.encoding import encode_images, encode_prompt
from subject_driven_t2i.models import load_pipeline, meta_unet
from subject_driven_t2i.subjects import subject_of
from visual_instruction import prepare_data as visual_data
from visual_instruction.models import adapter_config, architecture, meta_llava

Way = Callable[[], Any]

METHOD = "method=moslora"

# The frozen parts of stabilityai/stable-diffusion-xl-base-1.0.
SDXL_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
SDXL_TEXT = (
    (
        CLIPTextModel,
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    ),
    (
        CLIPTextModelWithProjection,
        {
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "num_attention_heads": 20,
            "projection_dim": 1280,
        },
    ),
)
TEXT_TOKENS = 100  # of a conversation behind an image, about the mean of LLaVA's instructions


def step(model: nn.Module, loss: Way) -> Way:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-5)

    def take() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return take


# ------------------------------------------------------------------------------------------- subject-driven generation


def t2i_smoke(work: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of a step with everything computed once, and with images or also captions encoded before it."""
    folders = [f"data.dir={work / 't2i'}", f"runs_dir={work / 'runs'}"]
    config = configuration(t2i, [METHOD, "data.subject=toy", *folders])
    t2i_data.main(config)
    subject = subject_of(config.data)
    pipeline, ready = load_pipeline(config.model, without=["unet"]), t2i_train.prepare(config, t2i.locate(config))
    rows = config.training.per_device_batch_size
    batch = ready.collator([ready.train_set[number] for number in range(rows)])
    trainer = ready.trainer(ready.model.train(), ready.arguments, ready.collator, ready.train_set)
    cached = step(ready.model, lambda: trainer.compute_loss(ready.model, batch))
    images = [subject.images[number % len(subject.images)] for number in range(rows)]
    caption = config.data.instance_prompt.format(subject.token, subject.class_name)

    def latents() -> None:
        encode_images(pipeline, images, config.training.resolution)
        cached()

    def everything() -> None:
        for _ in range(rows):
            encode_prompt(pipeline, caption)
        latents()

    ways = {
        "computed once": cached,
        "latents at every step": latents,
        "latents and embeddings at every step": everything,
    }
    return side_by_side(ways, rounds)


def t2i_paper() -> dict[str, int]:
    """Operations of a step on one image of 1024 pixels."""
    config = configuration(t2i, [METHOD, "scale=paper", "data.subject=dog"])
    unet = meta_unet(config.model.architecture)
    model = attach(
        unet, config.method, peft_config(config.method, config.adapter, seed=0, total_steps=10, task_type=None)
    )
    with torch.device("meta"):
        vae = AutoencoderKL(**SDXL_VAE).requires_grad_(False)
        encoders = [kind(CLIPTextConfig(**settings)).requires_grad_(False) for kind, settings in SDXL_TEXT]
        size = config.training.resolution
        noisy, pixels, ids = torch.zeros(1, 4, size // 8, size // 8), torch.zeros(1, 3, size, size), torch.zeros(1, 77)
        added = {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.zeros(1, 6)}
        tokens, timestep = torch.zeros(1, 77, 2048), torch.zeros(1)

    def cached() -> None:
        found = model(noisy, timestep, encoder_hidden_states=tokens, added_cond_kwargs=added).sample
        functional.mse_loss(found, noisy).backward()

    step = operations(cached)
    with torch.no_grad():
        latents = operations(lambda: vae.encode(pixels))
        embeddings = operations(lambda: [encoder(ids.long()) for encoder in encoders])
    return {
        "computed once": step,
        "latents at every step": step + latents,
        "latents and embeddings at every step": step + latents + embeddings,
    }


# ------------------------------------------------------------------------------------------- visual instruction tuning


def visual_smoke(work: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of a step with the frozen vision tower's features at hand, and with its forward."""
    folders = [f"data.dir={work / 'visual'}", f"runs_dir={work / 'runs'}"]
    config = configuration(visual, [METHOD, "adapter.vision.r=0", *folders])
    visual_data.main(config)
    ready = visual_train.prepare(config, visual.locate(config))
    with_image = [number for number, has in enumerate(ready.train_set.has_image) if has]
    batch = ready.collator([ready.train_set[number] for number in with_image[: config.training.per_device_batch_size]])
    take = step(ready.model.train(), lambda: ready.model(**batch).loss)
    tower = ready.model.get_base_model().model.vision_tower
    with torch.no_grad():
        features = tower(batch["pixel_values"], output_hidden_states=True, return_dict=True)

    def cached() -> None:
        tower.forward = lambda *_, **__: features
        take()
        del tower.forward

    return side_by_side({"features at hand": cached, "tower's forward at every step": take}, rounds)


def visual_paper() -> dict[str, int]:
    """Operations of a step on one image and a text of ``TEXT_TOKENS``, with LLaMA-3 8B and CLIP ViT-L/14-336."""
    config = configuration(visual, [METHOD, "scale=paper", "model=llama3_8b", "adapter.vision.r=0"])
    llava = architecture(config.model)
    adapter = peft_config(config.method, adapter_config(config.adapter, llava), seed=0, total_steps=10)
    parts = attach(meta_llava(llava), config.method, adapter).get_base_model()
    vision = llava.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    with torch.device("meta"):
        features, text = (
            torch.zeros(1, patches, vision.hidden_size),
            torch.zeros(1, TEXT_TOKENS, llava.text_config.hidden_size),
        )
        pixels = torch.zeros(1, 3, vision.image_size, vision.image_size)

    def cached() -> None:
        embeddings = torch.cat([parts.model.multi_modal_projector(features), text], dim=1)
        parts.lm_head(parts.model.language_model(inputs_embeds=embeddings).last_hidden_state).sum().backward()

    with torch.no_grad():
        tower = operations(lambda: parts.model.vision_tower(pixels))
    cached_operations = operations(cached)
    return {"features at hand": cached_operations, "tower's forward at every step": cached_operations + tower}


# --------------------------------------------------------------------------------------------------------------- table


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python benchmarks/caching.py", description=__doc__.split(":")[0])
    parser.add_argument("--rounds", type=int, default=15, help="steps of each way (default: 15)")
    out_argument(parser, "caching")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        timed = {
            "subject-driven generation": t2i_smoke(Path(folder), arguments.rounds),
            "visual instruction tuning, vision tower frozen": visual_smoke(Path(folder), arguments.rounds),
        }
    counted = dict(zip(timed, (t2i_paper(), visual_paper()), strict=True))
    rows, numbers = [], {}
    for experiment, ways in timed.items():
        first = next(iter(ways))
        for name, seconds in ways.items():
            slower, tera = ratio(seconds, ways[first]), counted[experiment][name] / 1e12
            more = counted[experiment][name] / counted[experiment][first]
            rows.append([f"{experiment}: {name}", slower.text(), f"{tera:.1f}", f"{more:.2f}"])
            numbers[f"{experiment}: {name}"] = {
                "seconds_at_smoke": seconds,
                "time_ratio_at_smoke": slower,
                "operations_at_paper": counted[experiment][name],
                "operations_ratio_at_paper": more,
            }
    headers = ["step", "time at scale=smoke", "TFLOP at scale=paper", "ratio"]
    report("caching", headers, rows, numbers, arguments.out)
    return 0


if __name__ == "__main__":
    run(main)

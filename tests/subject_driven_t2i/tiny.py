"""A tiny random pipeline of SDXL's architecture, prepared subjects and their images: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image, ImageDraw
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from moslora_core.prepared import write_manifest
from subject_driven_t2i.subjects import PROMPTS_FILE, NewSubject, Subject, read_subjects, write_subjects

RESOLUTION, LATENT = 16, 8
TOKENS = 16
TOKEN = "sks"
WORDS = ("a", "photo", "of", "sks", "dog", "can", "in", "the", "snow", "on", "beach", "red")
PROMPTS = ("a {0} {1} in the snow", "a {0} {1} on the beach", "a red {0} {1}")
TEXT_WIDTHS, POOLED, TIME = (8, 12), 12, 4


def build_tokenizer() -> CLIPTokenizer:
    """CLIP's kind, in which each of ``WORDS`` is one token; a letter is one too."""
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = letters + [f"{letter}</w>" for letter in letters]
    merges: list[tuple[str, str]] = []
    for word in sorted(set(WORDS)):
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            pair = (parts[0], parts[1])
            if pair not in merges:
                merges.append(pair)
                vocabulary.append("".join(pair))
            parts = ["".join(pair), *parts[2:]]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]  # the end last: CLIP's text model pools there
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(dict.fromkeys(vocabulary))},
        merges=merges,
        model_max_length=TOKENS,
    )


def _text_config(width: int, tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=POOLED,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_factor=3.0,  # large enough that images differ between prompts
    )


def unet_config(**changes) -> dict:
    return {
        "sample_size": LATENT,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 4),
        "transformer_layers_per_block": 1,
        "cross_attention_dim": sum(TEXT_WIDTHS),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": TIME,
        "projection_class_embeddings_input_dim": 6 * TIME + POOLED,
        "norm_num_groups": 4,
        **changes,
    }


def build_pipeline(seed: int = 0, prediction: str = "epsilon", **unet_changes) -> StableDiffusionXLPipeline:
    """SDXL's architecture with random weights: (16, 16) pixels, (4, 8, 8) latents."""
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return StableDiffusionXLPipeline(
            vae=AutoencoderKL(
                block_out_channels=(4, 8),
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                latent_channels=4,
                norm_num_groups=2,
                sample_size=RESOLUTION,
                scaling_factor=0.7,
            ),
            text_encoder=CLIPTextModel(_text_config(TEXT_WIDTHS[0], tokenizer)),
            text_encoder_2=CLIPTextModelWithProjection(_text_config(TEXT_WIDTHS[1], tokenizer)),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            unet=UNet2DConditionModel(**unet_config(**unet_changes)),
            scheduler=EulerDiscreteScheduler(
                beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=prediction
            ),
        )


def subject_image(name: str, number: int, size: int = 20) -> Image.Image:
    """A disc of the subject's own colour on one of several greys."""
    image = Image.new("RGB", (size, size), (60 + 40 * number,) * 3)
    colour = {"rex": (200, 40, 40), "cola": (40, 60, 200)}[name]
    ImageDraw.Draw(image).ellipse((size // 4, size // 4, 3 * size // 4, 3 * size // 4), fill=colour)
    return image


def new_subjects() -> list[NewSubject]:
    return [
        NewSubject("rex", "dog", True, [subject_image("rex", number) for number in range(3)], PROMPTS),
        NewSubject("cola", "can", False, [subject_image("cola", number) for number in range(2)], PROMPTS[:2]),
    ]


def write_prepared(folder: Path) -> dict[str, Subject]:
    """A folder as prepare_data leaves it."""
    folder.mkdir(parents=True)
    write_subjects(folder, new_subjects(), TOKEN)
    write_manifest(folder, {"source": "tests"}, summarised=("subjects",))
    return read_subjects(folder)


def write_dreambooth(root: Path) -> None:
    """A folder as DreamBooth publishes it; its list has a class without a folder."""
    for subject in new_subjects():
        (root / subject.name).mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(subject.images):
            image.save(root / subject.name / f"{number:02d}.jpg", quality=95)
    (root / PROMPTS_FILE).write_text(_PROMPTS_AND_CLASSES, encoding="utf-8")


_PROMPTS_AND_CLASSES = """Classes

subject_name,class
rex,dog
cola,can
bear,stuffed animal

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the snow'.format(unique_token, class_token),
"a {0} {1} on top of a child's rug".format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} in the snow'.format(unique_token, class_token),
'a {0} {1} wearing a red hat'.format(unique_token, class_token),
]
"""

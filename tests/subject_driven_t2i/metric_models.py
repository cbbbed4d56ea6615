"""Tiny random encoders of the metrics' architectures, saved as their checkpoints are."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast, ViTConfig, ViTModel

IMAGE_SIZE, PATCH_SIZE = 32, 8
TEXT_LENGTH = 12
WORDS = (
    *("<pad>", "<s>", "<unk>", "a", "photo", "of", "sks", "on", "in", "front", "background", "wall", "the", "beach"),
    *("white", "black", "gray", "brown", "pink", "teal", "toy", "badge", "lamp", "robot", "button", "dog", "</s>"),
)
_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def save_dino(folder: Path, seed: int = 0, **settings) -> Path:
    """A ViT as ``facebook/dino-vits16`` is saved: without a pooling layer."""
    torch.manual_seed(seed)
    config = ViTConfig(**{**_TOWER, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, **settings})
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def save_clip(folder: Path, seed: int = 0) -> Path:
    """A CLIP with a word-level tokenizer."""
    torch.manual_seed(seed)
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    text = {"vocab_size": len(WORDS), "max_position_embeddings": TEXT_LENGTH, "pad_token_id": 0, "bos_token_id": 1}
    config = CLIPConfig(
        text_config={**_TOWER, **text, "eos_token_id": vocabulary["</s>"], "projection_dim": 16},
        vision_config={**_TOWER, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "projection_dim": 16},
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", vocabulary["</s>"])]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder

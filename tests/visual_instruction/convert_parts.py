"""Small random parts of a LLaVA in folders, for the tests of the converters."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "initializer_factor": 5.0,
    "initializer_range": 0.3,
}


def save_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges, which does not know ``<image>``: 261 tokens."""
    letters = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|im_end|>", pad_token="<pad>"
    )
    fast.save_pretrained(folder)
    return fast


def save_llm(folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0, **settings) -> LlamaForCausalLM:
    """A random Llama of two layers with grouped queries, and its tokenizer; saved in shards."""
    values = {
        "vocab_size": 261,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 4,
        "pad_token_id": 0,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**values | settings)).to(dtype).eval()
    model.save_pretrained(folder, max_shard_size="60KB")
    save_tokenizer(folder)
    return model


def save_clip(folder: Path, whole: bool = False, seed: int = 1, **settings) -> torch.nn.Module:
    """A random CLIP vision tower (the whole CLIP model around it if ``whole``), under the names of published ones."""
    vision = CLIPVisionConfig(**VISION | settings)
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if whole:
            model = CLIPModel(CLIPConfig(vision_config=vision.to_dict(), text_config=text | {"vocab_size": 64})).eval()
        else:
            model = CLIPVisionModel(vision).eval()
    model.save_pretrained(folder)
    return model


def save_projector(
    folder: Path, vision_width: int = 32, text_width: int = 48, seed: int = 2
) -> dict[str, torch.Tensor]:
    """A random projector under transformers' names."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "linear_1.weight": (text_width, vision_width),
        "linear_1.bias": (text_width,),
        "linear_2.weight": (text_width, text_width),
        "linear_2.bias": (text_width,),
    }
    tensors = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def renamed(folder: Path, rename) -> None:
    """Renames the tensors of a saved single file by a function of their names."""
    path = folder / "model.safetensors"
    tensors = {rename(name): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def left_over(folder: Path) -> list[str]:
    """Names in a folder, hidden ones too."""
    return sorted(path.name for path in folder.iterdir())

"""A LLaVA from its parts: a language model in Llama's layout, a CLIP vision tower and a projector.

**Vocabulary.** A tokenizer that knows the image token keeps it. To any other it is added as a new special token, and
``<pad>`` with it where there is neither a padding token nor a reserved one to pad with. New ids take rows that the
embeddings have to spare; without such rows the embeddings grow to the next multiple of 64. (LLaMA-3 8B: ``<image>`` is
128256, 128,320 rows; InternLM2: 92544 and 92,608, as XTuner's conversion of its LLaVA-LLaMA-3 for transformers.) A
reserved token is not renamed instead: its name is written into tokenizer files in several places, and users of the
language model know it. New rows are the mean of all others: the logit of a new token is the mean of all logits, so
that greedy decoding never chooses it, and the logits of ordinary tokens stay what they were.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    PreTrainedTokenizerBase,
)

from moslora_core.adapter_files import check_output, new_folder
from moslora_core.base_models import set_padding
from moslora_core.errors import UserError

from .checkpoint import CONFIG_FILE, Checkpoint, ShardWriter, open_checkpoint, parse_config, read_config
from .internlm2 import MODEL_TYPE as INTERNLM2
from .layout import (
    IMAGE_TOKEN,
    LANGUAGE,
    TOWER,
    llava_name,
    read_image_processor,
    read_llava_config,
    read_tokenizer,
    shapes_of,
    vision_shapes,
    write_generation_config,
    write_processor,
)
from .projector import PREFIX, Projector, new_projector, read_projector

PAD_TOKEN = "<pad>"
ROWS = 64
_EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
_CHUNK = 8192


@dataclass(frozen=True)
class LanguageModel:
    folder: Path
    config: LlamaConfig
    weights: Checkpoint
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class VisionTower:
    """``weights``: names below ``vision_tower.vision_model``."""

    config: CLIPVisionConfig
    weights: Checkpoint
    images: CLIPImageProcessorPil


def assemble(
    llm: Path,
    vision: Path,
    projector: Path | None,
    out: Path,
    *,
    image_token: str = IMAGE_TOKEN,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    allow_pickle: bool = False,
) -> Path:
    """Writes a base model folder: LlavaForConditionalGeneration with tokenizer and image processor, as LLaVA-1.5.

    Tensors go from file to file; no model is built, and one shard (2 GB) is held at a time.

    Args:
        llm: LlamaForCausalLM folder with its tokenizer.
        vision: folder of a CLIPVisionModel, or of a whole CLIP model or a LLaVA, whose vision tower is taken.
        projector: folder or file (see ``projector``); None for an untrained one drawn with ``seed``.
        out: folder to write, new or empty; it appears complete or not at all.
        image_token: special token that stands for the image in text.
        dtype: dtype of all weights; None keeps that of each tensor, and that of the language model for what is new.
            transformers loads the whole model in one dtype, by ``dtype="auto"`` in the language model's.
        allow_pickle: read ``vision`` and ``projector`` from pickles too (see :func:`.checkpoint.open_checkpoint`);
            CLIP ViT-L/14-336 is published as one.

    Raises:
        UserError: a part is missing, damaged, of another kind or does not fit the others; or ``out`` is not empty or
            cannot be written.
    """
    check_output(out)
    language = _read_language_model(llm)
    tower = _read_tower(vision, allow_pickle)
    widths = (tower.config.hidden_size, language.config.hidden_size)
    kept = language.config.dtype or torch.float32
    if projector is None:
        between = new_projector(*widths, dtype or kept, seed)
    else:
        between = read_projector(projector, allow_pickle=allow_pickle)
        if (between.vision_width, between.llm_width) != widths:
            raise UserError(
                f"{projector}: leads from {between.vision_width} to {between.llm_width}; expected from {widths[0]} "
                f"({vision}) to {widths[1]} ({llm})"
            )
    rows = _add_tokens(language, image_token)
    config = _llava_config(language, tower, between, rows, image_token)
    text, config.dtype = language.config, dtype or kept
    with new_folder(out) as folder:
        writer = ShardWriter(folder)

        def write(name: str, tensor: torch.Tensor) -> None:
            writer.add(name, tensor if dtype is None else tensor.to(dtype))

        for name, tensor in language.weights.tensors("language model"):
            write(LANGUAGE + name, with_rows(tensor, rows) if name in _EMBEDDINGS else tensor)
        for name, tensor in tower.weights.tensors("vision tower"):
            write(f"{TOWER}vision_model.{name}", tensor)
        for name, tensor in between.tensors.items():
            write(PREFIX + name, tensor)
        writer.close()
        config.save_pretrained(folder)
        write_processor(folder, language.tokenizer, tower.images, config)
        write_generation_config(llm, text, folder)
    return out


# ------------------------------------------------------------------------------------------------------------- parts


def _read_language_model(folder: Path) -> LanguageModel:
    description = read_config(folder, ("llama", INTERNLM2))
    if description["model_type"] == INTERNLM2:
        raise UserError(f"{folder}: is an InternLM2; run python -m visual_instruction.convert internlm2 on it first")
    config = parse_config(LlamaConfig, description, folder / CONFIG_FILE)
    weights = open_checkpoint(folder)
    if config.tie_word_embeddings:
        weights = weights.view(lambda name: None if name == "lm_head.weight" else name)
    weights.check(shapes_of(LlamaForCausalLM, config, folder))
    return LanguageModel(folder, config, weights, read_tokenizer(folder))


def _read_tower(folder: Path, allow_pickle: bool) -> VisionTower:
    description = read_config(folder, ("clip_vision_model", "clip", "llava"))
    if description["model_type"] == "llava":
        config = read_llava_config(folder).vision_config
    else:
        if description["model_type"] == "clip":
            description = description.get("vision_config") or {}
        config = parse_config(CLIPVisionConfig, description, folder / CONFIG_FILE)
    shapes = vision_shapes(config, folder)

    def rename(name: str) -> str | None:
        name = (llava_name(name) or name).removeprefix(TOWER).removeprefix("vision_model.")
        return name if name in shapes else None

    weights = open_checkpoint(folder, allow_pickle=allow_pickle).view(rename)
    weights.check(shapes)
    return VisionTower(config, weights, read_image_processor(folder, config))


def _llava_config(
    language: LanguageModel, tower: VisionTower, projector: Projector, rows: int, image_token: str
) -> LlavaConfig:
    tokenizer = language.tokenizer
    text = language.config
    text.vocab_size = rows
    text.pad_token_id = tokenizer.pad_token_id
    return LlavaConfig(
        text_config=text,
        vision_config=tower.config,
        image_token_index=tokenizer.convert_tokens_to_ids(image_token),
        image_seq_length=(tower.config.image_size // tower.config.patch_size) ** 2,
        projector_hidden_act=projector.hidden_act,
        multimodal_projector_bias=projector.bias,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=text.tie_word_embeddings,
        pad_token_id=tokenizer.pad_token_id,
        architectures=["LlavaForConditionalGeneration"],
    )


# -------------------------------------------------------------------------------------------------------- vocabulary


def _add_tokens(language: LanguageModel, image_token: str) -> int:
    """Makes the tokenizer know the image token and a padding token; returns the rows that the embeddings need."""
    tokenizer, rows = language.tokenizer, language.config.vocab_size
    if image_token not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(image_token, special=True, normalized=False)], special_tokens=True)
    unpadded = tokenizer.pad_token is None
    set_padding(tokenizer, str(language.folder))
    if unpadded and tokenizer.pad_token == tokenizer.eos_token:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    needed = max(tokenizer.get_vocab().values()) + 1
    return rows if needed <= rows else -(-needed // ROWS) * ROWS


def with_rows(matrix: torch.Tensor, rows: int) -> torch.Tensor:
    """``matrix`` (old rows, width) with new rows below, each the mean of the old ones."""
    if (missing := rows - matrix.shape[0]) == 0:
        return matrix
    total = sum(chunk.double().sum(0) for chunk in matrix.split(_CHUNK))
    mean = (total / matrix.shape[0]).to(matrix.dtype)
    return torch.cat([matrix, mean.expand(missing, -1)])

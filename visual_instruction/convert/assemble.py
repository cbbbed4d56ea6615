"""Assembles a LLaVA from its parts: a language model in Llama's layout, a CLIP vision tower and a projector.

The recipe is LLaVA-1.5's: features of the vision tower's last layer but one without the class token, a projector of
two layers with GELU. Weights are written under llava-hf's names (``language_model.model``,
``vision_tower.vision_model``, ``multi_modal_projector``), which every version of transformers reads.

**Vocabulary.** ``<image>`` becomes a special token. Where the language model has no row for it, its embeddings and its
output head grow to the next multiple of 64. The new rows are the mean of the old ones: the embedding of ``<image>`` is
replaced by the image's features and never used, and a logit that is the mean of all others is never the largest. The
logits of the language model's own vocabulary stay what they were.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tokenizers import AddedToken
from torch import nn
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)

from moslora_core.base_models import loading
from moslora_core.errors import UserError

from .checkpoint import CONFIG, Checkpoint, Shape, new_folder, parse_config, read_config, shapes_of, write_weights

logger = logging.getLogger(__name__)

IMAGE_TOKEN = "<image>"
VOCABULARY_MULTIPLE = 64
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PROJECTOR_TENSORS = ("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias")
_IMAGE_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_PATCHES = "embeddings.patch_embedding.weight"

Tensors = dict[str, Callable[[], torch.Tensor]]


@dataclass
class Part:
    """A part of a LLaVA: its configuration, and what reads its tensors, by their names in the part's own model."""

    config: LlamaConfig | CLIPVisionConfig
    tensors: Tensors


def assemble(
    llm: Path,
    vision: Path,
    projector: Path | None,
    out: Path,
    *,
    image_token: str = IMAGE_TOKEN,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Path:
    """Writes the base model folder ``out``: configuration, weights, tokenizer and processor.

    Args:
        llm: folder of a language model in Llama's layout with its tokenizer.
        vision: folder of a CLIP vision model, a whole CLIP model, or a LLaVA.
        projector: folder that ``python -m visual_instruction.convert projector`` writes; None draws a new one, as
            ``nn.Linear`` does, from ``seed``.
        dtype: of all weights; None keeps those of the parts (a new projector takes the language model's).

    Raises:
        UserError: a part that is missing, of another kind, damaged or incomplete, parts that do not fit, or an ``out``
            that is not empty.
    """
    llm, vision, out = Path(llm), Path(vision), Path(out)
    with new_folder(out) as folder:
        language, tower = read_llm(llm), read_vision(vision)
        text = language.config
        widths = (tower.config.hidden_size, text.hidden_size)
        text_dtype = language.tensors[EMBEDDINGS]().dtype
        if projector is None:
            connection = draw_projector(*widths, dtype=text_dtype, seed=seed)
        else:
            connection = read_projector(Path(projector), *widths)
        tokenizer, image_id = load_tokenizer(llm, image_token)
        tensors = resized(language.tensors, text, image_id)
        text.dtype = tower.config.dtype = dtype or text_dtype
        config = LlavaConfig(
            text_config=text.to_dict(),
            vision_config=tower.config.to_dict(),
            image_token_index=image_id,
            image_seq_length=(tower.config.image_size // tower.config.patch_size) ** 2,
            projector_hidden_act="gelu",
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            tie_word_embeddings=text.tie_word_embeddings,
            dtype=dtype or text_dtype,
        )
        image_processor = load_image_processor(vision, tower.config)
        write_llava(folder, config, tensors, tower.tensors, connection, dtype)
        write_generation_config(folder, llm, config)
        write_processor(folder, config, tokenizer, image_processor, image_token)
    logger.info("%s: a LLaVA of %s and %s", out, llm, vision)
    return out


# --------------------------------------------------------------------------------------------------------------- parts


def read_llm(folder: Path) -> Part:
    """A language model in Llama's layout.

    Raises:
        UserError: a folder that holds none, or less than a whole one.
    """
    config = parse_config(LlamaConfig, read_config(folder, ("llama",)), folder / CONFIG)
    return Part(config, _lazy(Checkpoint(folder), shapes_of(LlamaForCausalLM, config)))


def read_vision(folder: Path) -> Part:
    """The CLIP vision tower of a CLIP vision model, a whole CLIP model or a LLaVA.

    Raises:
        UserError: a folder that holds none, or a LLaVA with another kind of tower.
    """
    values = read_config(folder, ("clip_vision_model", "clip", "llava"))
    values = values if values["model_type"] == "clip_vision_model" else values.get("vision_config", {})
    if values.get("model_type", "clip_vision_model") != "clip_vision_model":
        raise UserError(
            f"{folder / CONFIG}: vision_config has model_type {values['model_type']!r}; expected clip_vision_model"
        )
    config = parse_config(CLIPVisionConfig, values, folder / CONFIG)
    checkpoint = Checkpoint(folder)
    # The prefix depends on the model around the tower and on the transformers that saved it.
    prefixes = [name.removesuffix(_PATCHES) for name in checkpoint if name.endswith(_PATCHES)]
    if len(prefixes) != 1:
        raise UserError(f"{folder}: has {len(prefixes)} tensors named ...{_PATCHES}; expected one vision tower")
    return Part(config, _lazy(checkpoint, shapes_of(CLIPVisionModel, config), prefixes[0]))


def read_projector(folder: Path, vision_width: int, text_width: int) -> Tensors:
    """A projector under transformers' names.

    Raises:
        UserError: a folder that holds none, or one between towers of other widths.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected a projector ({', '.join(PROJECTOR_TENSORS)})")
    return _lazy(Checkpoint(folder), projector_shapes(vision_width, text_width))


def projector_shapes(vision_width: int, text_width: int) -> dict[str, Shape]:
    """Tensors of a projector: (text, vision) and (text, text) weights with their biases."""
    shapes = ((text_width, vision_width), (text_width,), (text_width, text_width), (text_width,))
    return dict(zip(PROJECTOR_TENSORS, shapes, strict=True))


def draw_projector(vision_width: int, text_width: int, dtype: torch.dtype, seed: int) -> Tensors:
    """A new projector with ``nn.Linear``'s own initialisation, as LLaVA and XTuner begin with."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        layers = {"linear_1": nn.Linear(vision_width, text_width), "linear_2": nn.Linear(text_width, text_width)}
    state = nn.ModuleDict(layers).state_dict()
    return {name: partial(state[name].to, dtype) for name in PROJECTOR_TENSORS}


def _lazy(checkpoint: Checkpoint, shapes: dict[str, Shape], prefix: str = "") -> Tensors:
    """What reads each of a model's tensors; every one of them is known to be there."""
    for name in shapes:
        if prefix + name not in checkpoint:
            raise UserError(f"{checkpoint.folder}: has no tensor {prefix + name}; the checkpoint is incomplete")
    return {name: partial(checkpoint.read, prefix + name, shape) for name, shape in shapes.items()}


# ---------------------------------------------------------------------------------------------------------- vocabulary


def load_tokenizer(folder: Path, image_token: str = IMAGE_TOKEN) -> tuple[PreTrainedTokenizerBase, int]:
    """The tokenizer of a model folder with ``image_token`` as a special token, and the token's id.

    Raises:
        UserError: a folder without a tokenizer.
    """
    tokenizer = loading(lambda: AutoTokenizer.from_pretrained(str(folder), local_files_only=True), str(folder))
    tokenizer.add_tokens([AddedToken(image_token, normalized=False, special=True)], special_tokens=True)
    return tokenizer, tokenizer.convert_tokens_to_ids(image_token)


def resized(tensors: Tensors, config: LlamaConfig, image_id: int) -> Tensors:
    """``tensors`` with rows for ``image_id`` where there are none; sets the vocabulary size of ``config``."""
    if image_id < config.vocab_size:
        return tensors
    config.vocab_size = -(-(image_id + 1) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    grown = {name: partial(_grow, tensors[name], config.vocab_size) for name in (EMBEDDINGS, HEAD) if name in tensors}
    return tensors | grown


def _grow(read: Callable[[], torch.Tensor], rows: int) -> torch.Tensor:
    weight = read()
    mean = weight.mean(dim=0, keepdim=True, dtype=torch.float32).to(weight.dtype)
    return torch.cat([weight, mean.expand(rows - len(weight), -1)])


# ------------------------------------------------------------------------------------------------------------- writing


def load_image_processor(folder: Path, config: CLIPVisionConfig) -> CLIPImageProcessorPil:
    """The image processor of a model folder, or CLIP's own at the size that the vision tower takes.

    Raises:
        UserError: a processor for another size of images.
    """
    size = config.image_size
    if not any((folder / name).is_file() for name in _IMAGE_PROCESSOR_FILES):
        return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    processor = loading(lambda: CLIPImageProcessorPil.from_pretrained(str(folder), local_files_only=True), str(folder))
    found = (processor.crop_size.height, processor.crop_size.width)
    if found != (size, size):
        raise UserError(f"{folder}: its image processor makes images of {found}; the vision tower takes {size, size}")
    return processor


def write_llava(
    folder: Path, config: LlavaConfig, text: Tensors, vision: Tensors, projector: Tensors, dtype: torch.dtype | None
) -> None:
    """Configuration and weights of a LLaVA; ``dtype`` None keeps every tensor's own."""
    prefixes = {"language_model.": text, "vision_tower.vision_model.": vision, "multi_modal_projector.": projector}
    named = {prefix + name: read for prefix, part in prefixes.items() for name, read in part.items()}

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, read in named.items():
            yield name, read() if dtype is None else read().to(dtype)

    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(folder)
    write_weights(folder, tensors(), len(named))


def write_generation_config(folder: Path, source: Path, config: LlavaConfig) -> None:
    """The generation settings of ``source`` (chat models have several end tokens there), or those of ``config``."""
    name = "generation_config.json"
    if (source / name).is_file():
        # As it is: published ones hold sampling settings that transformers reads but refuses to save.
        shutil.copyfile(source / name, folder / name)
    else:
        GenerationConfig.from_model_config(config.get_text_config()).save_pretrained(folder)


def write_processor(
    folder: Path,
    config: LlavaConfig,
    tokenizer: PreTrainedTokenizerBase,
    image_processor: CLIPImageProcessorPil,
    image_token: str = IMAGE_TOKEN,
) -> None:
    """Tokenizer and image processor as one LlavaProcessor, which expands ``image_token`` to an image's tokens."""
    LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        image_token=image_token,
        num_additional_image_tokens=1,  # CLIP's class token, which the strategy "default" drops again
    ).save_pretrained(folder)

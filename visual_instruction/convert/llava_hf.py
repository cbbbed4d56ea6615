"""A LLaVA as llava-hf publishes it: as a base model folder, or as the parts that ``assemble`` puts together again."""

from __future__ import annotations

from pathlib import Path

from transformers import CLIPImageProcessorPil, LlavaConfig, PreTrainedTokenizerBase

from moslora_core.adapter_files import check_output, new_folder
from moslora_core.errors import UserError

from .checkpoint import Checkpoint, ShardWriter
from .layout import (
    IMAGE_TOKEN,
    LANGUAGE,
    TOWER,
    open_llava,
    read_image_processor,
    read_llava_config,
    read_tokenizer,
    write_generation_config,
    write_processor,
)
from .projector import PREFIX, Projector, write_projector

LLM, VISION, PROJECTOR = "llm", "vision", "projector"


def convert_llava_hf(source: Path, out: Path, *, parts: bool = False) -> Path:
    """Writes a LLaVA with CLIP as a base model folder, or as folders ``llm``, ``vision`` and ``projector``.

    Tensors are copied as they are; only names and the processor's files are brought to one form (see ``layout``).

    Args:
        source: config.json, safetensors, tokenizer and image processor, of any version of transformers.
        out: folder to write, new or empty; it appears complete or not at all.

    Raises:
        UserError: ``source`` is no complete LLaVA with CLIP, its image token is not its tokenizer's, or ``out`` is
            not empty or cannot be written.
    """
    check_output(out)
    config = read_llava_config(source)
    checkpoint = open_llava(source, config)
    tokenizer = read_tokenizer(source)
    images = read_image_processor(source, config.vision_config)
    image_token = tokenizer.convert_ids_to_tokens(config.image_token_index)
    if image_token != IMAGE_TOKEN:
        raise UserError(
            f"{source}: image_token_index={config.image_token_index} is {image_token!r} in its tokenizer; expected "
            f"{IMAGE_TOKEN!r}, which the prompt templates write"
        )
    if parts and config.text_config.model_type != "llama":
        raise UserError(f"{source}: its language model is {config.text_config.model_type!r}; expected llama for parts")
    with new_folder(out) as folder:
        if parts:
            _write_parts(checkpoint, config, tokenizer, images, folder)
        else:
            _copy(checkpoint, folder)
            config.save_pretrained(folder)
            write_processor(folder, tokenizer, images, config)
        write_generation_config(source, config.text_config, folder / LLM if parts else folder)
    return out


def _write_parts(
    checkpoint: Checkpoint,
    config: LlavaConfig,
    tokenizer: PreTrainedTokenizerBase,
    images: CLIPImageProcessorPil,
    folder: Path,
) -> None:
    for part, settings, prefix, architecture, processor in (
        (LLM, config.text_config, LANGUAGE, "LlamaForCausalLM", tokenizer),
        (VISION, config.vision_config, TOWER, "CLIPVisionModel", images),
    ):
        (folder / part).mkdir()
        settings.architectures, settings.dtype = [architecture], config.dtype
        settings.save_pretrained(folder / part)
        processor.save_pretrained(folder / part)
        _copy(_below(checkpoint, prefix), folder / part)
    (folder / PROJECTOR).mkdir()
    tensors = dict(_below(checkpoint, PREFIX).tensors(PROJECTOR))
    write_projector(Projector(tensors, config.projector_hidden_act), folder / PROJECTOR)


def _below(checkpoint: Checkpoint, prefix: str) -> Checkpoint:
    return checkpoint.view(lambda name: name.removeprefix(prefix) if name.startswith(prefix) else None)


def _copy(checkpoint: Checkpoint, folder: Path) -> None:
    writer = ShardWriter(folder)
    for name, tensor in checkpoint.tensors("LLaVA"):
        writer.add(name, tensor)
    writer.close()

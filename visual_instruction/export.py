"""Exports a trained run for tools that know nothing of this project.

    python -m visual_instruction.export --run runs/visual_instruction/paper/moslora/default/seed-1 --out moslora

    merged/   base, adapters of both towers and projector in one LlavaForConditionalGeneration, with its processor:
              for transformers (5 or later) alone, and for all that loads such a folder
    adapter/  the adapter folded to plain LoRA, with the projector (modules_to_save): for stock PEFT on the same base
    export.json   where they come from, and how much was found to differ

**In the toolkits.** lmms-eval: ``--model llava_hf --model_args pretrained=<out>/merged``. VLMEvalKit: its class
``LLaVA_Next`` with ``model_path=<out>/merged``; the path must hold the word "interleave" (``--out
interleave-moslora``), by which that class takes LlavaForConditionalGeneration. Both render the processor's chat
template, which here is the template of the training, and stop at the tokenizer's end token, which here is the
template's. The image processor pads to a square where the training did. VLMEvalKit's ``LLaVA_XTuner``, which the paper
used, wants XTuner's folders with code of their own; ``merged`` stands in for it.

**Checks.** Merging is done in float32 and must leave the logits of a question about a picture as they were, to 1e-4 of
the largest. Then the weights are rounded to the dtype of the base. What is written is loaded again by transformers
alone: its logits must be those of the rounded weights, and its processor must give the tokens and pixels that training
and evaluation give. An export that fails a check is not written.

**Quantised bases.** An adapter of a quantised base corrects the base as quantised, so it is merged into the
dequantised weights, and the export is as large as the base was before. Quantising it again rounds the adapter's part
too: expect other answers than those that were evaluated.
"""

from __future__ import annotations

import argparse
import copy
import gc
import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoProcessor,
    GenerationConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
)

from moslora_core import launch
from moslora_core.adapter_files import CARD_NAME, CONFIG_NAME, WEIGHTS_NAME, new_folder, read_config
from moslora_core.base_models import adapter_digest, attach_saved
from moslora_core.errors import UserError
from moslora_core.evaluations import trained_adapter
from moslora_core.fold import fold_adapter
from moslora_core.record import RunRecord, environment, write_json

from .chat import HUMAN, IMAGE, Template
from .chat_markup import chat_markup
from .config import EXPERIMENT, Config, ModelConfig
from .data import Collator, encode_prompt
from .images import image_token_count, pixel_values
from .models import load_base, load_processor, template_of
from .recorded import recorded_config

logger = logging.getLogger(__name__)

MERGED, ADAPTER, FACTS = "merged", "adapter", "export.json"
TOLERANCE = 1e-4  # of the largest logit, in float32
PIXEL_TOLERANCE = 1e-2  # in standard deviations of the image processor; a grey level is about 0.015
QUESTION = "What is in the picture?"


# --------------------------------------------------------------------------------------------------------------- merge


def load_mergeable(config: ModelConfig, adapter: Path) -> tuple[PeftModel, torch.dtype]:
    """The adapted LLaVA in float32 on the CPU, a quantised base dequantised; and the dtype of the base.

    Raises:
        UserError: a base or an adapter that does not load.
    """
    base = load_base(config)
    dtype = base.get_input_embeddings().weight.dtype
    if config.quantization != "none":
        logger.warning(
            "the base was quantised (%s): merging into its dequantised weights, which are as large as an unquantised "
            "base; quantising the export again would round the adapter too",
            config.quantization,
        )
        base = base.dequantize()
        base.is_quantized = False
    return attach_saved(base.float(), adapter, f"model.path={config.path or config.llm}").eval(), dtype


def merge(model: PeftModel) -> LlavaForConditionalGeneration:
    """The model with its adapters and its trained projector merged in.

    Raises:
        UserError: weights that are not finite.
    """
    try:
        return model.merge_and_unload(safe_merge=True).eval()
    except ValueError as error:
        raise UserError(f"the adapter cannot be merged: {str(error).splitlines()[0]}") from None


@torch.inference_mode()
def _logits(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch).logits.float()


def _check_logits(before: torch.Tensor, after: torch.Tensor, what: str) -> float:
    """Largest difference of two models' logits over the largest logit.

    Raises:
        UserError: it exceeds the tolerance.
    """
    difference = ((before - after).abs().max() / before.abs().max()).item()
    if not difference <= TOLERANCE:  # a NaN is no agreement
        raise UserError(
            f"export failed: {what} changes the logits by {difference:.1e}; expected {TOLERANCE:.0e} at most"
        )
    logger.info("%s changes the logits by %.1e of the largest", what, difference)
    return difference


# ----------------------------------------------------------------------------------------------------------- processor


def exported_processor(processor: LlavaProcessor, template: Template, square_padding: bool) -> LlavaProcessor:
    """A processor that by itself asks and sees as evaluation does.

    It has the chat template of the training with its beginning token, which the tokenizer therefore no longer adds of
    its own, the template's end as the end token, and square padding.
    """
    found = copy.deepcopy(processor)
    tokenizer = found.tokenizer
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    tokenizer.add_bos_token = False
    tokenizer.eos_token = template.end
    found.chat_template = tokenizer.chat_template = chat_markup(template)
    if square_padding:
        settings = found.image_processor.to_dict()
        settings.pop("image_processor_type", None)
        found.image_processor = LlavaImageProcessorPil(**settings | {"do_pad": True})
    return found


def probe(processor: LlavaProcessor) -> Image.Image:
    """A wide picture of noise, the same every time."""
    height = processor.image_processor.crop_size["height"]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (height, height * 3 // 2, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(noise.numpy())


def _batch(processor: LlavaProcessor, template: Template, square_padding: bool) -> dict[str, torch.Tensor]:
    """A question about the probe, as evaluation puts it to the model."""
    turns = [{"from": HUMAN, "value": f"{IMAGE}\n{QUESTION}"}]
    row: dict[str, Any] = encode_prompt(turns, processor.tokenizer, template, image_token_count(processor))
    row["pixel_values"] = pixel_values([probe(processor)], processor, square_padding)[0]
    return Collator(processor.tokenizer.pad_token_id)([row])


def _check_processor(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    """What the written processor makes of the probe, by either way of calling it.

    Raises:
        UserError: other tokens or pixels than those of training and evaluation.
    """
    processor = AutoProcessor.from_pretrained(folder)
    image = probe(processor)
    parts = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    renderings = {
        "tokenizer": processor.tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{IMAGE}\n{QUESTION}"}], tokenize=False, add_generation_prompt=True
        ),
        "processor": processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True),
    }
    for name, text in renderings.items():
        found = processor(text=text, images=image, return_tensors="pt")
        if not torch.equal(found["input_ids"], expected["input_ids"]):
            raise UserError(
                f"export failed: the {name}'s chat template gives other tokens than the prompt template of the "
                f"training: {processor.tokenizer.decode(found['input_ids'][0])[:200]!r}"
            )
        pixels = expected["pixel_values"]
        if (
            found["pixel_values"].shape != pixels.shape
            or (found["pixel_values"] - pixels).abs().max() > PIXEL_TOLERANCE
        ):
            raise UserError("export failed: the written image processor gives other pixels than that of the training")


# --------------------------------------------------------------------------------------------------------------- write


def _write_merged(
    folder: Path,
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    template: Template,
    base_ends: int | list[int] | None,
) -> None:
    tokenizer = processor.tokenizer
    ends = {tokenizer.convert_tokens_to_ids(template.end)}
    ends |= set([base_ends] if isinstance(base_ends, int) else base_ends or [])
    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)  # the file of its own that transformers 4 looks for


def _write_adapter(source: Path, folder: Path) -> None:
    """The adapter folded, where it has mixers, else as it is."""
    if read_config(source).get("peft_type") == "MOSLORA":
        fold_adapter(source, folder)
        return
    folder.mkdir()
    for name in (CONFIG_NAME, WEIGHTS_NAME, CARD_NAME):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def export(run: Path, out: Path, base: str | None = None) -> Path:
    """Writes ``merged``, ``adapter`` and ``export.json`` of a run to ``out``, all of them or none.

    Args:
        base: path of the base where it is not at the recorded one.

    Raises:
        UserError: no trained run, a base or an adapter that does not load, a folder that holds something, a check that
            fails.
    """
    record = RunRecord(run)
    config = recorded_config(record)
    if base is not None:
        config.model = replace(config.model, path=base)
    adapter = trained_adapter(record, config, EXPERIMENT)
    if adapter is None:
        raise UserError(f"{run}: method={config.method.name} has no adapter; nothing to export")
    with new_folder(out) as folder:
        differences = _export_merged(folder / MERGED, config, adapter)
        _write_adapter(adapter, folder / ADAPTER)
        facts = {
            "run": str(run),
            "method": config.method.name,
            "seed": config.seed,
            "base": config.model.path or config.model.llm,
            "quantization": config.model.quantization,
            "template": config.model.template,
            "square_padding": config.data.square_padding,
            "adapter_sha256": adapter_digest(adapter),
            "logit_differences": differences,
            **environment(),
        }
        write_json(folder / FACTS, facts)
    logger.info("written to %s", out)
    return out


def _export_merged(folder: Path, config: Config, adapter: Path) -> dict[str, float]:
    template = template_of(config.model)
    processor = load_processor(config.model)
    batch = _batch(processor, template, config.data.square_padding)
    adapted, dtype = load_mergeable(config.model, adapter)
    ends = adapted.get_base_model().generation_config.eos_token_id
    before = _logits(adapted, batch)
    merged = merge(adapted)
    del adapted
    differences = {"merging": _check_logits(before, _logits(merged, batch), "merging")}
    for parameter in merged.parameters():
        parameter.data = parameter.data.to(dtype).float()
    rounded = _logits(merged, batch)
    merged = merged.to(dtype)
    _write_merged(folder, merged, exported_processor(processor, template, config.data.square_padding), template, ends)
    del merged
    gc.collect()  # before the model is loaded again
    _check_processor(folder, batch)
    written = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    differences["writing"] = _check_logits(rounded, _logits(written, batch), "writing")
    return differences


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m visual_instruction.export", description="Export a trained run as plain LLaVA and plain LoRA."
    )
    parser.add_argument("--run", required=True, type=Path, help="folder of a trained run")
    parser.add_argument("--out", required=True, type=Path, help="folder to write; new or empty")
    parser.add_argument("--base", help="path of the base model where it is not at the recorded one")
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        export(given.run, given.out, given.base)
    except UserError as error:
        launch.fail(error)


if __name__ == "__main__":
    main()

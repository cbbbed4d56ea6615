"""Adapters for diffusers' pipelines: MoSLoRA folded to plain LoRA, in the file that ``load_lora_weights`` reads.

    python -m subject_driven_t2i.export runs/.../seed-1/adapter my_lora
    pipeline.load_lora_weights("my_lora")     # stock diffusers, without this project

A training writes such a folder (``adapter_diffusers``) beside its adapter. diffusers always builds a plain LoRA: of an
unfolded adapter it would drop the mixers, and without the configuration in the file's metadata it would take every
scale as 1. Both are taken care of here.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from diffusers import StableDiffusionXLPipeline

from moslora_core import launch
from moslora_core.adapter_files import PREFIX, new_folder, read_config, read_weights
from moslora_core.errors import UserError
from moslora_core.fold import fold_state_dict, plain_config

logger = logging.getLogger(__name__)

DIFFUSERS_FOLDER = "adapter_diffusers"
_LORA = ("MOSLORA", "LORA")
# Starts of A and B that leave the base as it is; PiSSA and its like take B @ A out of it when they are loaded.
_STARTS = (True, False, "gaussian")


def obstacle(adapter: Path) -> str | None:
    """What keeps diffusers' pipelines from loading a saved adapter as plain LoRA; None if nothing does.

    Raises:
        UserError: no saved adapter.
    """
    config = read_config(adapter)
    if (kind := config.get("peft_type")) not in _LORA:
        return f"peft_type is {kind!r}; diffusers loads {' and '.join(_LORA)} alone"
    if (start := config.get("init_lora_weights", True)) not in _STARTS:
        return f"init_lora_weights={start!r} changes the base's weights, which diffusers does not"
    return None


def export_diffusers(adapter: Path, out: Path) -> Path:
    """Writes a saved adapter of a UNet as ``pytorch_lora_weights.safetensors`` to the new folder ``out``.

    Raises:
        UserError: no complete adapter, one that diffusers cannot load, or a folder that holds something.
    """
    if reason := obstacle(adapter):
        raise UserError(f"{adapter}: {reason}")
    try:
        folded = fold_state_dict(read_weights(adapter))
        plain = plain_config(read_config(adapter)).to_dict()
    except (TypeError, ValueError) as error:
        raise UserError(f"{adapter}: {str(error).splitlines()[0]}") from None
    layers = {key.removeprefix(PREFIX): tensor for key, tensor in folded.items()}
    metadata = {key: value for key, value in plain.items() if value is not None} | {"peft_type": "LORA"}
    if isinstance(metadata.get("target_modules"), set):
        metadata["target_modules"] = sorted(metadata["target_modules"])
    with new_folder(out) as folder:
        StableDiffusionXLPipeline.save_lora_weights(
            folder, unet_lora_layers=layers, unet_lora_adapter_metadata=metadata
        )
    return out


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m subject_driven_t2i.export",
        description="Write a saved adapter as plain LoRA for diffusers' load_lora_weights.",
    )
    parser.add_argument("adapter", type=Path, help="folder of a saved adapter, such as a run's adapter/")
    parser.add_argument("out", type=Path, help="folder to write; new or empty")
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        logger.info("written to %s", export_diffusers(given.adapter, given.out))
    except UserError as error:
        launch.fail(error)


if __name__ == "__main__":
    main()

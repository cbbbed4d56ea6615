"""``python -m visual_instruction.convert``; see the package."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from moslora_core.errors import UserError
from moslora_core.fold import DTYPES
from moslora_core.launch import fail

from .assemble import assemble
from .internlm2 import convert_internlm2
from .layout import IMAGE_TOKEN
from .llava_hf import convert_llava_hf
from .projector import convert_projector

_PICKLE = "also read pickles, with torch's unpickler for tensors alone; no code in them runs"


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the folder written; ends with status 2 and one line on stderr for bad input."""
    arguments = _parser().parse_args(argv)
    try:
        written = arguments.run(arguments)
    except UserError as error:
        fail(error)
    sys.stdout.write(f"{written}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m visual_instruction.convert", description="Convert checkpoints for visual instruction tuning."
    )
    commands = parser.add_subparsers(required=True, metavar="WHAT")

    def command(name: str, text: str, run: Callable[[argparse.Namespace], Path]) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        made.set_defaults(run=run)
        return made

    def source_and_output(made: argparse.ArgumentParser, source: str) -> None:
        made.add_argument("source", metavar="SRC", type=Path, help=source)
        made.add_argument("output", metavar="DST", type=Path, help="folder to write; new or empty")

    made = command(
        "internlm2", "InternLM2 to Llama's layout", lambda given: convert_internlm2(given.source, given.output)
    )
    source_and_output(made, "folder of an InternLM2, downloaded")

    made = command(
        "projector",
        "XTuner's or LLaVA's projector to transformers' names",
        lambda given: convert_projector(given.source, given.output, allow_pickle=given.allow_pickle),
    )
    source_and_output(made, "folder or file of a pretrained projector")
    made.add_argument("--allow-pickle", action="store_true", help=_PICKLE)

    made = command(
        "llava-hf",
        "a LLaVA of llava-hf to a base model folder",
        lambda given: convert_llava_hf(given.source, given.output, parts=given.parts),
    )
    source_and_output(made, "folder of a LLaVA, downloaded")
    made.add_argument("--parts", action="store_true", help="write its parts instead: llm, vision, projector")

    made = command(
        "assemble",
        "a base model folder from its parts",
        lambda given: assemble(
            given.llm,
            given.vision,
            given.projector,
            given.output,
            image_token=given.image_token,
            dtype=DTYPES[given.dtype] if given.dtype else None,
            seed=given.seed,
            allow_pickle=given.allow_pickle,
        ),
    )
    made.add_argument("--llm", type=Path, required=True, help="folder of a language model in Llama's layout")
    made.add_argument(
        "--vision", type=Path, required=True, help="folder of a CLIP model, its vision tower, or a LLaVA"
    )
    made.add_argument("--projector", type=Path, help="folder or file of a projector; default: an untrained one")
    made.add_argument("--image-token", default=IMAGE_TOKEN, help="default: %(default)s")
    made.add_argument("--dtype", choices=sorted(DTYPES), help="of all weights; default: as they are")
    made.add_argument("--seed", type=int, default=0, help="of an untrained projector; default: %(default)s")
    made.add_argument("--allow-pickle", action="store_true", help=_PICKLE)
    made.add_argument("output", metavar="DST", type=Path, help="folder to write; new or empty")
    return parser


if __name__ == "__main__":
    main()

"""Answers LLaVA's question files with a trained run, for whoever judges or reads the answers.

    python -m visual_instruction.answer --run runs/visual_instruction/paper/moslora/default/seed-1
        --questions qa90_questions.jsonl --images path/to/coco --out answers.jsonl

Questions are lines of {"question_id", "image", "text", "category"}, as in LLaVA-Bench; answers are lines in LLaVA's
layout, {"question_id", "prompt", "text", "category", "model_id"}, in the order of the questions. Decoding is greedy
and the prompt is that of the training. A stopped command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from moslora_core import launch
from moslora_core.base_models import adapter_digest
from moslora_core.errors import UserError
from moslora_core.evaluations import check_positive, trained_adapter
from moslora_core.record import RunRecord, append_jsonl, repair_jsonl

from .benchmarks.registry import FREE_FORM_TOKENS, JUDGED
from .benchmarks.tsv import ImageSource, Item
from .config import EXPERIMENT, Config
from .conversations import check_image, read_questions
from .generation import Responder
from .models import load_adapted, load_processor, template_of
from .recorded import recorded_config

logger = logging.getLogger(__name__)


def answer(
    run: Path,
    questions: Path,
    images: Path,
    out: Path,
    *,
    batch_size: int = 16,
    max_new_tokens: int = FREE_FORM_TOKENS,
) -> None:
    """Appends an answer for every question that ``out`` has none for yet.

    Args:
        run: folder of a trained run, or of the untrained base.
        images: folder that the questions' images are relative to.

    Raises:
        UserError: no trained run, a bad question file, an image that is not there, or answers of another model in
            ``out``.
    """
    check_positive({"--batch-size": batch_size, "--max-new-tokens": max_new_tokens})
    record = RunRecord(run)
    config = recorded_config(record)
    adapter = trained_adapter(record, config, EXPERIMENT)
    rows = read_questions(questions)
    for row in rows:
        if fault := check_image({"id": str(row["question_id"]), "image": row["image"]}, images, "exists"):
            raise UserError(f"{questions}: question {row['question_id']!r}: {fault}")
    model_id = _model_id(config, adapter)
    answered = _answered(out, model_id)
    pending = [row for row in rows if row["question_id"] not in answered]
    if answered:
        logger.info("%d of %d questions were answered before", len(rows) - len(pending), len(rows))
    if not pending:
        return
    processor = load_processor(config.model)
    template = template_of(config.model)
    model = Responder(load_adapted(config.model, adapter), processor, template, config.data.square_padding)
    with tqdm(total=len(pending), desc="answering", unit="question", disable=None) as progress:
        for start in range(0, len(pending), batch_size):
            asked = pending[start : start + batch_size]
            responses = model.respond([_item(row, images) for row in asked], batch_size, max_new_tokens)
            append_jsonl(
                out,
                [
                    {
                        "question_id": row["question_id"],
                        "prompt": row["text"],
                        "text": response,
                        "category": row["category"],
                        "model_id": model_id,
                    }
                    for row, response in zip(asked, responses, strict=True)
                ],
            )
            progress.update(len(asked))
    logger.info("written to %s", out)


def _item(row: dict[str, Any], images: Path) -> Item:
    return Item(f"question/{row['question_id']}", JUDGED, row["text"], ImageSource(images / row["image"]))


def _model_id(config: Config, adapter: Path | None) -> str:
    """Names the model in the answers: its base, its method and, for a trained one, its weights."""
    name = f"{config.model.name}-{config.method.name}-seed-{config.seed}"
    return name if adapter is None else f"{name}-{adapter_digest(adapter)[:12]}"


def _answered(out: Path, model_id: str) -> set[int | str]:
    """Ids of the questions that ``out`` answers already."""
    if not out.exists():
        return set()
    rows = repair_jsonl(out)
    if others := sorted({str(row.get("model_id")) for row in rows} - {model_id}):
        raise UserError(f"{out}: holds answers of {others[0]}; expected those of {model_id}, or a new file")
    return {row.get("question_id") for row in rows}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m visual_instruction.answer", description="Answer LLaVA's question files with a trained run."
    )
    parser.add_argument("--run", required=True, type=Path, help="folder of a trained run")
    parser.add_argument("--questions", required=True, type=Path, help="LLaVA's question file (jsonl)")
    parser.add_argument("--images", required=True, type=Path, help="folder of the images that it names")
    parser.add_argument("--out", required=True, type=Path, help="file of answers (jsonl); grows, and is resumed")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=FREE_FORM_TOKENS)
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        answer(
            given.run,
            given.questions,
            given.images,
            given.out,
            batch_size=given.batch_size,
            max_new_tokens=given.max_new_tokens,
        )
    except UserError as error:
        launch.fail(error)


if __name__ == "__main__":
    main()

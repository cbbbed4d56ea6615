"""Draws a run's images: ``python -m subject_driven_t2i.generate scale=smoke method=moslora data.subject=toy seed=1``.

Takes the arguments that the run was trained with, and ``generation.*``. Every method, and the untrained base
(``method=base``), starts an image from the same noise. The images and their manifest go into the run record
(moslora_core/drawn_images.py), beside ``generation.json`` with the settings that they were drawn with; a stopped
generation goes on with the images that are missing.
"""

from __future__ import annotations

import hashlib
import io
import logging
import shutil
from collections.abc import Sequence, Set
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from moslora_core import launch
from moslora_core.drawn_images import FACTS, MANIFEST, SCORES, DrawnImage, read_drawn, read_facts
from moslora_core.errors import UserError
from moslora_core.evaluations import fingerprint, is_base, trained_adapter
from moslora_core.paths import is_file
from moslora_core.prepared import sha256
from moslora_core.record import (
    RunRecord,
    append_jsonl,
    repair_jsonl,
    write_atomic,
    write_json,
)
from moslora_core.running import check_on_finished

from .config import CONF_MODULE, EXPERIMENT, NOT_IN_LABEL, Config, locate
from .drawing import Request, draw, requests, resolution_of
from .encoding import encode_captions
from .models import adapt, load_pipeline
from .subjects import subject_of

logger = logging.getLogger(__name__)

STAGE = "generate"
IMAGES_FOLDER = "images"


def settings(config: Config) -> dict[str, Any]:
    """What the images depend on, beside the adapter and the prompts; the batch size is not among it."""
    model, generation = config.model, asdict(config.generation)
    return {
        "subject": config.data.subject,
        "model": [model.path, model.revision, model.variant, model.vae, model.dtype],
        **{key: value for key, value in generation.items() if key != "batch_size"},
        "resolution": resolution_of(config),
    }


# ------------------------------------------------------------------------------------------------------------- record


def _whole(record: RunRecord, drawn: DrawnImage) -> bool:
    """Whether the image of a line of the manifest is there, as it was drawn."""
    path = record.path / drawn.file
    return is_file(path) and sha256(path) == drawn.sha256


def _is_done(record: RunRecord, expected: str, wanted: Sequence[Request], on_finished: str) -> bool:
    """Whether all images are there and are to be kept.

    Raises:
        UserError: they are there under ``refuse``, or are of another adapter or of other settings.
    """
    check_on_finished(on_finished)
    if on_finished == "overwrite" or not (facts := read_facts(record)).finished:
        return False
    if facts.fingerprint != expected:
        raise UserError(
            f"{record.path} has images of another adapter, other prompts or other settings; "
            "on_finished=overwrite replaces them"
        )
    if sum(_whole(record, drawn) for drawn in read_drawn(record)) < len(wanted):
        return False
    record.settle(STAGE)
    if on_finished == "refuse":
        raise UserError(
            f"{record.path} has its images already; on_finished=skip keeps them, on_finished=overwrite replaces them"
        )
    logger.info("already drawn: %s", record.path)
    return True


def _key(request: Request) -> tuple[int, int]:
    return request.prompt_index, request.index


def _finished_before(record: RunRecord, expected: str, overwrite: bool) -> set[tuple[int, int]]:
    """Images that an earlier start drew and that are kept, as (prompt, image); everything else is removed."""
    keeps = not overwrite and read_facts(record).fingerprint == expected
    kept = {drawn.key for drawn in read_drawn(record) if _whole(record, drawn)} if keeps else set()
    manifest = record.path / MANIFEST
    if not keeps:
        if manifest.exists() and not overwrite:
            logger.warning("the stopped generation in %s had other settings: drawing afresh", record.path)
        _forget_scores(record)
        shutil.rmtree(record.path / IMAGES_FOLDER, ignore_errors=True)
    write_json(record.path / FACTS, {"fingerprint": expected, "finished": False})
    if keeps:
        repair_jsonl(manifest, keep=lambda row: (row["prompt_index"], row["index"]) in kept)
    else:
        write_atomic(manifest, "")
    return kept


def _forget_scores(record: RunRecord) -> None:
    """Removes the evaluations of images that are replaced: a score stands beside the image that it is of."""
    results = record.results()
    if results.evaluations:
        results.evaluations.clear()
        record.write_results(results)
    for name in (SCORES, record.predictions_path.name):
        (record.path / name).unlink(missing_ok=True)
    for partial in record.path.glob("predictions.*.partial.jsonl"):
        partial.unlink()


def _write_image(record: RunRecord, request: Request, image: Image.Image) -> DrawnImage:
    """Writes one image and adds its line to the manifest, in this order: a line has its image beside it."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    content = buffer.getvalue()
    file = f"{IMAGES_FOLDER}/{request.prompt_index:03d}-{request.index:02d}.png"
    write_atomic(record.path / file, content)
    drawn = DrawnImage(
        request.prompt_index,
        request.index,
        request.prompt,
        request.class_prompt,
        request.noise_seed,
        file,
        hashlib.sha256(content).hexdigest(),
    )
    append_jsonl(record.path / MANIFEST, [asdict(drawn)])
    return drawn


# ---------------------------------------------------------------------------------------------------------------- draw


def generate(
    config: Config, record: RunRecord, adapter: Path | None, wanted: Sequence[Request], done: Set[tuple[int, int]]
) -> None:
    """Draws the images of ``wanted`` into the record, batch by batch, but for those that are ``done``.

    An image's last bit depends on its batch: one of which some are done is drawn whole, and what is missing is kept.

    Raises:
        UserError: a model or an adapter that does not load, or an image that is not finite.
    """
    generation, resolution = config.generation, resolution_of(config)
    batches = [wanted[start : start + generation.batch_size] for start in range(0, len(wanted), generation.batch_size)]
    batches = [batch for batch in batches if not done.issuperset(map(_key, batch))]
    if not batches:
        return
    pipeline = load_pipeline(config.model)
    adapt(pipeline.unet, adapter, config.model)
    prompts = [request.prompt for batch in batches for request in batch]
    captions = encode_captions(pipeline, prompts, generation.negative_prompt)
    for batch in tqdm(batches, "drawing", unit="batch", disable=None):
        for request, image in zip(batch, draw(pipeline, batch, captions, generation, resolution), strict=True):
            if _key(request) not in done:
                _write_image(record, request, image)


# ------------------------------------------------------------------------------------------------------------- command


def main(config: Config) -> None:
    subject = subject_of(config.data)
    wanted = requests(subject, config.generation)
    record = locate(config)
    if config.dry_run:
        logger.info("would draw %d images into %s: %s", len(wanted), record.path, settings(config))
        return
    adapter = trained_adapter(record, config, EXPERIMENT)
    prompts = {str(request.noise_seed): request.prompt for request in wanted}
    expected = fingerprint(adapter, settings(config), prompts)
    if _is_done(record, expected, wanted, config.on_finished):
        return
    with record.stage(STAGE):
        if is_base(config) and not record.config_path.exists():
            write_atomic(record.config_path, launch.dump(config))
        done = _finished_before(record, expected, config.on_finished == "overwrite")
        if done:
            logger.info("%d of %d images were drawn before", len(done), len(wanted))
        generate(config, record, adapter, wanted, done)
        facts = {"fingerprint": expected, "finished": True, "images": len(wanted), "settings": settings(config)}
        write_json(record.path / FACTS, facts)
    logger.info("%d images in %s", len(wanted), record.path / IMAGES_FOLDER)


if __name__ == "__main__":
    launch.run(main, Config, CONF_MODULE, not_in_label=NOT_IN_LABEL)

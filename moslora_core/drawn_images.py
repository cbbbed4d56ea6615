"""Images that a run drew, as its record keeps them: the files, what each was drawn from, and scores image by image.

    images/<prompt>-<image>.png     numbers of three and two digits
    generation.json                 the settings that they were drawn with, and whether all of them are there
    images.jsonl                    one object an image: what it was drawn from, its file, and that file's sha256
    references/<number>.png         the real images that the drawn ones were compared with, reduced in size
    scores.jsonl                    one object an image and evaluation: evaluation, prompt_index, index, and the scores

The references are in the record so that it can be shown without the data that the run was trained on.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from .errors import UserError
from .paths import inside
from .prepared import sha256
from .record import RunRecord, read_json, read_jsonl, write_atomic
from .typed import Count, build

MANIFEST = "images.jsonl"
FACTS = "generation.json"
SCORES = "scores.jsonl"
REFERENCES = "references"
LONGEST = 384  # pixels of a reference's longer side in the record: enough for a figure


@dataclass(frozen=True)
class DrawnImage:
    """One line of the manifest.

    Attributes:
        prompt_index: number of the prompt among the subject's.
        index: number of the image among those of its prompt.
        prompt: text that it was drawn from.
        class_prompt: the same without the word that means the subject.
        noise_seed: seed of its starting noise, the same for every method.
        file: path below the run folder.
    """

    prompt_index: Count
    index: Count
    prompt: str
    class_prompt: str
    noise_seed: Count
    file: str
    sha256: str

    @property
    def key(self) -> tuple[int, int]:
        return self.prompt_index, self.index


def read_drawn(record: RunRecord) -> list[DrawnImage]:
    """The images of a run in the order of prompts and numbers; empty where none was drawn yet.

    Raises:
        UserError: a damaged manifest, or one that has an image twice.
    """
    path = record.path / MANIFEST
    if not path.exists():
        return []
    found = [build(DrawnImage, row, f"{path} line {number}") for number, row in enumerate(read_jsonl(path), start=1)]
    for number, image in enumerate(found, start=1):
        inside(record.path, image.file, f"{path} line {number}")
    found.sort(key=lambda image: image.key)
    for image, following in pairwise(found):
        if image.key == following.key:
            raise UserError(f"{path}: image {image.index} of prompt {image.prompt_index} is there twice")
    return found


@dataclass(frozen=True)
class Facts:
    """What generation.json says: ``fingerprint`` is of all that the images depend on."""

    fingerprint: str | None = None
    finished: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


def read_facts(record: RunRecord) -> Facts:
    """The facts of a run's images, finished or not.

    Raises:
        UserError: a damaged file.
    """
    path = record.path / FACTS
    return build(Facts, read_json(path), f"{path} is damaged", others=True) if path.exists() else Facts()


def drawing_settings(record: RunRecord) -> dict[str, Any] | None:
    """The settings that a run's images were drawn with; None where they are not all there.

    Raises:
        UserError: a damaged file.
    """
    facts = read_facts(record)
    return facts.settings if facts.finished else None


def verified(record: RunRecord, image: DrawnImage) -> Path:
    """The file of an image, which is the one that the manifest describes.

    Raises:
        UserError: it is missing, or another than was drawn.
    """
    path = record.path / image.file
    try:
        found = sha256(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; the manifest {MANIFEST} has it") from None
    if found != image.sha256:
        raise UserError(f"{path} has sha256 {found[:12]}..., expected {image.sha256[:12]}... as in {MANIFEST}")
    return path


# --------------------------------------------------------------------------------------------------------- references


def write_references(record: RunRecord, images: Sequence[Path]) -> None:
    """Copies real images into the record, so that it can be shown without the data; at most ``LONGEST`` pixels."""
    from PIL import Image

    for number, path in enumerate(images):
        with Image.open(path) as image:
            copy = image.convert("RGB")
        copy.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        copy.save(buffer, format="PNG", optimize=True)
        write_atomic(record.path / REFERENCES / f"{number:02d}.png", buffer.getvalue())


def references(record: RunRecord) -> list[Path]:
    """The copies of the real images in the record."""
    return sorted((record.path / REFERENCES).glob("*.png"))


# ------------------------------------------------------------------------------------------------------------- scores


def write_scores(record: RunRecord, evaluation: str, rows: Iterable[dict[str, Any]]) -> None:
    """Adds (or replaces) the scores of one evaluation; ``rows`` have prompt_index, index and the scores."""
    path = record.path / SCORES
    kept = [row for row in read_scores(record) if row.get("evaluation") != evaluation]
    lines = [*kept, *({"evaluation": evaluation, **row} for row in rows)]
    write_atomic(path, "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines))


def read_scores(record: RunRecord) -> list[dict[str, Any]]:
    path = record.path / SCORES
    return read_jsonl(path) if path.exists() else []

"""A study: its pairs, the attention checks among them, and in which order and on which sides each rater sees them.

All of it stands in ``study.json`` before the first vote, and so does the rule by which inattentive raters are left
out.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from moslora_core.errors import UserError
from moslora_core.paths import inside, is_file
from moslora_core.record import check_version, read_json
from moslora_core.typed import Share, build, shown

from ..config import EXPERIMENT

STUDY_FILE, IMAGES_FOLDER = "study.json", "images"
SCHEMA_VERSION = 1
QUESTIONS = ("subject_similarity", "prompt_consistency")
KINDS = ("pair", "same", "other")
ANSWERS = ("first", "second", "tie")
_Side = Annotated[int, 1]
# A rater who answered more than this share of the attention questions wrong is left out of the analysis.
MAX_WRONG = 0.25


@dataclass(frozen=True)
class Pair:
    """What a rater sees at once: a prompt and two images.

    Attributes:
        kind: pair (first and second method) | same (one image twice) | other (a photograph of the subject, and one of
            another subject): the last two are attention checks.
        prompt_index, index: of the image; of ``other`` the index is that of no image and null.
        images: names of the first and the second file.
        sources: sha256 of the files that they were made of.
        expected: question -> first | second | tie, the right answer, for attention checks.
    """

    id: str
    kind: str
    subject: str
    prompt_index: int
    index: int | None
    prompt: str
    images: tuple[str, str]
    sources: tuple[str, str]
    expected: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """One of the two that are compared; ``runs`` has the folder of the run of every subject."""

    name: str
    method: str
    label: str
    runs: dict[str, str]


@dataclass(frozen=True)
class ShownSubject:
    """What a rater sees of a subject beside the pairs: its class and some of its images."""

    class_name: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Study:
    """A study; ``size`` is (width, height) of all images that are compared."""

    name: str
    seed: int
    prompts: int
    images_per_prompt: int
    checks: int
    first: Method
    second: Method
    subjects: dict[str, ShownSubject]
    size: tuple[_Side, _Side]
    pairs: tuple[Pair, ...]
    questions: tuple[str, ...] = QUESTIONS
    max_wrong: Share = MAX_WRONG
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class Screen:
    """A pair as one rater sees it; ``swapped`` has the second image on the left."""

    pair: str
    swapped: bool


# --------------------------------------------------------------------------------------------------- what raters see


def screens(study: Study, rater: int) -> list[Screen]:
    """The pairs in the order and with the sides of the rater of that number, drawn from the study's seed.

    Half of the pairs are swapped, and half of the checks: a rater who always says "left" favours neither method.
    """
    generator = random.Random(f"{study.seed}/screens/{rater}")
    drawn = []
    for pairs in ([p for p in study.pairs if p.kind == "pair"], [p for p in study.pairs if p.kind != "pair"]):
        sides = [number % 2 == 0 for number in range(len(pairs))]
        if len(pairs) % 2:
            sides[-1] = generator.random() < 0.5
        generator.shuffle(sides)
        drawn += [Screen(pair.id, swapped) for pair, swapped in zip(pairs, sides, strict=True)]
    generator.shuffle(drawn)
    return drawn


# ------------------------------------------------------------------------------------------------------------- reading


def read_study(folder: Path) -> Study:
    """The study of a folder.

    Raises:
        UserError: no study, a damaged one, or an image of it that is missing.
    """
    path = folder / STUDY_FILE
    if not path.is_file():
        raise UserError(f"no study at {folder}; python -m {EXPERIMENT}.human_study serve makes one from two methods")
    raw = read_json(path)
    check_version(raw, SCHEMA_VERSION, str(path))
    study = build(Study, raw, str(path))
    _check(study, str(path))
    for name in image_files(study):
        if not is_file(inside(folder / IMAGES_FOLDER, name, str(path))):
            raise UserError(f"{folder}: the image {IMAGES_FOLDER}/{shown(name)} is missing; make the study anew")
    return study


def _check(study: Study, where: str) -> None:
    """Refuses what no study has, and what raters, votes or their analysis would fail on."""

    def check(key: str, found: Sequence[str], known: Collection[str]) -> None:
        if not found or len(set(found)) < len(found) or not set(found) <= set(known):
            expected = f"some of {', '.join(known)}, each once" if known is not found else "some, each once"
            raise UserError(f"{where}: {key} must be {expected}; found {shown(list(found))}")

    check("questions", study.questions, QUESTIONS)
    check("pairs", ids := [pair.id for pair in study.pairs], ids)
    for number, pair in enumerate(study.pairs):
        check(f"pairs.{number}.kind", [pair.kind], KINDS)
        check(f"pairs.{number}.subject", [pair.subject], study.subjects)
        for question, answer in pair.expected.items():
            check(f"pairs.{number}.expected", [question], QUESTIONS)
            check(f"pairs.{number}.expected.{question}", [answer], ANSWERS)


def image_files(study: Study) -> list[str]:
    """Names of all image files of a study: nothing else of its folder is ever served."""
    names = [name for pair in study.pairs for name in pair.images]
    return list(dict.fromkeys([*names, *(name for shown in study.subjects.values() for name in shown.references)]))


def differences(study: Study, other: Study) -> list[str]:
    """In which of their parts two studies differ, apart from the names of their files."""
    parts = (_without_files(study), _without_files(other))
    return [key for key in parts[0] if parts[0][key] != parts[1][key]]


def _without_files(study: Study) -> dict[str, Any]:
    plain = asdict(study)
    for pair in plain["pairs"]:
        del pair["images"]
    plain["subjects"] = {name: entry["class_name"] for name, entry in plain["subjects"].items()}
    return plain

"""LLaVA's files: instructions (JSON) and questions (jsonl), with every fault named and counted.

An instruction is {"id", "image": path below the image root or absent, "conversations": [{"from": "human" | "gpt",
"value"}]}, as in ``llava_v1_5_mix665k.json``; other keys are left out. XTuner drops turns of the assistant before the
first question; here such a conversation has a fault like any other, to be refused or skipped.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from moslora_core.errors import UserError
from moslora_core.paths import is_below, is_file
from moslora_core.record import parse_json, read_json

from .chat import ASSISTANT, HUMAN, IMAGE
from .images import open_image

logger = logging.getLogger(__name__)

ON_FAULT = ("refuse", "skip")
CHECK_IMAGES = ("none", "exists", "decode")
_NAMED = 3  # faulty rows that a message names; the rest are counted

Item = dict[str, Any]

# ------------------------------------------------------------------------------------------------------------- faults


@dataclass(frozen=True)
class Fault:
    """What is wrong with a row: ``kind`` is what faults are counted by."""

    kind: str
    found: str
    expected: str

    def __str__(self) -> str:
        return f"{self.kind}: found {self.found}, expected {self.expected}"


@dataclass
class Faults:
    """The faults of one file: counted by kind, the first few kept by row."""

    path: str
    rows: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    first: list[tuple[int, Fault]] = field(default_factory=list)

    def add(self, row: int, fault: Fault) -> None:
        self.counts[fault.kind] += 1
        if len(self.first) < _NAMED:
            self.first.append((row, fault))

    def total(self) -> str:
        """How many of how many rows, by kind."""
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(self.counts.items()))
        return f"{self.counts.total()} of {self.rows} rows ({kinds})"

    def named(self) -> str:
        """The first faults, by row."""
        return "; ".join(f"{self.path}[{row}]: {fault}" for row, fault in self.first)

    def settle(self, on_fault: str, key: str = "data.on_fault") -> None:
        """Refuses or says aloud what was found.

        Args:
            key: the setting that decides, for the error.

        Raises:
            UserError: ``on_fault`` is refuse and there is a fault, or no row is without one.
        """
        if not self.counts:
            return
        if on_fault == "refuse":
            raise UserError(f"{self.named()}; in all {self.total()} are faulty; {key}=skip leaves them out")
        if self.counts.total() == self.rows:
            raise UserError(f"{self.path}: {self.total()} are faulty, nothing is left; the first: {self.named()}")
        logger.warning("%s are faulty and skipped; the first: %s", self.total(), self.named())


# ------------------------------------------------------------------------------------------------------- instructions


def check_item(row: Any) -> Fault | None:
    """The first fault of an instruction's text and of the form of its image path, or None."""
    if not isinstance(row, dict) or type(row.get("id")) not in (str, int):
        return Fault("layout", _short(row), "an object with id and conversations")
    turns = row.get("conversations")
    if not isinstance(turns, list):
        return Fault("layout", f"conversations {_short(turns)}", "a list of turns")
    if not turns:
        return Fault("empty", "no turns", "a question and its answer")
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            return Fault("layout", f"turn {number} {_short(turn)}", "an object with from and value")
        speaker = turn.get("from")
        if speaker not in (HUMAN, ASSISTANT):
            return Fault("unknown_speaker", f"turn {number} from {_short(speaker)}", f"{HUMAN!r} or {ASSISTANT!r}")
        expected = (HUMAN, ASSISTANT)[number % 2]
        if speaker != expected:
            kind = "starts_with_answer" if number == 0 else "not_alternating"
            return Fault(kind, f"turn {number} from {speaker!r}", repr(expected))
        if not turn["value"].strip():
            return Fault("empty", f"turn {number} without text", "text")
    if len(turns) % 2:
        return Fault("unanswered", f"a last turn from {HUMAN!r}", "an answer at the end")
    return _check_placeholders(row, turns) or _check_image_path(row.get("image"))


def _check_placeholders(row: Item, turns: list[dict[str, str]]) -> Fault | None:
    asked = sum(turn["value"].count(IMAGE) for turn in turns[::2])
    answered = sum(turn["value"].count(IMAGE) for turn in turns[1::2])
    expected = int(row.get("image") is not None)
    if (asked, answered) == (expected, 0):
        return None
    where = "the questions" if answered == 0 else "questions and answers"
    return Fault(
        "image_tokens",
        f"{asked + answered} {IMAGE} in {where}",
        f"{'one in a question, with its image' if expected else 'none, without an image'}",
    )


def _check_image_path(image: Any) -> Fault | None:
    if image is None:
        return None
    if not isinstance(image, str) or not image.strip():
        return Fault("layout", f"image {_short(image)}", "a path below data.image_root")
    if not is_below(image):
        return Fault("image_outside", repr(image), "a path that stays below data.image_root")
    return None


def check_image(item: Item, root: Path, how: str) -> Fault | None:
    """The fault of an item's image file, or None.

    Args:
        how: none | exists | decode, how far to look.
    """
    if "image" not in item or how == "none":
        return None
    path = root / item["image"]
    if not is_file(path):
        return Fault("image_missing", f"no file {path}", "an image")
    if how == "decode":
        try:
            open_image(path)
        except UserError as error:
            return Fault("image_unreadable", str(error), "an image")
    return None


def _check_images(items: list[Item], root: Path, how: str) -> Iterator[Fault | None]:
    """Faults in the order of ``items``; several files at once, as decoding lets go of the interpreter's lock."""
    workers = min(32, os.cpu_count() or 1)
    pending = iter(items)
    with ThreadPoolExecutor(workers) as pool:
        while block := list(islice(pending, 64 * workers)):  # map would submit all 665k of them at once
            yield from pool.map(lambda item: check_image(item, root, how), block)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _plain(row: Item) -> Item:
    """The fields that are used, of a row without fault."""
    image = {} if row.get("image") is None else {"image": row["image"]}
    turns = [{"from": turn["from"], "value": turn["value"]} for turn in row["conversations"]]
    return {"id": str(row["id"]), **image, "conversations": turns}


def read_instructions(path: Path, faults: Faults) -> dict[int, Item]:
    """Instructions of a file whose text is without fault, by row; their images are not looked at.

    Args:
        faults: takes what was found, for the caller to settle.

    Raises:
        UserError: the file is missing, is no JSON list, or is empty.
    """
    if not path.is_file():
        raise UserError(f"no instruction file {path}; expected LLaVA's JSON list of conversations")
    rows = read_json(path)
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a JSON list of conversations, found {type(rows).__name__}")
    if not rows:
        raise UserError(f"{path}: expected conversations, found none")
    faults.rows = len(rows)
    items = {}
    for number, row in enumerate(rows):
        if fault := check_item(row):
            faults.add(number, fault)
        else:
            items[number] = _plain(row)
    return items


def sound_items(
    candidates: Iterable[tuple[int, Item]], root: Path, how: str, faults: Faults, count: int | None = None
) -> Iterator[Item]:
    """Items whose image is without fault, in the order of ``candidates``, up to ``count``; faults are collected.

    Only as many images are looked at as it takes, give or take a block.
    """
    pending = iter(candidates)
    left = count
    while left is None or left > 0:
        block = list(islice(pending, 1024 if left is None else min(left, 1024)))
        if not block:
            return
        found = _check_images([item for _, item in block], root, how)
        for (row, item), fault in zip(block, found, strict=True):
            if fault is None:
                yield item
                left = None if left is None else left - 1
            else:
                faults.add(row, fault)


# ---------------------------------------------------------------------------------------------- questions

_QUESTION = {"question_id": int | str, "image": str, "text": str, "category": str}


def read_questions(path: Path) -> list[dict[str, Any]]:
    """LLaVA's question file: rows with question_id, image, text and category; other keys are left out.

    Raises:
        UserError: no such file, a line that is no JSON object, a field that is missing or of another type, an empty
            question, an image path that leaves its folder, or a question_id that comes twice.
    """
    rows = _read_lines(path)
    for number, row in enumerate(rows, start=1):
        if fault := _check_image_path(row["image"]):
            raise UserError(f"{path} line {number}: {fault}")
    return rows


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    rows = [_read_line(line, f"{path} line {n}") for n, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise UserError(f"{path}: expected lines with {', '.join(_QUESTION)}, found none")
    if repeated := [key for key, count in Counter(row["question_id"] for row in rows).items() if count > 1]:
        raise UserError(f"{path}: question_id {repeated[0]!r} comes more than once; expected distinct ones")
    return rows


def _read_line(line: str, where: str) -> dict[str, Any]:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise UserError(f"{where} is damaged: expected a JSON object, found {error}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with {', '.join(_QUESTION)}, found {type(row).__name__}")
    for name, kind in _QUESTION.items():
        if name not in row:
            raise UserError(f"{where}: field {name!r} is missing; expected {', '.join(_QUESTION)}")
        if not isinstance(row[name], kind) or isinstance(row[name], bool):
            raise UserError(f"{where}: {name} must be {getattr(kind, '__name__', kind)}, found {_short(row[name])}")
    if not row["text"].strip():
        raise UserError(f"{where}: text is empty")
    return {name: row[name] for name in _QUESTION}

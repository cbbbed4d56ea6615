"""Reading VLMEvalKit's benchmark files: tab-separated, a row a question, the image inside the row.

Columns: ``index``, ``question``, ``image`` (base64, or the index of the row that has the image) or ``image_path`` (a
file below the images' folder), ``answer``, and where a benchmark has them ``hint``, the options ``A`` to ``I``,
``category``, ``l2-category`` and ``split``. A circular benchmark repeats question ``i`` under the indices
``i + k * 1000000`` with its options rotated.

SEED-Bench's file alone is 600 MB. Reading keeps the text of a row and the place of its image in the file; an image is
decoded when it is asked for.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import io
import logging
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from moslora_core.errors import UserError
from moslora_core.paths import is_below, is_file

from ..images import open_image
from .registry import JUDGED, MME_PARTS, MULTIPLE_CHOICE, SHORT_ANSWER, YES_NO, Benchmark

logger = logging.getLogger(__name__)

OPTION_LETTERS = "ABCDEFGHI"
ROTATION = 1_000_000
REFERENCE_LENGTH = 64  # an ``image`` of at most that many characters names another row
_MISSING = ("", "nan", "NaN")


@dataclass(frozen=True)
class ImageSource:
    """Where an item's image is: a file, or the ``image`` column of the row that begins at byte ``offset``."""

    path: Path
    offset: int | None = None


@dataclass(frozen=True)
class Item:
    """One question of a benchmark.

    Attributes:
        id: ``<benchmark>/<index>``, the same in every run.
        kind: how it is asked and scored, see :class:`Benchmark`.
        options: letter -> text, empty where nothing is offered.
        answers: the accepted answers: a letter, Yes or No, or one or more short answers.
        group: questions that are scored together have the same: the rotations of a question, the two questions about
            one picture in MME.
        rotated: whether it is a rotation of another item.
        columns: every column of the row but the image, for those who score it elsewhere.
    """

    id: str
    kind: str
    question: str
    image: ImageSource
    hint: str | None = None
    options: dict[str, str] = field(default_factory=dict)
    answers: tuple[str, ...] = ()
    group: str = ""
    rotated: bool = False
    category: str | None = None
    l2_category: str | None = None
    columns: dict[str, str] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------------------- reading


def read_tsv(path: Path, benchmark: Benchmark, images: Path | None = None) -> list[Item]:
    """Items of a benchmark's file, in its order. Rows without any image are left out, as VLMEvalKit does.

    Args:
        images: folder that ``image_path`` entries are relative to; None for the folder of the file.

    Raises:
        UserError: no such file, a missing column, an index twice, an image that refers to none or lies elsewhere, an
            answer that is not offered.
    """
    rows = list(_rows(path))
    if not rows:
        raise UserError(f"{path}: holds no items; expected a row of names and a row for each question")
    header = list(rows[0][1])
    letters = [letter for letter in OPTION_LETTERS if letter in header]
    kind = MULTIPLE_CHOICE if benchmark.kind == SHORT_ANSWER and letters else benchmark.kind
    _check_header(path, kind, header)
    offsets = {row["index"]: offset for offset, row, _ in rows}
    if len(offsets) != len(rows):
        indices = [row["index"] for _, row, _ in rows]
        twice = next(index for index in indices if indices.count(index) > 1)
        raise UserError(f"{path}: index {twice} appears twice; expected one row for each")
    embedded = {row["index"] for _, row, characters in rows if characters > REFERENCE_LENGTH}
    items, without = [], 0
    for offset, row, characters in rows:
        where = f"{path}, index {row['index']}"
        if characters > REFERENCE_LENGTH:
            image = ImageSource(path, offset)
        elif reference := row.get("image"):
            if reference not in embedded:
                raise UserError(f"{where}: image refers to {reference!r}, which is no row with an image")
            image = ImageSource(path, offsets[reference])
        elif name := row.get("image_path"):
            image = ImageSource(_image_file(where, name, images or path.parent))
        else:
            without += 1
            continue
        items.append(_item(where, benchmark, kind, row, letters, image))
    if without:
        logger.warning("%s: %d of %d rows have no image and are left out", path, without, len(rows))
    if not items:
        raise UserError(f"{path}: no row has an image; expected base64 in image or a file name in image_path")
    if benchmark.mme:
        _check_pairs(path, items)
    return items


def first_questions(items: Sequence[Item], limit: int | None) -> list[Item]:
    """The first ``limit`` questions with all that is scored together with them; all items for None."""
    if limit is None:
        return list(items)
    chosen = {item.group for item in [item for item in items if not item.rotated][:limit]}
    return [item for item in items if item.group in chosen]


def digest(path: Path, items: Sequence[Item]) -> str:
    """SHA-256 over a benchmark's file and the image files that its items name."""
    files = {path, *(item.image.path for item in items)}
    found = hashlib.sha256()
    for name in sorted(files):
        with open(name, "rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


@contextmanager
def long_fields() -> Iterator[None]:
    """Lets csv read fields of any length (images), and sets its limit back for everyone else."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str], int]]:
    """Rows as (byte offset, columns without missing values, length of the image): base64 itself is dropped."""
    try:
        with open(path, "rb") as file, long_fields():
            lines = _Lines(file)
            reader = csv.reader(lines, delimiter="\t", strict=True)
            header = next(reader, [])
            if twice := [name for name in header if header.count(name) > 1]:
                raise UserError(f"{path}: column {twice[0]!r} appears twice")
            while True:
                offset = lines.consumed
                values = next(reader, None)
                if values is None:
                    return
                if not values:  # a blank line
                    continue
                if len(values) != len(header):
                    raise UserError(
                        f"{path} line {lines.number}: {len(values)} columns; its first line names {len(header)}"
                    )
                row = dict(zip(header, values, strict=True))
                length = len(row.get("image", ""))
                if length > REFERENCE_LENGTH:
                    if row["image"].startswith("["):
                        raise UserError(f"{path} line {lines.number}: holds several images; expected one")
                    row["image"] = ""
                yield offset, {name: "" if value in _MISSING else value for name, value in row.items()}, length
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; expected a TSV file of VLMEvalKit") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged or no TSV file: {error}") from None


class _Lines:
    """Lines of an open file for csv, which counts the bytes of what csv has taken so far."""

    def __init__(self, file: io.BufferedReader):
        self._file = file
        self.consumed = 0
        self.number = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = next(self._file)
        first = self.consumed == 0
        self.consumed += len(line)
        self.number += 1
        if b"\0" in line:
            raise csv.Error(f"line {self.number} has a NUL byte")
        return line.decode("utf-8-sig" if first else "utf-8")


def _check_header(path: Path, kind: str, header: Sequence[str]) -> None:
    needed = ["index", "question"]
    if kind != JUDGED:
        needed.append("answer")
    if kind == MULTIPLE_CHOICE:
        needed += ["A", "B"]
    for name in needed:
        if name not in header:
            raise UserError(f"{path}: has no column {name!r}; found {', '.join(header)}")
    if "image" not in header and "image_path" not in header:
        raise UserError(f"{path}: has no column 'image' or 'image_path'; found {', '.join(header)}")


def _check_pairs(path: Path, items: Sequence[Item]) -> None:
    """MME's score wants a known category and two questions about every picture."""
    known = [category for part in MME_PARTS.values() for category in part]
    questions = Counter(item.group for item in items)
    for item in items:
        if item.category not in known:
            raise UserError(f"{path}, {item.id}: category {item.category!r}; expected one of {', '.join(known)}")
        if questions[item.group] != 2:
            raise UserError(f"{path}, {item.id}: {questions[item.group]} questions about its picture; expected 2")


def _item(
    where: str, benchmark: Benchmark, kind: str, row: dict[str, str], letters: Sequence[str], image: ImageSource
) -> Item:
    options = {letter: row[letter] for letter in letters if row[letter]} if kind == MULTIPLE_CHOICE else {}
    for name in ("index", "question"):
        if not row[name]:
            raise UserError(f"{where}: has no {name}")
    group, rotated = _group(where, benchmark, row, image)
    return Item(
        id=f"{benchmark.name}/{row['index']}",
        kind=kind,
        question=row["question"],
        image=image,
        hint=row.get("hint") or None,
        options=options,
        answers=_answers(where, kind, row, options),
        group=group,
        rotated=rotated,
        category=row.get("category") or None,
        l2_category=row.get("l2-category") or None,
        columns={name: value for name, value in row.items() if name != "image"},
    )


def _group(where: str, benchmark: Benchmark, row: dict[str, str], image: ImageSource) -> tuple[str, bool]:
    index = row["index"]
    if benchmark.mme:
        picture = row.get("image_path") or f"{image.path}:{image.offset}"
        return f"{row.get('category', '')}/{picture}", False
    if not benchmark.circular:
        return index, False
    if not re.fullmatch(r"\d{1,18}", index):
        raise UserError(f"{where}: expected an integer, by which the rotations of a question are found")
    group = row.get("g_index") or str(int(index) % ROTATION)
    return group, group != index


def _answers(where: str, kind: str, row: dict[str, str], options: dict[str, str]) -> tuple[str, ...]:
    answer = row.get("answer", "")
    if kind == JUDGED:
        return (answer,)
    if kind == MULTIPLE_CHOICE:
        if answer not in options:
            raise UserError(f"{where}: answer {answer!r} is none of the offered letters {', '.join(options)}")
        return (answer,)
    if kind == YES_NO:
        if answer not in ("Yes", "No"):
            raise UserError(f"{where}: answer {answer!r}; expected Yes or No")
        return (answer,)
    if answer.startswith("["):
        try:
            several = ast.literal_eval(answer)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            several = None
        if isinstance(several, list) and several and all(isinstance(entry, str) for entry in several):
            return tuple(several)
        raise UserError(f"{where}: answer {answer[:60]!r}; expected a list of strings")
    if not answer:
        raise UserError(f"{where}: has no answer")
    return (answer,)


# -------------------------------------------------------------------------------------------------------------- images


def _image_file(where: str, name: str, folder: Path) -> Path:
    path = folder / name
    if not is_below(name):
        raise UserError(f"{where}: image_path {name!r}; expected a file below {folder}")
    if not is_file(path):
        raise UserError(f"{where}: no image at {path}")
    return path


def load_image(item: Item) -> Image.Image:
    """The item's image in RGB.

    Raises:
        UserError: it cannot be read.
    """
    source = item.image
    if source.offset is None:
        return open_image(source.path)
    return open_image(_embedded(source), f"the image of {item.id} in {source.path}")


def _embedded(source: ImageSource) -> bytes:
    """The base64 of an image in its row."""
    with open(source.path, "rb") as file, long_fields():
        header = next(csv.reader(_Lines(file), delimiter="\t", strict=True))
        file.seek(source.offset)
        row = next(csv.reader((line.decode("utf-8") for line in file), delimiter="\t", strict=True))
    return row[header.index("image")].encode()

"""Subjects and their prompts: what prepare_data finds in a DreamBooth folder, writes, and the other commands read.

A DreamBooth folder has one folder of images a subject, and ``prompts_and_classes.txt``: the class of every subject,
25 prompts for objects and 25 for live subjects. Prompts are templates of Python's ``format``: {0} is the token that
comes to mean the subject, {1} the subject's class.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image, ImageOps

from moslora_core.errors import UserError
from moslora_core.paths import inside, is_file
from moslora_core.prepared import read_manifest
from moslora_core.record import read_json
from moslora_core.typed import build, shown

from .config import EXPERIMENT, DataConfig

PROMPTS_FILE = "prompts_and_classes.txt"
SUBJECTS_FILE, SUBJECTS_FOLDER = "subjects.json", "subjects"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_PIXELS = 64_000_000  # an image that claims more is not decoded: a small file may unpack to gigabytes


@dataclass(frozen=True)
class Prompt:
    """A template such as ``a {0} {1} on the beach``: {0} is the subject's token, {1} its class."""

    template: str

    def text(self, token: str, class_name: str) -> str:
        """The prompt that an adapted model draws: ``a sks dog on the beach``."""
        return self.template.format(token, class_name)

    def text_without(self, class_name: str) -> str:
        """The prompt without the token, which no other model knows: ``a dog on the beach``."""
        return " ".join(self.template.format("", class_name).split())


@dataclass(frozen=True)
class Subject:
    """One subject as prepared.

    Attributes:
        class_name: what it is: dog.
        live: whether it is a living thing, which decides its prompts.
        token: word that comes to mean it.
        images: files of its images, the references of the metrics and of the human study too.
        prompts: those that are drawn with a trained model.
    """

    name: str
    class_name: str
    live: bool
    token: str
    images: tuple[Path, ...]
    prompts: tuple[Prompt, ...]


@dataclass(frozen=True)
class NewSubject:
    """A subject before it is prepared: images in memory, RGB; prompts as templates."""

    name: str
    class_name: str
    live: bool
    images: Sequence[Image.Image]
    prompts: Sequence[str]


def prompt_texts(subject: Subject, token: str | None = None) -> list[str]:
    """The subject's prompts as an adapted model is to draw them.

    Args:
        token: another token than the subject's own.
    """
    return [prompt.text(token or subject.token, subject.class_name) for prompt in subject.prompts]


# ----------------------------------------------------------------------------------------------------------- prepared


@dataclass(frozen=True)
class _Row:
    """A subject in ``subjects.json``: its images as paths below the folder, its prompts as templates."""

    name: str
    class_name: str
    live: bool
    token: str
    images: list[str]
    prompts: list[str]


def write_subjects(folder: Path, subjects: Iterable[NewSubject], token: str) -> dict[str, Subject]:
    """Writes images and ``subjects.json`` to ``folder``; returns what :func:`read_subjects` will."""
    rows = []
    for subject in subjects:
        files = [f"{SUBJECTS_FOLDER}/{subject.name}/{number:02d}.png" for number in range(len(subject.images))]
        (folder / SUBJECTS_FOLDER / subject.name).mkdir(parents=True)
        for file, image in zip(files, subject.images, strict=True):
            image.save(folder / file)
        rows.append(_Row(subject.name, subject.class_name, subject.live, token, files, list(subject.prompts)))
    text = json.dumps([asdict(row) for row in rows], indent=1, ensure_ascii=False)
    (folder / SUBJECTS_FILE).write_text(text + "\n", encoding="utf-8")
    return _read(folder)


def read_subjects(data_dir: str | Path) -> dict[str, Subject]:
    """Name -> subject of a prepared folder, in its order.

    Raises:
        UserError: no prepared data, or a damaged folder.
    """
    folder = Path(data_dir)
    read_manifest(folder, f"{EXPERIMENT}.prepare_data")
    return _read(folder)


def _read(folder: Path) -> dict[str, Subject]:
    path = folder / SUBJECTS_FILE
    subjects: dict[str, Subject] = {}
    for row in build(list[_Row], read_json(path), str(path)):
        where = f"{path}: {row.name}"
        if row.name in subjects or not row.images or not row.prompts:
            raise UserError(
                f"{where} is there twice, or has no images or no prompts; expected what prepare_data writes"
            )
        images = tuple(inside(folder, file, where) for file in row.images)
        if missing := [file for file, image in zip(row.images, images, strict=True) if not is_file(image)]:
            raise UserError(f"data.dir={folder}: no image {shown(missing[0])}; run prepare_data again")
        prompts = tuple(Prompt(check_template(template, where)) for template in row.prompts)
        subjects[row.name] = Subject(row.name, row.class_name, row.live, row.token, images, prompts)
    if not subjects:
        raise UserError(f"{path}: expected subjects, found none")
    return subjects


def subject_of(data: DataConfig) -> Subject:
    """The subject that a configuration's run learns.

    Raises:
        UserError: none is named, it is not among the prepared ones, or it was prepared with another token.
    """
    if data.subject is None:
        raise UserError("data.subject names no subject; expected the name of a prepared one, as in data.subject=dog")
    subjects = read_subjects(data.dir)
    if data.subject not in subjects:
        known = ", ".join(subjects) or "none"
        raise UserError(f"data.subject={data.subject}: no such subject in {data.dir}; it has {known}")
    subject = subjects[data.subject]
    if subject.token != data.token:
        raise UserError(
            f"data.token={data.token}, but {data.dir} was prepared with {subject.token}; run prepare_data with the "
            "same settings, or name another data.dir"
        )
    return subject


# ------------------------------------------------------------------------------------------------- DreamBooth's folder


@dataclass(frozen=True)
class PromptFile:
    """What ``prompts_and_classes.txt`` says.

    Attributes:
        classes: subject -> class.
        object_prompts, live_prompts: templates.
    """

    classes: dict[str, str]
    object_prompts: tuple[str, ...]
    live_prompts: tuple[str, ...]


_HEADINGS = {"object prompts": "object", "live subject prompts": "live", "classes": "classes", "prompts": None}
_PROMPT = re.compile(r"""^(['"])(?P<template>.*)\1\s*\.format\(\s*unique_token\s*,\s*class_token\s*\)\s*,?$""")


def read_prompt_file(path: Path) -> PromptFile:
    """Reads DreamBooth's ``prompts_and_classes.txt``; nothing in it is executed, though its lists are Python.

    Raises:
        UserError: no such file, or one in which classes or prompts are missing or not understood.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {path}: {reason}; expected DreamBooth's list of classes and prompts") from None
    part: str | None = None
    classes: dict[str, str] = {}
    prompts: dict[str, list[str]] = {"object": [], "live": []}
    for number, line in enumerate(map(str.strip, lines), start=1):
        if line.lower() in _HEADINGS:
            part = _HEADINGS[line.lower()]
        elif not line or line in ("prompt_list = [", "]") or line.replace(" ", "") == "subject_name,class":
            continue
        elif part == "classes" and len(fields := [entry.strip() for entry in line.split(",")]) == 2 and all(fields):
            name, class_name = fields
            if classes.setdefault(name, class_name) != class_name:
                raise UserError(f"{path} line {number}: {name} is a {class_name} here, and a {classes[name]} before")
        elif part in prompts and (match := _PROMPT.match(line)):
            prompts[part].append(check_template(match["template"], f"{path} line {number}"))
        else:
            raise UserError(
                f"{path} line {number}: expected a class such as dog6,dog or a prompt such as "
                f"'a {{0}} {{1}} in the snow'.format(unique_token, class_token), found {line[:80]!r}"
            )
    parts = {"Classes": classes, "Object Prompts": prompts["object"], "Live Subject Prompts": prompts["live"]}
    if missing := [name for name, found in parts.items() if not found]:
        raise UserError(f"{path}: no {missing[0]} found; expected {', '.join(parts)}")
    return PromptFile(classes, tuple(prompts["object"]), tuple(prompts["live"]))


def check_template(text: str, where: str) -> str:
    """``text``, if it is a template that has {0}, the token, {1}, the class, and no other fields.

    Raises:
        UserError: says where.
    """
    try:
        fields = [entry[1:] for entry in string.Formatter().parse(text) if entry[1] is not None]
    except ValueError:
        fields = [("?", "", None)]
    if any(name not in ("0", "1") or specification or conversion for name, specification, conversion in fields):
        raise UserError(f"{where}: {text!r} is no template; expected {{0}} for the token and {{1}} for the class")
    return text


def read_dreambooth(root: Path, data: DataConfig) -> Iterator[NewSubject]:
    """Subjects of a DreamBooth folder with their images and prompts, all of them or ``data.subjects``.

    Raises:
        UserError: no such folder or subject, a subject without class or images, an image that cannot be read or is too
            small.
    """
    if not root.is_dir():
        raise UserError(f"data.path={root}: no such folder; expected DreamBooth's, one folder of images a subject")
    found = read_prompt_file(root / PROMPTS_FILE)
    folders = {path.name: path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")}
    names = list(folders) if data.subjects is None else list(data.subjects)
    if not names:
        raise UserError(f"data.path={root}: no folder of a subject there")
    for name in names:
        if name not in folders:
            raise UserError(f"data.subjects: no folder {name!r} in {root}; it has {', '.join(folders) or 'none'}")
        if name not in found.classes:
            raise UserError(
                f"{root / PROMPTS_FILE}: no class for the subject {name!r}; expected a line {name},<class>"
            )
    for name in names:  # one at a time: the images of all thirty subjects take half a gigabyte
        yield _read_subject(name, folders[name], found, data)


def _read_subject(name: str, folder: Path, found: PromptFile, data: DataConfig) -> NewSubject:
    class_name = found.classes[name]
    live = class_name in data.live_classes
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise UserError(f"{folder}: no images of the subject; expected some of {', '.join(IMAGE_SUFFIXES)}")
    images = [open_image(path, data.min_size) for path in files]
    return NewSubject(name, class_name, live, images, found.live_prompts if live else found.object_prompts)


def open_image(path: Path, min_size: int = 1) -> Image.Image:
    """Reads an image as RGB, turned as its EXIF orientation says, transparent parts on white.

    Args:
        min_size: least width and height in pixels.

    Raises:
        UserError: something that is no image, one that is cut off or damaged, too small or too large.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"expected 8 bits a channel, found mode {image.mode}")
            image.load()
            found = _on_white(ImageOps.exif_transpose(image))
    except OSError as error:
        if error.strerror:  # no such file, no permission
            raise UserError(f"{path}: {error.strerror}; expected an image") from None
        raise UserError(f"{path} cannot be read as an image: {error}") from None
    except Image.DecompressionBombError:
        raise UserError(f"{path}: an image of more than {MAX_PIXELS} pixels; expected a smaller one") from None
    except Exception as error:  # the decoders raise many kinds on damaged data
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} cannot be read as an image: {reason}") from None
    if min(found.size) < min_size:
        raise UserError(
            f"{path}: an image of {found.width} x {found.height} pixels; expected at least {min_size} x {min_size} "
            "(data.min_size)"
        )
    return found


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255)), image).convert("RGB")

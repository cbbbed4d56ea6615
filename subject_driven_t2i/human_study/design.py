"""Draws a study from the runs of two methods, by its seed, and writes it.

The names of the image files alone are drawn anew for every study, without a seed: no one can work out which is which.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from moslora_core.drawn_images import verified
from moslora_core.errors import UserError
from moslora_core.prepared import sha256
from moslora_core.record import write_json

from ..subjects import Subject, open_image, read_subjects
from . import pictures
from .runs import Arm, Key
from .study import IMAGES_FOLDER, QUESTIONS, STUDY_FILE, Method, Pair, ShownSubject, Study

REFERENCES = 4  # images of the subject beside a pair, at most


@dataclass(frozen=True)
class _Chosen:
    """A pair before its images have names."""

    kind: str
    subject: str
    key: Key
    files: tuple[Path, Path]
    prompt: str
    expected: dict[str, str]


@dataclass(frozen=True)
class Draft:
    """A study that is not written yet: ``compared`` and ``references`` map the names of its files to their sources."""

    study: Study
    compared: dict[str, Path]
    references: dict[str, Path]


def draw_study(
    first: Arm,
    second: Arm,
    *,
    name: str,
    prompts: int = 8,
    images_per_prompt: int = 1,
    checks: int = 4,
    seed: int = 0,
) -> Draft:
    """Draws a study from the runs of two methods; writes nothing.

    Args:
        prompts: number of prompts of each subject, drawn at random.
        images_per_prompt: images of each of them.
        checks: attention checks.

    Raises:
        UserError: too few prompts or images, images that are damaged, were changed or differ in size.
    """
    least = {"prompts": (prompts, 1), "images-per-prompt": (images_per_prompt, 1), "checks": (checks, 0)}
    for option, (number, expected) in least.items():
        if number < expected:
            raise UserError(f"--{option} {number}: expected at least {expected}")
    data_dir = next(iter(first.values())).data_dir
    prepared = read_subjects(data_dir)
    if unknown := [subject for subject in first if subject not in prepared]:
        raise UserError(f"{data_dir}: no subject {unknown[0]}; it has {', '.join(prepared) or 'none'}")
    chosen = _pairs(first, second, prompts, images_per_prompt, seed)
    chosen += _checks(chosen, first, second, [prepared[subject] for subject in first], checks, seed)
    names = {path: pictures.new_name() for pair in chosen for path in pair.files}
    references = {
        subject: {pictures.new_name(): path for path in prepared[subject].images[:REFERENCES]} for subject in first
    }
    study = Study(
        name=name,
        seed=seed,
        prompts=prompts,
        images_per_prompt=images_per_prompt,
        checks=checks,
        first=_method(first),
        second=_method(second),
        subjects={
            subject: ShownSubject(prepared[subject].class_name, tuple(files)) for subject, files in references.items()
        },
        size=_size(chosen),
        pairs=tuple(_pair(number, pair, names) for number, pair in enumerate(chosen, start=1)),
    )
    compared = {file: path for path, file in names.items()}
    return Draft(study, compared, {file: path for files in references.values() for file, path in files.items()})


def write_study(folder: Path, draft: Draft) -> None:
    """Writes a study to ``folder``, which appears whole or not at all.

    Raises:
        UserError: a folder that holds something else or cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} holds something else; expected no such folder, or another --name")
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
            new = Path(temporary) / "study"
            (new / IMAGES_FOLDER).mkdir(parents=True)
            for file, path in draft.compared.items():
                pictures.save(pictures.square(path, draft.study.size), new / IMAGES_FOLDER / file)
            for file, path in draft.references.items():
                pictures.save(pictures.reference(path), new / IMAGES_FOLDER / file)
            write_json(new / STUDY_FILE, asdict(draft.study))
            new.rename(folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from None


def _method(arm: Arm) -> Method:
    run = next(iter(arm.values()))
    return Method(run.name, run.method, run.label, {subject: str(run.path) for subject, run in arm.items()})


def _pair(number: int, chosen: _Chosen, names: Mapping[Path, str]) -> Pair:
    return Pair(
        id=f"{number:03d}",
        kind=chosen.kind,
        subject=chosen.subject,
        prompt_index=chosen.key[0],
        index=None if chosen.kind == "other" else chosen.key[1],
        prompt=chosen.prompt,
        images=tuple(names[path] for path in chosen.files),
        sources=tuple(sha256(path) for path in chosen.files),
        expected=chosen.expected,
    )


def _pairs(first: Arm, second: Arm, prompts: int, images_per_prompt: int, seed: int) -> list[_Chosen]:
    chosen = []
    for subject, run in first.items():
        # A generator of its own: whether another subject takes part does not change this one's prompts.
        generator = random.Random(f"{seed}/pairs/{subject}")
        by_prompt: dict[int, list[Key]] = {}
        for key in sorted(run.images):
            by_prompt.setdefault(key[0], []).append(key)
        if len(by_prompt) < prompts:
            raise UserError(f"{run.path}: images of {len(by_prompt)} prompts; --prompts asks for {prompts}")
        for prompt in sorted(generator.sample(sorted(by_prompt), prompts)):
            if len(by_prompt[prompt]) < images_per_prompt:
                raise UserError(
                    f"{run.path}: {len(by_prompt[prompt])} images of prompt {prompt}; "
                    f"--images-per-prompt asks for {images_per_prompt}"
                )
            for key in sorted(generator.sample(by_prompt[prompt], images_per_prompt)):
                runs = (run, second[subject])
                files = tuple(verified(drawn.record, drawn.images[key]) for drawn in runs)
                chosen.append(_Chosen("pair", subject, key, files, run.images[key].class_prompt, {}))
    return chosen


def _checks(
    pairs: Sequence[_Chosen], first: Arm, second: Arm, subjects: Sequence[Subject], checks: int, seed: int
) -> list[_Chosen]:
    """Attention checks, in turn one image twice and a photograph of another subject against one of the right one.

    Both methods give images to the former. The latter asks about the subject alone: no photograph follows a prompt.
    """
    generator = random.Random(f"{seed}/checks")
    shown = {(pair.subject, pair.key) for pair in pairs}
    order = generator.sample(subjects, len(subjects))
    chosen = []
    for number in range(checks):
        subject = order[number % len(order)]
        others = [other for other in subjects if other.name != subject.name]
        keys = sorted(first[subject.name].images)
        key = generator.choice([key for key in keys if (subject.name, key) not in shown] or keys)
        prompt = first[subject.name].images[key].class_prompt
        if number % 2 == 0 or not others:
            run = generator.choice((first, second))[subject.name]
            file = verified(run.record, run.images[key])
            chosen.append(_Chosen("same", subject.name, key, (file, file), prompt, dict.fromkeys(QUESTIONS, "tie")))
        else:
            files = (generator.choice(subject.images), generator.choice(generator.choice(others).images))
            chosen.append(_Chosen("other", subject.name, key, files, prompt, {"subject_similarity": "first"}))
    return chosen


def _size(chosen: Sequence[_Chosen]) -> tuple[int, int]:
    """(width, height) of the methods' images."""
    sizes: dict[tuple[int, int], Path] = {}
    for pair in chosen:
        if pair.kind == "pair":
            for path in pair.files:
                sizes.setdefault(open_image(path).size, path)
    if len(sizes) > 1:
        (one, path), (two, other) = list(sizes.items())[:2]
        raise UserError(
            f"{path} has {one[0]} x {one[1]} pixels and {other} {two[0]} x {two[1]}; expected images of one size"
        )
    return next(iter(sizes))

"""The smoke scale's world: pictures of one or two coloured shapes, instructions about them, and six small benchmarks.

A picture of 32 x 32 pixels has a background in one of four colours, and one or two objects, each a shape in a colour
in one corner. Six kinds of question are asked about it, in the three forms that the real benchmarks have:

    colour, background        four options with letters       (as MMBench)
    existence                 Yes or No, two to a picture     (as MME)
    shape, count, position    a word                          (as TextVQA)

Combinations of shape, colour and background are split: those of the benchmarks and those of the validation files never
occur in a training picture, and not in one another's. What a question asks for has therefore to be seen, not recalled.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from moslora_core.errors import UserError

from .chat import ASSISTANT, HUMAN, IMAGE
from .prompts import MULTIPLE_CHOICE_SUFFIX, SHORT_ANSWER_SUFFIX

SIDE = 32
COLOURS = {
    "red": (225, 30, 30),
    "green": (30, 175, 60),
    "blue": (40, 70, 230),
    "yellow": (235, 220, 40),
    "white": (245, 245, 245),
    "purple": (150, 50, 190),
}
BACKGROUNDS = {"black": (0, 0, 0), "gray": (125, 125, 125), "brown": (110, 65, 25), "pink": (255, 170, 190)}
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = {"top-left": (0, 0), "top-right": (16, 0), "bottom-left": (0, 16), "bottom-right": (16, 16)}
COUNTS = ("one", "two")
YES, NO = "Yes", "No"
LETTERS = "ABCD"

# What a question of each kind can be answered with, dealt evenly to the items of a benchmark.
ANSWERS: dict[str, tuple[str, ...]] = {
    "colour": tuple(LETTERS),
    "shape": SHAPES,
    "count": COUNTS,
    "existence": (YES, NO),
    "position": tuple(PLACES),
    "background": tuple(LETTERS),
}
KINDS = tuple(ANSWERS)
# Accuracy of whoever gives one and the same answer to every question of a kind.
CHANCE = {kind: 1 / len(answers) for kind, answers in ANSWERS.items()}
SPLITS = ("train", "benchmarks", "validation")
# Of six residues of a combination, the first is the benchmarks' and the fourth the validation's.
_RESIDUES = {"benchmarks": (0,), "validation": (3,), "train": (1, 2, 4, 5)}
# Attempts at a question that fits, before the world counts as exhausted.
_ATTEMPTS = 1000
TEXT_ONLY = 0.1  # share of training items without a picture, as the published mixture has some
SECOND_TURN = 0.3  # share of training items with a picture that ask twice


# ------------------------------------------------------------------------------------------------------------- scenes


@dataclass(frozen=True)
class Thing:
    """One object of a picture."""

    shape: str
    colour: str
    place: str


@dataclass(frozen=True)
class Scene:
    """What a picture shows: one or two things that differ in shape, colour and place."""

    background: str
    things: tuple[Thing, ...]


def split_of(shape: str, colour: str, background: str) -> str:
    """The split that a combination of attributes belongs to: two thirds are of the training."""
    numbers = (SHAPES.index(shape), list(COLOURS).index(colour), list(BACKGROUNDS).index(background))
    residue = sum(numbers) % 6
    return next(split for split, residues in _RESIDUES.items() if residue in residues)


def draw_scene(rng: random.Random, split: str) -> Scene:
    """A random scene whose things all belong to ``split``, and differ in shape and colour."""
    background = rng.choice(list(BACKGROUNDS))
    allowed = [(s, c) for s in SHAPES for c in COLOURS if split_of(s, c, background) == split]
    shape, colour = rng.choice(allowed)
    places = rng.sample(list(PLACES), 2)
    things = [Thing(shape, colour, places[0])]
    others = [(s, c) for s, c in allowed if s != shape and c != colour]
    if others and rng.random() < 0.5:
        things.append(Thing(*rng.choice(others), places[1]))
    return Scene(background, tuple(things))


def paint(scene: Scene, rng: random.Random) -> Image.Image:
    """The picture of a scene, RGB of SIDE x SIDE: things of 11 to 13 pixels, moved by up to a pixel."""
    image = Image.new("RGB", (SIDE, SIDE), BACKGROUNDS[scene.background])
    draw = ImageDraw.Draw(image)
    for thing in scene.things:
        size = rng.randint(11, 13)
        x, y = (corner + (16 - size) // 2 + rng.randint(-1, 1) for corner in PLACES[thing.place])
        _paint_shape(draw, thing.shape, x, y, size - 1, COLOURS[thing.colour])
    return image


def _paint_shape(draw: ImageDraw.ImageDraw, shape: str, x: int, y: int, size: int, fill: tuple[int, ...]) -> None:
    box = (x, y, x + size, y + size)
    if shape == "circle":
        draw.ellipse(box, fill=fill)
    elif shape == "square":
        draw.rectangle(box, fill=fill)
    elif shape == "triangle":
        draw.polygon([(x, y + size), (x + size, y + size), (x + size / 2, y)], fill=fill)
    else:
        third = size // 3
        draw.rectangle((x + third, y, x + size - third, y + size), fill=fill)
        draw.rectangle((x, y + third, x + size, y + size - third), fill=fill)


# ---------------------------------------------------------------------------------------------------------- questions


@dataclass(frozen=True)
class Question:
    """A question about a picture.

    Attributes:
        options: texts of A, B, C, D; empty where the answer is a word.
        answer: the right letter or word.
    """

    kind: str
    text: str
    answer: str
    options: tuple[str, ...] = ()

    def asked(self) -> str:
        """The question as training and evaluation put it."""
        if self.options:
            lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, self.options, strict=True)]
            return "\n".join([self.text, *lines, MULTIPLE_CHOICE_SUFFIX])
        return self.text if self.kind == "existence" else f"{self.text}\n{SHORT_ANSWER_SUFFIX}"


def _choice(kind: str, text: str, right: str, wrong: list[str], rng: random.Random) -> Question:
    options = rng.sample(wrong, 3)
    position = rng.randrange(4)
    options.insert(position, right)
    return Question(kind, text, LETTERS[position], tuple(options))


def _colour(scene: Scene, rng: random.Random) -> Question:
    thing = rng.choice(scene.things)
    wrong = [colour for colour in COLOURS if colour != thing.colour]
    return _choice("colour", f"What color is the {thing.shape}?", thing.colour, wrong, rng)


def _position(scene: Scene, rng: random.Random) -> Question:
    thing = rng.choice(scene.things)
    return Question("position", f"Where is the {thing.shape}?", thing.place)


def _shape(scene: Scene, rng: random.Random) -> Question:
    thing = rng.choice(scene.things)
    return Question("shape", f"What shape is the {thing.colour} object?", thing.shape)


def _count(scene: Scene, rng: random.Random) -> Question:
    return Question("count", "How many objects are in the image?", COUNTS[len(scene.things) - 1])


def _background(scene: Scene, rng: random.Random) -> Question:
    wrong = [colour for colour in BACKGROUNDS if colour != scene.background]
    return _choice("background", "What color is the background?", scene.background, wrong, rng)


def existence(scene: Scene, rng: random.Random, there: bool) -> Question:
    """Whether a thing is in the picture; one that is not differs from one that is in its shape or in its colour.

    What is not there is always a combination of the training split. Were those of the benchmarks denied in training,
    it would teach that they do not exist.
    """
    thing = rng.choice(scene.things)
    shape, colour = thing.shape, thing.colour
    if not there:
        absent = [(s, colour) for s in SHAPES] + [(shape, c) for c in COLOURS]
        shown = {(other.shape, other.colour) for other in scene.things}
        known = [pair for pair in absent if split_of(*pair, scene.background) == "train"]
        shape, colour = rng.choice([pair for pair in known if pair not in shown])
    text = f"Is there a {colour} {shape} in the image? Please answer yes or no."
    return Question("existence", text, YES if there else NO)


def _existence(scene: Scene, rng: random.Random) -> Question:
    return existence(scene, rng, rng.random() < 0.5)


_ASK: dict[str, Callable[[Scene, random.Random], Question]] = {
    "colour": _colour,
    "shape": _shape,
    "count": _count,
    "existence": _existence,
    "position": _position,
    "background": _background,
}


def ask(kind: str, scene: Scene, rng: random.Random) -> Question:
    """A random question of one kind about a scene."""
    return _ASK[kind](scene, rng)


def lookup(rng: random.Random) -> Question:
    """A question without a picture: which letter stands before a word."""
    words = rng.sample(list(rng.choice((COLOURS, BACKGROUNDS))), 4)
    answer = rng.randrange(4)
    return Question("lookup", f"Which letter stands before {words[answer]}?", LETTERS[answer], tuple(words))


# -------------------------------------------------------------------------------------------------------------- files


def generate(out: Path, *, seed: int, train_items: int, test_items: int, validation_items: int) -> None:
    """Writes a world: ``train.json``, ``images/``, ``benchmarks/*.tsv`` and ``validation/*.tsv`` below ``out``.

    The same arguments give the same bytes. Items of different splits are drawn apart, so that a longer training set
    begins with the shorter one.

    Args:
        train_items: items in LLaVA's instruction format.
        test_items: questions of each of the six benchmarks, in VLMEvalKit's TSV layout.
        validation_items: questions of each kind, in the same layout, to choose settings on.
    """
    images = out / "images"
    images.mkdir(parents=True)
    items = list(_train_items(seed, train_items, images))
    (out / "train.json").write_text(json.dumps(items, indent=1) + "\n", encoding="utf-8")
    for split, count in (("benchmarks", test_items), ("validation", validation_items)):
        for kind in KINDS:
            path = out / split / f"smoke_{kind}.tsv"
            path.parent.mkdir(exist_ok=True)
            _write_tsv(path, list(_rows(kind, split, count, random.Random(f"{split}/{kind}/{seed}"))))


def _train_items(seed: int, count: int, images: Path) -> Iterator[dict[str, Any]]:
    rng = random.Random(f"train/{seed}")
    for number in range(count):
        item: dict[str, Any] = {"id": f"smoke/{number}"}
        if rng.random() < TEXT_ONLY:
            questions, opening = [lookup(rng)], ""
        else:
            scene = draw_scene(rng, "train")
            kinds = rng.sample(KINDS, 2 if rng.random() < SECOND_TURN else 1)
            questions, opening = [ask(kind, scene, rng) for kind in kinds], f"{IMAGE}\n"
            item["image"] = f"{number:06d}.png"
            paint(scene, rng).save(images / item["image"])
        turns = []
        for question in questions:
            turns += [{"from": HUMAN, "value": opening + question.asked()}]
            turns += [{"from": ASSISTANT, "value": question.answer}]
            opening = ""
        yield item | {"conversations": turns}


def _rows(kind: str, split: str, count: int, rng: random.Random) -> Iterator[dict[str, str]]:
    answers, pictures = ANSWERS[kind], set()
    for index in range(count):
        wanted = answers[index % len(answers)]
        # MME asks twice about a picture, once for each answer.
        if kind != "existence" or wanted == YES:
            scene, picture, question = _new_question(kind, split, wanted, pictures, rng)
            pictures.add(picture)
        else:
            question = existence(scene, rng, there=False)
        row = {"index": str(index), "image": picture, "question": question.text}
        row |= dict(zip(LETTERS, question.options, strict=True)) if question.options else {}
        number = f"{COUNTS[len(scene.things) - 1]} object{'s' if len(scene.things) > 1 else ''}"
        yield row | {"answer": question.answer, "category": kind, "l2-category": number}


def _new_question(
    kind: str, split: str, answer: str, pictures: set[str], rng: random.Random
) -> tuple[Scene, str, Question]:
    """A question with that answer about a picture that is none of ``pictures`` (base64)."""
    for _ in range(_ATTEMPTS):
        scene = draw_scene(rng, split)
        question = ask(kind, scene, rng)
        if question.answer == answer and (picture := _base64(paint(scene, rng))) not in pictures:
            return scene, picture, question
    raise UserError(
        f"data: the smoke world has only about {len(pictures)} different pictures for {split} of smoke_{kind}; "
        "expected fewer test_items or validation_items"
    )


def _base64(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _write_tsv(path: Path, rows: list[dict[str, str]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)

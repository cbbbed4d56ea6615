"""The generated world: what its pictures show, its questions and answers, its splits and its files."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import itertools
import json
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moslora_core.errors import UserError
from visual_instruction.benchmarks.questions import question_text
from visual_instruction.benchmarks.registry import BENCHMARKS
from visual_instruction.benchmarks.tsv import read_tsv
from visual_instruction.prompts import MULTIPLE_CHOICE_SUFFIX, SHORT_ANSWER_SUFFIX
from visual_instruction.smoke_world import (
    ANSWERS,
    BACKGROUNDS,
    CHANCE,
    COLOURS,
    KINDS,
    LETTERS,
    PLACES,
    SHAPES,
    SIDE,
    SPLITS,
    Scene,
    Thing,
    draw_scene,
    generate,
    paint,
    split_of,
)

TRAIN_ITEMS, TEST_ITEMS, VALIDATION_ITEMS = 600, 48, 24
CHOICES, WORDS = ("colour", "background"), ("shape", "count", "position")


# ------------------------------------------------------------------------------------- an independent look at pictures


def shape_of(mask: np.ndarray) -> str:
    """The shape of a thing from its pixels alone: how the widths of its rows change."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    widths = box.sum(1)
    if box.all():
        return "square"
    if (np.diff(widths) >= 0).all():
        return "triangle"
    return "cross" if len(set(widths)) == 2 else "circle"


def seen(picture: Image.Image) -> Scene:
    """What a picture shows, read from its pixels."""
    pixels = np.asarray(picture)
    assert pixels.shape == (SIDE, SIDE, 3)
    # Two things of 13 x 13 pixels cover a third of a picture.
    ((background, _),) = Counter(tuple(pixel) for pixel in pixels.reshape(-1, 3).tolist()).most_common(1)
    things = []
    for place, (left, top) in PLACES.items():
        corner = pixels[top : top + SIDE // 2, left : left + SIDE // 2]
        mask = (corner != background).any(-1)
        if mask.any():
            (colour,) = {tuple(pixel) for pixel in corner[mask].tolist()}
            things.append(Thing(shape_of(mask), next(n for n, c in COLOURS.items() if c == colour), place))
    return Scene(next(name for name, colour in BACKGROUNDS.items() if colour == background), tuple(things))


def in_order(scene: Scene) -> Scene:
    order = list(PLACES)
    return Scene(scene.background, tuple(sorted(scene.things, key=lambda thing: order.index(thing.place))))


def truth(question: str, scene: Scene) -> str:
    """The answer in words, from what is seen."""
    by_shape = {thing.shape: thing for thing in scene.things}
    by_colour = {thing.colour: thing for thing in scene.things}
    for pattern, answer in (
        (r"What color is the background\?", lambda: scene.background),
        (r"What color is the (\w+)\?", lambda shape: by_shape[shape].colour),
        (r"Where is the (\w+)\?", lambda shape: by_shape[shape].place),
        (r"What shape is the (\w+) object\?", lambda colour: by_colour[colour].shape),
        (r"How many objects are in the image\?", lambda: {1: "one", 2: "two"}[len(scene.things)]),
        (
            r"Is there a (\w+) (\w+) in the image\? Please answer yes or no\.",
            lambda colour, shape: "Yes" if any((t.colour, t.shape) == (colour, shape) for t in scene.things) else "No",
        ),
    ):
        if found := re.match(pattern, question):
            return answer(*found.groups())
    raise AssertionError(question)


def frame(text: str) -> str:
    """A text without the words of the world."""
    return re.sub("|".join([*SHAPES, *COLOURS, *BACKGROUNDS, *PLACES]), "_", text)


def combinations(scene: Scene) -> set[tuple[str, str, str]]:
    return {(thing.shape, thing.colour, scene.background) for thing in scene.things}


# --------------------------------------------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world")
    generate(out, seed=3, train_items=TRAIN_ITEMS, test_items=TEST_ITEMS, validation_items=VALIDATION_ITEMS)
    return out


@pytest.fixture(scope="module")
def train(folder: Path) -> list[dict]:
    return json.loads((folder / "train.json").read_text())


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


@pytest.fixture(scope="module")
def rows(folder: Path) -> dict[tuple[str, str], list[dict[str, str]]]:
    """(split, kind) -> rows of the file."""
    return {
        (split, kind): rows_of(folder / split / f"smoke_{kind}.tsv")
        for split in ("benchmarks", "validation")
        for kind in KINDS
    }


def asked_and_answered(item: dict) -> list[tuple[str, str]]:
    """Questions, without the picture's placeholder, and answers of a training item."""
    values = [turn["value"].removeprefix("<image>\n") for turn in item["conversations"]]
    return list(zip(values[::2], values[1::2], strict=True))


def picture_of(row: dict[str, str]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(row["image"])))


def digests(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


# -------------------------------------------------------------------------------------------------------------- scenes


def test_words_have_one_meaning() -> None:
    words = [*SHAPES, *COLOURS, *BACKGROUNDS, *PLACES]
    assert len(words) == len(set(words))


@pytest.mark.parametrize("split", SPLITS)
def test_a_picture_shows_its_scene(split) -> None:
    rng = random.Random(0)
    for _ in range(150):
        scene = draw_scene(rng, split)
        assert seen(paint(scene, rng)) == in_order(scene)


def test_splits_hold_out_combinations_and_no_pair_of_attributes() -> None:
    split = {each: split_of(*each) for each in itertools.product(SHAPES, COLOURS, BACKGROUNDS)}
    assert Counter(split.values()) == {"train": 64, "benchmarks": 16, "validation": 16}
    trained = [each for each, name in split.items() if name == "train"]
    for first, second in itertools.combinations(range(3), 2):
        pairs = {(each[first], each[second]) for each in split}
        assert {(each[first], each[second]) for each in trained} == pairs


@pytest.mark.parametrize("split", SPLITS)
def test_things_of_a_scene_belong_to_its_split_and_differ(split) -> None:
    rng = random.Random(1)
    scenes = [draw_scene(rng, split) for _ in range(600)]
    assert {split_of(*each) for scene in scenes for each in combinations(scene)} == {split}
    for scene in scenes:
        for attribute in ("shape", "colour", "place"):
            values = [getattr(thing, attribute) for thing in scene.things]
            assert len(values) == len(set(values))
    shares = Counter(len(scene.things) for scene in scenes)
    assert set(shares) == {1, 2} and min(shares.values()) > 200
    for attribute, values in (("shape", SHAPES), ("colour", COLOURS), ("place", PLACES)):
        assert {getattr(thing, attribute) for scene in scenes for thing in scene.things} == set(values)


# ------------------------------------------------------------------------------------------------------ training items


def test_training_items_have_llavas_format(folder, train) -> None:
    assert len(train) == len({item["id"] for item in train}) == TRAIN_ITEMS
    for item in train:
        turns = item["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        images = [turn["value"].count("<image>") for turn in turns]
        assert images == [int("image" in item), *[0] * (len(turns) - 1)]
        assert "image" not in item or turns[0]["value"].startswith("<image>\n")
    named = {item["image"] for item in train if "image" in item}
    assert named == {path.name for path in (folder / "images").iterdir()}


def test_training_answers_are_what_the_pictures_show(folder, train) -> None:
    asked = Counter()
    for item in train:
        if "image" not in item:
            continue
        scene = seen(Image.open(folder / "images" / item["image"]))
        assert {split_of(*each) for each in combinations(scene)} == {"train"}
        for question, answer in asked_and_answered(item):
            text, *rest = question.split("\n")
            if rest and rest[-1] == MULTIPLE_CHOICE_SUFFIX:
                options = dict(line.split(". ") for line in rest[:-1])
                assert tuple(options) == tuple(LETTERS)
                answer = options[answer]
            else:
                assert rest in ([], [SHORT_ANSWER_SUFFIX])
            assert answer == truth(text, scene)
            asked[frame(text)] += 1
    assert len(asked) == len(KINDS) and min(asked.values()) > 60


def test_some_items_are_text_alone_and_answered_by_their_words(train) -> None:
    texts = [item["conversations"] for item in train if "image" not in item]
    assert 0.05 < len(texts) / len(train) < 0.15
    for human, gpt in texts:
        question, *options, suffix = human["value"].split("\n")
        assert suffix == MULTIPLE_CHOICE_SUFFIX
        word = re.fullmatch(r"Which letter stands before (\S+)\?", question)[1]
        assert dict(line.split(". ") for line in options)[gpt["value"]] == word


def test_some_items_have_a_second_turn_about_something_else(train) -> None:
    longer = [item["conversations"] for item in train if len(item["conversations"]) == 4]
    assert 0.2 < len(longer) / len(train) < 0.35
    assert all(turns[0]["value"] != "<image>\n" + turns[2]["value"] for turns in longer)


# ----------------------------------------------------------------------------------------------------------- questions


@pytest.mark.parametrize("split", ["benchmarks", "validation"])
@pytest.mark.parametrize("kind", KINDS)
def test_files_have_the_layout_of_their_kind(folder, rows, split, kind) -> None:
    options = list(LETTERS) if kind in CHOICES else []
    found = rows[split, kind]
    assert list(found[0]) == ["index", "image", "question", *options, "answer", "category", "l2-category"]
    assert len(found) == {"benchmarks": TEST_ITEMS, "validation": VALIDATION_ITEMS}[split]
    assert {row["category"] for row in found} == {kind}
    items = read_tsv(folder / split / f"smoke_{kind}.tsv", BENCHMARKS[f"smoke_{kind}"])
    kinds = {"existence": "yes_no"} | dict.fromkeys(CHOICES, "multiple_choice") | dict.fromkeys(WORDS, "short_answer")
    assert {item.kind for item in items} == {kinds[kind]}


def test_training_asks_in_the_words_of_the_evaluation(folder, train) -> None:
    trained = {
        frame(turn["value"].removeprefix("<image>\n"))
        for item in train
        for turn in item["conversations"]
        if turn["from"] == "human"
    }
    for kind in KINDS:
        path = folder / "benchmarks" / f"smoke_{kind}.tsv"
        assert {frame(question_text(item)) for item in read_tsv(path, BENCHMARKS[f"smoke_{kind}"])} <= trained


@pytest.mark.parametrize("split", ["benchmarks", "validation"])
@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_what_the_pictures_show(rows, split, kind) -> None:
    for row in rows[split, kind]:
        scene = seen(picture_of(row))
        assert {split_of(*each) for each in combinations(scene)} == {split}
        right = truth(row["question"], scene)
        if kind in CHOICES:
            options = [row[letter] for letter in LETTERS]
            assert len(set(options)) == 4 and options[LETTERS.index(row["answer"])] == right
        else:
            assert row["answer"] == right
        assert row["l2-category"] == ("one object" if len(scene.things) == 1 else "two objects")


@pytest.mark.parametrize("split", ["benchmarks", "validation"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_is_right_equally_often(rows, split, kind) -> None:
    counts = Counter(row["answer"] for row in rows[split, kind])
    assert set(counts) == set(ANSWERS[kind]) and len(set(counts.values())) == 1
    assert max(counts.values()) / sum(counts.values()) == CHANCE[kind]


@pytest.mark.parametrize("split", ["benchmarks", "validation"])
def test_existence_asks_twice_about_a_picture_as_mme_does(rows, split) -> None:
    found = rows[split, "existence"]
    for yes, no in zip(found[::2], found[1::2], strict=True):
        assert yes["image"] == no["image"] and yes["question"] != no["question"]
        assert (yes["answer"], no["answer"]) == ("Yes", "No")


def test_what_is_denied_is_a_combination_that_training_shows(train, folder, rows) -> None:
    """No combination of the benchmarks is denied in training, which would teach that it does not exist."""

    def denied(question: str, picture: Image.Image) -> tuple[str, str, str]:
        colour, shape = re.search(r"Is there a (\w+) (\w+) in", question).groups()
        return shape, colour, seen(picture).background

    found = [
        denied(question, Image.open(folder / "images" / item["image"]))
        for item in train
        for question, answer in asked_and_answered(item)
        if answer == "No"
    ]
    found += [
        denied(row["question"], picture_of(row)) for row in rows["benchmarks", "existence"] if row["answer"] == "No"
    ]
    assert len(found) > 40 and {split_of(*each) for each in found} == {"train"}


@pytest.mark.parametrize("split", ["benchmarks", "validation"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_picture_of_a_file_repeats(rows, split, kind) -> None:
    questions = 2 if kind == "existence" else 1
    assert set(Counter(row["image"] for row in rows[split, kind]).values()) == {questions}


def test_splits_share_no_picture(folder, rows) -> None:
    def pixels(image: Image.Image) -> bytes:
        return image.tobytes()

    trained = {pixels(Image.open(path)) for path in (folder / "images").iterdir()}
    tested = {split: {pixels(picture_of(row)) for kind in KINDS for row in rows[split, kind]} for split in SPLITS[1:]}
    assert not trained & tested["benchmarks"]
    assert not trained & tested["validation"]
    assert not tested["benchmarks"] & tested["validation"]


# --------------------------------------------------------------------------------------------------------- determinism


def test_a_world_is_determined_by_its_seed(tmp_path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        generate(tmp_path / name, seed=seed, train_items=12, test_items=4, validation_items=2)
    first, second, third = (digests(tmp_path / name) for name in "abc")
    assert first == second
    assert all(first[name] != third[name] for name in first.keys() & third.keys())


def test_sizes_of_one_split_do_not_change_the_others_and_more_items_begin_with_fewer(tmp_path) -> None:
    sizes = {"a": (12, 4, 4), "b": (24, 8, 4)}
    for name, (train_items, test_items, validation_items) in sizes.items():
        generate(
            tmp_path / name, seed=1, train_items=train_items, test_items=test_items, validation_items=validation_items
        )
    few, many = (digests(tmp_path / name) for name in "ab")
    shared = [name for name in few if name.startswith(("images/", "validation/"))]
    assert len(shared) > 12 and all(few[name] == many[name] for name in shared)
    items = [json.loads((tmp_path / name / "train.json").read_text()) for name in "ab"]
    assert items[1][: len(items[0])] == items[0]
    for kind in KINDS:
        tested = [rows_of(tmp_path / name / "benchmarks" / f"smoke_{kind}.tsv") for name in "ab"]
        assert tested[1][: len(tested[0])] == tested[0]


def test_more_pictures_than_the_world_has_are_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("visual_instruction.smoke_world._ATTEMPTS", 3)
    with pytest.raises(UserError, match=r"pictures for benchmarks of smoke_\w+; expected fewer test_items"):
        generate(tmp_path / "world", seed=0, train_items=1, test_items=200, validation_items=1)

"""The smoke world: what is drawn, what captions say, the subjects, and the oracle that reads pictures."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageFilter

from moslora_core.errors import UserError
from subject_driven_t2i.smoke_world import (
    BACKGROUNDS,
    BODY,
    CLASSES,
    COLOURS,
    CORE,
    JITTER,
    RESERVED,
    SHAPES,
    SIDE,
    SPRITES,
    TOKEN,
    Reading,
    Sprite,
    draw_captioned,
    expected,
    held_out,
    held_out_prompts,
    hits,
    paint,
    paint_somewhere,
    read,
    subjects,
)

ATTRIBUTES = ("shape", "foreground", "core", "background")


def picture(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(pixels, 0, 255).round().astype(np.uint8))


def shape_of(mask: np.ndarray) -> str:
    """The shape of a filled outline, by how wide its rows are."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    assert box.shape == (BODY, BODY)
    widths = box.sum(1)
    if box.all():
        return "square"
    if (np.diff(widths) >= 0).all():
        return "triangle"
    return "cross" if len(set(widths)) == 2 else "circle"


# ------------------------------------------------------------------------------------------------------------ pictures


def test_words_and_colours_have_one_meaning() -> None:
    words = [*SHAPES, *COLOURS, *BACKGROUNDS, *CLASSES, TOKEN]
    assert len(words) == len(set(words))
    palette = [*COLOURS.values(), *BACKGROUNDS.values()]
    assert min(np.linalg.norm(np.subtract(a, b)) for a, b in itertools.combinations(palette, 2)) > 90


@pytest.mark.parametrize("shape", SHAPES)
def test_a_picture_shows_its_sprite(shape) -> None:
    """By counting pixels, with no template."""
    for dx, dy in itertools.product((-JITTER, 0, JITTER), repeat=2):
        pixels = np.asarray(paint(Sprite(shape, "red", "cyan"), "pink", dx, dy))
        body = (pixels == COLOURS["red"]).all(-1)
        core = (pixels == COLOURS["cyan"]).all(-1)
        assert (body | core | (pixels == BACKGROUNDS["pink"]).all(-1)).all()
        assert shape_of(body | core) == shape
        rows, columns = np.nonzero(body | core)
        middle = (SIDE - 1) / 2
        assert (rows.min() + rows.max()) / 2 == middle + dy and (columns.min() + columns.max()) / 2 == middle + dx
        assert core.sum() == CORE**2
        y, x = np.nonzero(core)
        assert y.max() - y.min() == x.max() - x.min() == CORE - 1
        # The core is inside: no pixel of it touches the background.
        grown = np.pad(core, 1)
        grown = grown[:-2, 1:-1] | grown[2:, 1:-1] | grown[1:-1, :-2] | grown[1:-1, 2:]
        assert not (grown & ~body & ~core).any()


# ---------------------------------------------------------------------------------------------------------- the oracle


@pytest.mark.parametrize("shape", SHAPES)
def test_the_oracle_reads_every_combination(shape) -> None:
    rng = random.Random(shape)
    for colour, core, background in itertools.product(COLOURS, COLOURS, BACKGROUNDS):
        found = read(paint_somewhere(Sprite(shape, colour, core), background, rng))
        assert found == Reading(shape, colour, core, background)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_oracle_reads_a_sprite_wherever_it_is(shape) -> None:
    for dx, dy in itertools.product(range(-JITTER, JITTER + 1), repeat=2):
        assert read(paint(Sprite(shape, "green", "yellow"), "teal", dx, dy)) == Reading(
            shape, "green", "yellow", "teal"
        )


def test_the_oracle_reads_pictures_that_are_a_little_off() -> None:
    """Blurred, tinted and noisy as generated ones are."""
    generator, rng = np.random.default_rng(0), random.Random(0)
    for shape, colour, core in itertools.product(SHAPES, COLOURS, COLOURS):
        background = rng.choice(list(BACKGROUNDS))
        image = paint_somewhere(Sprite(shape, colour, core), background, rng)
        pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(0.5)), float) * 0.95 + generator.normal(8, 8, 3)
        found = read(picture(pixels + generator.normal(0, 12, pixels.shape)))
        assert (found.shape, found.background) == (shape, background)
        assert (found.foreground, found.core) == (colour, core)


def noises() -> dict[str, np.ndarray]:
    """Name -> pictures (n, SIDE, SIDE, 3) with nothing in them."""
    generator = np.random.default_rng(1)
    coarse = generator.integers(0, 256, (60, 8, 8, 3)).repeat(4, 1).repeat(4, 2)
    smooth = [Image.fromarray(each.astype(np.uint8)).filter(ImageFilter.GaussianBlur(3)) for each in coarse]
    stripes = np.where(np.arange(SIDE)[:, None, None] % 8 < 4, COLOURS["red"], BACKGROUNDS["black"])
    palette = np.array([*COLOURS.values(), *BACKGROUNDS.values()])
    return {
        "uniform": generator.integers(0, 256, (60, SIDE, SIDE, 3)),
        "gaussian": generator.normal(128, 60, (60, SIDE, SIDE, 3)),
        "patches": coarse,
        "palette": palette[generator.integers(0, len(palette), (60, SIDE, SIDE))],
        "smooth": np.stack([np.asarray(each) for each in smooth]),
        "stripes": np.stack([np.broadcast_to(stripes, (SIDE, SIDE, 3))] * 2),
    }


@pytest.mark.parametrize("kind", noises())
def test_noise_is_not_a_sprite(kind) -> None:
    found = [read(picture(pixels)) for pixels in noises()[kind]]
    read_off = Counter(name for each in found for name in ATTRIBUTES if getattr(each, name) is not None)
    assert not read_off


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_an_empty_picture_has_a_background_alone(background) -> None:
    generator = np.random.default_rng(2)
    pixels = np.full((SIDE, SIDE, 3), BACKGROUNDS[background]) + generator.normal(0, 8, (SIDE, SIDE, 3))
    assert read(picture(pixels)) == Reading(background=background)


def test_a_colour_outside_of_its_palette_is_not_read() -> None:
    pixels = np.asarray(paint(Sprite("square", "red", "red"), "white")).copy()
    body = (pixels == COLOURS["red"]).all(-1)
    for colour in (BACKGROUNDS["gray"], (128, 255, 0)):
        pixels[body] = colour
        assert read(picture(pixels)) == Reading("square", None, None, "white")
    assert read(picture(np.where(body[..., None], COLOURS["red"], COLOURS["blue"]))) == Reading("square", "red", "red")


def test_a_picture_of_another_size_is_refused() -> None:
    with pytest.raises(UserError, match="64 x 64 pixels; expected 32 x 32"):
        read(Image.new("RGB", (64, 64)))
    with pytest.raises(UserError, match="64 x 16 pixels; expected 32 x 32"):
        read(Image.new("RGB", (64, 16)))


def test_modes_of_pictures_are_converted() -> None:
    image = paint(Sprite("cross", "blue", "red"), "white")
    assert read(image.convert("RGBA")) == Reading("cross", "blue", "red", "white")


# ------------------------------------------------------------------------------------------------------------ captions


@pytest.fixture(scope="module")
def drawn() -> list:
    rng = random.Random(0)
    return [draw_captioned(rng) for _ in range(4000)]


def test_held_out_combinations_are_a_sixth_and_no_pair_of_attributes() -> None:
    everything = list(itertools.product(SHAPES, COLOURS, BACKGROUNDS))
    kept = [each for each in everything if held_out(*each)]
    assert len(kept) * 6 == len(everything)
    for first, second in itertools.combinations(range(3), 2):
        pairs = {(each[first], each[second]) for each in everything}
        assert {(each[first], each[second]) for each in set(everything) - set(kept)} == pairs


def test_captions_say_what_is_drawn_and_nothing_that_is_held_out(drawn) -> None:
    named = 0
    for each in drawn:
        words, sprite = set(each.caption.split()), each.sprite
        said = {name: words & set(values) for name, values in (("shape", SHAPES), ("colour", COLOURS))}
        assert words & set(BACKGROUNDS) <= {each.background}
        assert sprite not in SPRITES.values()
        if said["shape"]:
            assert said == {"shape": {sprite.shape}, "colour": {sprite.colour}} and sprite.core == sprite.colour
            assert not held_out(sprite.shape, sprite.colour, each.background)
            assert not words & {*CLASSES, TOKEN}
            named += 1
        else:
            assert not said["colour"] and sprite.core != sprite.colour and len(words & set(CLASSES)) == 1
    assert 0.6 < named / len(drawn) < 0.8
    placed = sum(bool(set(each.caption.split()) & set(BACKGROUNDS)) for each in drawn)
    assert 0.7 < placed / len(drawn) < 0.9


def test_a_class_says_nothing_about_looks(drawn) -> None:
    """Every class, with and without the rare token, has sprites of every shape, body and core."""
    found: dict[tuple[str, bool], list[Sprite]] = {}
    for each in drawn:
        words = each.caption.split()
        for name in set(words) & set(CLASSES):
            found.setdefault((name, TOKEN in words), []).append(each.sprite)
    assert len(found) == 2 * len(CLASSES)
    for sprites in found.values():
        assert {sprite.shape for sprite in sprites} == set(SHAPES)
        assert {sprite.colour for sprite in sprites} == {sprite.core for sprite in sprites} == set(COLOURS)


def test_held_out_prompts_ask_for_each_held_out_combination_once() -> None:
    asked = list(held_out_prompts())
    combinations = [(each.sprite.shape, each.sprite.colour, each.background) for each in asked]
    assert len(set(combinations)) == len(asked) == 24 and all(itertools.starmap(held_out, combinations))
    for each in asked:
        assert each.caption == f"a {each.sprite.colour} {each.sprite.shape} on a {each.background} background"


# ------------------------------------------------------------------------------------------------------------ subjects


def test_subjects_are_dreambooths() -> None:
    found = subjects(seed=1)
    assert len({subject.name for subject in found}) == len(found) >= 5 and {*RESERVED} < {s.name for s in found}
    assert len({SPRITES[subject.name] for subject in found}) == len(found)
    for subject in found:
        readings = [read(image) for image in subject.images]
        assert len(readings) == 5 and subject.class_name in CLASSES
        sprite = SPRITES[subject.name]
        assert {(each.shape, each.foreground, each.core) for each in readings} == {
            (sprite.shape, sprite.colour, sprite.core)
        }
        shown = {each.background for each in readings}
        asked = {expected(subject.name, template).background for template in subject.prompts}
        assert len(shown) == 3 and shown | asked == set(BACKGROUNDS) and not shown & asked
        assert len(set(subject.prompts)) == len(subject.prompts) >= 6
        for template in subject.prompts:
            words = template.format(TOKEN, subject.class_name).split()
            assert words.count(TOKEN) == words.count(subject.class_name) == 1


def test_subjects_are_determined_by_the_seed() -> None:
    def pixels(seed: int) -> list[bytes]:
        return [image.tobytes() for subject in subjects(seed) for image in subject.images]

    assert pixels(3) == pixels(3) != pixels(4)
    assert [s.prompts for s in subjects(3)] == [s.prompts for s in subjects(4)]


def test_a_prompt_asks_for_the_subject_and_for_the_background_that_it_names() -> None:
    assert expected("lamp", "a {0} {1} on a gray background") == Reading("triangle", "green", "purple", "gray")
    assert expected("toy", "a photo of a {0} {1}") == Reading("cross", "red", "yellow", None)
    with pytest.raises(UserError, match=r"'dog' is none of the smoke world's; expected one of toy, badge"):
        expected("dog", "a {0} {1}")


def test_hits_judge_what_is_asked_and_miss_what_is_not_read() -> None:
    wanted = Reading("cross", "red", "yellow", "gray")
    assert hits(wanted, wanted) == dict.fromkeys(ATTRIBUTES, True)
    assert hits(Reading(), wanted) == dict.fromkeys(ATTRIBUTES, False)
    assert hits(Reading("cross", "blue", None, "gray"), Reading("cross", "red", "yellow")) == {
        "shape": True,
        "foreground": False,
        "core": False,
    }

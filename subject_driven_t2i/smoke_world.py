"""The smoke scale's world: sprites on plain backgrounds with captions, new subjects, and an exact oracle.

A picture of 32 x 32 pixels has a background in one of six colours and one sprite: a body of one of four shapes in one
of six other colours, with a square core that has a colour of its own or the body's. No word and no colour has two
meanings, so whatever a picture shows can be read off its pixels (:func:`read`).

The base learns two kinds of caption. *Plain* sprites, whose core has the body's colour, are named by colour and shape:
``a red cross on a gray background``. Sprites of two colours are called by a class word that says nothing about their
looks: ``a toy on a gray background``. A *subject* is one sprite of two colours that the base was never shown; five
pictures of it, on three of the six backgrounds, are what DreamBooth trains on. The evaluation prompts ask for the
subject on the three backgrounds that it was not shown on.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache

import numpy as np
from PIL import Image

from moslora_core.errors import UserError

SIDE = 32
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 170, 60),
    "blue": (45, 70, 230),
    "yellow": (240, 220, 40),
    "purple": (150, 50, 190),
    "cyan": (40, 200, 220),
}
BACKGROUNDS = {
    "white": (245, 245, 245),
    "black": (15, 15, 15),
    "gray": (128, 128, 128),
    "brown": (110, 65, 25),
    "pink": (255, 170, 190),
    "teal": (0, 105, 115),
}
SHAPES = ("circle", "square", "triangle", "cross")
CLASSES = ("toy", "badge", "lamp", "robot", "button")
TOKEN = "sks"
# What captions and evaluation prompts are made of; the second kind leaves the background open.
PLACED = (
    "a {thing} on a {background} background",
    "a photo of a {thing} on a {background} background",
    "a {thing} in front of a {background} wall",
)
UNPLACED = ("a {thing}", "a photo of a {thing}")

BODY, CORE = 20, 8
JITTER = 3  # a sprite is moved by up to so many pixels in each direction


# ------------------------------------------------------------------------------------------------------------ sprites


@dataclass(frozen=True)
class Sprite:
    """A body and its core; a plain sprite has both in one colour."""

    shape: str
    colour: str
    core: str


@dataclass(frozen=True)
class Reading:
    """What a picture shows, or is asked to show; None for what cannot be read, or is not asked."""

    shape: str | None = None
    foreground: str | None = None
    core: str | None = None
    background: str | None = None


def held_out(shape: str, colour: str, background: str) -> bool:
    """Whether a combination is kept from the base's training, to measure it by: one in six, no pair of attributes."""
    numbers = (SHAPES.index(shape), list(COLOURS).index(colour), list(BACKGROUNDS).index(background))
    return sum(numbers) % 6 == 0


@cache
def _body(shape: str) -> np.ndarray:
    """Pixels of a body, boolean (BODY, BODY)."""
    y, x = np.mgrid[:BODY, :BODY]
    middle = (BODY - 1) / 2
    if shape == "circle":
        return (x - middle) ** 2 + (y - middle) ** 2 <= (BODY / 2) ** 2
    if shape == "square":
        return np.ones((BODY, BODY), bool)
    if shape == "triangle":
        return np.abs(x - middle) <= (y + 1) / 2
    arm = BODY / 5
    return (np.abs(x - middle) < arm) | (np.abs(y - middle) < arm)


def _regions(shape: str, dx: int, dy: int) -> np.ndarray:
    """Background, body without its core, and core of a sprite moved by (dx, dy): boolean (3, SIDE, SIDE)."""
    left, top = (SIDE - BODY) // 2 + dx, (SIDE - BODY) // 2 + dy
    body, core = np.zeros((2, SIDE, SIDE), bool)
    body[top : top + BODY, left : left + BODY] = _body(shape)
    # A triangle is widest at its foot, so its core sits lower.
    inset, drop = (BODY - CORE) // 2, BODY // 5 if shape == "triangle" else 0
    core[top + inset + drop : top + inset + drop + CORE, left + inset : left + inset + CORE] = True
    return np.stack((~body, body & ~core, core))


def paint(sprite: Sprite, background: str, dx: int = 0, dy: int = 0) -> Image.Image:
    """The picture of a sprite, RGB of SIDE x SIDE, moved by (dx, dy) pixels from the middle."""
    colours = (BACKGROUNDS[background], COLOURS[sprite.colour], COLOURS[sprite.core])
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    for region, colour in zip(_regions(sprite.shape, dx, dy), colours, strict=True):
        pixels[region] = colour
    return Image.fromarray(pixels)


def paint_somewhere(sprite: Sprite, background: str, rng: random.Random) -> Image.Image:
    """The picture of a sprite at a random place."""
    return paint(sprite, background, rng.randint(-JITTER, JITTER), rng.randint(-JITTER, JITTER))


# ----------------------------------------------------------------------------------------------- captions of the base


@dataclass(frozen=True)
class Captioned:
    """One training item of the base."""

    caption: str
    sprite: Sprite
    background: str


# Shares of captions that name colour and shape, and that name the background; the others leave it open.
NAMED, WITH_BACKGROUND = 0.7, 0.8
# Share of class captions that have the rare token, to which the base so learns to give no meaning.
WITH_TOKEN = 0.3


def draw_captioned(rng: random.Random) -> Captioned:
    """A random captioned sprite of the base's training: no held-out combination, no subject."""
    background = rng.choice(list(BACKGROUNDS))
    if rng.random() < NAMED:
        allowed = [(s, c) for s in SHAPES for c in COLOURS if not held_out(s, c, background)]
        shape, colour = rng.choice(allowed)
        sprite, thing = Sprite(shape, colour, colour), f"{colour} {shape}"
    else:
        sprite, thing = rng.choice(_two_coloured()), rng.choice(CLASSES)
        thing = f"{TOKEN} {thing}" if rng.random() < WITH_TOKEN else thing
    templates = PLACED if rng.random() < WITH_BACKGROUND else UNPLACED
    return Captioned(rng.choice(templates).format(thing=thing, background=background), sprite, background)


def held_out_prompts() -> Iterator[Captioned]:
    """Prompts of the combinations that the base never saw, what the base is measured by."""
    for background in BACKGROUNDS:
        for shape in SHAPES:
            for colour in COLOURS:
                if held_out(shape, colour, background):
                    prompt = PLACED[0].format(thing=f"{colour} {shape}", background=background)
                    yield Captioned(prompt, Sprite(shape, colour, colour), background)


# ----------------------------------------------------------------------------------------------------------- subjects


@dataclass(frozen=True)
class SmokeSubject:
    """A subject in DreamBooth's terms.

    Attributes:
        images: five pictures of it.
        prompts: evaluation prompts as DreamBooth writes them, with ``{0}`` for the rare token and ``{1}`` for the
            class, each on a background that no image has.
    """

    name: str
    class_name: str
    images: list[Image.Image]
    prompts: list[str]


SPRITES = {
    "toy": Sprite("cross", "red", "yellow"),
    "badge": Sprite("circle", "blue", "red"),
    "lamp": Sprite("triangle", "green", "purple"),
    "robot": Sprite("square", "yellow", "blue"),
    "button": Sprite("circle", "purple", "cyan"),
}
# The subjects to choose settings on: no table has them.
RESERVED = ("robot", "button")
IMAGES = 5
_SHOWN = {
    "toy": ("white", "gray", "teal"),
    "badge": ("black", "gray", "pink"),
    "lamp": ("white", "brown", "pink"),
    "robot": ("black", "brown", "teal"),
    "button": ("white", "brown", "gray"),
}


@cache
def _two_coloured() -> tuple[Sprite, ...]:
    """Sprites of two colours that the base is shown: all but the subjects."""
    sprites = (Sprite(s, c, k) for s in SHAPES for c in COLOURS for k in COLOURS if c != k)
    return tuple(sprite for sprite in sprites if sprite not in SPRITES.values())


def subjects(seed: int = 0) -> list[SmokeSubject]:
    """All subjects; ``seed`` decides where in its pictures a subject is."""
    return [_subject(name, seed) for name in SPRITES]


def _subject(name: str, seed: int) -> SmokeSubject:
    rng, shown = random.Random(f"{name}/{seed}"), _SHOWN[name]
    images = [paint_somewhere(SPRITES[name], shown[i % len(shown)], rng) for i in range(IMAGES)]
    unseen = [background for background in BACKGROUNDS if background not in shown]
    prompts = [t.format(thing="{0} {1}", background=background) for t in PLACED for background in unseen]
    return SmokeSubject(name, name, images, prompts)


def expected(subject_name: str, prompt_template: str) -> Reading:
    """What a picture for an evaluation prompt has to show: the subject, and the prompt's background.

    Raises:
        UserError: for an unknown subject.
    """
    if subject_name not in SPRITES:
        raise UserError(
            f"subject: '{subject_name}' is none of the smoke world's; expected one of {', '.join(SPRITES)}"
        )
    sprite = SPRITES[subject_name]
    named = [word for word in prompt_template.split() if word in BACKGROUNDS]
    return Reading(sprite.shape, sprite.colour, sprite.core, named[0] if named else None)


# --------------------------------------------------------------------------------------------------------- the oracle


# Places that a sprite is looked for at, a pixel beyond those it is painted at.
_REACH = JITTER + 1
# Share of a picture's variance that the best template has to explain, and the least standard deviation of a picture
# with something in it.
_EXPLAINED, _CONTRAST = 0.6, 15.0
# Distance in RGB up to which a pixel of a sprite has a colour of the palette, and share of a region's pixels that have
# to have it; outlines may be blurred. No two colours are nearer than 90.
_NEAR, _SHARE = 60.0, 0.4
# The same for the background as a whole, and the root mean squared distance up to which it is one colour.
_BACKGROUND_NEAR, _SPREAD = 75.0, 25.0


@cache
def _templates() -> tuple[list[str], np.ndarray]:
    """Shape of each template, and its regions: (templates, 3, SIDE * SIDE) of zeros and ones."""
    moves = range(-_REACH, _REACH + 1)
    keys = [(shape, dx, dy) for shape in SHAPES for dx in moves for dy in moves]
    regions = np.stack([_regions(*key) for key in keys]).reshape(len(keys), 3, -1)
    return [shape for shape, _, _ in keys], regions.astype(np.float64)


def read(image: Image.Image) -> Reading:
    """What a picture shows.

    Each shape at each place is a template of three regions. The one whose regions are most uniform in the picture
    gives the shape, unless even that leaves much unexplained; the colour of a region is the one of the palette that
    most of its pixels are near to. The background is read in the frame that no sprite reaches, if that has one colour.
    What cannot be read is None, so that noise is not a hit.

    Args:
        image: of any mode, SIDE x SIDE.
    """
    if image.size != (SIDE, SIDE):
        raise UserError(f"image: {image.width} x {image.height} pixels; expected {SIDE} x {SIDE} of the smoke world")
    pixels = np.asarray(image.convert("RGB"), np.float64).reshape(-1, 3)
    background = _background(pixels[_frame()])
    shapes, regions = _templates()
    counts = regions.sum(-1)  # (templates, 3)
    means = (regions.reshape(-1, len(pixels)) @ pixels).reshape(*counts.shape, 3) / counts[..., None]
    explained = (counts[..., None] * means**2).sum((1, 2)) - len(pixels) * (pixels.mean(0) ** 2).sum()
    total = ((pixels - pixels.mean(0)) ** 2).sum()
    best = int(explained.argmax())
    if total < len(pixels) * _CONTRAST**2 or explained[best] < _EXPLAINED * total:
        return Reading(background=background)
    _, body, core = regions[best].astype(bool)
    foreground, middle = (_sprite_colour(pixels[region]) for region in (body, core))
    return Reading(shapes[best], foreground, middle, background)


@cache
def _frame() -> np.ndarray:
    margin = (SIDE - BODY) // 2 - JITTER
    frame = np.ones((SIDE, SIDE), bool)
    frame[margin:-margin, margin:-margin] = False
    return frame.reshape(-1)


def _sprite_colour(pixels: np.ndarray) -> str | None:
    """The colour of the palette that the pixels (n, 3) of a body or core have."""
    names, colours = _palette()
    distances = np.linalg.norm(pixels[:, None] - colours, axis=-1)
    nearest = np.where(distances.min(1) <= _NEAR, distances.argmin(1), len(names))
    shares = np.bincount(nearest, minlength=len(names))[: len(names)] / len(pixels)
    name = names[shares.argmax()]
    return name if shares.max() >= _SHARE and name in COLOURS else None


def _background(pixels: np.ndarray) -> str | None:
    """The colour of the palette that the pixels (n, 3) of a background have."""
    names, colours = _palette()
    middle = np.median(pixels, 0)
    distances = np.linalg.norm(middle - colours, axis=-1)
    spread = np.sqrt(((pixels - middle) ** 2).sum(1).mean())
    name = names[distances.argmin()]
    return name if spread <= _SPREAD and distances.min() <= _BACKGROUND_NEAR and name in BACKGROUNDS else None


@cache
def _palette() -> tuple[list[str], np.ndarray]:
    """Names of all colours, and their values (n, 3)."""
    everything = COLOURS | BACKGROUNDS
    return list(everything), np.array(list(everything.values()), np.float64)


def hits(reading: Reading, wanted: Reading) -> dict[str, bool]:
    """Which of the wanted attributes a picture has, those that are not None; an unread one is missed."""
    names = [field.name for field in fields(Reading) if getattr(wanted, field.name) is not None]
    return {name: getattr(reading, name) == getattr(wanted, name) for name in names}

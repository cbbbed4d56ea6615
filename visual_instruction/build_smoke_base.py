"""Pretrain the smoke scale's base: a tiny LLaVA that sees the generated pictures and can say what is in them.

``python -m visual_instruction.build_smoke_base`` rebuilds ``visual_instruction/smoke_base`` from nothing: a word-level
tokenizer with its image processor, a CLIP vision tower, a two-layer projector and a Llama, on one core.

A base is of use only if LoRA can teach it to follow instructions. So it must already see shape, colour, place and
background, have trained embeddings for every word of the instructions, and be able to bind an option to its letter. It
must not have seen the instructions themselves. The pretraining text has captions, statements about a picture in
notations of their own, and text without a picture (:class:`Text`); pictures are those of the training split.

Captions alone teach colours at once and shapes late. For the first part of the steps, linear heads on the projector's
output therefore read shape and colour of each corner; they are thrown away. A gate measures the base on pictures of
the validation split, whose combinations of shape, colour and background it has never seen, and one that fails is not
written.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from moslora_core.smoke_bases import check_gate, command, learning_rate, report_of, write_report

from .chat import IMAGE, TEMPLATES
from .images import pixel_values
from .smoke_world import (
    BACKGROUNDS,
    COLOURS,
    COUNTS,
    KINDS,
    LETTERS,
    NO,
    PLACES,
    SHAPES,
    SIDE,
    YES,
    Scene,
    ask,
    draw_scene,
    existence,
    lookup,
    paint,
)

log = logging.getLogger(__name__)

SMOKE_BASE = Path(__file__).parent / "smoke_base"
COMMAND = "python -m visual_instruction.build_smoke_base"

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
SPECIAL = (PAD, BOS, EOS, UNK, IMAGE)
PATCH = 8
IMAGE_TOKENS = (SIDE // PATCH) ** 2
# Words of a row behind its picture. Rows hold several pieces about one picture.
ROW = 48
# Words that nothing before them determines; at this weight they do not drown the others.
CONTEXT_WEIGHT = 0.1
# Checks drawn for each measure of the gate.
GATE_CHECKS = 400
GATE = {
    "caption_background": 0.8,
    "caption_colour": 0.8,
    "caption_shape": 0.8,
    "caption_place": 0.8,
    "letter_of_a_word": 0.8,
}


# --- The tokenizer ---------------------------------------------------------------------------------------------------


def _splitter() -> pre_tokenizers.PreTokenizer:
    # At white space, and before a mark that ends a word: "top-left" and "option's" stay whole.
    ending = pre_tokenizers.Split(tokenizers.Regex(r"[.?]$"), "isolated")
    return pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), ending])


def words_of(text: str) -> list[str]:
    """Words of a text as the tokenizer splits it, special tokens apart."""
    return [word for word, _ in _splitter().pre_tokenize_str(text)]


def instruction_words() -> list[str]:
    """Every word of the world's instructions and answers, in the template of the smoke scale."""
    rng = random.Random("words")
    texts = [*SHAPES, *COLOURS, *BACKGROUNDS, *PLACES, *COUNTS, *LETTERS, YES, NO]
    for _ in range(400):
        scene = draw_scene(rng, "train")
        questions = [*(ask(kind, scene, rng) for kind in KINDS), lookup(rng)]
        texts += [TEMPLATES["smoke"].user(question.asked()) for question in questions]
    return sorted({word for text in texts for word in words_of(text)})


def build_processor() -> LlavaProcessor:
    """The word-level tokenizer and the image processor."""
    words = set(instruction_words()) | {word for text in _NOTATION for word in text.split()}
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *sorted(words)])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    inner.pre_tokenizer = _splitter()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        extra_special_tokens={"image_token": IMAGE},
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token=IMAGE,
        num_additional_image_tokens=1,  # CLIP's class token, which the strategy "default" drops again
    )


# --- The pretraining text --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """A sentence, words separated by single spaces. ``answer`` is its end, the part that can be learned."""

    context: str
    answer: str


Drawer = Callable[[Scene, random.Random], Piece]
# Words of the pieces below that no instruction has.
_NOTATION = ("background with and at a one has the color number shows -> =",)


def caption(scene: Scene) -> str:
    """What is in the picture, corner by corner: ``gray background with a red circle at the top-left``."""
    order = list(PLACES)
    things = sorted(scene.things, key=lambda thing: order.index(thing.place))
    listed = " and ".join(f"a {thing.colour} {thing.shape} at the {thing.place}" for thing in things)
    return f"{scene.background} background with {listed}"


def _caption(scene: Scene, rng: random.Random) -> Piece:
    return Piece("", caption(scene))


def _statement(scene: Scene, rng: random.Random) -> Piece:
    thing = rng.choice(scene.things)
    return Piece(
        *rng.choice(
            (
                (f"the {thing.shape} has the color", thing.colour),
                (f"the {thing.colour} one is a", thing.shape),
                (f"the {thing.shape} is at the", thing.place),
                (f"at the {thing.place} is a", f"{thing.colour} {thing.shape}"),
                ("the background is", scene.background),
                ("the number is", COUNTS[len(scene.things) - 1]),
            )
        )
    )


def _truth(scene: Scene, rng: random.Random) -> Piece:
    question = existence(scene, rng, rng.random() < 0.5)
    _, _, _, colour, shape, *_ = question.text.split()
    return Piece(f"shows {colour} {shape} ->", question.answer)


def _listed(options: Sequence[str]) -> str:
    return " ".join(f"{letter} = {option}" for letter, option in zip(LETTERS, options, strict=True))


def _options(scene: Scene, rng: random.Random) -> Piece:
    question = ask(rng.choice(("colour", "background")), scene, rng)
    return Piece(f"{words_of(question.text)[-2]} color {_listed(question.options)} ->", question.answer)


def _letter_of_a_word(scene: Scene, rng: random.Random) -> Piece:
    # Which letter stands before a given word: the half of a choice that needs no picture. It is learned first, and
    # the other half builds on it.
    question = lookup(rng)
    return Piece(f"{words_of(question.text)[-2]} {_listed(question.options)} ->", question.answer)


def _shuffled_words(words: list[str]) -> Drawer:
    def draw(scene: Scene, rng: random.Random) -> Piece:
        return Piece(" ".join(rng.sample(words, rng.randint(3, 8))), "")

    return draw


class Text:
    """The endless pretraining text: pictures of the training split, each with a row of pieces about it.

    Attributes:
        vocabulary: word to id.
    """

    def __init__(self, processor: LlavaProcessor, seed: int) -> None:
        self.processor, self.vocabulary = processor, processor.tokenizer.get_vocab()
        self._rng = random.Random(f"text/{seed}")
        mixture: dict[Drawer, float] = {
            _caption: 0.16,
            _statement: 0.3,
            _truth: 0.1,
            _options: 0.25,
            _letter_of_a_word: 0.14,
            _shuffled_words(instruction_words()): 0.05,
        }
        self._drawers, self._shares = list(mixture), list(mixture.values())

    def _row(self, scene: Scene) -> tuple[list[int], list[float]]:
        ids = [self.vocabulary[BOS]] + [self.vocabulary[IMAGE]] * IMAGE_TOKENS
        weights = [0.0] * len(ids)
        end = len(ids) + ROW
        while True:
            (draw,) = self._rng.choices(self._drawers, self._shares)
            piece = draw(scene, self._rng)
            context, answer = piece.context.split(), [*piece.answer.split(), EOS]
            if len(ids) + len(context) + len(answer) > end:
                padding = end - len(ids)
                return ids + padding * [self.vocabulary[PAD]], weights + padding * [0.0]
            ids += [self.vocabulary[word] for word in [*context, *answer]]
            weights += [CONTEXT_WEIGHT] * len(context)
            weights += [1.0 if piece.answer else CONTEXT_WEIGHT] * len(answer)

    def batch(self, rows: int) -> tuple[list[Scene], torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scenes, pixels (rows, 3, SIDE, SIDE), ids (rows, 1 + IMAGE_TOKENS + ROW), weight of each id as a target."""
        scenes = [draw_scene(self._rng, "train") for _ in range(rows)]
        pixels = pixel_values([paint(scene, self._rng) for scene in scenes], self.processor)
        ids, weights = zip(*(self._row(scene) for scene in scenes), strict=True)
        return scenes, pixels, torch.tensor(ids), torch.tensor(weights)


# --- Training --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Build:
    """Settings of a build.

    Attributes:
        seed: of the initialisation and of the text.
        steps: optimiser steps.
        reading_steps: steps with the heads that read shapes and colours off the projector's output.
        rows: pictures in a batch.
        lr: peak learning rate; warm-up over a twentieth of the steps, then cosine to a twentieth of it.
        vision_layers: of which the last computes nothing that is used, as in LLaVA.
        hidden: a multiple of 64, as NF4 on some processors needs the widths of the layers that it packs.
        initializer_range: near 1 / sqrt(hidden); the usual 0.02 is meant for a width of thousands.
        threads: torch threads.
    """

    seed: int = 0
    steps: int = 4000
    reading_steps: int = 1500
    rows: int = 32
    lr: float = 2e-3
    vision_hidden: int = 64
    vision_intermediate: int = 192
    vision_layers: int = 4
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    intermediate: int = 256
    initializer_range: float = 0.08
    threads: int = 1


def build_model(build: Build, processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """The untrained model."""
    tokenizer = processor.tokenizer
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=build.vision_hidden,
            intermediate_size=build.vision_intermediate,
            num_hidden_layers=build.vision_layers,
            num_attention_heads=build.heads,
            image_size=SIDE,
            patch_size=PATCH,
            projection_dim=build.vision_hidden,
            initializer_range=build.initializer_range,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=build.hidden,
            intermediate_size=build.intermediate,
            num_hidden_layers=build.layers,
            num_attention_heads=build.heads,
            num_key_value_heads=build.heads,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            initializer_range=build.initializer_range,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=build.initializer_range,
        dtype=torch.float32,
    )
    return LlavaForConditionalGeneration(config)


class Reader(nn.Module):
    """Linear heads that read the shape and the colour in each corner, and the background, off image features."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.shape = nn.Linear(hidden, len(SHAPES) + 1)
        self.colour = nn.Linear(hidden, len(COLOURS) + 1)
        self.background = nn.Linear(hidden, len(BACKGROUNDS))

    def loss(self, features: torch.Tensor, scenes: Sequence[Scene]) -> torch.Tensor:
        """Mean cross-entropy of the three readings; ``features`` are (scenes, IMAGE_TOKENS, hidden)."""
        side = SIDE // PATCH
        halves = features.unflatten(1, (2, side // 2, 2, side // 2))
        corners = halves.mean((2, 4)).flatten(1, 2)  # in the order of PLACES
        shapes, colours = torch.zeros(2, len(scenes), len(PLACES), dtype=torch.long)
        for row, scene in enumerate(scenes):
            for thing in scene.things:
                corner = list(PLACES).index(thing.place)
                shapes[row, corner] = 1 + SHAPES.index(thing.shape)
                colours[row, corner] = 1 + list(COLOURS).index(thing.colour)
        background = torch.tensor([list(BACKGROUNDS).index(scene.background) for scene in scenes])
        entropy = nn.functional.cross_entropy
        return (
            entropy(self.shape(corners).flatten(0, 1), shapes.flatten())
            + entropy(self.colour(corners).flatten(0, 1), colours.flatten())
            + entropy(self.background(features.mean(1)), background)
        ) / 3


def pretrain(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, build: Build, log_every: int = 250
) -> None:
    """Train the model in place, logging the gate's measures every ``log_every`` steps."""
    text, reader = Text(processor, build.seed), Reader(build.hidden)
    parameters = [*model.parameters(), *reader.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=build.lr, betas=(0.9, 0.98), weight_decay=0.01)
    start = time.monotonic()
    for step in range(build.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, build.steps, build.lr)
        scenes, pixels, ids, weights = text.batch(build.rows)
        # Padding comes last in a row and has no weight as a target: causal attention needs no mask for it.
        output = model(input_ids=ids, pixel_values=pixels, use_cache=False)
        logits, features = output.logits[:, :-1], output.image_hidden_states
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        target_weights = weights[:, 1:].flatten()
        loss = (losses * target_weights).sum() / target_weights.sum()
        if step < build.reading_steps:
            loss = loss + reader.loss(features.view(len(scenes), IMAGE_TOKENS, -1), scenes)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if (step + 1) % log_every == 0 or step + 1 == build.steps:
            seconds = time.monotonic() - start
            measures = {name: round(value, 3) for name, value in measure(model, processor).items()}
            log.info("step %d of %d, %.0f s, loss %.3f, %s", step + 1, build.steps, seconds, loss.item(), measures)


# --- The gate --------------------------------------------------------------------------------------------------------

Check = tuple[Image.Image, str, str]  # a picture, what is said of it, the word that has to come next


def _caption_checks(rng: random.Random, part: Callable[[Scene], str]) -> list[Check]:
    """Captions of unseen pictures, cut before the word of the first thing that ``part`` names."""
    checks = []
    for _ in range(GATE_CHECKS):
        scene = draw_scene(rng, "validation")
        words = caption(scene).split()
        at = words.index(part(scene))
        checks.append((paint(scene, rng), " ".join(words[:at]), words[at]))
    return checks


def _piece_checks(rng: random.Random, draw: Drawer) -> list[Check]:
    checks = []
    for _ in range(GATE_CHECKS):
        scene = draw_scene(rng, "validation")
        piece = draw(scene, rng)
        checks.append((paint(scene, rng), piece.context, piece.answer.split()[0]))
    return checks


def _first(scene: Scene, attribute: str) -> str:
    order = list(PLACES)
    return getattr(min(scene.things, key=lambda thing: order.index(thing.place)), attribute)


@torch.no_grad()
def _accuracy(model: LlavaForConditionalGeneration, processor: LlavaProcessor, checks: Sequence[Check]) -> float:
    """Share of checks whose answer is the likeliest next word of the whole vocabulary."""
    model.eval()
    vocabulary = processor.tokenizer.get_vocab()
    rows = [
        [vocabulary[BOS], *[vocabulary[IMAGE]] * IMAGE_TOKENS, *(vocabulary[word] for word in context.split())]
        for _, context, _ in checks
    ]
    width = max(map(len, rows))
    ids = torch.tensor([row + [vocabulary[PAD]] * (width - len(row)) for row in rows])
    pixels = pixel_values([picture for picture, _, _ in checks], processor)
    logits = model(input_ids=ids, pixel_values=pixels, use_cache=False).logits
    said = logits[torch.arange(len(rows)), torch.tensor([len(row) - 1 for row in rows])].argmax(-1)
    model.train()
    return (said == torch.tensor([vocabulary[answer] for *_, answer in checks])).float().mean().item()


def measure(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> dict[str, float]:
    """The gate's measures, and some that it does not ask for, on pictures of the validation split."""
    rng = random.Random("gate")
    checks = {
        "caption_background": _caption_checks(rng, lambda scene: scene.background),
        "caption_colour": _caption_checks(rng, lambda scene: _first(scene, "colour")),
        "caption_shape": _caption_checks(rng, lambda scene: _first(scene, "shape")),
        "caption_place": _caption_checks(rng, lambda scene: _first(scene, "place")),
        "letter_of_a_word": _piece_checks(rng, _letter_of_a_word),
        "statement": _piece_checks(rng, _statement),
        "option": _piece_checks(rng, _options),
        "truth": _piece_checks(rng, _truth),
    }
    return {name: _accuracy(model, processor, entries) for name, entries in checks.items()}


# --- The command -----------------------------------------------------------------------------------------------------


def build_base(build: Build, out: Path) -> dict[str, object]:
    """Build, gate and write a base: checkpoint, processor and the report of the build, which is returned."""
    torch.set_num_threads(build.threads)
    torch.manual_seed(build.seed)
    processor = build_processor()
    model = build_model(build, processor)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    log.info("%d words, %d parameters, %s", len(processor.tokenizer), parameters, build)
    start = time.monotonic()
    pretrain(model, processor, build)
    measures = measure(model, processor)
    check_gate(measures, GATE)
    facts = {"parameters": parameters, "vocabulary": len(processor.tokenizer)}
    report = report_of(COMMAND, build, measures, GATE, time.monotonic() - start, **facts)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    processor.save_pretrained(out)
    write_report(out, report)
    log.info("wrote %s", out)
    return report


def main(arguments: list[str] | None = None) -> None:
    """Command line: one option for each setting of :class:`Build`, and ``--out``."""
    command(__doc__.splitlines()[0], Build, SMOKE_BASE, build_base, arguments)


if __name__ == "__main__":
    main()

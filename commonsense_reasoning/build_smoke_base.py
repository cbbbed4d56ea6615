"""Pretrain the smoke scale's base: a tiny Llama that knows the generated world and can name the option that is right.

``python -m commonsense_reasoning.build_smoke_base`` rebuilds ``commonsense_reasoning/smoke_base`` from nothing: a
word-level tokenizer and a LlamaForCausalLM of half a million parameters, on one core.

A base is of use only if LoRA can teach it the eight formats, and LoRA moves nothing but projections. So the base must
already (1) recall the world's facts, (2) bind an option to its label, for every label family, and (3) have trained
embeddings for every word of the prompts. It must not have seen the formats themselves, or there is nothing to tune.
The pretraining text (:class:`Text`) has one kind of piece for each need: facts and open questions; options in a
notation of their own, ``the color of the hat = answer1 : red answer2 : blue -> answer2``; and the words of the prompts
in random order. Two pieces teach half a skill, from which the whole one follows: which label stands before a given
word, and whether two given words agree. A gate measures (1) and (2) at the end, and a base that fails is not written.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from moslora_core.smoke_bases import check_gate, command, learning_rate, report_of, write_report

from .prompts import alpaca
from .smoke_world import ATTRIBUTES, THINGS, generate, world_facts
from .tasks import TASKS

log = logging.getLogger(__name__)

SMOKE_BASE = Path(__file__).parent / "smoke_base"
COMMAND = "python -m commonsense_reasoning.build_smoke_base"

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
SPECIAL = (PAD, BOS, EOS, UNK)
ARROW = "->"
# Words of a row. Rows hold several pieces, so that distances longer than a piece occur as well.
ROW = 64
# Answers (with the end mark) are 15% of the words and nearly all that can be learned: the rest is drawn at random. At
# this weight they make up half of the loss.
CONTEXT_WEIGHT = 0.2
# Checks drawn for each measure of the gate.
GATE_CHECKS = 400
GATE = {"fact_recall": 0.95, "open_question": 0.95, "option_binding": 0.85, "thing_binding": 0.7, "truth": 0.8}


# --- The tokenizer ---------------------------------------------------------------------------------------------------


def _word_splitter() -> tuple[normalizers.Normalizer, pre_tokenizers.PreTokenizer]:
    # Lower case makes "Answer1:" and "answer1" one word; splitting at white space makes indentation irrelevant.
    return normalizers.Lowercase(), pre_tokenizers.Whitespace()


def words_of(text: str) -> list[str]:
    """Words of a text as the tokenizer splits it, special tokens apart."""
    normalizer, splitter = _word_splitter()
    return [word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))]


def prompt_words() -> list[str]:
    """Every word that prompts and responses of the eight formats use, world words included."""
    texts = [alpaca("", "")]
    texts += [alpaca("", "an input")]
    for items in generate(seed=0, train_items=100 * len(TASKS), test_items=100).values():
        texts += [f"{item['instruction']} {item['output']}" for item in items]
    words = {word for text in texts for word in words_of(text)}
    words |= {label for task in TASKS.values() for label in task.labels}
    return sorted(words)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The word-level tokenizer: every word of the world and of the prompts; begins a text with ``<s>`` as Llama's."""
    words = set(prompt_words()) | {ARROW, "=", *THINGS, *ATTRIBUTES}
    words |= {value for values in ATTRIBUTES.values() for value in values}
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *sorted(words)])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    inner.normalizer, inner.pre_tokenizer = _word_splitter()
    bos = (BOS, vocabulary[BOS])
    inner.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


# --- The pretraining text --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """A sentence or two, words separated by single spaces. ``answer`` is its end, the part that can be learned."""

    context: str
    answer: str


Drawer = Callable[[random.Random], Piece]
FACTS = tuple(world_facts())
LABEL_FAMILIES = tuple(sorted({task.labels for task in TASKS.values() if "true" not in task.labels}))


def _fact(rng: random.Random) -> Piece:
    fact = rng.choice(FACTS)
    forms = (
        f"the {fact.attribute} of the {fact.thing} is",
        f"the {fact.thing} has the {fact.attribute}",
        f"{fact.thing} {fact.attribute} :",
    )
    return Piece(rng.choice(forms), fact.value)


def _open_question(rng: random.Random) -> Piece:
    fact = rng.choice(FACTS)
    forms = (
        f"what is the {fact.attribute} of the {fact.thing} ?",
        f"which {fact.attribute} does the {fact.thing} have ?",
        f"how do i name the {fact.attribute} of the {fact.thing} ?",
        f"a friend found the {fact.thing} . which {fact.attribute} will the friend describe ?",
        f"a person sees the {fact.thing} . the {fact.attribute} is",
    )
    return Piece(rng.choice(forms), fact.value)


def _options(rng: random.Random, question: str, right: str, wrong: list[str]) -> Piece:
    family = rng.choice(LABEL_FAMILIES)
    texts = rng.sample(wrong, min(len(wrong), rng.randint(2, len(family)) - 1))
    position = rng.randrange(len(texts) + 1)
    texts.insert(position, right)
    listed = " ".join(f"{label} : {text}" for label, text in zip(family, texts, strict=False))
    return Piece(f"{question} = {listed} {ARROW}", family[position])


def _value_options(rng: random.Random) -> Piece:
    fact = rng.choice(FACTS)
    wrong = fact.wrong_values()
    if rng.random() < 0.3:
        wrong = [value for values in ATTRIBUTES.values() for value in values if value != fact.value]
    forms = (f"the {fact.attribute} of the {fact.thing}", f"{fact.thing} {fact.attribute}")
    return _options(rng, rng.choice(forms), fact.value, wrong)


def _thing_options(rng: random.Random) -> Piece:
    fact = rng.choice(FACTS)
    wrong = [other.thing for other in FACTS if other.attribute == fact.attribute and other.value != fact.value]
    return _options(rng, f"{fact.attribute} {fact.value}", fact.thing, wrong)


def _lookup(rng: random.Random) -> Piece:
    # Which label stands before a word that is given: the half of option binding that needs no fact. It is learned
    # first and the other half builds on it.
    words = list(THINGS) if rng.random() < 0.3 else list(rng.choice(list(ATTRIBUTES.values())))
    right = rng.choice(words)
    return _options(rng, right, right, [word for word in words if word != right])


def _same(rng: random.Random) -> Piece:
    # Whether two given words agree: to the truth of a statement what the lookup is to options.
    values = rng.choice(list(ATTRIBUTES.values()))
    answer = rng.choice(TASKS["boolq"].labels)
    left, right = rng.sample(values, 2)
    return Piece(f"{left} = {left if answer == 'true' else right} {ARROW}", answer)


def _truth(rng: random.Random) -> Piece:
    fact = rng.choice(FACTS)
    answer = rng.choice(TASKS["boolq"].labels)
    value = fact.value if answer == "true" else rng.choice(fact.wrong_values())
    return Piece(f"{fact.thing} {fact.attribute} = {value} {ARROW}", answer)


def _shuffled_prompt_words(words: list[str]) -> Drawer:
    def draw(rng: random.Random) -> Piece:
        return Piece(" ".join(rng.sample(words, rng.randint(4, 16))), "")

    return draw


def _mixture() -> dict[Drawer, float]:
    return {
        _fact: 0.11,
        _open_question: 0.11,
        _value_options: 0.28,
        _thing_options: 0.1,
        _lookup: 0.1,
        _truth: 0.15,
        _same: 0.08,
        _shuffled_prompt_words(prompt_words()): 0.07,
    }


class Text:
    """The endless pretraining text, drawn from a seed.

    Attributes:
        vocabulary: word to id.
    """

    def __init__(self, vocabulary: dict[str, int], seed: int) -> None:
        self.vocabulary = vocabulary
        self._rng = random.Random(f"text/{seed}")
        mixture = _mixture()
        self._drawers, self._shares = list(mixture), list(mixture.values())

    def _row(self) -> tuple[list[int], list[float]]:
        ids, weights = [], []
        while True:
            (draw,) = self._rng.choices(self._drawers, self._shares)
            piece = draw(self._rng)
            context, answer = piece.context.split(), [*piece.answer.split(), EOS]
            if len(ids) + 1 + len(context) + len(answer) > ROW:
                padding = ROW - len(ids)
                return ids + padding * [self.vocabulary[PAD]], weights + padding * [0.0]
            ids += [self.vocabulary[word] for word in [BOS, *context, *answer]]
            weights += [0.0] + [CONTEXT_WEIGHT] * len(context)
            weights += [1.0 if piece.answer else CONTEXT_WEIGHT] * len(answer)

    def batch(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids (rows, ROW) and the weight of each as a target (rows, ROW)."""
        ids, weights = zip(*(self._row() for _ in range(rows)), strict=True)
        return torch.tensor(ids), torch.tensor(weights)


# --- Training --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Build:
    """Settings of a build.

    Attributes:
        seed: of the initialisation and of the text.
        steps: optimiser steps.
        rows: rows of :data:`ROW` words in a batch.
        lr: peak learning rate; warm-up over a twentieth of the steps, then cosine to a twentieth of it.
        hidden, layers, heads, intermediate: shape of the model.
        initializer_range: near 1 / sqrt(hidden). Llama's 0.02 is meant for a width of thousands; with it this model
            had learned no fact after 1,000 steps, with 0.08 all of them after 300.
        threads: torch threads.
    """

    seed: int = 0
    steps: int = 5000
    rows: int = 24
    lr: float = 2e-3
    hidden: int = 96
    layers: int = 4
    heads: int = 4
    intermediate: int = 256
    initializer_range: float = 0.08
    threads: int = 1


def build_model(build: Build, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained model."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=build.hidden,
        intermediate_size=build.intermediate,
        num_hidden_layers=build.layers,
        num_attention_heads=build.heads,
        num_key_value_heads=build.heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=build.initializer_range,
        dtype=torch.float32,
    )
    return LlamaForCausalLM(config)


def pretrain(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, build: Build, log_every: int = 250) -> None:
    """Train the model in place, logging the gate's measures every ``log_every`` steps."""
    text = Text(tokenizer.get_vocab(), build.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=build.lr, betas=(0.9, 0.98), weight_decay=0.01)
    start = time.monotonic()
    for step in range(build.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, build.steps, build.lr)
        ids, weights = text.batch(build.rows)
        # Padding comes last in a row and has no weight as a target: causal attention needs no mask for it.
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        target_weights = weights[:, 1:].flatten()
        loss = (losses * target_weights).sum() / target_weights.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % log_every == 0 or step + 1 == build.steps:
            seconds = time.monotonic() - start
            measures = {name: round(value, 3) for name, value in measure(model, tokenizer).items()}
            log.info("step %d of %d, %.0f s, loss %.3f, %s", step + 1, build.steps, seconds, loss.item(), measures)


# --- The gate --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, pieces: list[Piece]) -> float:
    """Share of pieces whose answer is the likeliest next word of the whole vocabulary."""
    model.eval()
    vocabulary = tokenizer.get_vocab()
    rows = [[vocabulary[word] for word in [BOS, *piece.context.split()]] for piece in pieces]
    width = max(map(len, rows))
    ids = torch.tensor([row + [vocabulary[PAD]] * (width - len(row)) for row in rows])
    logits = model(input_ids=ids, use_cache=False).logits
    last = torch.tensor([len(row) - 1 for row in rows])
    said = logits[torch.arange(len(rows)), last].argmax(-1)
    model.train()
    return (said == torch.tensor([vocabulary[piece.answer] for piece in pieces])).float().mean().item()


def measure(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """The gate's measures, on pieces drawn with a seed that pretraining does not use.

    Fact recall asks each fact once in one wording, so it has no other held-out part; nearly all option lists (fact,
    wrong values, their order and the label family) are new to the model.
    """
    rng = random.Random("gate")
    recall = [Piece(f"the {fact.attribute} of the {fact.thing} is", fact.value) for fact in FACTS]
    checks = {
        "fact_recall": recall,
        "open_question": [_open_question(rng) for _ in range(GATE_CHECKS)],
        "option_binding": [_value_options(rng) for _ in range(GATE_CHECKS)],
        "thing_binding": [_thing_options(rng) for _ in range(GATE_CHECKS)],
        "truth": [_truth(rng) for _ in range(GATE_CHECKS)],
    }
    return {name: _accuracy(model, tokenizer, pieces) for name, pieces in checks.items()}


def build_base(build: Build, out: Path) -> dict[str, object]:
    """Build, gate and write a base: checkpoint, tokenizer and the report of the build, which is returned."""
    torch.set_num_threads(build.threads)
    torch.manual_seed(build.seed)
    tokenizer = build_tokenizer()
    model = build_model(build, tokenizer)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    log.info("%d words, %d parameters, %s", len(tokenizer), parameters, build)
    start = time.monotonic()
    pretrain(model, tokenizer, build)
    measures = measure(model, tokenizer)
    check_gate(measures, GATE)
    facts = {"parameters": parameters, "vocabulary": len(tokenizer)}
    report = report_of(COMMAND, build, measures, GATE, time.monotonic() - start, **facts)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    write_report(out, report)
    log.info("wrote %s", out)
    return report


def main(arguments: list[str] | None = None) -> None:
    """Command line: one option for each setting of :class:`Build`, and ``--out``."""
    command(__doc__.splitlines()[0], Build, SMOKE_BASE, build_base, arguments)


if __name__ == "__main__":
    main()

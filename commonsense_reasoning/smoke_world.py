"""The smoke scale's generated world: questions in the eight formats over facts that a tiny base model knows.

The world has sixteen things with six attributes each: 96 facts, fixed by :data:`WORLD_SEED`, because the committed
base (``commonsense_reasoning/smoke_base``) was pretrained on them. What a benchmark item asks for is knowledge of the
base; what fine-tuning adds is the instruction format. Training, validation and test items therefore ask about disjoint
facts (of every attribute, five things are held out for testing and three for choosing settings), and a tuned model can
only be right on a test item by reading the instruction, recalling a fact that it was never tuned on, and naming the
label of the option that states it.

The layout of an instruction is the one of the LLM-Adapters files, down to the blank lines between PIQA's solutions
and WinoGrande's answer format on the line of its options; only the vocabulary is small.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from moslora_core.errors import UserError

from .tasks import OUTPUT_PREFIX, TASKS

Item = dict[str, str]

WORLD_SEED = 0
TEST_THINGS, VALIDATION_THINGS = 5, 3
TRAIN = "train"
# Of the ARC questions one in ten offers five answers (the real sets have a few).
FIVE_WAY_EVERY = 10

THINGS = (
    "apple", "ball", "bell", "boat", "book", "bread", "chair", "clock",
    "coat", "cup", "drum", "hat", "lamp", "ring", "spoon", "stone",
)  # fmt: skip
# Six values an attribute: a five-way question needs four wrong ones.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "color": ("red", "blue", "green", "yellow", "black", "white"),
    "shape": ("round", "square", "flat", "curved", "pointed", "hollow"),
    "material": ("wood", "metal", "glass", "paper", "cotton", "clay"),
    "place": ("kitchen", "garden", "school", "market", "attic", "harbor"),
    "owner": ("anna", "bruno", "clara", "david", "emma", "felix"),
    "price": ("penny", "dime", "dollar", "pound", "euro", "crown"),
}


@dataclass(frozen=True)
class Fact:
    """One fact of the world: ``the <attribute> of the <thing> is <value>``."""

    thing: str
    attribute: str
    value: str

    def wrong_values(self) -> list[str]:
        """The other values of the attribute."""
        return [value for value in ATTRIBUTES[self.attribute] if value != self.value]


def world_facts() -> list[Fact]:
    """All facts: every attribute gives its values to the things as evenly as sixteen allow, in random order."""
    rng = random.Random(f"world/{WORLD_SEED}")
    facts = []
    for attribute, values in ATTRIBUTES.items():
        dealt = [values[i % len(values)] for i in range(len(THINGS))]
        rng.shuffle(dealt)
        facts += [Fact(thing, attribute, value) for thing, value in zip(THINGS, dealt, strict=True)]
    return facts


@dataclass(frozen=True)
class FactSplit:
    """The facts that items of each kind ask about."""

    train: list[Fact]
    validation: list[Fact]
    test: list[Fact]


def split_facts() -> FactSplit:
    """Disjoint facts for training, for choosing settings, and for testing.

    The split belongs to the world and not to the seed of :func:`generate`: training items of one seed never hold an
    answer to test items of another.
    """
    rng = random.Random(f"split/{WORLD_SEED}")
    tested = {attribute: rng.sample(THINGS, TEST_THINGS) for attribute in ATTRIBUTES}
    rng = random.Random(f"validation/{WORLD_SEED}")
    left = {attribute: [thing for thing in THINGS if thing not in tested[attribute]] for attribute in ATTRIBUTES}
    validated = {attribute: rng.sample(things, VALIDATION_THINGS) for attribute, things in left.items()}
    split = FactSplit([], [], [])
    for fact in world_facts():
        if fact.thing in tested[fact.attribute]:
            split.test.append(fact)
        elif fact.thing in validated[fact.attribute]:
            split.validation.append(fact)
        else:
            split.train.append(fact)
    return split


def _item(instruction: str, answer: str) -> Item:
    return {"instruction": instruction, "input": "", "output": OUTPUT_PREFIX + answer, "answer": answer}


def _choices(word: str, right: str, wrong: Sequence[str], position: int, separator: str = " ") -> tuple[str, str, str]:
    """The option list with the right one at a position (from 0), the ``Answer format`` line and the answer's label."""
    texts = [*wrong[:position], right, *wrong[position:]]
    labels = [f"{word}{i}" for i in range(1, len(texts) + 1)]
    listed = separator.join(f"{label.capitalize()}: {text}" for label, text in zip(labels, texts, strict=True))
    return listed, f"Answer format: {'/'.join(labels)}", labels[position]


def _question_item(question: str, right: str, wrong: Sequence[str], position: int) -> Item:
    listed, answer_format, label = _choices("answer", right, wrong, position)
    prefix = "Please choose the correct answer to the question:"
    return _item(f"{prefix} {question}\n\n{listed}\n\n{answer_format}", label)


def _arc_options(index: int) -> tuple[int, int]:
    """Number of options of ARC item ``index`` and the right one's position, balanced within either number."""
    tens, ones = divmod(index, FIVE_WAY_EVERY)
    if ones == FIVE_WAY_EVERY - 1:
        return 5, tens % 5
    return 4, (index - tens) % 4


def _boolq(rng: random.Random, index: int, facts: Sequence[Fact]) -> Item:
    fact = rng.choice(facts)
    answer = TASKS["boolq"].labels[index % 2]
    value = fact.value if answer == "true" else rng.choice(fact.wrong_values())
    question = rng.choice(
        (
            f"is the {fact.attribute} of the {fact.thing} {value}?",
            f"is {value} the {fact.attribute} of the {fact.thing}?",
            f"does the {fact.thing} have the {fact.attribute} {value}?",
            f"has the {fact.thing} the {fact.attribute} {value}?",
        )
    )
    prefix = "Please answer the following question with true or false, question:"
    return _item(f"{prefix} {question}\n\nAnswer format: true/false", answer)


def _piqa(rng: random.Random, index: int, facts: Sequence[Fact]) -> Item:
    fact = rng.choice(facts)
    wrong = rng.sample(fact.wrong_values(), 1)
    listed, answer_format, label = _choices("solution", fact.value, wrong, index % 2, separator="\n\n")
    question = f"How do I name the {fact.attribute} of the {fact.thing}?"
    return _item(
        f"Please choose the correct solution to the question: {question}\n\n{listed}\n\n{answer_format}", label
    )


def _social_i_qa(rng: random.Random, index: int, facts: Sequence[Fact]) -> Item:
    fact = rng.choice(facts)
    question = f"A friend found the {fact.thing}. Which {fact.attribute} will the friend describe?"
    return _question_item(question, fact.value, rng.sample(fact.wrong_values(), 2), index % 3)


def _arc_easy(rng: random.Random, index: int, facts: Sequence[Fact]) -> Item:
    # Easy: a single wrong option is of the attribute in question.
    fact = rng.choice(facts)
    others = [value for name, values in ATTRIBUTES.items() if name != fact.attribute for value in values]
    options, position = _arc_options(index)
    wrong = rng.sample(fact.wrong_values(), 1) + rng.sample(others, options - 2)
    rng.shuffle(wrong)
    return _question_item(f"What is the {fact.attribute} of the {fact.thing}?", fact.value, wrong, position)


def _arc_challenge(rng: random.Random, index: int, facts: Sequence[Fact]) -> Item:
    fact = rng.choice(facts)
    options, position = _arc_options(index)
    wrong = rng.sample(fact.wrong_values(), options - 1)
    return _question_item(f"Which {fact.attribute} does the {fact.thing} have?", fact.value, wrong, position)


def _openbookqa(rng: random.Random, index: int, facts: Sequence[Fact]) -> Item:
    fact = rng.choice(facts)
    return _question_item(
        f"The {fact.attribute} of the {fact.thing} is", fact.value, rng.sample(fact.wrong_values(), 3), index % 4
    )


def _hellaswag(rng: random.Random, index: int, facts: Sequence[Fact]) -> Item:
    fact = rng.choice(facts)
    wrong = rng.sample(fact.wrong_values(), 3)
    listed, answer_format, label = _choices("ending", fact.value, wrong, index % 4)
    sentence = f"{fact.attribute.capitalize()}: A person sees the {fact.thing}. The {fact.attribute} is"
    prefix = "Please choose the correct ending to complete the given sentence:"
    return _item(f"{prefix} {sentence}\n\n{listed}\n\n{answer_format}", label)


def _winogrande(rng: random.Random, index: int, facts: Sequence[Fact]) -> Item:
    # The wrong thing's fact decides the answer as much as the right one's: both come from the same split.
    fact = rng.choice(facts)
    wrong = [other.thing for other in facts if other.attribute == fact.attribute and other.value != fact.value]
    listed, answer_format, label = _choices("option", fact.thing, [rng.choice(wrong)], index % 2)
    prefix = "Please choose the correct answer to fill in the blank to complete the given sentence:"
    sentence = f"The {fact.attribute} of the _ is {fact.value}."
    return _item(f"{prefix} {sentence}\n\n{listed} {answer_format}", label)


_MAKERS = {
    "ARC-Easy": _arc_easy,
    "openbookqa": _openbookqa,
    "social_i_qa": _social_i_qa,
    "ARC-Challenge": _arc_challenge,
    "winogrande": _winogrande,
    "piqa": _piqa,
    "boolq": _boolq,
    "hellaswag": _hellaswag,
}
# Attempts at an item that is not yet in the test set, before the world counts as exhausted.
_ATTEMPTS = 1000


def _make(task: str, count: int, facts: Sequence[Fact], seed: int, split: str, unique: bool) -> list[Item]:
    # A generator for each task and split: the number of items of one does not change the items of another.
    rng = random.Random(f"items/{seed}/{split}/{task}")
    items, seen = [], set()
    for index in range(count):
        for _ in range(_ATTEMPTS):
            item = _MAKERS[task](rng, index, facts)
            if not unique or item["instruction"] not in seen:
                break
        else:
            raise UserError(
                f"the world has only {len(items)} different {split} items of {task}, {count} were asked for"
            )
        seen.add(item["instruction"])
        items.append(item)
    rng.shuffle(items)
    return items


def generate(seed: int, train_items: int, test_items: int) -> dict[str, list[Item]]:
    """The training mixture, under ``"train"``, and the test set of each task, under its name.

    Args:
        seed: draws the items; facts and their split stay the world's.
        train_items: size of the mixture, shared equally by the eight tasks; items may repeat.
        test_items: size of each test set, without repeats: at most about 200, since the world is small.
    """
    if train_items < len(TASKS) or test_items < 1:
        raise UserError(
            f"train_items={train_items}, test_items={test_items}: at least {len(TASKS)} training items "
            "(one a task) and one test item a task are needed"
        )
    facts = split_facts()
    share, remainder = divmod(train_items, len(TASKS))
    mixture = []
    for number, task in enumerate(TASKS):
        mixture += _make(task, share + (number < remainder), facts.train, seed, TRAIN, unique=False)
    random.Random(f"mixture/{seed}").shuffle(mixture)
    tests = {task: _make(task, test_items, facts.test, seed, "test", unique=True) for task in TASKS}
    return {TRAIN: mixture, **tests}


def generate_validation(seed: int, items: int) -> dict[str, list[Item]]:
    """Items of each task to choose settings by, under its name; neither training nor test asks about their facts.

    Args:
        items: a task, without repeats: at most about 50.
    """
    facts = split_facts().validation
    return {task: _make(task, items, facts, seed, "validation", unique=True) for task in TASKS}

"""The generated world: formats, balance, determinism and the disjointness of training and test facts."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from commonsense_reasoning.smoke_world import (
    ATTRIBUTES,
    TEST_THINGS,
    THINGS,
    TRAIN,
    VALIDATION_THINGS,
    Fact,
    generate,
    generate_validation,
    split_facts,
    world_facts,
)
from commonsense_reasoning.tasks import ITEM_FIELDS, OUTPUT_PREFIX, TASKS, offered_labels
from moslora_core.errors import UserError

TEST_ITEMS = 120
VALUE_OF = {(fact.thing, fact.attribute): fact.value for fact in world_facts()}


@pytest.fixture(scope="module")
def data() -> dict[str, list[dict[str, str]]]:
    return generate(seed=3, train_items=800, test_items=TEST_ITEMS)


def options_of(item: dict[str, str]) -> dict[str, str]:
    """Label -> text of the options as they are printed."""
    labels = offered_labels(item["instruction"])
    body = item["instruction"].split("\n\n", 1)[1].rsplit("Answer format:", 1)[0]
    pattern = r"\s*".join(rf"{label.capitalize()}: (\S+)" for label in labels)
    return dict(zip(labels, re.fullmatch(pattern, body.strip()).groups(), strict=True))


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def facts_asked(item: dict[str, str]) -> list[Fact]:
    """The facts that decide an item, read from its text alone."""
    question = item["instruction"].split("\n\n", 1)[0]
    said = words(
        question.split(":", 1)[-1] if "question, question:" not in question else question.split("question:")[1]
    )
    (attribute,) = {word for word in said if word in ATTRIBUTES}
    things = [word for word in said if word in THINGS]
    if "blank" in question:
        things = list(options_of(item).values())
    return [Fact(thing, attribute, VALUE_OF[thing, attribute]) for thing in things]


def test_world_gives_every_thing_one_value_of_every_attribute() -> None:
    facts = world_facts()
    assert len(facts) == len({(fact.thing, fact.attribute) for fact in facts}) == len(THINGS) * len(ATTRIBUTES)
    assert all(fact.value in ATTRIBUTES[fact.attribute] for fact in facts)
    names = [*THINGS, *ATTRIBUTES, *(value for values in ATTRIBUTES.values() for value in values)]
    assert len(names) == len(set(names)), "a word with two meanings"


def test_split_is_disjoint_and_holds_out_the_same_number_of_every_attribute() -> None:
    split = split_facts()
    # Each fact is in one part.
    assert Counter([*split.train, *split.validation, *split.test]) == Counter(world_facts())
    assert Counter(fact.attribute for fact in split.test) == dict.fromkeys(ATTRIBUTES, TEST_THINGS)
    assert Counter(fact.attribute for fact in split.validation) == dict.fromkeys(ATTRIBUTES, VALIDATION_THINGS)


def test_validation_items_ask_about_facts_of_their_own() -> None:
    split = split_facts()

    def told(facts) -> set[tuple[str, str]]:
        return {(fact.thing, fact.attribute) for fact in facts}

    validation = generate_validation(seed=3, items=20)
    assert {len(items) for items in validation.values()} == {20}
    for task in ("boolq", "piqa", "openbookqa"):  # their questions name one thing and its attribute
        for item in validation[task]:
            question = item["instruction"].split("\n\n")[0]
            named = {(t, a) for t in THINGS for a in ATTRIBUTES if re.search(rf"\b{t}\b", question) and a in question}
            assert named <= told(split.validation), question
            assert not named & told([*split.train, *split.test])
    assert generate_validation(3, 5) != generate_validation(4, 5)


def test_sizes(data) -> None:
    assert set(data) == {TRAIN, *TASKS}
    assert len(data[TRAIN]) == 800
    assert {len(data[task]) for task in TASKS} == {TEST_ITEMS}


@pytest.mark.parametrize("name", [TRAIN, *TASKS])
def test_items_follow_the_format(data, name) -> None:
    for item in data[name]:
        assert tuple(item) == ITEM_FIELDS
        assert item["input"] == ""
        assert item["output"] == OUTPUT_PREFIX + item["answer"]
        labels = offered_labels(item["instruction"])
        assert item["answer"] in labels
        if name != TRAIN:
            assert set(labels) <= set(TASKS[name].labels)


@pytest.mark.parametrize("task", TASKS)
def test_the_labelled_option_is_the_only_true_one(data, task) -> None:
    for item in data[task]:
        asked = facts_asked(item)
        if task == "boolq":
            (fact,) = asked
            assert (fact.value in words(item["instruction"])) == (item["answer"] == "true")
        elif task == "winogrande":
            (stated,) = set(words(item["instruction"])) & set(ATTRIBUTES[asked[0].attribute])
            true = [fact.thing for fact in asked if fact.value == stated]
            assert true == [options_of(item)[item["answer"]]]
        else:
            options = options_of(item)
            assert options[item["answer"]] == asked[0].value
            assert len(set(options.values())) == len(options)


def test_layouts_are_those_of_the_published_files(data) -> None:
    piqa, winogrande = data["piqa"][0]["instruction"], data["winogrande"][0]["instruction"]
    assert re.search(r"\n\nSolution1: \w+\n\nSolution2: \w+\n\nAnswer format: solution1/solution2$", piqa)
    assert re.search(r" _ .*\n\nOption1: \w+ Option2: \w+ Answer format: option1/option2$", winogrande)
    assert data["boolq"][0]["instruction"].endswith("?\n\nAnswer format: true/false")
    assert data["hellaswag"][0]["instruction"].startswith("Please choose the correct ending to complete the given")
    ways = Counter(len(offered_labels(item["instruction"])) for item in data["ARC-Challenge"])
    assert ways == {4: TEST_ITEMS * 9 // 10, 5: TEST_ITEMS // 10}


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_balanced(data, task) -> None:
    four_way = [item for item in data[task] if len(offered_labels(item["instruction"])) != 5]
    counts = Counter(item["answer"] for item in four_way)
    assert set(counts) == set(offered_labels(four_way[0]["instruction"]))
    assert max(counts.values()) - min(counts.values()) <= 1


def test_no_question_of_a_test_is_asked_in_training(data) -> None:
    tuned = {fact for item in data[TRAIN] for fact in facts_asked(item)}
    tested = {fact for task in TASKS for item in data[task] for fact in facts_asked(item)}
    assert tuned and tested and not tuned & tested


@pytest.mark.parametrize("task", TASKS)
def test_no_test_item_repeats(data, task) -> None:
    assert len({item["instruction"] for item in data[task]}) == TEST_ITEMS


def test_the_mixture_holds_every_task_equally(data) -> None:
    starts = Counter(item["instruction"].split(":")[0] for item in data[TRAIN])
    # The four "answer" tasks share a wording.
    assert sorted(starts.values()) == [100, 100, 100, 100, 400]


def test_generation_is_determined_by_its_seed() -> None:
    assert generate(1, 80, 10) == generate(1, 80, 10)
    assert generate(1, 80, 10) != generate(2, 80, 10)


def test_sizes_of_one_split_do_not_change_the_other() -> None:
    few, many = generate(1, 80, 10), generate(1, 160, 10)
    assert all(few[task] == many[task] for task in TASKS)


@pytest.mark.parametrize(("train_items", "test_items"), [(7, 10), (80, 0), (80, 100_000)])
def test_impossible_sizes_are_refused(train_items, test_items) -> None:
    with pytest.raises(UserError, match="items"):
        generate(0, train_items, test_items)

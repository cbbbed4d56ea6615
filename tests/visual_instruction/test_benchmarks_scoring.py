"""What a benchmark's answers add up to: MMBench's rotations, MME's points, TextVQA, standard errors."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visual_instruction.benchmarks.registry import MME_PARTS, find
from visual_instruction.benchmarks.scoring import Answer, answer, gold, task_result
from visual_instruction.benchmarks.tsv import ImageSource, Item

IMAGE = ImageSource(Path("file.tsv"), 0)


def choice(index: int = 0, **changes) -> Item:
    settings = {"options": {"A": "red", "B": "blue"}, "answers": ("A",), "group": str(index % 1_000_000)}
    settings |= {"rotated": index >= 1_000_000}
    return Item(f"b/{index}", "multiple_choice", "?", IMAGE, **(settings | changes))


def question(index: int, category: str, picture: str, right: str = "Yes") -> Item:
    group = f"{category}/{picture}"
    return Item(f"mme/{index}", "yes_no", "?", IMAGE, answers=(right,), group=group, category=category)


def right(count: int, of: int) -> list[Answer]:
    return [Answer("A", 1.0)] * count + [Answer("B", 0.0)] * (of - count)


# ------------------------------------------------------------------------------------------------------------ one item


def test_an_answer_is_read_and_scored_by_its_kind():
    assert answer(choice(), "(A) red") == Answer("A", 1.0)
    assert answer(choice(), "B") == Answer("B", 0.0)
    assert answer(choice(), "no idea") == Answer(None, 0.0)
    assert answer(question(0, "color", "a"), "Yes, it is.") == Answer("Yes", 1.0)
    assert answer(question(0, "color", "a", "No"), "maybe") == Answer(None, 0.0)
    text = Item("t/0", "short_answer", "?", IMAGE, answers=("stop", "stop", "go", "Stop sign"))
    assert answer(text, "The stop!").prediction == "stop"
    assert answer(text, "stop").score == pytest.approx((1 / 3 + 1 / 3 + 2 / 3 + 2 / 3) / 4)
    assert answer(Item("m/0", "judged", "?", IMAGE, answers=("x",)), "x") == Answer(None, 0.0)


def test_for_paired_tests_a_share_of_the_people_is_right_from_two_of_ten():
    people = Item("t/0", "short_answer", "?", IMAGE, answers=("a1",) * 1 + ("b2",) * 2 + ("c3",) * 7)
    assert [answer(people, text).correct for text in ("a1", "b2", "c3", "d4")] == [False, True, True, False]


def test_gold_is_what_most_people_said():
    assert gold(choice()) == "A"
    assert gold(Item("t/0", "short_answer", "?", IMAGE, answers=("go", "Stop!", "stop"))) == "stop"
    assert (
        gold(Item("t/0", "short_answer", "?", IMAGE, answers=("two",)))
        == answer(Item("t/0", "short_answer", "?", IMAGE, answers=("two",)), "Two.").prediction
    )


# ------------------------------------------------------------------------------------------------------------ accuracy


def test_accuracy_with_its_standard_error_and_unparsed_share():
    answers = [*right(6, 9), Answer(None, 0.0)]
    result = task_result(find("ai2d"), [choice(i) for i in range(10)], answers)
    assert (result.metric, result.value, result.n, result.unparsed) == ("accuracy", 0.6, 10, 0.1)
    assert result.stderr == pytest.approx(statistics.stdev([1] * 6 + [0] * 4) / math.sqrt(10))
    assert result.breakdown is None


def test_one_item_has_no_standard_error():
    assert task_result(find("ai2d"), [choice()], right(1, 1)).stderr is None


def test_abilities_are_the_parts_of_mmbench():
    names = ["attribute_reasoning", "coarse_perception", "attribute_reasoning", None]
    items = [choice(i, l2_category=name) for i, name in enumerate(names)]
    result = task_result(find("mmbench_cn"), items, right(2, 4))
    assert set(result.breakdown) == {"attribute_reasoning", "coarse_perception", "circular"}
    assert result.breakdown["attribute_reasoning"].value == 0.5 and result.breakdown["attribute_reasoning"].n == 2
    assert result.breakdown["coarse_perception"].value == 1


def test_a_circular_question_must_be_right_in_every_rotation():
    rotations = {1: [1, 1, 1, 1], 2: [1, 1, 0, 1], 3: [0, 1, 1, 1], 4: [1]}
    items = [choice(q + 1_000_000 * k) for q, hits in rotations.items() for k in range(len(hits))]
    answers = [Answer("A", float(hit)) for hits in rotations.values() for hit in hits]
    result = task_result(find("mmbench_en"), items, answers)
    assert (result.value, result.n) == (0.75, 4), "accuracy is over the questions as they are"
    circular = result.breakdown["circular"]
    assert (circular.metric, circular.value, circular.n) == ("circular_accuracy", 0.5, 4)
    assert circular.stderr == pytest.approx(math.sqrt(0.25 / 3))


def test_a_rotation_without_its_question_counts_for_nothing():
    result = task_result(find("mmbench_en"), [choice(1), choice(1_000_002)], right(1, 2))
    assert result.breakdown["circular"].value == 1 and result.breakdown["circular"].n == 1


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=4), min_size=1, max_size=8))
def test_circular_accuracy_never_exceeds_accuracy(rotations):
    items = [choice(q + 1_000_000 * k) for q, hits in enumerate(rotations) for k in range(len(hits))]
    answers = [Answer("A", float(hit)) for hits in rotations for hit in hits]
    result = task_result(find("mmbench_en"), items, answers)
    assert result.breakdown["circular"].value <= result.value
    assert result.breakdown["circular"].value == statistics.mean(all(hits) for hits in rotations)


def test_short_answers_have_the_error_of_a_mean_and_no_unparsed_share():
    items = [Item(f"t/{i}", "short_answer", "?", IMAGE, answers=("a",) * 10) for i in range(4)]
    scores = [1.0, 0.3, 0.0, 0.9]
    result = task_result(find("textvqa"), items, [Answer("x", score) for score in scores])
    assert (result.metric, result.n, result.unparsed) == ("vqa_accuracy", 4, None)
    assert result.value == pytest.approx(0.55)
    assert result.stderr == pytest.approx(statistics.stdev(scores) / 2)
    single = [Item("t/0", "short_answer", "?", IMAGE, answers=("a",))]
    assert task_result(find("smoke_count"), single, [Answer("a", 1.0)]).metric == "accuracy"


# ----------------------------------------------------------------------------------------------------------------- MME


def mme_points(hits: dict[str, list[tuple[int, int]]]) -> dict[str, float]:
    """Points by part, as the benchmark defines them: accuracy and paired accuracy of a category in percent, added."""
    points = {part: 0.0 for part in MME_PARTS}
    for category, pictures in hits.items():
        part = next(part for part, categories in MME_PARTS.items() if category in categories)
        accuracy = 100 * statistics.mean(hit for picture in pictures for hit in picture)
        plus = 100 * statistics.mean(min(picture) for picture in pictures)
        points[part] += accuracy + plus
    return points


def of_mme(hits: dict[str, list[tuple[int, int]]]):
    flat = [(c, i, hit) for c, pictures in hits.items() for i, picture in enumerate(pictures) for hit in picture]
    items = [question(number, category, str(i)) for number, (category, i, _) in enumerate(flat)]
    return task_result(find("mme"), items, [Answer("Yes", float(hit)) for *_, hit in flat])


PICTURES = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=4)
CATEGORIES = [category for part in MME_PARTS.values() for category in part]


@given(st.fixed_dictionaries({category: PICTURES for category in CATEGORIES}))
def test_mme_is_its_points_over_2800(hits):
    result, points = of_mme(hits), mme_points(hits)
    assert result.metric == "share_of_points" and result.n == 2 * sum(map(len, hits.values()))
    assert result.value == pytest.approx(sum(points.values()) / 2800)
    assert result.breakdown["perception"].value == pytest.approx(points["perception"] / 2000)
    assert result.breakdown["cognition"].value == pytest.approx(points["cognition"] / 800)


def test_mmes_error_is_that_of_a_sum_of_means_over_pictures():
    hits = {"color": [(1, 1), (1, 0), (0, 0)], "OCR": [(1, 1), (0, 1)]}
    worth = {"color": [1, 0.25, 0], "OCR": [1, 0.25]}  # (accuracy + both right) / 2 of each picture
    variance = sum(statistics.variance(values) / len(values) for values in worth.values())
    assert of_mme(hits).stderr == pytest.approx(math.sqrt(variance) / 2)
    assert of_mme({"color": [(1, 1)], "OCR": hits["OCR"]}).stderr is None


def test_mme_of_a_part_alone():
    result = of_mme({"color": [(1, 1), (1, 0)]})
    assert set(result.breakdown) == {"perception"}
    assert result.value == result.breakdown["perception"].value == pytest.approx((75 + 50) / 200)

"""Reading answers out of responses: VLMEvalKit's rules on nasty strings, VQA accuracy against its definition."""

from __future__ import annotations

import itertools
import statistics
import string

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from visual_instruction.benchmarks.extraction import normalise, read_option, read_yes_no, vqa_accuracy

OPTIONS = {"A": "red", "B": "blue", "C": "green", "D": "dark blue"}


@pytest.mark.parametrize(
    "response, letter",
    [
        ("B", "B"),
        ("B.", "B"),
        ("(B)", "B"),
        ("[B]", "B"),
        ("B: blue", "B"),
        ("B, because it is so", None),  # the letter is further than four words from the end
        ("B blue it is", "B"),
        ("The answer is B", "B"),
        ("The correct answer is **B**. The sky of this picture is of that colour.", "B"),
        ("the answer is (B) and here is a long explanation of why", None),
        ("It is C.\n", "C"),
        ("**D**", "D"),
        ("A or B", None),
        ("A B C D", None),
        ("A and A", "A"),
        ("E", None),  # not offered
        ("b", None),  # letters are capitals; one option's text would do, but "b" is in two of them
        ("Green", "C"),
        ("The apple is green.", "C"),
        ("blue", "B"),
        ("dark blue", None),  # holds the text of two options
        ("Red, not green", None),
        ("It is hard to say, but after a long look at the picture I would say that it is green", None),
        ("The answer is blue", "B"),  # by the text of B, not by its first letter
        ("the answer is a guess", None),
        ("The answer is Green", "C"),
        ("I think A small cat is green", "C"),  # an article far from the end is no letter
        ("A cat", "A"),  # where it is near the end, it is
        ("Sorry, I can't help with images of people yet. B", None),
        ("Cannot determine the answer: red", None),
        ("", None),
        (" ", None),
        ("...", None),
        ("BLUE", "B"),
        ("Bluegreen", None),
        ("C" * 40, None),
        ("\u202eB", None),
        ("\uff22", None),  # a letter of full width
        ("B</s>", None),
        ("B\x00", None),
    ],
)
def test_the_option_that_a_response_chooses(response, letter):
    assert read_option(response, OPTIONS) == letter


def test_the_letters_are_those_that_are_offered():
    assert read_option("E", {"A": "red", "E": "blue"}) == "E"
    assert read_option("A or E", {"B": "red", "E": "blue"}) == "E"
    assert read_option("The answer is F, as every one of us could see", {letter: letter for letter in "EFG"}) == "F"
    assert read_option("anything", {}) is None


TEXTS = st.lists(st.text(string.ascii_lowercase, min_size=2, max_size=8), min_size=2, max_size=4, unique=True)
FILLERS = st.lists(st.sampled_from(["the", "it is", "(", ").", "answer:", "**", "i", "colour"]), max_size=4)


@given(TEXTS, st.data())
def test_renaming_the_letters_renames_the_answer(texts, data):
    """What is read does not depend on where among the options the text stands."""
    letters = "ABCD"[: len(texts)]
    order = data.draw(st.permutations(range(len(texts))))
    renamed = dict(zip(letters, (letters[at] for at in order), strict=True))
    pieces = data.draw(st.lists(st.one_of(st.sampled_from(letters), st.sampled_from(texts)), max_size=3))
    parts = [part for pair in itertools.zip_longest(pieces, data.draw(FILLERS), fillvalue="") for part in pair]
    options = dict(zip(letters, texts, strict=True))
    there = {renamed[letter]: text for letter, text in options.items()}
    found = read_option(" ".join(parts), options)
    again = read_option(" ".join(renamed.get(part, part) for part in parts), there)
    assert again == (None if found is None else renamed[found])


@given(TEXTS, st.integers(0, 3), st.sampled_from(["{}", "({})", "{}.", " {} ", "[{}]", "Answer: {}", "{}: {text}"]))
def test_a_plain_answer_is_always_read(texts, at, form):
    options = dict(zip("ABCD", texts, strict=False))
    letter = list(options)[at % len(options)]
    assert read_option(form.format(letter, text=options[letter]), options) == letter


@given(TEXTS, st.integers(0, 3))
def test_the_text_of_an_option_is_read_where_no_other_is_part_of_it(texts, at):
    options = dict(zip("ABCD", texts, strict=False))
    letter = list(options)[at % len(options)]
    # Nor of the words around it: "is" is an option too.
    said = f"it is {options[letter]}"
    assume(not any(text in said for other, text in options.items() if other != letter))
    assert read_option(f"It is {options[letter].upper()}!", options | {"Z": "x" * 20}) == letter


@given(st.text())
def test_any_response_reads_as_an_offered_letter_or_none(response):
    assert read_option(response, OPTIONS) in {*OPTIONS, None}
    assert read_yes_no(response) in {"Yes", "No", None}


@pytest.mark.parametrize(
    "response, answer",
    [
        ("Yes", "Yes"),
        ("yes.", "Yes"),
        ("No", "No"),
        ("NO!", "No"),
        ("No, there is not", "No"),
        ("Yes, there is no doubt", None),
        ("yes/no", None),
        ("Yesterday", None),
        ("There is not", None),
        ("nothing", None),
        ("", None),
        ("yes-man", "Yes"),  # the hyphen becomes a space
        ("it's a yes", "Yes"),
    ],
)
def test_yes_or_no(response, answer):
    assert read_yes_no(response) == answer


@pytest.mark.parametrize(
    "text, normal",
    [
        ("The Cat", "cat"),
        ("a  cat.", "cat"),
        ("two cats", "2 cats"),
        ("None", "0"),
        ("dont", "don't"),
        ("don't", "don't"),
        ("its", "its"),
        ("youve", "you've"),
        ("shouldnt've", "shouldn't've"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("U.S.A.", "usa"),
        ("well-known", "well known"),
        ("well -known", "well known"),
        ("5 % (about)", "5 % about"),
        ("x/y", "x y"),
        ("line\nbreak\ttab", "line break tab"),
        ("the", ""),
        ("Coca-Cola!", "coca cola"),
        ("$5,00 a-b", "$500 ab"),  # a comma between digits has every mark removed
    ],
)
def test_short_answers_are_compared_without_what_does_not_matter(text, normal):
    assert normalise(text) == normal


@given(st.text())
def test_normalising_leaves_no_case_and_no_space_at_the_ends(text):
    found = normalise(text)
    assert found == found.strip() and "\n" not in found and "  " not in found


ANSWERS = st.lists(st.sampled_from(["cat", "dog", "the cat", "two", "2"]), min_size=10, max_size=10)


@given(ANSWERS, st.sampled_from(["cat", "a cat.", "dog", "2", "bird", ""]))
def test_vqa_accuracy_is_the_mean_over_leaving_one_person_out(answers, response):
    wanted = [normalise(answer) for answer in answers]
    expected = statistics.mean(
        min(1, [*wanted[:left], *wanted[left + 1 :]].count(normalise(response)) / 3) for left in range(10)
    )
    assert vqa_accuracy(response, answers) == pytest.approx(expected)


@pytest.mark.parametrize("same, accuracy", [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_by_the_number_of_people(same, accuracy):
    assert vqa_accuracy("yes", ["Yes"] * same + ["no"] * (10 - same)) == pytest.approx(accuracy)


def test_one_answer_must_be_given_exactly():
    assert vqa_accuracy("The cat.", ["cat"]) == 1
    assert vqa_accuracy("cats", ["cat"]) == 0
    assert vqa_accuracy("", ["the"]) == 1, "both normalise to nothing"

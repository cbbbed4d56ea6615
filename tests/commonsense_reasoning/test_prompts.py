"""The prompts, byte for byte. Spaces that matter are written as tildes, where an editor cannot take it away."""

from __future__ import annotations

from commonsense_reasoning.prompts import (
    EVALUATE_PROMPTS,
    TRAIN_PROMPTS,
    alpaca,
    published_evaluate,
    published_train,
)

_ALONE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
_16 = "~" * 16


def spaced(*lines: str) -> str:
    return "\n".join(lines).replace("~", " ")


def test_the_published_training_prompt():
    expected = spaced(
        f"{_ALONE}~~",
        "",
        f"{_16}### Instruction:",
        f"{_16}ASK",
        _16,
        f"{_16}### Response:",
        _16,
    )
    assert published_train("ASK") == expected
    assert expected.count(" " * 16) == 5 and "request.  \n\n" in expected


def test_the_published_evaluation_prompt():
    expected = spaced(
        f"{_ALONE}~",
        "",
        f"{_16}### Instruction:",
        f"{_16}ASK",
        "",
        f"{_16}### Response:",
        _16,
    )
    assert published_evaluate("ASK") == expected
    assert expected.count(" " * 16) == 4 and "request. \n\n" in expected


def test_the_published_prompts_with_an_input():
    middle = (f"{_16}### Instruction:", f"{_16}ASK")
    given = (f"{_16}### Input:", f"{_16}GIVEN")
    end = (f"{_16}### Response:", _16)
    assert published_train("ASK", "GIVEN") == spaced(f"{_WITH_INPUT}~", "", *middle, _16, *given, _16, *end)
    assert published_evaluate("ASK", "GIVEN") == spaced(_WITH_INPUT, "", *middle, "", *given, "", *end)


def test_the_published_prompts_keep_the_instruction_as_it_is():
    """Only its first line is indented: the published templates are f-strings."""
    assert f"\n{' ' * 16}one\n\ntwo\n" in published_train("one\n\ntwo")


def test_the_alpaca_prompt():
    assert alpaca("ASK") == f"{_ALONE}\n\n### Instruction:\nASK\n\n### Response:\n"
    assert alpaca("ASK", "GIVEN") == (
        f"{_WITH_INPUT}\n\n### Instruction:\nASK\n\n### Input:\nGIVEN\n\n### Response:\n"
    )


def test_protocols_differ_in_what_training_and_evaluation_share():
    assert TRAIN_PROMPTS["corrected"]("ASK") == EVALUATE_PROMPTS["corrected"]("ASK")
    assert TRAIN_PROMPTS["paper"] is published_train and EVALUATE_PROMPTS["paper"] is published_evaluate
    assert TRAIN_PROMPTS["paper"]("ASK") != EVALUATE_PROMPTS["paper"]("ASK")
    assert TRAIN_PROMPTS.keys() == EVALUATE_PROMPTS.keys() == {"paper", "corrected"}

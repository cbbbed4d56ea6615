"""Which runs are an arm: by name first, then at the one learning rate that they were run at, never by a guess."""

from __future__ import annotations

import pytest

from analysis.arms import find, find_pair, split, without

RATE = "training.learning_rate"


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["default", f"{RATE}=0.1"], "default"),
        ([f"{RATE}=0.1"], f"{RATE}=0.1"),
        ([f"{RATE}=0.1", f"{RATE}=0.2"], None),  # which of them nobody has said
        (["adapter.r=4", f"adapter.r=4,{RATE}=0.1"], None),
        ([f"data~0123,{RATE}=0.1"], None),  # a label that was cut is no list of overrides
    ],
)
def test_an_arm_is_found_by_name_or_at_its_one_rate(labels, expected):
    rows = [("lora", label) for label in labels] + [("moslora", "default")]
    assert find(rows, "lora", ["default"]) == (None if expected is None else ("lora", expected))


def test_an_arm_is_looked_for_in_its_context():
    rows = [("lora", "protocol=paper"), ("lora", f"adapter.r=4,protocol=paper,{RATE}=0.1"), ("lora", "default")]
    assert find(rows, "lora", ["default"], "protocol=paper") == rows[0]
    assert find(rows, "lora", ["adapter.r=4"], "protocol=paper") == rows[1]
    assert find(rows, "lora", ["adapter.r=4"]) is None


def test_a_tried_rate_and_the_default_are_no_pair():
    default, tried = ("lora", "default"), ("lora", f"{RATE}=0.1")
    other = ("moslora", f"{RATE}=0.2")
    arms = [("moslora", ["default"]), ("lora", ["default"])]
    assert find_pair([other, default], *arms, "") == (None, default)
    assert find_pair([other, default, tried], *arms, "") == (other, tried)
    assert find_pair([("moslora", "default"), other, default, tried], *arms, "") == (("moslora", "default"), default)


def test_labels_are_taken_apart():
    assert split(f"model.quantization=nf4,{RATE}=0.1") == (f"{RATE}=0.1", "model.quantization=nf4")
    assert without(f"adapter.r=4,{RATE}=0.1", RATE) == "adapter.r=4"
    assert without(f"{RATE}=0.1", RATE) == "default"
    assert without("cut~0123", RATE) == "cut~0123"

"""The eight benchmarks in the LLM-Adapters instruction format: their names, labels and sizes.

An item is a JSON object ``{"instruction", "input", "output", "answer"}``. ``answer`` is one of the task's label words
and ``output`` is ``"the correct answer is <answer>"``; the instruction ends with ``Answer format: label1/label2/...``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

OUTPUT_PREFIX = "the correct answer is "
ITEM_FIELDS = ("instruction", "input", "output", "answer")
PUBLISHED_TRAIN_ITEMS = 170_420  # rows of commonsense_170k.json


@dataclass(frozen=True)
class Task:
    """One benchmark.

    Attributes:
        name: folder and file name in the LLM-Adapters collection.
        title: name in the paper's tables.
        labels: every label word of the task, in order. ARC and SIQA share one family in the published extraction rule.
        test_items: size of the published test set.
    """

    name: str
    title: str
    labels: tuple[str, ...]
    test_items: int

    @property
    def pattern(self) -> str:
        """Regular expression of the published answer extraction: the first label word anywhere in the response."""
        return "|".join(self.labels)


def _numbered(word: str, count: int) -> tuple[str, ...]:
    return tuple(f"{word}{i}" for i in range(1, count + 1))


# In the column order of the paper's Table 4. The published rule allows answer1..answer5 for the four "answer" tasks
# (ARC has a few five-way questions), so a response "answer5" to a three-way question is wrong, not unparsed.
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("ARC-Easy", "ARC-e", _numbered("answer", 5), 2376),
        Task("openbookqa", "OBQA", _numbered("answer", 5), 500),
        Task("social_i_qa", "SIQA", _numbered("answer", 5), 1954),
        Task("ARC-Challenge", "ARC-c", _numbered("answer", 5), 1172),
        Task("winogrande", "WinoG", _numbered("option", 2), 1267),
        Task("piqa", "PIQA", _numbered("solution", 2), 1838),
        Task("boolq", "BoolQ", ("true", "false"), 3270),
        Task("hellaswag", "HellaS", _numbered("ending", 4), 10042),
    )
}

_ANSWER_FORMAT = re.compile(r"Answer format:\s*(\S+)\s*$")


def offered_labels(instruction: str) -> tuple[str, ...] | None:
    """The label words that an instruction's ``Answer format: a/b/c`` line offers, or None where it has none."""
    match = _ANSWER_FORMAT.search(instruction)
    return tuple(match.group(1).split("/")) if match else None

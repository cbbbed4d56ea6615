"""The text of a question, as VLMEvalKit's wrapper of XTuner's models asks it (``vlmeval/vlm/llava/llava_xtuner.py``).

Multiple choice: hint, question and lettered options, a line each, then the instruction to answer with a letter, in
Chinese if anything before it is. TextVQA and other short answers: the question and LLaVA's instruction. The questions
of MME, MM-Vet and MathVista say themselves what they want.
"""

from __future__ import annotations

import re

from ..chat import HUMAN, IMAGE, Turn
from ..prompts import MULTIPLE_CHOICE_SUFFIX, SHORT_ANSWER_SUFFIX
from .registry import MULTIPLE_CHOICE, SHORT_ANSWER
from .tsv import Item

MULTIPLE_CHOICE_SUFFIX_CN = "请直接回答选项字母。"
_CHINESE = re.compile("[\u4e00-\u9fff]")


def question_text(item: Item) -> str:
    """What the model is asked about the image, without the placeholder of the image."""
    if item.kind == MULTIPLE_CHOICE:
        lines = [item.hint] if item.hint else []
        lines += [item.question, *(f"{letter}. {text}" for letter, text in item.options.items())]
        asked = "\n".join(lines)
        suffix = MULTIPLE_CHOICE_SUFFIX_CN if _CHINESE.search(asked) else MULTIPLE_CHOICE_SUFFIX
        return f"{asked}\n{suffix}"
    if item.kind == SHORT_ANSWER:
        return f"{item.question}\n{SHORT_ANSWER_SUFFIX}"
    return item.question


def turn(item: Item) -> Turn:
    """The user's turn: the image, then the question."""
    return {"from": HUMAN, "value": f"{IMAGE}\n{question_text(item).replace(IMAGE, '')}"}

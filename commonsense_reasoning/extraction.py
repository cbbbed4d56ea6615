"""Reading an answer out of a generated response.

The published rule (``extract_answer`` of the LLM-Adapters evaluation, which the paper's code keeps) is
``re.findall(pattern, response.strip())[0]``: the first label word anywhere, case-sensitive, without word boundaries.
So "Answer1" is no answer, "answer10" reads as answer1 and "untrue" as true. A response is what stands between the
prompt's ``### Response:`` and the next one, if the model writes another. The rule is part of what published numbers
measure; the lenient rule beside it shows how much of a difference it makes.
"""

from __future__ import annotations

import re

from .prompts import RESPONSE_MARK
from .tasks import TASKS


def first_answer(task: str, response: str) -> str | None:
    """The published rule: the first label word of ``task`` in ``response``, or None where there is none."""
    match = re.search(TASKS[task].pattern, _own_response(response))
    return match.group() if match else None


def last_answer(task: str, response: str) -> str | None:
    """A lenient rule: the last label word that stands as a word of its own, in any case."""
    found = re.findall(rf"\b(?:{TASKS[task].pattern})\b", _own_response(response), flags=re.IGNORECASE)
    return found[-1].lower() if found else None


def _own_response(response: str) -> str:
    return response.split(RESPONSE_MARK)[0]

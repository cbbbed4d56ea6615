"""The instruction prompts: the published ones, byte for byte, and one that training and evaluation share.

The published code indents its templates, and its training and evaluation templates differ in white space: two spaces
against one after the first sentence, a blank line of sixteen spaces against an empty one, and a response that follows
directly in training but after a strip in evaluation. ``protocol=paper`` keeps all of it, because it is part of what
the published numbers measure; ``protocol=corrected`` asks in evaluation exactly what was asked in training.
"""

from __future__ import annotations

_INDENT = " " * 16
_TASK = "Below is an instruction that describes a task"
_INPUT = f"{_TASK}, paired with an input that provides further context"
_WRITE = "Write a response that appropriately completes the request."

RESPONSE_MARK = "### Response:"


def _published(instruction: str, input_text: str, after_preamble: str, blank: str) -> str:
    parts = [f"{_INPUT if input_text else _TASK}. {_WRITE}{after_preamble}", "", f"{_INDENT}### Instruction:"]
    parts += [f"{_INDENT}{instruction}", blank]
    if input_text:
        parts += [f"{_INDENT}### Input:", f"{_INDENT}{input_text}", blank]
    return "\n".join([*parts, f"{_INDENT}{RESPONSE_MARK}", _INDENT])


def published_train(instruction: str, input_text: str = "") -> str:
    """Prompt of the published training script; the response follows without a separator."""
    return _published(instruction, input_text, after_preamble=" " if input_text else "  ", blank=_INDENT)


def published_evaluate(instruction: str, input_text: str = "") -> str:
    """Prompt of the published evaluation script (it never passes an input: all items have an empty one)."""
    return _published(instruction, input_text, after_preamble="" if input_text else " ", blank="")


def alpaca(instruction: str, input_text: str = "") -> str:
    """The Alpaca template without indentation; the response follows on the line after ``### Response:``."""
    middle = f"\n\n### Input:\n{input_text}" if input_text else ""
    preamble = f"{_INPUT if input_text else _TASK}. {_WRITE}"
    return f"{preamble}\n\n### Instruction:\n{instruction}{middle}\n\n{RESPONSE_MARK}\n"


TRAIN_PROMPTS = {"paper": published_train, "corrected": alpaca}
EVALUATE_PROMPTS = {"paper": published_evaluate, "corrected": alpaca}

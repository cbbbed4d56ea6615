"""What the task files refer to: reading the prepared items, building prompts, scoring responses."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from datasets import Dataset

from commonsense_reasoning.extraction import first_answer, last_answer
from commonsense_reasoning.items import Item, read_prepared
from commonsense_reasoning.prompts import EVALUATE_PROMPTS
from commonsense_reasoning.tasks import OUTPUT_PREFIX, TASKS, offered_labels
from moslora_core.errors import UserError

_FIELDS = ("id", "instruction", "input", "answer")


def read_items(data_dir: str | Path, task: str, split: str = "test") -> list[Item]:
    """Items of ``task`` in a folder that prepare_data wrote, of its test or its validation file.

    Raises:
        UserError: unprepared or damaged data.
    """
    path = Path(data_dir) / split / f"{task}.json"
    items = read_prepared(path, TASKS[task].labels)
    repeated = [identity for identity, count in Counter(item["id"] for item in items).items() if count > 1]
    if repeated:
        raise UserError(f"{path}: id {repeated[0]!r} comes more than once; expected distinct ones")
    return items


def labels(task: str, item: Item) -> list[str]:
    """The label words between which an item asks to choose; all of the task's where its list lacks the answer."""
    offered = offered_labels(item["instruction"]) or ()
    return list(offered if item["answer"] in offered else TASKS[task].labels)


# ------------------------------------------------------------------------------------------------------ task files


def dataset(task: str, data_dir: str | None = None, split: str = "test", **_: Any) -> dict[str, Dataset]:
    """``custom_dataset``: the items of ``task`` in ``data_dir``, which ``--metadata`` gives to every task.

    Those of ``split`` (test or validation) make the one data set that lm-eval is given, whatever it calls it.
    """
    if data_dir is None:
        raise UserError('these tasks need --metadata \'{"data_dir": "<folder written by prepare_data>"}\'')
    rows = read_items(data_dir, task, split)
    columns = [{**{name: row[name] for name in _FIELDS}, "task": task, "choices": labels(task, row)} for row in rows]
    return {"test": Dataset.from_list(columns)}


def paper_prompt(doc: Item) -> str:
    return EVALUATE_PROMPTS["paper"](doc["instruction"], doc["input"])


def corrected_prompt(doc: Item) -> str:
    return EVALUATE_PROMPTS["corrected"](doc["instruction"], doc["input"])


def paper_context(doc: Item) -> str:
    """What a label is scored after: the prompt and the response up to it.

    The space before the label is the tasks' ``target_delimiter``, so that it is scored with the label: byte-level
    tokenizers make one token of it and the word that follows, as in a training text.
    """
    return paper_prompt(doc) + OUTPUT_PREFIX.rstrip(" ")


def corrected_context(doc: Item) -> str:
    """As :func:`paper_context`, after the corrected prompt."""
    return corrected_prompt(doc) + OUTPUT_PREFIX.rstrip(" ")


def score_response(doc: Item, responses: list[str]) -> dict[str, float]:
    """Metrics of one generated response: the published rule's accuracy, a lenient rule's, and no answer found."""
    task, (response,) = doc["task"], responses
    answer = first_answer(task, response)
    return {
        "acc": float(answer == doc["answer"]),
        "acc_lenient": float(last_answer(task, response) == doc["answer"]),
        "unparsed": float(answer is None),
    }

"""Bad inputs of commonsense reasoning: the files of LLM-Adapters, what prepare_data wrote of them, and the base."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from commonsense_reasoning.config import DataConfig, ModelConfig, ProtocolConfig
from commonsense_reasoning.data import load_training
from commonsense_reasoning.lm_eval_tasks.functions import read_items
from commonsense_reasoning.models import load_base, load_tokenizer
from commonsense_reasoning.prepare_data import prepare
from moslora_core.base_models import resolve_path

from .files import instead, unreadable
from .row import BadInput, check_refused

ITEM = {
    "instruction": "is one a number?\n\nAnswer format: true/false",
    "input": "",
    "output": "the correct answer is true",
    "answer": "true",
}
PREPARED = [{"id": f"boolq/{number}", **ITEM} for number in range(3)]
TRAIN, TEST = "source/train.json", "source/boolq/test.json"
PREPARED_TRAIN, PREPARED_TEST, MANIFEST = "data/train.json", "data/test/boolq.json", "data/manifest.json"


def data(folder: Path, **changes: Any) -> DataConfig:
    settings = {"source": "folder", "path": str(folder / "source"), "train_files": ["train.json"], "tasks": ["boolq"]}
    return DataConfig(dir=str(folder / "data"), **settings | changes)


def write_source(folder: Path) -> None:
    for file in (TRAIN, TEST):
        instead(file, lambda _: None, json.dumps([ITEM, ITEM]).encode())(folder)


def write_prepared(folder: Path) -> None:
    for file in (PREPARED_TRAIN, PREPARED_TEST):
        instead(file, lambda _: None, json.dumps(PREPARED).encode())(folder)
    instead(MANIFEST, lambda _: None, b'{"subset": {"train_items": null}}')(folder)


def read_source(folder: Path) -> None:
    prepare(data(folder))


def read_training(folder: Path) -> None:
    load_training(data(folder), ProtocolConfig("corrected", False, 1, 8), None)


def read_test(folder: Path) -> None:
    read_items(folder / "data", "boolq")


def rows_of(file: str, before: Callable[[Path], None], read: Callable[[Path], None], what: str) -> list[BadInput]:
    """Rows on the content of a JSON list of items, of which the second is at fault."""
    good = {"id": "boolq/1", **ITEM} if before is write_prepared else ITEM
    other = good | {"id": "boolq/0"}
    faults = {
        "is an object": ({"boolq": [good]}, ("list",)),
        "is null": (None, ("list",)),
        "is an empty list": ([], ()),
        "has a text for an item": ([good, "true"], ("1",)),
        "has null for an item": ([good, None], ("1",)),
        "has a list for an item": ([good, ["true"]], ("1",)),
        **{
            f"has an item without {name}": ([other, {key: good[key] for key in good if key != name}], ("1", name))
            for name in good
        },
        "has a number for an instruction": ([other, good | {"instruction": 3}], ("1", "instruction")),
        "has null for an input": ([other, good | {"input": None}], ("1", "input")),
        "has true for an answer": ([other, good | {"answer": True}], ("1", "answer")),
        "has NaN for an answer": ([other, good | {"answer": math.nan}], ("1", "answer")),
        "has an empty instruction": ([other, good | {"instruction": " \n"}], ("1", "instruction")),
        "has half a character": ([other, good | {"instruction": "\ud83d " + good["instruction"]}], ()),
        "has an answer of another task": ([other, good | {"answer": "ending1", "output": "ending1"}], ("ending1",)),
        "has an answer in capitals": ([other, good | {"answer": "True", "output": "True"}], ("'True'", "true")),
        "has an empty answer": ([other, good | {"answer": ""}], ("''",)),
    }
    return [
        BadInput(f"{what} {wrong}", instead(file, before, json.dumps(rows).encode()), read, (Path(file).name, *names))
        for wrong, (rows, names) in faults.items()
    ]


def settings(wrong: str, names: tuple[str, ...], **changes: Any) -> BadInput:
    return BadInput(f"data.{wrong}", write_source, lambda folder: prepare(data(folder, **changes)), names)


# --------------------------------------------------------------------------------------------------------------- base


def write_base(folder: Path) -> None:
    shutil.copytree(resolve_path("package:commonsense_reasoning/smoke_base"), folder / "base")


def base(load: Callable[[ModelConfig], object]) -> Callable[[Path], object]:
    return lambda folder: load(ModelConfig(path=str(folder / "base")))


def base_config(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        write_base(folder)
        path = folder / "base" / "config.json"
        config = json.loads(path.read_text())
        change(config)
        path.write_text(json.dumps(config))

    return write


def cut_weights(folder: Path) -> None:
    write_base(folder)
    path = folder / "base" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


ROWS = [
    *unreadable("the training file", TRAIN, write_source, read_source),
    *unreadable("the test file", TEST, write_source, read_source),
    *unreadable("the prepared training file", PREPARED_TRAIN, write_prepared, read_training),
    *unreadable("the prepared test file", PREPARED_TEST, write_prepared, read_test),
    *unreadable("the manifest", MANIFEST, write_prepared, read_training, names=("data",)),
    *rows_of(TRAIN, write_source, read_source, "the training file"),
    *rows_of(TEST, write_source, read_source, "the test file"),
    *rows_of(PREPARED_TRAIN, write_prepared, read_training, "the prepared training file"),
    *rows_of(PREPARED_TEST, write_prepared, read_test, "the prepared test file"),
    BadInput(
        "the training file has an output without its answer",
        instead(TRAIN, write_source, json.dumps([ITEM | {"output": "it is so"}]).encode()),
        read_source,
        ("train.json[0]", "output", "it is so"),
    ),
    BadInput(
        "the prepared test file has an id twice",
        instead(PREPARED_TEST, write_prepared, json.dumps([PREPARED[0], PREPARED[0]]).encode()),
        read_test,
        ("boolq.json", "boolq/0"),
    ),
    BadInput(
        "the manifest is a list", instead(MANIFEST, write_prepared, b"[]"), read_training, ("manifest.json", "damaged")
    ),
    BadInput(
        "the manifest has a list of subsets",
        instead(MANIFEST, write_prepared, b'{"subset": []}'),
        read_training,
        ("manifest.json", "damaged"),
    ),
    settings("test_file has another placeholder", ("test_file", "{name}"), test_file="{name}.json"),
    settings("test_file has half a placeholder", ("test_file", "{task"), test_file="{task"),
    *unreadable("the base's config.json", "base/config.json", write_base, base(load_base), names=("base",)),
    *unreadable("the base's tokenizer.json", "base/tokenizer.json", write_base, base(load_tokenizer), names=("base",)),
    *unreadable(
        "the base's weights", "base/model.safetensors", write_base, base(load_base), {"are empty": b""}, ("base",)
    ),
    BadInput("the base's weights are cut off", cut_weights, base(load_base), ("base",)),
    BadInput(
        "the base's model_type is unknown",
        base_config(lambda c: c.update(model_type="llamma")),
        base(load_base),
        ("base",),
    ),
    BadInput(
        "the base's width is text", base_config(lambda c: c.update(hidden_size="wide")), base(load_base), ("base",)
    ),
    BadInput(
        "the base's width is another than its weights'",
        base_config(lambda c: c.update(hidden_size=2 * c["hidden_size"])),
        base(load_base),
        ("base",),
    ),
    BadInput(
        "the base's layers are null",
        base_config(lambda c: c.update(num_hidden_layers=None)),
        base(load_base),
        ("base",),
    ),
    BadInput(
        "the base's heads are 0", base_config(lambda c: c.update(num_attention_heads=0)), base(load_base), ("base",)
    ),
    BadInput("the base is absent", lambda folder: None, base(load_base), ("base",)),
    BadInput("the base is a list", instead("base/config.json", write_base, b"[]"), base(load_base), ("base",)),
]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_bad_inputs_are_refused(row, tmp_path):
    check_refused(row, tmp_path)

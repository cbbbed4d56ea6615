"""Prepares the items: ``python -m commonsense_reasoning.prepare_data scale=smoke``.

Reads the LLM-Adapters collection from a local folder or from the hub, or generates the smoke world, checks it, and
writes one folder that the other commands read:

    train.json            items of the training mixture
    test/<task>.json      items of each benchmark
    manifest.json         sources with sha256, counts, label counts, duplicates, sha256 of what was written

An item is {"id", "instruction", "input", "output", "answer"}; the id names file and row of the source.
"""

from __future__ import annotations

import json
import logging
import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moslora_core import launch
from moslora_core.errors import UserError
from moslora_core.prepared import new_folder, sha256, write_manifest
from moslora_core.record import read_json

from . import smoke_world
from .config import CONF_MODULE, NOT_IN_LABEL, Config, DataConfig
from .tasks import ITEM_FIELDS, TASKS, offered_labels

logger = logging.getLogger(__name__)

TRAIN_FILE = "train.json"
SOURCES = ("smoke", "folder", "hub")

Item = dict[str, str]


def test_file(task: str) -> str:
    return f"test/{task}.json"


# ------------------------------------------------------------------------------------------------------------ reading


def check_item(row: Any, where: str, labels: tuple[str, ...] | None = None) -> Item:
    """One row as an item of strings.

    Args:
        where: file and index, for the error.
        labels: label words of the task; None accepts those of any task.

    Raises:
        UserError: a missing field, one that is no string, or an answer that is no label or not in the output.
    """
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with {', '.join(ITEM_FIELDS)}, found {type(row).__name__}")
    for name in ITEM_FIELDS:
        if name not in row:
            raise UserError(f"{where}: field {name!r} is missing; expected {', '.join(ITEM_FIELDS)}")
        if not isinstance(row[name], str):
            raise UserError(f"{where}: {name} must be a string, found {type(row[name]).__name__}")
    if not row["instruction"].strip():
        raise UserError(f"{where}: instruction is empty")
    allowed = labels or offered_labels(row["instruction"]) or sum((task.labels for task in TASKS.values()), ())
    if row["answer"] not in allowed:
        raise UserError(f"{where}: answer must be one of {'/'.join(allowed)}, found {row['answer']!r}")
    if row["answer"] not in row["output"]:
        raise UserError(f"{where}: output must state the answer {row['answer']!r}, found {row['output']!r}")
    return {name: row[name] for name in ITEM_FIELDS}


def read_items(path: Path, labels: tuple[str, ...] | None = None, prefix: str | None = None) -> list[Item]:
    """Items of a JSON file, each with an id ``<prefix>/<row>``.

    Raises:
        UserError: the file is missing, is no JSON list of items, or is empty; a bad row is named by file and index.
    """
    if not path.is_file():
        raise UserError(f"no data file {path}; expected a JSON list of LLM-Adapters items")
    rows = read_json(path)
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a JSON list of items, found {type(rows).__name__}")
    return _number(rows, str(path), labels, path.stem if prefix is None else prefix)


def _number(rows: Iterable[Any], source: str, labels: tuple[str, ...] | None, prefix: str) -> list[Item]:
    items = [{"id": f"{prefix}/{i}", **check_item(row, f"{source}[{i}]", labels)} for i, row in enumerate(rows)]
    if not items:
        raise UserError(f"{source}: expected items, found none")
    return items


def _train_prefix(file: str) -> str:
    """A training file's part of the ids: its name below ``data.path``, so that files of one name stay apart."""
    return Path(file).with_suffix("").as_posix()


def _test_name(data: DataConfig, task: str) -> str:
    try:
        return data.test_file.format(task=task)
    except (KeyError, IndexError, ValueError, AttributeError):
        raise UserError(f"data.test_file={data.test_file}: the only placeholder is {{task}}") from None


def _read_folder(data: DataConfig) -> tuple[list[Item], dict[str, list[Item]], dict[str, str]]:
    if data.path is None:
        raise UserError("data.source=folder needs data.path: the folder of LLM-Adapters JSON files")
    root = Path(data.path)
    if not root.is_dir():
        raise UserError(f"data.path={data.path}: no such folder; expected the LLM-Adapters JSON files in it")
    tests = {name: _test_name(data, name) for name in data.tasks}
    train = [item for file in data.train_files for item in read_items(root / file, prefix=_train_prefix(file))]
    test = {name: read_items(root / file, TASKS[name].labels, prefix=name) for name, file in tests.items()}
    return train, test, {file: sha256(root / file) for file in [*data.train_files, *tests.values()]}


def _read_hub(data: DataConfig) -> tuple[list[Item], dict[str, list[Item]], dict[str, str]]:
    """The same files from a dataset repository of the hub; the layout below the repository is that of a folder."""
    if data.path is None:
        raise UserError("data.source=hub needs data.path: the id of a dataset repository with the LLM-Adapters files")
    from datasets import load_dataset

    def load(file: str, labels: tuple[str, ...] | None, prefix: str) -> list[Item]:
        try:
            rows = load_dataset(data.path, data_files=file, split="train")
        except Exception as error:  # the hub's client raises many kinds, all with the reason in the first line
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(f"data.path={data.path}: cannot load {file} from the hub: {reason}") from None
        return _number(rows, f"{data.path}/{file}", labels, prefix)

    train = [item for file in data.train_files for item in load(file, None, _train_prefix(file))]
    test = {name: load(_test_name(data, name), TASKS[name].labels, name) for name in data.tasks}
    return train, test, {"hub": data.path}


def _generate(data: DataConfig) -> tuple[list[Item], dict[str, list[Item]], dict[str, str]]:
    if data.train_items is None or data.test_items is None:
        raise UserError("data.source=smoke needs data.train_items and data.test_items")
    world = smoke_world.generate(data.subset_seed, data.train_items, data.test_items)
    named = {
        split: [{"id": f"{split}/{i}", **item} for i, item in enumerate(items)]
        for split, items in world.items()
        if split == smoke_world.TRAIN or split in data.tasks
    }
    train = named.pop(smoke_world.TRAIN)
    return train, named, {"generated": f"smoke world, seed {data.subset_seed}"}


_READERS = {"smoke": _generate, "folder": _read_folder, "hub": _read_hub}

# ----------------------------------------------------------------------------------------------------------- checking


def _key(item: Item) -> str:
    return " ".join(item["instruction"].split()).lower()


def describe(train: list[Item], test: dict[str, list[Item]]) -> dict[str, Any]:
    """Composition of the data: sizes, label counts, and duplicates within and between training and test."""
    train_keys = Counter(_key(item) for item in train)

    def labels(items: list[Item]) -> dict[str, int]:
        return dict(sorted(Counter(item["answer"] for item in items).items()))

    return {
        "train": {
            "items": len(train),
            "labels": labels(train),
            "duplicates": sum(count - 1 for count in train_keys.values()),
        },
        "test": {
            name: {
                "items": len(items),
                "labels": labels(items),
                "duplicates": len(items) - len({_key(item) for item in items}),
                "also_in_train": sum(_key(item) in train_keys for item in items),
            }
            for name, items in test.items()
        },
    }


def _check_config(data: DataConfig) -> None:
    if data.source not in SOURCES:
        raise UserError(f"data.source must be one of {', '.join(SOURCES)}, found {data.source!r}")
    if unknown := [name for name in data.tasks if name not in TASKS]:
        raise UserError(f"data.tasks: unknown task {unknown[0]!r}; expected some of {', '.join(TASKS)}")
    if not data.tasks:
        raise UserError(f"data.tasks is empty; expected some of {', '.join(TASKS)}")
    if data.source != "smoke" and not data.train_files:
        raise UserError("data.train_files is empty; name at least one file below data.path")
    for name in ("train_items", "test_items"):
        if (count := getattr(data, name)) is not None and count < 1:
            raise UserError(f"data.{name} must be positive or null, found {count}")


def prepare(data: DataConfig) -> dict[str, Any]:
    """Reads, checks and writes the items of one configuration to ``data.dir``; returns the manifest.

    The folder appears whole or not at all, and replaces an earlier one only at the end.

    Raises:
        UserError: for any bad input, before anything is written.
    """
    _check_config(data)
    train, test, sources = _READERS[data.source](data)
    if data.published_sizes:
        for name, items in test.items():
            if len(items) != TASKS[name].test_items:
                raise UserError(
                    f"{name}: {len(items)} test items, expected the published {TASKS[name].test_items}; "
                    "set data.published_sizes=false for another selection"
                )
    if data.train_items is not None and data.source != "smoke":
        if data.train_items > len(train):
            raise UserError(f"data.train_items={data.train_items}: the training files hold {len(train)} items only")
        train = random.Random(data.subset_seed).sample(train, data.train_items)
    if data.test_items is not None:
        test = {name: items[: data.test_items] for name, items in test.items()}
    manifest = {
        "source": data.source,
        "sources": sources,
        "subset": {"train_items": data.train_items, "test_items": data.test_items, "seed": data.subset_seed},
        **describe(train, test),
    }
    with new_folder(Path(data.dir)) as folder:
        for name, items in {TRAIN_FILE: train, **{test_file(name): items for name, items in test.items()}}.items():
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(items, ensure_ascii=False, indent=1), encoding="utf-8")
        return write_manifest(folder, manifest)


# ------------------------------------------------------------------------------------------------------------ command


def main(config: Config) -> None:
    manifest = prepare(config.data)
    logger.info("train: %d items, %d duplicates", manifest["train"]["items"], manifest["train"]["duplicates"])
    for name, entry in manifest["test"].items():
        logger.info(
            "%s: %d items, labels %s, %d duplicates, %d also in train",
            name,
            entry["items"],
            entry["labels"],
            entry["duplicates"],
            entry["also_in_train"],
        )
    logger.info("written to %s", config.data.dir)


if __name__ == "__main__":
    launch.run(main, Config, CONF_MODULE, not_in_label=NOT_IN_LABEL)

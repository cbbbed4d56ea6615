"""Prepares the items: ``python -m commonsense_reasoning.prepare_data scale=smoke``.

Reads the LLM-Adapters collection from a local folder or from the hub, or generates the smoke world, checks it, and
writes one folder that the other commands read:

    train.json               items of the training mixture
    test/<task>.json         items of each benchmark
    validation/<task>.json   items to choose settings by, where there are any
    manifest.json            sources with sha256, counts, label counts, duplicates, sha256 of what was written

An item is {"id", "instruction", "input", "output", "answer"}; the id names file and row of the source.
"""

from __future__ import annotations

import json
import logging
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moslora_core import launch
from moslora_core.errors import UserError
from moslora_core.prepared import new_folder, sha256, write_manifest

from . import smoke_world
from .config import CONF_MODULE, NOT_IN_LABEL, Config, DataConfig
from .items import Item, check_item, read_rows
from .tasks import TASKS

logger = logging.getLogger(__name__)

TRAIN_FILE = "train.json"
SOURCES = ("smoke", "folder", "hub")


@dataclass
class Items:
    """What a source holds: the training mixture, each task's items by split, and the digests of what was read."""

    train: list[Item]
    by_split: dict[str, dict[str, list[Item]]]
    sources: dict[str, str]


def items_file(split: str, task: str) -> str:
    return f"{split}/{task}.json"


# ------------------------------------------------------------------------------------------------------------ reading


def _read(path: Path, labels: tuple[str, ...] | None, prefix: str) -> list[Item]:
    if not path.is_file():
        raise UserError(f"no data file {path}; expected a JSON list of LLM-Adapters items")
    return _number(read_rows(path), str(path), labels, prefix)


def _number(rows: Iterable[Any], source: str, labels: tuple[str, ...] | None, prefix: str) -> list[Item]:
    """The rows as items, each with an id ``<prefix>/<row>``."""
    return [{"id": f"{prefix}/{i}", **check_item(row, f"{source}[{i}]", labels)} for i, row in enumerate(rows)]


def _train_prefix(file: str) -> str:
    """A training file's part of the ids: its name below ``data.path``, so that files of one name stay apart."""
    return Path(file).with_suffix("").as_posix()


def _split_files(data: DataConfig) -> dict[str, dict[str, str]]:
    """Split -> task -> file below ``data.path``."""
    patterns = {"test": data.test_file, "validation": data.validation_file}
    return {
        split: {task: _file_of(f"data.{split}_file", pattern, task) for task in data.tasks}
        for split, pattern in patterns.items()
        if pattern is not None
    }


def _file_of(key: str, pattern: str, task: str) -> str:
    try:
        return pattern.format(task=task)
    except (KeyError, IndexError, ValueError, AttributeError):
        raise UserError(f"{key}={pattern}: the only placeholder is {{task}}") from None


def _prefix(split: str, task: str) -> str:
    """A split's part of the ids; that of test items is the task alone."""
    return task if split == "test" else f"{split}/{task}"


def _read_folder(data: DataConfig) -> Items:
    if data.path is None:
        raise UserError("data.source=folder needs data.path: the folder of LLM-Adapters JSON files")
    root = Path(data.path)
    if not root.is_dir():
        raise UserError(f"data.path={data.path}: no such folder; expected the LLM-Adapters JSON files in it")
    splits = _split_files(data)
    train = [item for file in data.train_files for item in _read(root / file, None, _train_prefix(file))]

    def read(split: str, task: str, file: str) -> list[Item]:
        return _read(root / file, TASKS[task].labels, _prefix(split, task))

    found = {split: {task: read(split, task, file) for task, file in files.items()} for split, files in splits.items()}
    names = [*data.train_files, *(file for files in splits.values() for file in files.values())]
    return Items(train, found, {file: sha256(root / file) for file in names})


def _read_hub(data: DataConfig) -> Items:
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

    splits = _split_files(data)
    train = [item for file in data.train_files for item in load(file, None, _train_prefix(file))]
    found = {
        split: {task: load(file, TASKS[task].labels, _prefix(split, task)) for task, file in files.items()}
        for split, files in splits.items()
    }
    return Items(train, found, {"hub": data.path})


def _generate(data: DataConfig) -> Items:
    if data.train_items is None or data.test_items is None:
        raise UserError("data.source=smoke needs data.train_items and data.test_items")
    world = smoke_world.generate(data.subset_seed, data.train_items, data.test_items)
    train = _named(smoke_world.TRAIN, world.pop(smoke_world.TRAIN))
    found = {"test": {task: _named(task, world[task]) for task in data.tasks}}
    if data.validation_file_items is not None:
        validation = smoke_world.generate_validation(data.subset_seed, data.validation_file_items)
        found["validation"] = {task: _named(_prefix("validation", task), validation[task]) for task in data.tasks}
    return Items(train, found, {"generated": f"smoke world, seed {data.subset_seed}"})


def _named(prefix: str, items: list[Item]) -> list[Item]:
    return [{"id": f"{prefix}/{i}", **item} for i, item in enumerate(items)]


_READERS = {"smoke": _generate, "folder": _read_folder, "hub": _read_hub}

# ----------------------------------------------------------------------------------------------------------- checking


def _key(item: Item) -> str:
    return " ".join(item["instruction"].split()).lower()


def describe(train: list[Item], by_split: dict[str, dict[str, list[Item]]]) -> dict[str, Any]:
    """Composition of the data: sizes, label counts, and duplicates within training and each split and between them."""
    train_keys = Counter(_key(item) for item in train)

    def labels(items: list[Item]) -> dict[str, int]:
        return dict(sorted(Counter(item["answer"] for item in items).items()))

    return {
        "train": {
            "items": len(train),
            "labels": labels(train),
            "duplicates": sum(count - 1 for count in train_keys.values()),
        },
        **{
            split: {
                name: {
                    "items": len(items),
                    "labels": labels(items),
                    "duplicates": len(items) - len({_key(item) for item in items}),
                    "also_in_train": sum(_key(item) in train_keys for item in items),
                }
                for name, items in tasks.items()
            }
            for split, tasks in by_split.items()
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
    for name in ("train_items", "test_items", "validation_file_items"):
        if (count := getattr(data, name)) is not None and count < 1:
            raise UserError(f"data.{name} must be positive or null, found {count}")


def prepare(data: DataConfig) -> dict[str, Any]:
    """Reads, checks and writes the items of one configuration to ``data.dir``; returns the manifest.

    The folder appears whole or not at all, and replaces an earlier one only at the end.

    Raises:
        UserError: for any bad input, before anything is written.
    """
    _check_config(data)
    found = _READERS[data.source](data)
    if data.published_sizes:
        for name, items in found.by_split["test"].items():
            if len(items) != TASKS[name].test_items:
                raise UserError(
                    f"{name}: {len(items)} test items, expected the published {TASKS[name].test_items}; "
                    "set data.published_sizes=false for another selection"
                )
    train = found.train
    if data.train_items is not None and data.source != "smoke":
        if data.train_items > len(train):
            raise UserError(f"data.train_items={data.train_items}: the training files hold {len(train)} items only")
        train = random.Random(data.subset_seed).sample(train, data.train_items)
    limits = {"test": data.test_items, "validation": data.validation_file_items}
    by_split = {
        split: {task: items[: limits[split]] for task, items in tasks.items()}
        for split, tasks in found.by_split.items()
    }
    manifest = {
        "source": data.source,
        "sources": found.sources,
        "subset": {"train_items": data.train_items, "test_items": data.test_items, "seed": data.subset_seed},
        **describe(train, by_split),
    }
    files = {TRAIN_FILE: train}
    for split, tasks in by_split.items():
        files |= {items_file(split, task): items for task, items in tasks.items()}
    with new_folder(Path(data.dir)) as folder:
        for name, items in files.items():
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(items, ensure_ascii=False, indent=1), encoding="utf-8")
        return write_manifest(folder, manifest)


# ------------------------------------------------------------------------------------------------------------ command


def main(config: Config) -> None:
    manifest = prepare(config.data)
    logger.info("train: %d items, %d duplicates", manifest["train"]["items"], manifest["train"]["duplicates"])
    entries = [(split, *entry) for split in ("test", "validation") for entry in manifest.get(split, {}).items()]
    for split, name, entry in entries:
        logger.info(
            "%s, %s: %d items, labels %s, %d duplicates, %d also in train",
            split,
            name,
            entry["items"],
            entry["labels"],
            entry["duplicates"],
            entry["also_in_train"],
        )
    logger.info("written to %s", config.data.dir)


if __name__ == "__main__":
    launch.run(main, Config, CONF_MODULE, not_in_label=NOT_IN_LABEL)

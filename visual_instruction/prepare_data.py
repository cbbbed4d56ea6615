"""Prepares the data: ``python -m visual_instruction.prepare_data scale=smoke``.

Reads LLaVA's instruction file with its image folders and VLMEvalKit's benchmark files, or generates the smoke world,
checks them, and writes one folder that the other commands read:

    train.json              training items in LLaVA's format
    images/                 generated images; those of an instruction file stay where they are (image_root)
    benchmarks/<name>.tsv   benchmarks in VLMEvalKit's layout, with their images inside
    validation/<name>.tsv   the same for choosing settings; of the generated world alone
    manifest.json           sources with sha256, counts, faults by kind, sha256 of what was written
"""

from __future__ import annotations

import base64
import csv
import json
import logging
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from moslora_core import launch
from moslora_core.errors import UserError
from moslora_core.prepared import new_folder, sha256, write_manifest

from . import smoke_world
from .benchmarks.registry import BENCHMARKS, Benchmark
from .benchmarks.tsv import REFERENCE_LENGTH, first_questions, load_image, long_fields, read_tsv
from .benchmarks.tsv import Item as Question
from .config import CONF_MODULE, NOT_IN_LABEL, Config, DataConfig
from .conversations import CHECK_IMAGES, ON_FAULT, Faults, Item, read_instructions, sound_items
from .data import IMAGES_FOLDER, TRAIN_FILE

logger = logging.getLogger(__name__)

SOURCES = ("smoke", "folder")
BENCHMARKS_FOLDER, VALIDATION_FOLDER = "benchmarks", "validation"

# ----------------------------------------------------------------------------------------------------------- training


def _training_items(path: Path, image_root: Path, data: DataConfig, count: int | None) -> tuple[list[Item], Faults]:
    """Items of an instruction file without fault, a random ``count`` of them if one is given."""
    faults = Faults(str(path))
    texts = list(read_instructions(path, faults).items())
    if count is not None:
        if count > len(texts):
            raise UserError(f"data.train_items={count}: {path} holds {len(texts)} items without fault only")
        texts = random.Random(data.subset_seed).sample(texts, len(texts))
    if any("image" in item for _, item in texts) and not image_root.is_dir():
        raise UserError(f"data.image_root={image_root}: no such folder; expected the images of {path}")
    found = sound_items(texts, image_root, data.check_images, faults, count)
    items = list(tqdm(found, "checking images", total=count or len(texts), unit="item", disable=None))
    faults.settle(data.on_fault)
    if count is not None and len(items) < count:
        raise UserError(f"data.train_items={count}: {path} holds {len(items)} items without fault only")
    return items, faults


def _describe(items: list[Item], faults: Faults) -> dict[str, Any]:
    return {
        "items": len(items),
        "with_image": sum("image" in item for item in items),
        "images": len({item["image"] for item in items if "image" in item}),
        "turns": sum(len(item["conversations"]) // 2 for item in items),
        "rows": faults.rows,
        "faults": dict(sorted(faults.counts.items())),
    }


# --------------------------------------------------------------------------------------------------------- benchmarks


def _rows(path: Path) -> Iterator[dict[str, str]]:
    with open(path, encoding="utf-8-sig", newline="") as file, long_fields():
        yield from csv.DictReader(file, delimiter="\t")


def _copy_questions(source: Path, target: Path, questions: list[Question]) -> None:
    """Writes the rows of ``questions`` with their images inside: a base64 field, or a row that has one of its own."""
    kept = {question.columns["index"] for question in questions}
    referred = {row["image"] for row in _rows(source) if row["index"] in kept and _refers(row)} - kept
    images = {row["index"]: row["image"] for row in _rows(source) if row["index"] in referred}
    files = {question.columns["index"]: question.image.path for question in questions if question.image.offset is None}
    with open(target, "w", encoding="utf-8", newline="") as file:
        writer: csv.DictWriter | None = None
        for row in _rows(source):
            if row["index"] not in kept:
                continue
            if row["index"] in files:
                row["image"] = base64.b64encode(files[row["index"]].read_bytes()).decode()
            else:
                row["image"] = images.get(row["image"], row["image"])
            if writer is None:
                writer = csv.DictWriter(file, list(row), delimiter="\t", lineterminator="\n")
                writer.writeheader()
            writer.writerow(row)


def _refers(row: dict[str, str]) -> bool:
    return len(row.get("image") or "") <= REFERENCE_LENGTH and bool(row.get("image"))


def _add_benchmark(benchmark: Benchmark, source: Path, target: Path, data: DataConfig) -> None:
    """Copies the first questions of a benchmark's file; a folder that holds ``target`` is one for them alone."""
    questions = read_tsv(source, benchmark)
    chosen = first_questions(questions, data.test_items)
    target.parent.mkdir(exist_ok=True)
    if len(chosen) == len(questions) and all(question.image.offset is not None for question in questions):
        shutil.copyfile(source, target)
    else:
        _copy_questions(source, target, chosen)


def _check_benchmark(benchmark: Benchmark, path: Path, data: DataConfig) -> dict[str, Any]:
    """Counts of a benchmark's written file, every row and, if it is asked for, every image read."""
    questions = read_tsv(path, benchmark)
    if data.check_images == "decode":
        for question in tqdm(questions, f"checking {path.name}", unit="item", disable=None):
            load_image(question)
    return {"items": len(questions), "questions": sum(not question.rotated for question in questions)}


# ------------------------------------------------------------------------------------------------------------ sources


def _generate(folder: Path, data: DataConfig) -> tuple[Path, dict[str, str]]:
    """Generates the smoke world into ``folder``; the root of its images, and the sources."""
    counts = {name: getattr(data, name) for name in ("train_items", "test_items", "validation_items")}
    if missing := [name for name, count in counts.items() if count is None]:
        raise UserError(f"data.source=smoke needs data.{missing[0]}: the generated world has no end")
    smoke_world.generate(folder, seed=data.subset_seed, **counts)
    for part in (BENCHMARKS_FOLDER, VALIDATION_FOLDER):
        generated = {path.stem: path for path in (folder / part).glob("*.tsv")}
        if absent := [name for name in data.benchmarks if BENCHMARKS[name].file not in generated]:
            raise UserError(
                f"data.benchmarks: {absent[0]!r} is no benchmark of the smoke world; expected some of "
                f"{', '.join(sorted(generated))}"
            )
        for name in generated.keys() - {BENCHMARKS[name].file for name in data.benchmarks}:
            generated[name].unlink()
    return folder / IMAGES_FOLDER, {"generated": f"smoke world, seed {data.subset_seed}"}


def _copy(folder: Path, data: DataConfig) -> tuple[Path, dict[str, str]]:
    """Copies the benchmarks into ``folder``; the root of the training images, and the sources."""
    for name, kind in (("path", "LLaVA's instruction file"), ("image_root", "the folder of its images")):
        if getattr(data, name) is None:
            raise UserError(f"data.source=folder needs data.{name}: {kind}")
    if data.benchmarks and data.benchmark_root is None:
        raise UserError("data.source=folder needs data.benchmark_root: the folder of VLMEvalKit's TSV files")
    path = Path(data.path)
    if not path.is_file():
        raise UserError(f"data.path={path}: no such file; expected LLaVA's instruction file")
    files = {name: Path(data.benchmark_root, f"{BENCHMARKS[name].file}.tsv") for name in data.benchmarks}
    if absent := [file for file in files.values() if not file.is_file()]:
        raise UserError(f"data.benchmark_root={data.benchmark_root}: no file {absent[0].name} there")
    for name, file in files.items():
        _add_benchmark(BENCHMARKS[name], file, folder / BENCHMARKS_FOLDER / f"{name}.tsv", data)
    return Path(data.image_root), {file.name: sha256(file) for file in (path, *files.values())}


# ------------------------------------------------------------------------------------------------------------ command


def _check_config(data: DataConfig) -> None:
    for name, allowed in (("source", SOURCES), ("on_fault", ON_FAULT), ("check_images", CHECK_IMAGES)):
        if (value := getattr(data, name)) not in allowed:
            raise UserError(f"data.{name} must be one of {', '.join(allowed)}, found {value!r}")
    if unknown := [name for name in data.benchmarks if name not in BENCHMARKS]:
        raise UserError(f"data.benchmarks: unknown benchmark {unknown[0]!r}; expected some of {', '.join(BENCHMARKS)}")
    for name in ("train_items", "test_items", "validation_items"):
        if (count := getattr(data, name)) is not None and count < 1:
            raise UserError(f"data.{name} must be positive or null, found {count}")


def prepare(data: DataConfig) -> dict[str, Any]:
    """Reads, checks and writes the data of one configuration to ``data.dir``; returns the manifest.

    The folder appears whole or not at all, and replaces an earlier one only at the end.

    Raises:
        UserError: for any bad input.
    """
    _check_config(data)
    with new_folder(Path(data.dir)) as folder:
        generated = data.source == "smoke"
        image_root, sources = (_generate if generated else _copy)(folder, data)
        path = folder / TRAIN_FILE if generated else Path(data.path)
        items, faults = _training_items(path, image_root, data, None if generated else data.train_items)
        (folder / TRAIN_FILE).write_text(json.dumps(items, ensure_ascii=False, indent=1), encoding="utf-8")
        manifest = {
            "source": data.source,
            "sources": sources,
            "image_root": None if generated else str(image_root.resolve()),
            "subset": {
                "train_items": data.train_items,
                "test_items": data.test_items,
                "validation_items": data.validation_items,
                "seed": data.subset_seed,
            },
            "check_images": data.check_images,
            "train": _describe(items, faults),
        }
        for part in (BENCHMARKS_FOLDER, VALIDATION_FOLDER):
            files = {name: folder / part / f"{name}.tsv" for name in data.benchmarks}
            manifest[part] = {
                name: _check_benchmark(BENCHMARKS[name], file, data) for name, file in files.items() if file.exists()
            }
        return write_manifest(folder, manifest, summarised=(IMAGES_FOLDER,))


def main(config: Config) -> None:
    manifest = prepare(config.data)
    train = manifest["train"]
    logger.info("train: %d items, %d with one of %d images", train["items"], train["with_image"], train["images"])
    for part in (BENCHMARKS_FOLDER, VALIDATION_FOLDER):
        for name, entry in manifest[part].items():
            logger.info("%s/%s: %d questions in %d rows", part, name, entry["questions"], entry["items"])
    logger.info("written to %s", config.data.dir)


if __name__ == "__main__":
    launch.run(main, Config, CONF_MODULE, not_in_label=NOT_IN_LABEL)

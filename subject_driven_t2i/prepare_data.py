"""Prepares the subjects: ``python -m subject_driven_t2i.prepare_data scale=smoke``.

    data.dir/
        subjects.json            [{name, class_name, live, token, images, prompts}]
        subjects/<name>/NN.png   RGB, turned as its EXIF orientation says, transparent parts on white
        manifest.json            source, subjects, sha256 of every file

``data.source=folder`` reads DreamBooth's folder (https://github.com/google/dreambooth): a folder of images for each
subject, and ``prompts_and_classes.txt``; a subject of one's own is another folder and another line there.
``data.source=hub`` reads a dataset repository of that layout. ``data.source=smoke`` paints the smoke world's subjects.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from moslora_core import launch
from moslora_core.base_models import loading
from moslora_core.errors import UserError
from moslora_core.prepared import new_folder, sha256, write_manifest

from . import smoke_world
from .config import CONF_MODULE, NOT_IN_LABEL, Config, DataConfig
from .subjects import PROMPTS_FILE, SUBJECTS_FOLDER, NewSubject, check_template, read_dreambooth, write_subjects

logger = logging.getLogger(__name__)

SOURCES = ("smoke", "folder", "hub")


def _smoke(data: DataConfig) -> tuple[Iterable[NewSubject], dict[str, str]]:
    """Subjects of the smoke world, and where they come from."""
    found = {subject.name: subject for subject in smoke_world.subjects()}
    names = list(found) if data.subjects is None else data.subjects
    if unknown := [name for name in names if name not in found]:
        raise UserError(f"data.subjects: no subject {unknown[0]!r} in the smoke world; it has {', '.join(found)}")
    subjects = [
        NewSubject(name, found[name].class_name, False, found[name].images, found[name].prompts) for name in names
    ]
    return subjects, {"generated": "smoke world"}


def _dreambooth(data: DataConfig) -> tuple[Iterable[NewSubject], dict[str, str]]:
    if data.path is None:
        raise UserError(f"data.source={data.source} needs data.path: DreamBooth's folder, or a repository of it")
    root = Path(data.path)
    if data.source == "hub":
        root = _download(data.path, data.revision)
    if not (root / PROMPTS_FILE).is_file() and (root / "dataset" / PROMPTS_FILE).is_file():
        root = root / "dataset"  # a clone of the repository
    subjects = read_dreambooth(root, data)
    return subjects, {PROMPTS_FILE: sha256(root / PROMPTS_FILE) if (root / PROMPTS_FILE).is_file() else "missing"}


def _download(name: str, revision: str | None) -> Path:
    return Path(loading(lambda: snapshot_download(name, repo_type="dataset", revision=revision), f"data.path={name}"))


def prepare(data: DataConfig) -> dict[str, Any]:
    """Reads, checks and writes the subjects of a configuration to ``data.dir``; returns the manifest.

    The folder appears whole or not at all, and replaces an earlier one only at the end.

    Raises:
        UserError: for any bad input.
    """
    if data.source not in SOURCES:
        raise UserError(f"data.source must be one of {', '.join(SOURCES)}, found {data.source!r}")
    if data.min_size < 1:
        raise UserError(f"data.min_size must be positive, found {data.min_size}")
    if not data.token.strip() or len(data.token.split()) > 1:
        raise UserError(f"data.token must be one word, found {data.token!r}")
    check_template(data.instance_prompt, "data.instance_prompt")
    with new_folder(Path(data.dir)) as folder:
        found, sources = (_smoke if data.source == "smoke" else _dreambooth)(data)
        subjects = write_subjects(folder, found, data.token)
        manifest = {
            "source": data.source,
            "sources": sources,
            "token": data.token,
            "subjects": {
                name: {
                    "class": subject.class_name,
                    "live": subject.live,
                    "images": len(subject.images),
                    "prompts": len(subject.prompts),
                }
                for name, subject in subjects.items()
            },
        }
        return write_manifest(folder, manifest, summarised=(SUBJECTS_FOLDER,))


def main(config: Config) -> None:
    manifest = prepare(config.data)
    for name, entry in manifest["subjects"].items():
        kind = "a living thing" if entry["live"] else "an object"
        logger.info(
            "%s: %s (%s), %d images, %d prompts", name, entry["class"], kind, entry["images"], entry["prompts"]
        )
    logger.info("written to %s", config.data.dir)


if __name__ == "__main__":
    launch.run(main, Config, CONF_MODULE, not_in_label=NOT_IN_LABEL)

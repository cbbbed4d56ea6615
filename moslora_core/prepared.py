"""Prepared data: a folder that appears whole or not at all, and its manifest.

What prepare_data of an experiment writes and the other commands read. The manifest says where the data came from,
which subset of it was taken and the sha256 of what was written.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import UserError
from .record import files_below, locked, read_json

MANIFEST_FILE = "manifest.json"


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def new_folder(target: Path, setting: str = "data.dir") -> Iterator[Path]:
    """An empty folder to fill, which takes the place of ``target`` when the block ends without an error.

    An earlier ``target`` stays as it is until then, and is replaced only if it is empty or has a manifest. What a
    killed process left beside it is removed, or put back if it was replacing ``target``.

    Args:
        setting: what names the folder, for errors.

    Raises:
        UserError: a target that cannot be written, that holds something else or that another process fills.
    """
    _refuse_other(target, setting)  # at once: filling may take hours
    place = target.absolute()  # which has a name where target is the working folder
    new, old, lock = (place.with_name(f".{place.name}.{kind}") for kind in ("new", "old", "lock"))
    with locked(lock, f"{setting}={target}"):
        try:
            _tidy(target, new, old)
            new.mkdir()
            yield new
            _refuse_other(target, setting)
            if target.exists():
                target.rename(old)  # removed only when the new folder has its place
            new.rename(target)
        except OSError as error:
            raise UserError(f"cannot write {setting}={target}: {error.strerror}") from None
        finally:
            _tidy(target, new, old)
            lock.unlink(missing_ok=True)


def _tidy(target: Path, new: Path, old: Path) -> None:
    if old.exists() and not target.exists():
        old.rename(target)
    for folder in (new, old):
        shutil.rmtree(folder, ignore_errors=True)


def _refuse_other(target: Path, setting: str) -> None:
    try:
        other = target.exists() and not (target / MANIFEST_FILE).exists() and any(target.iterdir())
    except OSError as error:
        raise UserError(f"cannot write {setting}={target}: {error.strerror}") from None
    if other:
        raise UserError(f"{setting}={target} holds something else; expected a manifest in it or no such folder")


def write_manifest(folder: Path, manifest: dict[str, Any], summarised: Sequence[str] = ()) -> dict[str, Any]:
    """Writes ``manifest`` to ``folder`` with the sha256 of every file there as ``files``; returns it so.

    Args:
        summarised: subfolders of many files, each with one digest over the names and digests of its files.
    """
    files: dict[str, str] = {}
    inside = {name: hashlib.sha256() for name in summarised}
    for path in files_below(folder):
        name = path.relative_to(folder).as_posix()
        part = name.split("/", 1)[0]
        if part in inside:
            inside[part].update(f"{name} {sha256(path)}\n".encode())
        else:
            files[name] = sha256(path)
    files |= {f"{part}/": digest.hexdigest() for part, digest in inside.items() if (folder / part).is_dir()}
    manifest = {**manifest, "files": files}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def read_manifest(folder: Path, command: str) -> dict[str, Any]:
    """The manifest of prepared data.

    Args:
        command: the module that prepares it, for the error.

    Raises:
        UserError: no prepared data, or a damaged manifest.
    """
    path = folder / MANIFEST_FILE
    if not path.exists():
        raise UserError(f"data.dir={folder}: no prepared data; run python -m {command} with the same settings first")
    manifest = read_json(path)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("subset", {}), dict):
        raise UserError(f"{path} is damaged: expected what prepare_data writes")
    return manifest


def check_subset(folder: Path, manifest: dict[str, Any], train_items: int | None, subset_seed: int) -> None:
    """Checks that the prepared training items are the subset that a configuration asks for."""
    subset = manifest.get("subset", {})
    asked = {"train_items": ("train_items", train_items)}
    if train_items is not None:
        asked["seed"] = ("subset_seed", subset_seed)
    for key, (name, value) in asked.items():
        if subset.get(key) != value:
            raise UserError(
                f"data.{name}={value}, but {folder} was prepared with {subset.get(key)}; "
                "run prepare_data with the same settings, or name another data.dir"
            )

"""A prepared folder: whole or not at all, and what its manifest says."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from moslora_core.errors import UserError
from moslora_core.prepared import check_subset, new_folder, read_manifest, write_manifest


def fill(target: Path, text: str) -> None:
    with new_folder(target) as folder:
        (folder / "items.json").write_text(text)
        write_manifest(folder, {"subset": {"train_items": 3, "seed": 1}})


def test_a_folder_takes_its_place_and_replaces_an_earlier_one(tmp_path):
    target = tmp_path / "deep" / "data"
    fill(target, "one")
    fill(target, "two")
    assert (target / "items.json").read_text() == "two"
    assert [path.name for path in target.parent.iterdir()] == ["data"]


def test_an_error_leaves_what_was_there(tmp_path):
    target = tmp_path / "data"
    fill(target, "one")
    with pytest.raises(RuntimeError, match="half way"), new_folder(target) as folder:
        (folder / "items.json").write_text("half")
        raise RuntimeError("half way")
    assert (target / "items.json").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def fork(work) -> multiprocessing.Process:
    child = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    child.start()
    return child


def test_one_process_fills_a_folder_and_what_it_leaves_when_it_is_killed_is_removed(tmp_path):
    target = tmp_path / "data"
    fill(target, "one")
    filling = multiprocessing.get_context("fork").Event()

    def fill_for_ever() -> None:
        with new_folder(target) as folder:
            (folder / "items.json").write_text("half")
            filling.set()
            time.sleep(600)

    child = fork(fill_for_ever)
    assert filling.wait(60)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=rf"^data\.dir={target} is in use by another process; wait for it or stop it$"):
        fill(target, "two")
    assert sorted(tmp_path.rglob("*")) == before, "a living process keeps its own"
    child.kill()
    child.join()
    assert (target / "items.json").read_text() == "one" and len(list(tmp_path.iterdir())) > 1
    fill(target, "two")
    assert (target / "items.json").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_kill_while_a_folder_is_replaced_loses_neither(tmp_path, monkeypatch):
    target = tmp_path / "data"
    fill(target, "one")
    rename = Path.rename

    def killed_in_between(path: Path, to: Path) -> None:
        rename(path, to)
        os.kill(os.getpid(), signal.SIGKILL)

    def replace() -> None:
        monkeypatch.setattr(Path, "rename", killed_in_between)
        fill(target, "two")

    fork(replace).join()
    assert not target.exists()
    with pytest.raises(RuntimeError, match="half way"), new_folder(target):
        raise RuntimeError("half way")
    assert (target / "items.json").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_the_manifest_has_the_digest_of_every_file_or_of_a_subfolder(tmp_path):
    def write(folder: Path, *, second: str) -> dict:
        (folder / "images" / "a").mkdir(parents=True)
        (folder / "plain" / "sub").mkdir(parents=True)
        (folder / "items.json").write_text("x")
        (folder / "plain" / "sub" / "b").write_text("y")
        (folder / "images" / "a" / "1").write_text("1")
        (folder / "images" / second).write_text("2")
        manifest = write_manifest(folder, {"source": "tests"}, summarised=("images", "absent"))
        assert json.loads((folder / "manifest.json").read_text()) == manifest
        return manifest

    one = write(tmp_path / "one", second="2")
    assert one["source"] == "tests"
    assert set(one["files"]) == {"items.json", "plain/sub/b", "images/"}
    assert one["files"]["items.json"] == hashlib.sha256(b"x").hexdigest()
    assert one["files"] == write(tmp_path / "two", second="2")["files"]
    assert one["files"]["images/"] != write(tmp_path / "three", second="renamed")["files"]["images/"]


@pytest.mark.parametrize("content", ["[", "[]", '{"subset": 3}'])
def test_a_damaged_manifest_is_named(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json.* is damaged"):
        read_manifest(tmp_path, "x.prepare_data")


def test_missing_data_name_the_command(tmp_path):
    with pytest.raises(UserError, match=r"no prepared data; run python -m x\.prepare_data"):
        read_manifest(tmp_path / "nowhere", "x.prepare_data")


@pytest.mark.parametrize(
    ("items", "seed", "expected"),
    [
        (3, 1, None),
        (4, 1, "data.train_items=4, but .* was prepared with 3"),
        (None, 1, "data.train_items=None, but"),
        (3, 0, "data.subset_seed=0, but .* was prepared with 1"),
    ],
)
def test_the_subset_must_be_the_prepared_one(tmp_path, items, seed, expected):
    fill(tmp_path / "data", "x")
    manifest = read_manifest(tmp_path / "data", "x.prepare_data")
    if expected is None:
        check_subset(tmp_path / "data", manifest, items, seed)
    else:
        with pytest.raises(UserError, match=expected):
            check_subset(tmp_path / "data", manifest, items, seed)

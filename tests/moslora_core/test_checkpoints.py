"""Checkpoints: the seal and what it finds, which one a run goes on from, which ones are removed."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from moslora_core.checkpoints import SEAL, Sealing, damage, newest_whole, numbered, seal, writing
from moslora_core.errors import UserError
from moslora_core.record import read_json, write_json


def written(folder: Path, step: int) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    (checkpoint / "global_step").mkdir(parents=True)
    (checkpoint / "optimizer.pt").write_bytes(bytes(range(256)))
    (checkpoint / "global_step" / "rank_0.pt").write_bytes(b"a shard of a process")
    return checkpoint


def sealed(folder: Path, step: int, processes: int = 1) -> Path:
    checkpoint = written(folder, step)
    seal(checkpoint, processes)
    return checkpoint


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def edit_seal(checkpoint: Path, **changes: object) -> None:
    write_json(checkpoint / SEAL, read_json(checkpoint / SEAL) | changes)


# --------------------------------------------------------------------------------------------------------------- seal


def test_a_sealed_checkpoint_is_whole_and_what_is_not_sealed_was_being_written(tmp_path):
    assert damage(sealed(tmp_path, 1)) is None
    assert "checkpoint-2 has no seal.json: it was being written" in damage(written(tmp_path, 2))


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (lambda c: flip(c / "optimizer.pt", 200), "optimizer.pt is damaged: its sha256"),
        (lambda c: truncate(c / "global_step" / "rank_0.pt"), "global_step/rank_0.pt is damaged: its sha256"),
        (lambda c: (c / "optimizer.pt").write_bytes(b""), "optimizer.pt is damaged: its sha256"),
        (lambda c: (c / "optimizer.pt").unlink(), "optimizer.pt is missing"),
        (lambda c: truncate(c / SEAL) or truncate(c / SEAL), "seal.json is damaged: "),
        (lambda c: (c / SEAL).write_text("[]"), "seal.json is damaged: "),
        (lambda c: edit_seal(c, files=3), "seal.json is damaged: files must be an object, found 3"),
        (lambda c: edit_seal(c, files={"optimizer.pt": 3}), "seal.json is damaged: files.optimizer.pt must be text"),
        (lambda c: edit_seal(c, processes=None), "seal.json is damaged: processes must be a whole number"),
        (lambda c: edit_seal(c, processes="1"), "seal.json is damaged: processes must be a whole number"),
        (lambda c: edit_seal(c, processes=0), "seal.json is damaged: processes must be a whole number of at least 1"),
        (lambda c: (c / SEAL).write_text('{"files": {}}'), "seal.json is damaged: processes is missing"),
    ],
)
def test_damage_is_named(tmp_path, harm, expected):
    checkpoint = sealed(tmp_path, 1)
    harm(checkpoint)
    assert str(tmp_path) in damage(checkpoint) and expected in damage(checkpoint)


def test_a_run_goes_on_from_the_newest_whole_one(tmp_path, caplog):
    for step in (9, 10, 11):  # by number: as text, 9 would be the last
        sealed(tmp_path, step)
    written(tmp_path, 12)
    assert newest_whole(tmp_path, 1).name == "checkpoint-11"
    flip(tmp_path / "checkpoint-11" / "optimizer.pt", 3)
    sealed(tmp_path, 13)
    edit_seal(tmp_path / "checkpoint-13", processes="one")
    caplog.clear()
    assert newest_whole(tmp_path, 1).name == "checkpoint-10"
    no_number, unfinished, damaged = caplog.messages
    assert "checkpoint-13/seal.json is damaged: processes" in no_number
    assert "checkpoint-12 has no seal.json" in unfinished and "checkpoint-11/optimizer.pt is damaged" in damaged
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}" / SEAL).unlink()
    assert newest_whole(tmp_path, 1) is None and newest_whole(tmp_path / "absent", 1) is None
    assert len(numbered(tmp_path)) == 5, "all of them stay: other processes may be looking too"


def test_another_number_of_processes_is_refused(tmp_path):
    sealed(tmp_path, 2, processes=2)
    assert newest_whole(tmp_path, 2).name == "checkpoint-2"
    with pytest.raises(
        UserError, match=r"checkpoint-2 is of a training on 2 processes, but 1 started; start torchrun"
    ):
        newest_whole(tmp_path, 1)


# ----------------------------------------------------------------------------------------------------------- rotation


def state(step: int, best: str | None = None, main: bool = True) -> SimpleNamespace:
    return SimpleNamespace(is_world_process_zero=main, global_step=step, best_model_checkpoint=best)


def test_the_oldest_by_step_go_whatever_the_clock_says(tmp_path):
    sealing = Sealing(tmp_path, keep=2, processes=1)
    for number, step in enumerate((8, 9, 10, 11)):
        written(tmp_path, step)
        os.utime(tmp_path / f"checkpoint-{step}", (1e9 - 3600 * number,) * 2)  # every hour an hour back
        sealing.on_save(None, state(step), None)
        assert damage(tmp_path / f"checkpoint-{step}") is None
    assert list(numbered(tmp_path)) == [10, 11]


def test_the_best_one_stays(tmp_path):
    sealing = Sealing(tmp_path, keep=1, processes=1)
    for step in (1, 2, 3):
        written(tmp_path, step)
        sealing.on_save(None, state(step, best=str(tmp_path / "checkpoint-1")), None)
    assert list(numbered(tmp_path)) == [1, 3]


def test_an_older_one_is_kept_until_the_new_one_is_sealed(tmp_path, monkeypatch):
    sealing = Sealing(tmp_path, keep=1, processes=1)
    written(tmp_path, 1)
    sealing.on_save(None, state(1), None)
    written(tmp_path, 2)

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("moslora_core.checkpoints.write_json", killed)
        sealing.on_save(None, state(2), None)
    assert newest_whole(tmp_path, 1).name == "checkpoint-1"


def test_only_the_first_process_seals_and_removes(tmp_path):
    sealing = Sealing(tmp_path, keep=1, processes=2)
    written(tmp_path, 1)
    sealing.on_save(None, state(1, main=False), None)
    sealing.on_train_begin(None, state(0, main=False), None)
    assert "no seal" in damage(tmp_path / "checkpoint-1")


def test_what_lies_beyond_the_point_of_resuming_is_removed(tmp_path):
    for step in (1, 2, 3):
        sealed(tmp_path, step)
    Sealing(tmp_path, keep=3, processes=1).on_train_begin(None, state(1), None)
    assert list(numbered(tmp_path)) == [1]


# ------------------------------------------------------------------------------------------------------------ writing


def _full(*args):
    raise OSError(errno.ENOSPC, "No space left on device", "a/file")


@pytest.mark.parametrize(
    ("fail", "expected"),
    [
        (_full, "cannot write a/file: No space left on device"),
        (lambda path: save_file({"a": torch.zeros(2)}, path / "absent" / "x"), "No such file or directory"),
        (lambda path: torch.save(torch.zeros(99999), "/dev/full"), "writing failed; is the disk full?"),
    ],
)
def test_what_libraries_say_of_a_disk_is_told_in_a_line(tmp_path, fail, expected):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no device that is always full")
    with pytest.raises(UserError) as caught, writing(tmp_path):
        fail(tmp_path)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error", [RuntimeError("size mismatch"), FileNotFoundError(2, "No such file"), UserError("x")]
)
def test_other_errors_stay_what_they_are(tmp_path, error):
    with pytest.raises(type(error)) as caught, writing(tmp_path):
        raise error
    assert caught.value is error

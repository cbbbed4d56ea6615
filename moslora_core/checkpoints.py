"""Resumable checkpoints of a training: sealed when they are whole, compared with their seal before they are used.

Trainer writes a checkpoint file by file into its place, and several processes may write to it. ``seal.json``, written
when all of them have, holds the sha256 of every file: a checkpoint without one was being written when the run was
killed, and one that differs from its seal was damaged since. Checkpoints are ordered by their steps, never by the
times of their files: a clock that goes backwards would otherwise make the newest the first to be removed.
"""

from __future__ import annotations

import errno
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from safetensors import SafetensorError
from transformers import TrainerCallback

from .errors import UserError
from .prepared import sha256
from .record import files_below, read_json, sync, write_json
from .typed import build

logger = logging.getLogger(__name__)

SEAL = "seal.json"
_NAME = re.compile(r"checkpoint-(\d+)")
# What torch.save says of a file that it cannot write, in whichever of its layers it notices.
_TORCH_SAVE = ("PytorchStreamWriter failed", "inline_container.cc", "iostream error")
_NOT_WRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


@dataclass(frozen=True)
class _Seal:
    """Attributes: number of processes whose states a checkpoint holds, and sha256 of its files by name."""

    processes: Annotated[int, 1]
    files: dict[str, str]


def numbered(folder: Path) -> dict[int, Path]:
    """Step -> checkpoint below ``folder``, the earliest first, whole or not."""
    found = {path: _NAME.fullmatch(path.name) for path in folder.glob("checkpoint-*") if path.is_dir()}
    return dict(sorted((int(match[1]), path) for path, match in found.items() if match))


def seal(checkpoint: Path, processes: int) -> None:
    """Writes every file of a checkpoint out to the disk, and then its seal.

    Args:
        processes: number of processes whose states it holds.

    Raises:
        UserError: a file that cannot be written.
    """
    sync(checkpoint)
    paths = [path for path in files_below(checkpoint) if path != checkpoint / SEAL]
    files = {path.relative_to(checkpoint).as_posix(): sha256(path) for path in paths}
    write_json(checkpoint / SEAL, asdict(_Seal(processes, files)))


def _read_seal(checkpoint: Path) -> _Seal:
    path = checkpoint / SEAL
    return build(_Seal, read_json(path), f"{path} is damaged")


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in words that name the file; None if it is as it was sealed."""
    if not (checkpoint / SEAL).exists():
        return f"{checkpoint} has no {SEAL}: it was being written when the run stopped"
    try:
        for name, expected in _read_seal(checkpoint).files.items():
            if not (checkpoint / name).is_file():
                return f"{checkpoint / name} is missing"
            if sha256(checkpoint / name) != expected:
                return f"{checkpoint / name} is damaged: its sha256 is not the one in {SEAL}"
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"{checkpoint} cannot be read: {error}"
    return None


def newest_whole(folder: Path, processes: int) -> Path | None:
    """The last checkpoint below ``folder`` that is as it was sealed; None where there is none.

    Damaged and unfinished ones stay where they are, since other processes may be looking too; those above the one that
    a training goes on from are removed by :class:`Sealing`.

    Raises:
        UserError: it is of another number of processes.
    """
    for checkpoint in reversed(numbered(folder).values()):
        if (wrong := damage(checkpoint)) is not None:
            logger.warning("%s; going on from before it", wrong)
            continue
        if (found := _read_seal(checkpoint).processes) != processes:
            raise UserError(
                f"{checkpoint} is of a training on {found} process{'es' if found > 1 else ''}, but {processes} "
                f"started; start torchrun --nproc_per_node {found}, or remove the folder to begin anew"
            )
        return checkpoint
    return None


class Sealing(TrainerCallback):
    """Seals every checkpoint that Trainer writes, and then removes those that are too many.

    Trainer's own ``save_total_limit`` would remove an older one before the new one is whole, and goes by the times of
    the files.

    Args:
        keep: number of checkpoints; the best one, if Trainer looks for it, is kept beside them.
        processes: of the training.
    """

    def __init__(self, folder: Path, keep: int, processes: int):
        self.folder, self.keep, self.processes = folder, keep, processes

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            for step, checkpoint in numbered(self.folder).items():
                if step > state.global_step:
                    shutil.rmtree(checkpoint)

    def on_save(self, args, state, control, **kwargs):
        _wait_for_all()
        if not state.is_world_process_zero:
            return
        seal(self.folder / f"checkpoint-{state.global_step}", self.processes)
        best = None if state.best_model_checkpoint is None else Path(state.best_model_checkpoint).name
        for checkpoint in list(numbered(self.folder).values())[: -self.keep]:
            if checkpoint.name != best:
                shutil.rmtree(checkpoint)


def _wait_for_all() -> None:
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Tells in a line that a file below ``folder`` could not be written, in the block's calls of libraries.

    Torch and safetensors have errors of their own for a full disk; theirs and the system's come out as a UserError.
    """
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        if error.errno not in _NOT_WRITTEN:
            raise
        raise UserError(f"cannot write {error.filename or folder}: {error.strerror}") from None
    except (SafetensorError, RuntimeError) as error:
        reason = re.search(r"[A-Z][\w ]+ \(os error \d+\)", str(error))
        if reason is None and not any(mark in str(error) for mark in _TORCH_SAVE):
            raise
        told = reason[0] if reason else "writing failed; is the disk full?"
        raise UserError(f"cannot write a file below {folder}: {told}") from None

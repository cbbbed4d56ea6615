"""Model folders as files: tensors read by name from safetensors, and written in shards, complete or not at all."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import PretrainedConfig, PreTrainedModel

from moslora_core.adapter_files import check_output
from moslora_core.errors import UserError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4 * 2**30

Shape = tuple[int, ...]


# ------------------------------------------------------------------------------------------------------------ reading


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UserError: no such file, or something else in it.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; expected a JSON object") from None
    except ValueError as error:
        raise UserError(f"{path}: no JSON ({error})") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds a JSON {type(found).__name__}; expected an object")
    return found


def read_config(folder: Path, expected: tuple[str, ...]) -> dict[str, Any]:
    """``config.json`` of a model folder, of one of the ``expected`` values of ``model_type``.

    Raises:
        UserError: no such folder, no configuration in it, or another kind of model.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected a downloaded model ({CONFIG} and safetensors)")
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: has no {CONFIG}; expected a model folder ({' or '.join(expected)})")
    config = read_json(folder / CONFIG)
    if config.get("model_type") not in expected:
        raise UserError(
            f"{folder / CONFIG}: model_type is {config.get('model_type')!r}; expected {' or '.join(expected)}"
        )
    return config


def parse_config(kind: type[PretrainedConfig], values: Mapping[str, Any], path: Path) -> PretrainedConfig:
    """transformers' configuration from the JSON object of ``path``.

    Raises:
        UserError: values that transformers refuses, by type or because they contradict each other.
    """
    try:
        return kind.from_dict(dict(values))
    except Exception as error:  # the validators of huggingface_hub have exceptions of their own
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(f"{path}: {' '.join(lines)[:300] or type(error).__name__}") from None


class Checkpoint:
    """Tensors of a model folder by name, read from ``model.safetensors`` or its shards one at a time.

    Raises:
        UserError: no safetensors (pickled weights are named and not opened), or a shard that is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if (folder / INDEX).is_file():
            names = read_json(folder / INDEX).get("weight_map")
            if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
                raise UserError(f"{folder / INDEX}: has no weight_map of names and files")
            self._files = {name: folder / file for name, file in names.items()}
        elif (folder / WEIGHTS).is_file():
            with _opened(folder / WEIGHTS) as file:
                self._files = dict.fromkeys(file.keys(), folder / WEIGHTS)
        else:
            pickles = sorted(path.name for path in folder.glob("*.bin"))
            raise UserError(
                f"{folder}: holds {pickles[0]}, a pickle, which is not read; expected {WEIGHTS} or its shards (take a "
                "revision of the checkpoint with safetensors: the hub's space safetensors/convert makes one)"
                if pickles
                else f"{folder}: has neither {WEIGHTS} nor {INDEX}; expected a model's weights"
            )
        for path in sorted(set(self._files.values())):
            if not path.is_file():
                raise UserError(f"{path}: missing, though {INDEX} names it; download the checkpoint again")

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def read(self, name: str, shape: Shape | None = None) -> torch.Tensor:
        """One tensor, on the CPU.

        Raises:
            UserError: no such tensor, one of another ``shape``, or a damaged file.
        """
        if name not in self._files:
            raise UserError(f"{self.folder}: has no tensor {name}; the checkpoint is incomplete or of another layout")
        path = self._files[name]
        with _opened(path) as file:
            try:
                found = tuple(file.get_slice(name).get_shape())
                if shape is not None and found != shape:
                    raise UserError(f"{path}: {name} has shape {found}; expected {shape} by {CONFIG}")
                return file.get_tensor(name)
            except SafetensorError as error:
                raise UserError(f"{path}: {name} cannot be read ({error})") from None


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        file = safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a complete safetensors file ({str(error).splitlines()[0]})") from None
    with file:
        yield file


def shapes_of(kind: type[PreTrainedModel], config: PretrainedConfig) -> dict[str, Shape]:
    """Names and shapes of the tensors that a checkpoint of this model must have; tied ones are counted once."""
    with torch.device("meta"):
        model = kind(config)
    return {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}


# ------------------------------------------------------------------------------------------------------------ writing


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary sibling that becomes ``folder`` when the block ends without an exception, and is removed otherwise.

    Raises:
        UserError: ``folder`` is not empty, or cannot be written.
    """
    check_output(folder)
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    try:
        temporary.mkdir(parents=True)
        yield temporary
        # Renaming onto an empty folder replaces it; onto one that filled up meanwhile it fails.
        os.replace(temporary, folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_weights(
    folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], total: int, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes named tensors as ``model.safetensors``, or as shards with their index where they exceed ``shard_bytes``.

    Args:
        tensors: names and tensors, made one by one; a shard at most is held in memory.
        total: how many there are, for the progress bar.
    """
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    pending_bytes = all_bytes = 0

    def flush() -> None:
        save_file(pending, folder / f"{len(shards)}.part", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tqdm(tensors, desc="weights", total=total, unit="tensor", leave=False):
        if pending and pending_bytes + tensor.nbytes > shard_bytes:
            flush()
            pending_bytes = 0
        # A row or a column block of a larger tensor would be written with all of it.
        pending[name] = tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor.contiguous()
        pending_bytes += tensor.nbytes
        all_bytes += tensor.nbytes
    flush()
    if len(shards) == 1:
        (folder / "0.part").rename(folder / WEIGHTS)
        return
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{number}.part").rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": all_bytes}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

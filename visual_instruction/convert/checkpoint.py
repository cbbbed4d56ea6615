"""Checkpoint folders as plain files: tensors are looked up by name, and written shard by shard.

Shapes come from the headers of the safetensors files, so that a whole checkpoint is checked before its first tensor is
read; tensors are read one at a time, and at most one output shard is held in memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import PretrainedConfig

from moslora_core.adapter_files import read_pickle
from moslora_core.base_models import loading
from moslora_core.errors import UserError
from moslora_core.paths import is_below, is_file
from moslora_core.record import read_json

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_FILE = "pytorch_model.bin"
PICKLE_ENDINGS = (".bin", ".pt", ".pth")
SHARD_BYTES = 2 * 1024**3

Config = TypeVar("Config", bound=PretrainedConfig)

# Buffers that older versions of transformers saved; they follow from the configuration.
_DERIVED = re.compile(r"(?:.+\.)?(?:rotary_emb\.inv_freq|position_ids)")


# ----------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: its file, its name there, its shape."""

    file: Path
    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """Tensors of a folder or a file, read when they are asked for.

    Attributes:
        path: the folder or file, for errors.
        entries: name of a tensor -> where it lies.
        loaded: what a pickle holds, which cannot be read tensor by tensor.
    """

    path: Path
    entries: Mapping[str, Stored]
    loaded: Mapping[str, torch.Tensor]

    def view(self, rename: Callable[[str], str | None]) -> Checkpoint:
        """The same tensors under the names that ``rename`` gives, without those for which it gives None."""
        named = ((rename(name), entry) for name, entry in self.entries.items())
        return Checkpoint(self.path, {name: entry for name, entry in named if name is not None}, self.loaded)

    def tensors(self, what: str) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors with their names, on the CPU, file by file; a terminal shows progress, titled ``what``."""
        files: dict[Path, dict[str, str]] = {}
        for name, entry in self.entries.items():
            files.setdefault(entry.file, {})[name] = entry.name
        with tqdm(total=len(self.entries), desc=what, unit="tensor", disable=None) as bar:
            for file, names in files.items():
                if self.loaded:
                    read = ((name, self.loaded[stored]) for name, stored in names.items())
                else:
                    read = _read(file, names)
                for name, tensor in read:
                    yield name, tensor
                    bar.update()

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Checks that exactly ``expected`` is there.

        Raises:
            UserError: a tensor is missing, of another shape, or unknown.
        """
        for name, shape in expected.items():
            if name not in self.entries:
                raise UserError(f"{self.path}: has no tensor {name}; expected one of shape {shape}")
            if (found := self.entries[name].shape) != shape:
                raise UserError(f"{self.path}: {name} has shape {found}; expected {shape}")
        for name, entry in self.entries.items():
            if name not in expected:
                raise UserError(f"{self.path}: {entry.name} is not a tensor of such a model")


def _read(file: Path, names: Mapping[str, str]) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        with safe_open(file, framework="pt") as opened:
            for name, stored in names.items():
                yield name, opened.get_tensor(stored)
    except SafetensorError as error:
        raise UserError(f"{file}: not a complete safetensors file ({_first_line(error)})") from None


def read_config(folder: Path, model_type: str | tuple[str, ...]) -> dict[str, Any]:
    """``config.json`` of a model folder.

    Args:
        model_type: what the configuration must say it is.

    Raises:
        UserError: no such folder or file, no JSON object, or another kind of model.
    """
    expected = (model_type,) if isinstance(model_type, str) else model_type
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected a model downloaded to a local folder")
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"{folder}: has no {CONFIG_FILE}; expected a model's folder ({' or '.join(expected)})")
    config = read_json(folder / CONFIG_FILE)
    if not isinstance(config, dict):
        raise UserError(f"{folder / CONFIG_FILE}: holds a JSON {type(config).__name__}; expected an object")
    if (found := config.get("model_type")) not in expected:
        raise UserError(f"{folder / CONFIG_FILE}: model_type is {found!r}; expected {' or '.join(expected)}")
    return config


def parse_config(kind: type[Config], values: Mapping[str, Any], path: Path) -> Config:
    """transformers' configuration from the JSON object of ``path``.

    Raises:
        UserError: values that transformers refuses, by their type or because they contradict each other.
    """
    return loading(lambda: kind.from_dict(dict(values)), f"{path}: not a configuration of such a model")


def open_checkpoint(path: Path, *, allow_pickle: bool = False) -> Checkpoint:
    """The weights of a folder (sharded or not), or of one file.

    Args:
        allow_pickle: also read a pickle, with ``weights_only=True``: torch's own unpickler, which knows tensors and
            containers and refuses everything else, so that no code in the file can run.

    Raises:
        UserError: no weights, a missing or damaged shard, or a pickle that is not allowed or refused.
    """
    entries: dict[str, Stored] = {}
    for file in _weight_files(path, allow_pickle):
        if file.suffix in PICKLE_ENDINGS:
            loaded = {name: tensor for name, tensor in read_pickle(file).items() if not _DERIVED.fullmatch(name)}
            return Checkpoint(path, {n: Stored(file, n, tuple(t.shape)) for n, t in loaded.items()}, loaded)
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  (not a dictionary)
                    if not _DERIVED.fullmatch(name):
                        entries[name] = Stored(file, name, tuple(opened.get_slice(name).get_shape()))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: not a complete safetensors file ({_first_line(error)})") from None
    return Checkpoint(path, entries, {})


def _weight_files(path: Path, allow_pickle: bool) -> list[Path]:
    if path.is_file():
        return [path] if path.suffix not in PICKLE_ENDINGS or allow_pickle else _refuse_pickle(path, path.name)
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder; expected weights in safetensors format")
    if (index := path / INDEX_FILE).is_file():
        content = read_json(index)
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise UserError(f"{index}: has no weight_map; expected the names of tensors and their files")
        for name in (names := sorted(set(weight_map.values()))):
            if not is_below(name) or not is_file(path / name):
                raise UserError(f"{index}: names the file {name!r}, which is not in {path}")
        return [path / name for name in names]
    if (path / WEIGHTS_FILE).is_file():
        return [path / WEIGHTS_FILE]
    if allow_pickle and (path / PICKLE_FILE).is_file():
        return [path / PICKLE_FILE]
    if pickles := sorted(file.name for file in path.iterdir() if file.suffix in PICKLE_ENDINGS):
        return _refuse_pickle(path, pickles[0])
    raise UserError(f"{path}: has neither {WEIGHTS_FILE} nor {INDEX_FILE}; expected a model's weights")


def _refuse_pickle(path: Path, name: str) -> list[Path]:
    raise UserError(
        f"{path}: holds {name}, a pickle, which is not read; expected safetensors "
        "(https://huggingface.co/spaces/safetensors/convert makes them of a repository on the hub)"
    )


# ----------------------------------------------------------------------------------------------------------- writing


class ShardWriter:
    """Writes tensors in the order in which they come, as ``model.safetensors`` or as shards with their index."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES):
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._shards: list[list[str]] = []
        self._bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Takes a tensor in, and writes a shard when it is full."""
        if self._pending and sum(held.nbytes for held in self._pending.values()) + tensor.nbytes > self._shard_bytes:
            self._flush()
        tensor = tensor.contiguous()
        # safetensors refuses tensors that share memory, as parts of a split tensor may.
        whole = tensor.untyped_storage().nbytes() == tensor.nbytes
        self._pending[name] = tensor if whole else tensor.clone()
        self._bytes += tensor.nbytes

    def close(self) -> None:
        """Writes what is pending and gives the files the names that readers look for."""
        self._flush()
        if len(self._shards) == 1:
            self._part(0).rename(self._folder / WEIGHTS_FILE)
            return
        weight_map = {}
        for number, names in enumerate(self._shards):
            file = f"model-{number + 1:05d}-of-{len(self._shards):05d}.safetensors"
            self._part(number).rename(self._folder / file)
            weight_map |= dict.fromkeys(names, file)
        write_json(self._folder / INDEX_FILE, {"metadata": {"total_size": self._bytes}, "weight_map": weight_map})

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number}.safetensors"

    def _flush(self) -> None:
        save_file(self._pending, self._part(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending.clear()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]

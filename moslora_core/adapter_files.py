"""Saved adapter folders as plain files: read and written without PEFT, a base model or a model of any kind.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors``. Reading executes nothing from the folder: the
configuration is JSON, the weights are safetensors, and a pickled ``adapter_model.bin`` is refused.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .errors import UserError
from .record import read_json
from .typed import build, shown

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
CARD_NAME = "README.md"
PREFIX = "base_model.model."

_Rank = Annotated[int, 1]


@dataclass(frozen=True)
class _Kind:
    peft_type: str | None = None


@dataclass(frozen=True)
class _Settings:
    """The settings of LoRA that are used from its file; PEFT checks the type of none."""

    r: _Rank = 8
    lora_alpha: float = 8
    target_modules: list[str] | str | None = None  # names, or one regular expression
    exclude_modules: list[str] | str | None = None
    rank_pattern: dict[str, _Rank] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool | None = None


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
    """``adapter_config.json`` of a saved adapter as a dictionary.

    Raises:
        UserError: the folder or the file is missing, unreadable, or no JSON object, or a setting of LoRA is of
            another type.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected a saved adapter")
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise UserError(f"{folder}: has no {CONFIG_NAME}; expected a saved adapter")
    config = build(dict[str, Any], read_json(path), str(path))
    build(_Kind, config, str(path), others=True)
    if config.get("peft_type") in ("MOSLORA", "LORA", None):  # AdaLoRA's pattern of ranks is another thing
        settings = build(_Settings, config, str(path), others=True)
        for name in ("rank_pattern", "alpha_pattern"):
            for key in getattr(settings, name) or {}:
                regex(key, f"{path}: {name}")
    return config


def read_safetensors(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Tensors of one safetensors file, on the CPU.

    Raises:
        UserError: the file is missing, truncated, or something else than safetensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected an adapter's weights in safetensors format")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a complete safetensors file ({_first_line(error)})") from None


def read_pickle(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Tensors of a file that ``torch.save`` wrote, through torch's unpickler for tensors alone: no code in it runs.

    For files of others that exist in no other format; nothing of this project is pickled.

    Raises:
        UserError: the file is damaged, needs code to be read, or holds something else than tensors by name.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle fails in whatever way its first wrong byte leads to
        # Torch's explanation advises to switch the safe mode off; what the file did wrong stands at its end.
        refused = re.search(r"Unsupported (?:global|class|operand)[^.\n]*|GLOBAL \S+", str(error))
        reason = refused[0] if refused else "damaged, or not written by torch.save"
        raise UserError(f"{path}: not a plain pickle of tensors ({reason}); it was not executed") from None
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]  # mmengine's checkpoints
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in content.items()
    ):
        raise UserError(f"{path}: holds a {type(content).__name__}; expected a dictionary of names and tensors")
    return dict(content)


def read_weights(folder: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Tensors of ``adapter_model.safetensors`` in a saved adapter.

    Raises:
        UserError: there is none, it is damaged, or there is only a pickle.
    """
    folder = Path(folder)
    if not (folder / WEIGHTS_NAME).is_file() and (folder / PICKLE_NAME).is_file():
        raise UserError(f"{folder}: holds {PICKLE_NAME}, a pickle, which is not read; expected {WEIGHTS_NAME}")
    return read_safetensors(folder / WEIGHTS_NAME)


def check_output(folder: str | os.PathLike) -> Path:
    """The path of a folder that can be written: absent, or empty.

    Raises:
        UserError: it holds something, is a file, or lies where nothing can be written.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; expected the name of a folder to write")
    try:
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"{folder}: exists and is not empty; expected a new or empty folder")
        existing = next(parent for parent in folder.absolute().parents if parent.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise UserError(f"{folder}: cannot be written; {existing} is not a writable folder")
    except PermissionError as error:
        raise UserError(f"{folder}: cannot be written ({_first_line(error)})") from None
    return folder


@contextmanager
def new_folder(target: str | os.PathLike) -> Iterator[Path]:
    """An empty folder to fill, which becomes ``target`` when the block ends without an error, and vanishes otherwise.

    Raises:
        UserError: ``target`` is not empty or cannot be written.
    """
    target = check_output(target)
    # Not mkdtemp, which makes private folders: a finished one has the permissions of any other new folder.
    temporary = target.absolute().parent / f".{target.absolute().name}.{uuid.uuid4().hex}"
    try:
        temporary.mkdir(parents=True)
        yield temporary
        # Renaming onto an empty folder replaces it; onto one that filled up meanwhile it fails.
        os.replace(temporary, target)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{target}: cannot be written ({_first_line(error)})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_adapter(
    folder: str | os.PathLike,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    card_from: str | os.PathLike | None = None,
) -> Path:
    """Writes a saved adapter in one step: readers see all of the folder or none of it.

    Args:
        config: content of ``adapter_config.json``; sets are written as sorted lists.
        card_from: folder whose model card (``README.md``), if there is one, is copied.

    Raises:
        UserError: the folder exists and is not empty, or cannot be written.
    """
    with new_folder(folder) as temporary:
        # safetensors refuses tensors that share memory (tied weights), so that each gets its own.
        contents = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        save_file(contents, temporary / WEIGHTS_NAME, metadata={"format": "pt"})
        text = json.dumps(config, indent=2, sort_keys=True, default=_jsonable)
        (temporary / CONFIG_NAME).write_text(text, encoding="utf-8")
        if card_from is not None and (card := Path(card_from) / CARD_NAME).is_file():
            shutil.copyfile(card, temporary / CARD_NAME)
    return Path(folder)


def regex(text: str, where: str) -> re.Pattern:
    """A regular expression of the user's.

    Args:
        where: the setting that it stands in, for the error.

    Raises:
        UserError: it is none.
    """
    try:
        return re.compile(text)
    except (re.error, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"{where}: {shown(text)} is no regular expression ({error})") from None


def pattern_value(pattern: Mapping[str, Any] | None, default: Any, module: str) -> Any:
    """Value that a rank or alpha pattern gives a module, by PEFT's rule.

    The first key that, as a regular expression, matches the module's full name or a tail of it after a dot decides.

    Args:
        module: name in the base model, such as ``model.layers.0.self_attn.q_proj``.
    """
    for key, value in (pattern or {}).items():
        if regex(rf"(.*\.)?({key})$", "a pattern of modules").match(module):
            return value
    return default


def scaling_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Factor on B @ A: alpha / r, or alpha / sqrt(r) under rank-stabilised LoRA, with the module's own alpha."""
    # Multi-head attention's output projection is adapted inside the layer, with the layer's alpha.
    layer = module.split(".base_layer.")[0]
    alpha = pattern_value(config.get("alpha_pattern"), config.get("lora_alpha"), layer)
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool):
        raise UserError(f"{CONFIG_NAME}: lora_alpha of {module} is {alpha!r}; expected a number")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _jsonable(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} in an adapter's configuration has no JSON form")


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]

"""Pretrained projectors: two linear layers between the vision tower and the language model.

    XTuner         ProjectorModel (xtuner/model/modules/projector): model.0.weight, ...; config.json with depth,
                   hidden_act, bias; ``xtuner convert pth_to_hf`` writes it as the folder ``projector``
    LLaVA          mm_projector.bin: model.mm_projector.0.weight, ...
    transformers   multi_modal_projector.linear_1.weight, ...; what is written here

XTuner's own checkpoints (``epoch_1.pth``, the file that the authors' configurations name) and LLaVA's are pickles, and
are read only if the caller says so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.activations import ACT2FN

from moslora_core.adapter_files import check_output, new_folder
from moslora_core.errors import UserError
from moslora_core.record import read_json

from .checkpoint import CONFIG_FILE, ShardWriter, open_checkpoint, write_json

PREFIX = "multi_modal_projector."
MODEL_TYPE = "projector"  # XTuner's name

_LAYERS = {"0": "linear_1", "2": "linear_2"}
_NAME = re.compile(
    r"(?:(?:(?:projector\.)?model|(?:model\.)?mm_projector|(?:model\.)?multi_modal_projector)\.)?"
    r"(?P<layer>\d+|linear_[12])\.(?P<leaf>weight|bias)"
)


@dataclass(frozen=True)
class Projector:
    """A projector in transformers' names.

    Attributes:
        tensors: linear_1.weight (llm, vision), linear_2.weight (llm, llm), and linear_1.bias, linear_2.bias (llm,) or
            neither.
        hidden_act: activation between the layers.
    """

    tensors: Mapping[str, torch.Tensor]
    hidden_act: str = "gelu"

    @property
    def bias(self) -> bool:
        return "linear_1.bias" in self.tensors

    @property
    def vision_width(self) -> int:
        return self.tensors["linear_1.weight"].shape[1]

    @property
    def llm_width(self) -> int:
        return self.tensors["linear_2.weight"].shape[0]


def convert_projector(source: Path, out: Path, *, allow_pickle: bool = False) -> Path:
    """Writes a projector as a folder: config.json and model.safetensors in transformers' names.

    Args:
        source: folder or file in one of the layouts above.
        out: folder to write, new or empty; it appears complete or not at all.
        allow_pickle: see :func:`.checkpoint.open_checkpoint`.

    Raises:
        UserError: see :func:`read_projector`; or ``out`` is not empty or cannot be written.
    """
    check_output(out)
    projector = read_projector(source, allow_pickle=allow_pickle)
    with new_folder(out) as folder:
        write_projector(projector, folder)
    return out


def read_projector(source: Path, *, allow_pickle: bool = False) -> Projector:
    """A projector in any of the layouts above; tensors keep their dtype.

    A folder's configuration must agree with its weights. Without one (a file alone) the activation is LLaVA's, GELU.

    Raises:
        UserError: another depth than 2, tensors that are missing, unknown or do not fit, or a pickle.
    """
    # LLaVA's file has a name of its own.
    pickles = [source / name for name in ("mm_projector.bin",) if allow_pickle and (source / name).is_file()]
    checkpoint = open_checkpoint(pickles[0] if pickles else source, allow_pickle=allow_pickle)
    tensors = dict(checkpoint.view(lambda name: _rename(name, source)).tensors("projector"))
    _check_shapes(source, tensors)
    settings = _read_settings(source)
    projector = Projector(tensors, settings.get("hidden_act", "gelu"))
    found = {
        "visual_hidden_size": projector.vision_width,
        "llm_hidden_size": projector.llm_width,
        "depth": len(_LAYERS),
        "bias": projector.bias,
    }
    for key, value in found.items():
        if settings.get(key, value) != value:
            raise UserError(f"{source}: {CONFIG_FILE} says {key}={settings[key]}; the weights say {value}")
    return projector


def new_projector(vision_width: int, llm_width: int, dtype: torch.dtype, seed: int) -> Projector:
    """An untrained projector, drawn as LLaVA and XTuner draw theirs: U(-1/sqrt(in), 1/sqrt(in)), torch's default."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer, width in (("linear_1", vision_width), ("linear_2", llm_width)):
        for leaf, shape in (("weight", (llm_width, width)), ("bias", (llm_width,))):
            drawn = torch.rand(shape, generator=generator) * 2 - 1
            tensors[f"{layer}.{leaf}"] = (drawn / width**0.5).to(dtype)
    return Projector(tensors)


def write_projector(projector: Projector, folder: Path) -> None:
    """Writes a projector to an existing folder."""
    writer = ShardWriter(folder)
    for name, tensor in projector.tensors.items():
        writer.add(PREFIX + name, tensor)
    writer.close()
    settings = {
        "model_type": MODEL_TYPE,
        "visual_hidden_size": projector.vision_width,
        "llm_hidden_size": projector.llm_width,
        "depth": len(_LAYERS),
        "hidden_act": projector.hidden_act,
        "bias": projector.bias,
    }
    write_json(folder / CONFIG_FILE, settings)


def _rename(name: str, source: Path) -> str:
    match = _NAME.fullmatch(name)
    layer = match and _LAYERS.get(match["layer"], match["layer"])
    if match is None or layer not in _LAYERS.values():
        raise UserError(f"{source}: {name} is no part of a projector of depth 2; expected model.0 and model.2")
    return f"{layer}.{match['leaf']}"


def _check_shapes(source: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    leaves = ("weight", "bias") if any(name.endswith("bias") for name in tensors) else ("weight",)
    for name in (f"{layer}.{leaf}" for layer in _LAYERS.values() for leaf in leaves):
        if name not in tensors:
            raise UserError(
                f"{source}: has no {name} of the projector; found {', '.join(sorted(tensors)) or 'nothing'}"
            )
    if (first := tensors["linear_1.weight"]).ndim != 2:
        raise UserError(f"{source}: linear_1.weight has shape {tuple(first.shape)}; expected a matrix")
    width = first.shape[0]
    expected = {"linear_2.weight": (width, width), "linear_1.bias": (width,), "linear_2.bias": (width,)}
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != expected.get(name, tuple(tensor.shape)):
            raise UserError(f"{source}: {name} has shape {tuple(tensor.shape)}; expected {expected[name]}")


def _read_settings(source: Path) -> dict[str, Any]:
    """XTuner's settings beside the weights; of LLaVA's configuration only the type of its projector."""
    if not (source / CONFIG_FILE).exists():
        return {}
    settings = read_json(source / CONFIG_FILE)
    if not isinstance(settings, dict):
        raise UserError(f"{source / CONFIG_FILE}: holds a JSON {type(settings).__name__}; expected an object")
    if settings.get("model_type") == MODEL_TYPE:
        act = settings.get("hidden_act", "gelu")
        if not isinstance(act, str) or act not in ACT2FN:
            raise UserError(f"{source / CONFIG_FILE}: hidden_act is {act!r}; expected one of {', '.join(ACT2FN)}")
        return settings
    if (kind := settings.get("mm_projector_type")) == "mlp2x_gelu":
        return {}
    raise UserError(
        f"{source / CONFIG_FILE}: model_type is {settings.get('model_type')!r} and mm_projector_type {kind!r}; "
        f"expected XTuner's {MODEL_TYPE!r}, or LLaVA's 'mlp2x_gelu'"
    )

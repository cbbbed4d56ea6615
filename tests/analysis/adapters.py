"""Adapters of chosen factors beside the run records."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from moslora_core.adapter_files import write_adapter
from moslora_core.record import RunRecord

R = 3
MODULES = tuple(
    f"model.layers.{layer}.{kind}"
    for layer in (0, 1)
    for kind in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
)

Matrices = tuple[np.ndarray, np.ndarray | None, np.ndarray]


def matrices(seed: int, r: int = R, out: int = 8, inp: int = 7, mixed: bool = True, zero: bool = False) -> Matrices:
    """Random A (r, in), M (r, r) or none, B (out, r) or zero."""
    rng = np.random.default_rng(seed)
    A, M, B = (rng.standard_normal(shape).astype(np.float32) for shape in ((r, inp), (r, r), (out, r)))
    return A, M if mixed else None, np.zeros_like(B) if zero else B


def write(folder: Path, modules: dict[str, Matrices], alpha: float = 6.0) -> Path:
    """Saves an adapter, with the mixers that there are."""
    tensors = {}
    for module, (A, M, B) in modules.items():
        base = f"base_model.model.{module}"
        tensors[f"{base}.lora_A.weight"] = A
        if M is None:
            tensors[f"{base}.lora_B.weight"] = B
        else:
            tensors |= {f"{base}.lora_B.raw": B, f"{base}.lora_B.mixer": M}
    mixed = any(M is not None for _, M, _ in modules.values())
    r = len(next(iter(modules.values()))[0])
    config = {"peft_type": "MOSLORA" if mixed else "LORA", "r": r, "lora_alpha": alpha}
    return write_adapter(folder, config, {name: torch.from_numpy(tensor) for name, tensor in tensors.items()})


def trained(seed: int, modules=MODULES, **given) -> dict[str, Matrices]:
    return {module: matrices(100 * seed + number, **given) for number, module in enumerate(modules)}


def add(
    runs,
    method: str,
    seed: int,
    label: str = "default",
    *,
    kept: tuple[int, ...] = (),
    r: int = R,
    modules=MODULES,
    mixed: bool | None = None,
    **given,
):
    """A finished run of 50 steps with its adapter and kept copies; the mixers of step 0 are the seed's own.

    ``mixed`` is whether there are mixers; in all methods but LoRA, unless told otherwise.
    """
    record: RunRecord = runs.add(method, seed, label, **given)
    mixed = method != "lora" if mixed is None else mixed
    write(record.adapter_path, trained(seed, modules, r=r, mixed=mixed))
    for step in kept:
        start = trained(seed + 1000 * (step + 1), modules, r=r, mixed=mixed, zero=step == 0)
        write(record.kept_adapter_path(step), start)
    return record

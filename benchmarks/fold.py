"""How long folding an adapter of LLaMA-3 8B's size takes: ``python benchmarks/fold.py``.

The adapter is random numbers in the layout of ``save_pretrained``: r 16 on q, k, v, up and down of 32 layers. It is
folded by the command line, a process of its own with all its imports, and by the function that the command calls.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from common import out_argument, report, run, seconds, spread
from safetensors.torch import save_file

from moslora_core import MoSLoraConfig
from moslora_core.arguments import Parser
from moslora_core.fold import fold_adapter

LAYERS, R = 32, 16
# Module of a layer -> in and out features.
MODULES = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (4096, 1024),
    "self_attn.v_proj": (4096, 1024),
    "mlp.up_proj": (4096, 14_336),
    "mlp.down_proj": (14_336, 4096),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
AIM = 2.0  # seconds


def write_adapter(folder: Path, dtype: torch.dtype) -> int:
    """Writes the adapter and returns its size in bytes."""
    tensors = {}
    for layer in range(LAYERS):
        for module, (inp, out) in MODULES.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(R, inp).to(dtype)
            tensors[f"{name}.lora_B.raw"] = torch.randn(out, R).to(dtype)
            tensors[f"{name}.lora_B.mixer"] = torch.randn(R, R).to(dtype)
    MoSLoraConfig(r=R, target_modules=sorted(module.split(".")[1] for module in MODULES)).save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return (folder / "adapter_model.safetensors").stat().st_size


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python benchmarks/fold.py", description=__doc__.split(":")[0])
    parser.add_argument("--rounds", type=int, default=5)
    out_argument(parser, "fold")
    arguments = parser.parse_args(argv)
    rows, numbers = [], {}
    with tempfile.TemporaryDirectory() as temporary:
        for name, dtype in DTYPES.items():
            folder = Path(temporary) / name
            folder.mkdir()
            size = write_adapter(folder, dtype)

            def target() -> str:
                return tempfile.mkdtemp(dir=temporary)

            def command() -> None:
                line = [sys.executable, "-m", "moslora_core.fold", str(folder), target()]  # noqa: B023
                subprocess.run(line, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

            def function() -> None:
                fold_adapter(folder, target())  # noqa: B023

            found = {"function": function, "command": command}
            found = {way: spread(seconds(of) for _ in range(arguments.rounds)) for way, of in found.items()}
            numbers[name] = {"bytes": size} | found
            times = (found[way].text() for way in ("function", "command"))
            rows.append([name, f"{size / 2**20:.0f}", *times, f"{AIM:.0f}"])
    report("fold", ["Dtype", "MiB", "Function (s)", "Command (s)", "Aim"], rows, numbers, arguments.out)
    return 0


if __name__ == "__main__":
    run(main)

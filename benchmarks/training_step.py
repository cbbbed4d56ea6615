"""A training step of MoSLoRA against PEFT's LoRA: ``python benchmarks/training_step.py``.

The same base, start and batch; forward and backward pass, without the optimiser. The bases: ``layers``, adapted linear
layers alone; ``llama``, a Llama of four layers; ``smoke``, the base of commonsense reasoning at the smoke scale; and,
where it is asked for, ``llama3-8b``, LLaMA-3 8B's shape with random bfloat16 weights at the paper's batch of 4 x 4
sequences (Table 4's cost columns; needs a large GPU).

Memory is what autograd keeps from the forward pass for the backward pass, each storage once and parameters aside; on a
CUDA device it is the allocator's peak over a step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from common import Spread, out_argument, ratio, report, run, side_by_side, spread
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from moslora_core import MoSLoraConfig
from moslora_core.arguments import Parser
from moslora_core.base_models import local_folder

TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")  # the paper's setting of commonsense reasoning
METHODS = {"lora": LoraConfig, "moslora": MoSLoraConfig}
FROZEN = "frozen"  # the base without an adapter: no method takes less
AIMS = {0.0: 0.95, 0.05: 0.90}


@dataclass(frozen=True)
class Base:
    """A base model, and the batch of a step: ``micro`` times (``batch``, ``length``) tokens."""

    make: Callable[[], nn.Module]
    batch: int
    length: int
    r: int = 16
    micro: int = 1
    targets: Sequence[str] = TARGETS


class Layers(nn.Module):
    """Linear layers alone, called as a language model is."""

    def __init__(self, width: int, number: int):
        super().__init__()
        self.embedding = nn.Embedding(64, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(number))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids).requires_grad_()
        for layer in self.layers:
            x = layer(x)
        return x


def _llama(**sizes: int) -> Callable[[], nn.Module]:
    return lambda: AutoModelForCausalLM.from_config(LlamaConfig(**sizes))


def _llama3_8b() -> nn.Module:
    sizes = {"vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32}
    config = LlamaConfig(**sizes, num_attention_heads=32, num_key_value_heads=8, use_cache=False)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


BASES = {
    "layers": Base(lambda: Layers(1024, 4), batch=4, length=256, targets=[f"layers.{i}" for i in range(4)]),
    "llama": Base(
        _llama(vocab_size=2048, hidden_size=512, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=8),
        batch=4,
        length=128,
    ),
    "smoke": Base(
        lambda: AutoModelForCausalLM.from_pretrained(local_folder("package:commonsense_reasoning/smoke_base")),
        batch=16,
        length=48,
        r=8,
    ),
    "llama3-8b": Base(_llama3_8b, batch=4, length=256, micro=4),
}


def _adapted(model: nn.Module, base: Base, method: str, dropout: float) -> nn.Module:
    settings = {"r": base.r, "lora_alpha": 2 * base.r, "lora_dropout": dropout}
    adapted = get_peft_model(model, METHODS[method](target_modules=list(base.targets), **settings))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)  # at the start, B = 0 leaves A without gradient
    return adapted


def _frozen(model: nn.Module, base: Base) -> nn.Module:
    """The backward pass of an adapted model ends at the same layers."""
    model.requires_grad_(False)
    for name, module in model.named_modules():
        if name.endswith(tuple(base.targets)):
            module.register_forward_hook(lambda _, __, out: out if out.requires_grad else out.requires_grad_())
    return model


class Step:
    """The training step of a method, or of none, on a base."""

    def __init__(self, base: Base, method: str, dropout: float, bf16: bool, compiled: bool, device: str):
        torch.manual_seed(0)
        with torch.device(device):
            model = base.make()
        adapted = _frozen(model, base) if method == FROZEN else _adapted(model, base, method, dropout)
        self.model = adapted.to(device).train()
        self.called = torch.compile(self.model) if compiled else self.model
        self.ids = torch.randint(64, (base.micro, base.batch, base.length), device=device)
        self.bf16, self.device = bf16, device

    @property
    def tokens(self) -> int:
        return self.ids.numel()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            out = self.called(ids)
        return getattr(out, "logits", out).float().square().mean()

    def __call__(self) -> None:
        self.model.zero_grad()
        for ids in self.ids:
            self.forward(ids).backward()
        if self.device == "cuda":
            torch.cuda.synchronize()

    def memory(self) -> int:
        """Bytes that a step needs beside the parameters."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self()
            return torch.cuda.max_memory_allocated()
        with _kept(self.model) as kept:
            self.forward(self.ids[0])
        return sum(kept.values())


@contextmanager
def _kept(model: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes of the storages that autograd keeps within the context, by address."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept, alive = {}, []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)  # or its address is given to another
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def measure(name: str, dropout: float, bf16: bool, compiled: bool, rounds: int, device: str) -> dict[str, object]:
    """One line of the table."""
    ways = (*METHODS, FROZEN)
    steps = {method: Step(BASES[name], method, dropout, bf16, compiled, device) for method in ways}
    found = side_by_side(steps, rounds, warm_up=2)
    memory = {method: step.memory() for method, step in steps.items()}
    return {
        "base": name,
        "dropout": dropout,
        "dtype": "bf16 autocast" if bf16 else "as the base",
        "mode": "compiled" if compiled else "eager",
        "seconds": {method: spread(of) for method, of in found.items()},
        "tokens_per_second": {m: steps[m].tokens / spread(of).median for m, of in found.items()},
        "memory_bytes": memory,
        "time_ratio": ratio(found["moslora"], found["lora"]),
        "least_time_ratio": ratio(found[FROZEN], found["lora"]),
        "memory_ratio": memory["moslora"] / memory["lora"],
    }


def _row(line: dict[str, object]) -> list[str]:
    time: Spread = line["time_ratio"]
    seconds, memory = line["seconds"], line["memory_bytes"]
    return [
        *(line["base"], str(line["dropout"]), line["dtype"], line["mode"]),
        *(f"{1000 * seconds[method].median:.0f}" for method in METHODS),
        time.text(),
        f"{AIMS.get(line['dropout'], 1.0):.2f}",
        line["least_time_ratio"].text(),
        *(f"{memory[method] / 2**20:.1f}" for method in METHODS),
        f"{line['memory_ratio']:.2f}",
    ]


HEADERS = [
    *("Base", "Dropout", "Dtype", "Mode", "LoRA (ms)", "MoSLoRA (ms)", "Time ratio", "Aim", "Least possible"),
    *("LoRA (MiB)", "MoSLoRA (MiB)", "Memory ratio"),
]


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python benchmarks/training_step.py", description=__doc__.split(":")[0])
    parser.add_argument("--base", nargs="+", choices=BASES, default=["layers", "llama", "smoke"])
    parser.add_argument("--dropout", nargs="+", type=float, default=list(AIMS))
    parser.add_argument("--modes", nargs="+", choices=["eager", "compiled"], default=["eager"])
    parser.add_argument("--rounds", type=int, default=20, help="steps of each method that count (default: 20)")
    parser.add_argument("--threads", type=int, default=1, help="threads on a CPU (default: 1)")
    out_argument(parser, "training_step")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lines = []
    for name in arguments.base:
        for dropout in arguments.dropout:
            for mode in arguments.modes:
                # The weights of the largest base are bfloat16 as they are.
                for bf16 in (True,) if name == "llama3-8b" else (False, True):
                    lines.append(measure(name, dropout, bf16, mode == "compiled", arguments.rounds, device))
                    sys.stderr.write(" | ".join(_row(lines[-1])) + "\n")
    numbers = {"threads": arguments.threads, "rounds": arguments.rounds, "device": device, "lines": lines}
    report("training_step", HEADERS, [_row(line) for line in lines], numbers, arguments.out)
    return 0


if __name__ == "__main__":
    run(main)

"""Trainings of several processes against one of one: ``python benchmarks/distributed.py``.

The same training of commonsense reasoning (smoke scale, few steps, no dropout, whose masks depend on how a batch is
dealt) in one process, and under data parallelism, ZeRO-2 and ZeRO-3 on one and two processes. Each is compared with
the first in its losses and in the update of its folded adapter. Then it is killed after a checkpoint, resumed, and
compared with itself undisturbed.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from common import configuration, out_argument, report, run
from safetensors.torch import load_file

import commonsense_reasoning.config as commonsense
from commonsense_reasoning import prepare_data, train
from moslora_core import launch
from moslora_core.arguments import Parser
from moslora_core.checkpoints import SEAL
from moslora_core.fold import fold_adapter

ROOT = Path(__file__).parents[1]
SETTINGS = (
    "scale=smoke",
    "method=moslora",
    "adapter.lora_dropout=0",
    "training.per_device_batch_size=4",
    "training.logging_steps=1",
)
AIM = 1e-4  # largest difference of a step's loss
SECONDS = 600  # after which a training counts as hanging


@dataclass(frozen=True)
class Way:
    name: str
    processes: int
    zero: str | None = None


ONE = Way("one process", 1)
WAYS = (
    ONE,
    Way("data parallelism", 2),
    *(Way(f"ZeRO-{stage}", processes, f"zero{stage}") for stage in (2, 3) for processes in (1, 2)),
)


def work(overrides: Sequence[str]) -> None:
    """What each process of a launch does: ``commonsense_reasoning.train``."""
    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        import deepspeed.ops

        # DeepSpeed would compile it for minutes; without it CPUs talk through gloo.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    train.main(configuration(commonsense, overrides))
    launch.end_process()


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to the launcher and to what it started, which are in sessions of their own and would go on."""
    for started in (process, *psutil.Process(process.pid).children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            started.kill()
    process.wait()


def train_as(way: Way, overrides: Sequence[str], log: Path, until: Path | None = None) -> None:
    """Trains in the way's processes; kills them all when the file ``until`` is there.

    Raises:
        RuntimeError: the training failed, hung, or ended before it could be killed.
    """
    given = [*overrides, *([f"training.deepspeed={way.zero}"] if way.zero else [])]
    launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={way.processes}"]
    line = [sys.executable, *(["-m", *launcher] if way is not ONE else []), __file__, "--work", *given]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    if way.zero and not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
    with open(log, "ab") as file:
        process = subprocess.Popen(line, env=environment, stdout=file, stderr=file)
    begin = time.monotonic()
    while process.poll() is None:
        late = time.monotonic() - begin > SECONDS
        if late or (until is not None and until.exists()):
            kill(process)
            if late:
                raise RuntimeError(f"{way.name} hangs:\n{log.read_text()[-4000:]}")
            return
        time.sleep(0.02)
    if process.returncode or until is not None:
        raise RuntimeError(f"{way.name} ended with {process.returncode}:\n{log.read_text()[-4000:]}")


def losses(config: Any) -> list[float]:
    return [row["loss"] for row in commonsense.locate(config).metrics() if "loss" in row]


def updates(adapter: Path, folder: Path) -> dict[str, torch.Tensor]:
    """B A of each module of the folded adapter."""
    tensors = load_file(fold_adapter(adapter, folder) / "adapter_model.safetensors")
    return {name: tensors[name.replace("lora_A", "lora_B")] @ A for name, A in tensors.items() if "lora_A" in name}


def apart(updates: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    """Largest difference of any entry."""
    return max(float((of - others[name]).abs().max()) for name, of in updates.items())


def measure(way: Way, folder: Path, common: Sequence[str], save_steps: int) -> dict[str, Any]:
    """Trains undisturbed and, beside it, killed and resumed."""
    log, found = folder / "log.txt", {}
    for name in ("undisturbed", "resumed"):
        overrides = [*common, f"runs_dir={folder / name}", f"training.save_steps={save_steps}"]
        config = configuration(commonsense, overrides)
        record = commonsense.locate(config)
        if name == "resumed":
            train_as(way, overrides, log, until=record.checkpoints_path / f"checkpoint-{save_steps}" / SEAL)
        begin = time.monotonic()
        train_as(way, overrides, log)
        found[name] = {
            "losses": losses(config),
            "updates": updates(record.adapter_path, folder / f"folded-{name}"),
            "bytes": (record.adapter_path / "adapter_model.safetensors").read_bytes(),
            "seconds": time.monotonic() - begin,
        }
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python benchmarks/distributed.py", description=__doc__.split(":")[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--save-steps", type=int, default=5, help="a training is killed after the first checkpoint")
    out_argument(parser, "distributed")
    arguments = parser.parse_args(argv)
    rows, numbers = [], {}
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary) / "data"
        common = [*SETTINGS, f"data.dir={data}", f"training.max_steps={arguments.steps}"]
        prepare_data.main(configuration(commonsense, common))
        for way in WAYS:
            folder = Path(temporary) / f"{way.zero or way.name}-{way.processes}".replace(" ", "-")
            folder.mkdir()
            found = measure(way, folder, common, arguments.save_steps)
            if way is ONE:
                expected = found["undisturbed"]
            once, again = found["undisturbed"], found["resumed"]
            loss = max(abs(one - other) for one, other in zip(once["losses"], expected["losses"], strict=True))
            update = apart(once["updates"], expected["updates"])
            same = once["losses"] == again["losses"] and once["bytes"] == again["bytes"]
            moved = apart(again["updates"], once["updates"])
            entry = {
                "processes": way.processes,
                "losses": once["losses"],
                "largest_difference_of_losses": loss,
                "largest_difference_of_updates": update,
                "resumed_bit_for_bit": same,
                "largest_difference_after_resuming": moved,
                "seconds": once["seconds"],
            }
            numbers[f"{way.name}, {way.processes}"] = entry
            resumed = "bit for bit" if same else f"{moved:.1e}"
            rows.append([way.name, way.processes, f"{loss:.1e}", f"{AIM:.0e}", f"{update:.1e}", resumed])
            sys.stderr.write(f"{rows[-1]}\n")
    largest_update = max(float(of.abs().max()) for of in expected["updates"].values())
    headers = ["training", "processes", "losses differ by", "aim", "updates differ by", "resumed"]
    report("distributed", headers, rows, {"largest_update": largest_update, "ways": numbers}, arguments.out)
    return 0 if all(entry["largest_difference_of_losses"] <= AIM for entry in numbers.values()) else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2:])
    else:
        run(main)

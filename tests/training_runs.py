"""What tests of several experiments' trainings share: changed configurations, deaths, launches, adapters."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from moslora_core import launch
from moslora_core.record import RunRecord


def having(config: Any, **changes) -> Any:
    """A copy with some fields changed; a double underscore separates the levels."""
    for key, value in changes.items():
        group, _, name = key.partition("__")
        config = replace(config, **{group: having(getattr(config, group), **{name: value}) if name else value})
    return config


def adapter_of(record: RunRecord) -> dict[str, torch.Tensor]:
    return load_file(record.adapter_path / "adapter_model.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def losses_of(record: RunRecord) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in record.metrics() if "loss" in row]


class Killed(BaseException):
    """Stands for a kill: nothing in a training may catch it."""


_LAUNCHER = """
import os, sys
import torch
torch.set_num_threads(1)
if os.environ.get("DS_ACCELERATOR"):
    import deepspeed.ops
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it is compiled for minutes
if os.environ.get("KILL_AT"):
    from transformers import Trainer
    training_step = Trainer.training_step
    def killed(self, *args, **kwargs):
        if self.state.global_step == int(os.environ["KILL_AT"]):
            os.kill(os.getpid(), 9)
        return training_step(self, *args, **kwargs)
    Trainer.training_step = killed
from omegaconf import OmegaConf
from {experiment}.config import Config
from {experiment}.train import main
from moslora_core import launch
main(launch.instantiate(Config, OmegaConf.load(sys.argv[1])))
launch.end_process()
"""


def launched(experiment: str, config: Any, folder: Path, processes: int, **environment: str) -> None:
    """Trains ``config`` in so many processes, as torchrun would; ``KILL_AT`` kills them as they begin a step."""
    name = hashlib.sha256(repr(config).encode()).hexdigest()[:8]
    settings, script = folder / f"{name}.yaml", folder / "launcher.py"
    settings.write_text(launch.dump(config))
    script.write_text(_LAUNCHER.format(experiment=experiment))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [*command, str(script), str(settings)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONFAULTHANDLER": "1"}
        | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (done.returncode == 0) == ("KILL_AT" not in environment), f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"


def assert_close(first: RunRecord, second: RunRecord, steps: int) -> None:
    """Two trainings that may differ by the order of sums alone."""
    expected = list(range(1, steps + 1))
    assert [step for step, _ in losses_of(first)] == [step for step, _ in losses_of(second)] == expected
    a, b = adapter_of(first), adapter_of(second)
    assert a.keys() == b.keys()
    for (_, one), (_, other) in zip(losses_of(first), losses_of(second), strict=True):
        assert abs(one - other) <= 2e-4, (losses_of(first), losses_of(second))
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-4, rtol=1e-3)

"""How a training is divided, against what was asked for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from moslora_core.errors import UserError
from moslora_core.sharding import check_sharding


class DeepSpeedEngine(nn.Module):
    """Stands for DeepSpeed's, which the tests may have to do without."""

    def __init__(self, stage: int):
        super().__init__()
        self.stage = stage

    def zero_optimization_stage(self) -> int:
        return self.stage


class FullyShardedDataParallel(nn.Module):
    """Stands for torch's, which wants a group of processes."""


class Engine(DeepSpeedEngine):
    """A kind of DeepSpeed's, as its pipelines are."""


PLAIN = nn.Linear(2, 2)
DATA_PARALLEL = DistributedDataParallel.__new__(DistributedDataParallel)


def trainer(model: nn.Module, fsdp: str = "") -> SimpleNamespace:
    return SimpleNamespace(args=SimpleNamespace(fsdp=fsdp), model_wrapped=model)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("WORLD_SIZE", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("environment", "fsdp", "stage", "model"),
    [
        ({}, "", 0, PLAIN),
        ({"WORLD_SIZE": "2"}, "", 0, DATA_PARALLEL),
        ({"WORLD_SIZE": "2"}, "", 3, DeepSpeedEngine(3)),
        ({}, "", 2, Engine(2)),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "", 0, DeepSpeedEngine(1)),
        ({"ACCELERATE_USE_FSDP": "true"}, "", 0, FullyShardedDataParallel()),
        ({"ACCELERATE_USE_FSDP": "false"}, "", 0, PLAIN),
    ],
)
def test_what_was_asked_for_passes(monkeypatch, environment, fsdp, stage, model):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    check_sharding(trainer(model, fsdp), stage)


@pytest.mark.parametrize(
    ("environment", "fsdp", "stage", "model", "expected"),
    [
        ({}, "", 2, PLAIN, "asks for ZeRO-2, but is set up with one process"),
        ({"WORLD_SIZE": "2"}, "", 3, DATA_PARALLEL, "asks for ZeRO-3, but is set up with data parallelism"),
        ({"WORLD_SIZE": "2"}, "", 3, DeepSpeedEngine(2), "asks for ZeRO-3, but is set up with ZeRO-2"),
        ({}, "", 2, DeepSpeedEngine(0), "asks for ZeRO-2, but is set up with DeepSpeed"),
        ({"WORLD_SIZE": "2"}, "", 0, PLAIN, "asks for data parallelism, but is set up with one process"),
        ({"WORLD_SIZE": "2"}, "full_shard", 0, DATA_PARALLEL, "asks for FSDP, but is set up with data parallelism"),
        ({"ACCELERATE_USE_FSDP": "true"}, "", 0, PLAIN, "asks for FSDP, but is set up with one process"),
        ({"ACCELERATE_USE_DEEPSPEED": "1"}, "", 0, PLAIN, "asks for DeepSpeed, but is set up with one process"),
    ],
)
def test_anything_else_is_refused(monkeypatch, environment, fsdp, stage, model, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=expected):
        check_sharding(trainer(model, fsdp), stage)

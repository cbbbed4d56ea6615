"""That a training is divided among its processes in the way that it was asked to be.

A run that asked for sharding and trains without it looks like any other until it runs out of memory: Trainer takes
plain data parallelism, or a single process, where a library or a launcher does not go along.
"""

from __future__ import annotations

import os

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback

from .errors import UserError
from .launch import world_size


def asked_for(trainer: Trainer, zero_stage: int) -> str | None:
    """What the configuration or the launcher asks for: ``ZeRO-<stage>``, ``FSDP``, ``data parallelism`` or nothing.

    Args:
        zero_stage: of the configuration's DeepSpeed file; 0 without one.
    """
    if zero_stage:
        return f"ZeRO-{zero_stage}"
    if trainer.args.fsdp or _is_set("ACCELERATE_USE_FSDP"):
        return "FSDP"
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        return "DeepSpeed"
    return "data parallelism" if world_size() > 1 else None


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes")


def found(model: nn.Module) -> str | None:
    """How a model that Trainer has wrapped is really divided, in the words of :func:`asked_for`."""
    kinds = {kind.__name__ for kind in type(model).__mro__}
    if "DeepSpeedEngine" in kinds:
        stage = model.zero_optimization_stage()
        return f"ZeRO-{int(stage)}" if stage else "DeepSpeed"
    if kinds & {"FullyShardedDataParallel", "FSDPModule"}:
        return "FSDP"
    return "data parallelism" if isinstance(model, DistributedDataParallel) else None


def check_sharding(trainer: Trainer, zero_stage: int) -> None:
    """Checks a trainer whose training begins.

    Raises:
        UserError: it is divided in another way than was asked for; says both.
    """
    asked, got = asked_for(trainer, zero_stage), found(trainer.model_wrapped)
    if asked == got or (asked == "DeepSpeed" and (got or "").startswith("ZeRO")):
        return
    raise UserError(
        f"the training asks for {asked or 'one process'}, but is set up with {got or 'one process'} "
        f"(training.deepspeed and the launcher's environment decide); start it with torchrun and a library that can"
    )


class CheckSharding(TrainerCallback):
    """Calls :func:`check_sharding` before the first step."""

    def __init__(self, trainer: Trainer, zero_stage: int):
        self.trainer, self.zero_stage = trainer, zero_stage

    def on_train_begin(self, args, state, control, **kwargs):
        check_sharding(self.trainer, self.zero_stage)

"""Running a training into its record: what the experiments that train through transformers' ``Trainer`` share.

An experiment brings data, model and batches (:class:`Prepared`); here are the arguments of the training, its log, its
checkpoints, the saved adapter, and when a run is done, stopped, or another one than asked for.
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from omegaconf import MISSING
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from transformers import PrinterCallback, SchedulerType, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy
from transformers.training_args import OptimizerNames

from . import launch
from .adapter_files import CONFIG_NAME, WEIGHTS_NAME
from .base_models import adapter_sha256
from .checkpoints import Sealing, damage, newest_whole, writing
from .count import accumulation_steps, optimiser_steps
from .errors import UserError
from .launch import world_size
from .methods import MethodConfig
from .record import (
    RunRecord,
    Stopwatch,
    Training,
    append_jsonl,
    peak_memory,
    read_json,
    repair_jsonl,
    sync,
    write_atomic,
)
from .sharding import CheckSharding
from .typed import Count, build

logger = logging.getLogger(__name__)

STAGE = "train"
ON_FINISHED = ("refuse", "skip", "overwrite")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
# A stopped run may go on with other values of these.
_NOT_IN_TRAINING = ("evaluation", "runs_dir", "run_name", "on_finished", "dry_run", "training.keep_steps")


@dataclass
class TrainingConfig:
    """Hyperparameters of a training.

    Attributes:
        warmup_steps: steps of linear warm-up; below 1, the share of all steps.
        global_batch_size: examples per optimiser step over all devices; accumulation is derived and must divide.
        devices: number of processes, one a device, that the run is meant for; a training on another number is refused.
            null takes as many as were started.
        max_steps: optimiser steps; null trains for ``epochs``.
        precision: fp32 | bf16 | fp16 autocast, or auto: bf16 on GPUs that have it, fp32 elsewhere.
        group_by_length: batches of examples of similar length.
        logging_steps: steps between logged losses, each the mean since the one before; a checkpoint logs one too.
        eval_steps: steps between validations; null for none.
        save_steps: steps between resumable checkpoints; null for none.
        save_total_limit: checkpoints that are kept, the newest ones, and the best beside them under ``load_best``.
        keep_steps: steps between copies of the adapter that are kept with the run (``adapters/step-<n>/``), and one of
            the start (``step-0``); null keeps none.
        load_best: keep the checkpoint of lowest validation loss instead of the last.
        workers: processes that load examples; 0 loads in the training process.
        deepspeed: a DeepSpeed configuration file, or a name below ``moslora_core/deepspeed``.
    """

    learning_rate: float = MISSING
    lr_scheduler: str = "linear"
    warmup_steps: float = 0
    epochs: float = 1.0
    max_steps: int | None = None
    global_batch_size: int = MISSING
    per_device_batch_size: int = MISSING
    devices: int | None = None
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    optimizer: str = "adamw_torch"
    precision: str = "auto"
    group_by_length: bool = True
    logging_steps: int = 10
    eval_steps: int | None = None
    save_steps: int | None = None
    save_total_limit: int = 3
    keep_steps: int | None = None
    load_best: bool = False
    workers: int = 0
    tensorboard: bool = False
    deepspeed: str | None = None


# --------------------------------------------------------------------------------------------------------------- plan


# Settings with a least value: those that are to be above 0, and those that may be 0.
_POSITIVE = (
    *("learning_rate", "epochs", "max_steps", "global_batch_size", "per_device_batch_size", "devices"),
    *("logging_steps", "eval_steps", "save_steps", "save_total_limit", "keep_steps"),
)
_NOT_NEGATIVE = ("warmup_steps", "weight_decay", "max_grad_norm", "workers")
_OPTIONAL = tuple(entry.name for entry in fields(TrainingConfig) if entry.default is None)


def check_training(training: TrainingConfig) -> None:
    """Checks each setting of a training by itself.

    Raises:
        UserError: one that is out of range, not finite or unknown.
    """
    for name in (*_POSITIVE, *_NOT_NEGATIVE):
        value = getattr(training, name)
        if value is None or (math.isfinite(value) and (value > 0 if name in _POSITIVE else value >= 0)):
            continue
        expected = ("positive" if name in _POSITIVE else "0 or positive") + (" or null" if name in _OPTIONAL else "")
        raise UserError(f"training.{name} must be {expected}, found {value}")
    for name, known in (("lr_scheduler", SchedulerType), ("optimizer", OptimizerNames), ("precision", PRECISIONS)):
        names = [getattr(entry, "value", entry) for entry in known]
        if (value := getattr(training, name)) not in names:
            raise UserError(f"training.{name} must be one of {', '.join(names)}, found {value!r}")
    _deepspeed(training.deepspeed)


def check_settings(config: Any) -> None:
    """Checks what the configurations of all experiments have in common, before data or a model is read.

    Raises:
        UserError: a setting that is out of range or unknown.
    """
    check_training(config.training)
    check_on_finished(config.on_finished)
    if not 0 <= config.seed < 2**32:  # numpy's range
        raise UserError(f"seed must be from 0 to {2**32 - 1}, found {config.seed}")


def is_main_process() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def total_steps(training: TrainingConfig, examples: int) -> int:
    """Optimiser steps of a training on so many examples.

    Raises:
        UserError: sizes that are not positive.
    """
    if training.max_steps is not None:
        return training.max_steps
    return optimiser_steps(examples, training.global_batch_size, training.epochs)


def planned_devices(training: TrainingConfig) -> int:
    """Devices that a run is meant for, or those that were started."""
    return world_size() if training.devices is None else training.devices


def accumulation(training: TrainingConfig) -> int:
    """Gradient accumulation over the devices that the run is meant for.

    Raises:
        UserError: the global batch is not a multiple of what the devices take.
    """
    devices = planned_devices(training)
    return accumulation_steps(training.global_batch_size, training.per_device_batch_size, devices)


def check_devices(training: TrainingConfig) -> None:
    """Refuses a launch on another number of devices than the run is meant for.

    Raises:
        UserError: says both numbers.
    """
    if (planned := planned_devices(training)) != (started := world_size()):
        raise UserError(
            f"training.devices={planned}, but {started} process{'es' if started > 1 else ''} started; start "
            f"torchrun --nproc_per_node {planned}, or set training.devices={started}: global_batch_size stays as it is"
        )


def _precision(name: str) -> dict[str, bool]:
    if name == "auto":
        bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        name = "bf16" if bf16 else "fp32"
    if name == "fp16" and not torch.cuda.is_available():
        raise UserError("training.precision=fp16 needs a GPU; use fp32 or bf16 on a CPU")
    return {"bf16": name == "bf16", "fp16": name == "fp16"}


def _deepspeed(name: str | None) -> str | None:
    if name is None:
        return None
    packaged = Path(__file__).parent / "deepspeed" / f"{name}.json"
    path = packaged if packaged.exists() else Path(name)
    if not path.is_file():
        known = sorted(p.stem for p in packaged.parent.glob("*.json"))
        raise UserError(f"training.deepspeed={name}: no such file; expected a JSON file or one of {', '.join(known)}")
    return str(path)


@dataclass(frozen=True)
class _Zero:
    stage: Count = 0


@dataclass(frozen=True)
class _DeepSpeed:
    zero_optimization: _Zero = _Zero()


def zero_stage(training: TrainingConfig) -> int:
    """ZeRO's stage in the DeepSpeed configuration of a training; 0 without DeepSpeed.

    Raises:
        UserError: no such configuration, or one that is no JSON object.
    """
    if (path := _deepspeed(training.deepspeed)) is None:
        return 0
    return build(_DeepSpeed, read_json(Path(path)), f"training.deepspeed={path}", others=True).zero_optimization.stage


def training_arguments(
    training: TrainingConfig,
    record: RunRecord,
    *,
    seed: int,
    steps: int,
    validates: bool = False,
    gradient_checkpointing: bool = False,
    **further: Any,
) -> TrainingArguments:
    """transformers' arguments of a run.

    Args:
        steps: optimiser steps of the whole training.
        validates: whether there are validation examples.
        further: arguments of the experiment's own, over what is set here.

    Raises:
        UserError: a setting that is out of range, contradicts another, or that transformers refuses.
    """
    check_training(training)
    check_devices(training)
    if training.load_best and (not validates or training.eval_steps is None or training.save_steps is None):
        raise UserError("training.load_best needs data.validation_items, training.eval_steps and training.save_steps")
    deepspeed = _deepspeed(training.deepspeed)
    if deepspeed is not None and "RANK" not in os.environ:
        raise UserError(
            f"training.deepspeed={training.deepspeed} needs a launcher, also for one process; start it with "
            "torchrun --nproc_per_node <processes> -m <module>"
        )
    evaluates = validates and training.eval_steps is not None
    settings = {
        "output_dir": str(record.checkpoints_path),
        "per_device_train_batch_size": training.per_device_batch_size,
        "per_device_eval_batch_size": training.per_device_batch_size,
        "gradient_accumulation_steps": accumulation(training),
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": training.lr_scheduler,
        "warmup_steps": training.warmup_steps,
        "max_steps": steps,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "optim": training.optimizer,
        "train_sampling_strategy": "group_by_length" if training.group_by_length else "random",
        "logging_steps": training.logging_steps,
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": training.eval_steps if evaluates else None,
        "save_strategy": "no" if training.save_steps is None else "steps",
        "save_steps": training.save_steps or 500,
        "logging_nan_inf_filter": False,  # it would log a diverged training as one without loss
        "load_best_model_at_end": training.load_best,
        "metric_for_best_model": "loss" if training.load_best else None,
        "gradient_checkpointing": gradient_checkpointing,
        "disable_tqdm": not sys.stderr.isatty(),
        "include_num_input_tokens_seen": "non_padding",
        "deepspeed": deepspeed,
        "report_to": [],
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "dataloader_num_workers": training.workers,
        "ddp_find_unused_parameters": False if world_size() > 1 else None,
        "seed": seed,
        "data_seed": seed,
        **_precision(training.precision),
    }
    try:
        arguments = TrainingArguments(**settings | further)
    except (ValueError, ImportError) as error:
        raise UserError(f"training: {str(error).strip().splitlines()[0]}") from None
    if arguments.deepspeed and world_size() > 1:
        # ZeRO-3 splits a model as it is loaded, and has to know by then among how many processes.
        import deepspeed

        deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", auto_mpi_discovery=False)
    return arguments


# ---------------------------------------------------------------------------------------------------------- callbacks


def _diverged(step: int, name: str, value: float) -> UserError:
    return UserError(f"training diverged at step {step}: {name} is {value}; lower training.learning_rate")


class Recorder(TrainerCallback):
    """Writes metrics.jsonl, and stops a training whose loss is no longer a number."""

    def __init__(self, record: RunRecord, stopwatch: Stopwatch):
        self.record = record
        self.stopwatch = stopwatch

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs or not ({"loss", "eval_loss"} & logs.keys()):
            return
        numbers = {name: logs[name] for name in ("loss", "eval_loss", "grad_norm", "learning_rate") if name in logs}
        if args.fp16 and not math.isfinite(numbers.get("grad_norm", 0.0)):
            numbers["grad_norm"] = None  # the step was skipped: fp16's loss scale is still being searched
        for name, value in numbers.items():
            if value is not None and not math.isfinite(value):
                raise _diverged(state.global_step, name, value)
        row = {
            "step": state.global_step,
            **numbers,
            **self._seen(args, state),
            "seconds": round(self.stopwatch.seconds, 3),
            "peak_memory_bytes": peak_memory()[0],
        }
        append_jsonl(self.record.metrics_path, [row])
        if args.disable_tqdm:  # a log file takes lines, not a progress bar
            shown = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items() if value is not None)
            logger.info("step %d of %d: %s, %.0f s", state.global_step, state.max_steps, shown, row["seconds"])

    @staticmethod
    def _seen(args: TrainingArguments, state: TrainerState) -> dict[str, int]:
        """Tokens so far; examples where a training has no tokens."""
        if args.include_num_input_tokens_seen != "no":
            return {"tokens": int(state.num_input_tokens_seen)}
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return {"samples": state.global_step * batch}


class LogAtCheckpoints(TrainerCallback):
    """Logs at every checkpoint too: a resumed training has no loss of the steps before it to average over."""

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save and state.global_step < state.max_steps:
            control.should_log = True


class AdaLoraBudget(TrainerCallback):
    """AdaLoRA prunes its ranks after each optimiser step, while the gradients are still there."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        tuner = getattr(model, "module", model)
        tuner.base_model.update_and_allocate(state.global_step)


class AdapterCopies(TrainerCallback):
    """Keeps a copy of the adapter at the start and every so many steps."""

    def __init__(self, every: int, keep: Callable[[int], None]):
        self.every = every
        self.keep = keep

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:  # not a resumed training, whose start is kept already
            self.keep(0)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            self.keep(state.global_step)


def _callbacks(
    method: MethodConfig, training: TrainingConfig, record: RunRecord, stopwatch: Stopwatch
) -> list[TrainerCallback]:
    callbacks: list[TrainerCallback] = [Recorder(record, stopwatch), LogAtCheckpoints()]
    if method.tuner == "adalora":
        callbacks.append(AdaLoraBudget())
    if training.tensorboard and is_main_process():
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations import TensorBoardCallback

        # Trainer's own place for it is below the checkpoints, which go when the training has finished.
        callbacks.append(TensorBoardCallback(SummaryWriter(str(record.path / "tensorboard"))))
    return callbacks


# -------------------------------------------------------------------------------------------------------------- train


@dataclass
class Prepared:
    """All that a training needs, checked: what can be wrong is found before the run folder is touched.

    Attributes:
        collator: makes a batch of examples.
        trainer: class of the trainer, for experiments with an order of their own.
        callbacks: what the experiment does on the way.
        finish: called by the first process when the adapter is saved, before the run counts as trained.
    """

    model: PeftModel
    train_set: Any
    validation_set: Any | None
    collator: Callable
    arguments: TrainingArguments
    trainer: type[Trainer] = Trainer
    callbacks: Sequence[TrainerCallback] = ()
    finish: Callable[[], None] | None = None


def resume_point(record: RunRecord) -> str | None:
    """Last whole checkpoint of a stopped run; the log and the kept adapters are cut back to it.

    Raises:
        UserError: it is of another number of processes, or the log is damaged.
    """
    checkpoint = newest_whole(record.checkpoints_path, world_size())
    step = 0 if checkpoint is None else int(checkpoint.name.rsplit("-", 1)[1])
    if is_main_process():
        record.metrics()  # refuses damage, in words
        repair_jsonl(record.metrics_path, keep=lambda row: row["step"] <= step)
        for kept, folder in record.kept_adapters().items():
            if kept > step:
                shutil.rmtree(folder)
    return None if checkpoint is None else str(checkpoint)


def _save_adapter(trainer: Trainer, record: RunRecord, folder: Path, bare: bool = False) -> None:
    """Saves the adapter beside its place and renames it: an adapter's folder is always whole.

    Args:
        bare: configuration and weights alone, without what else transformers puts there (tokenizer, model card).
    """
    temporary = record.path / ".adapter.partial"
    trainer.save_model(str(temporary))  # every process: sharded parameters are gathered here
    if is_main_process():
        (temporary / "training_args.bin").unlink(missing_ok=True)  # a pickle; config.yaml says it all
        for path in list(temporary.iterdir()) if bare else ():
            if path.name not in (CONFIG_NAME, WEIGHTS_NAME):
                path.unlink()
        sync(temporary)
        if folder.exists():
            shutil.rmtree(folder)
        folder.parent.mkdir(exist_ok=True)
        temporary.rename(folder)


def _loraplus(model: PeftModel, method: MethodConfig, training: TrainingConfig) -> torch.optim.Optimizer | None:
    if method.lora_plus_ratio is None:
        return None
    return create_loraplus_optimizer(
        model,
        torch.optim.AdamW,
        lr=training.learning_rate,
        loraplus_lr_ratio=method.lora_plus_ratio,
        weight_decay=training.weight_decay,
    )


def _keep_no_checkpoints(arguments: TrainingArguments) -> None:
    """For AdaLoRA, of which PEFT saves the ranks that a step has left, and nothing by which it prunes the next ones.

    Loading them into a model in training, to go on or to end with the best, fails on their shapes.
    """
    if arguments.save_strategy != SaveStrategy.NO:
        logger.warning("AdaLoRA has no checkpoints to go on from: a training that is stopped starts again")
    if arguments.load_best_model_at_end:
        logger.warning("nor can its best step be kept (training.load_best): the adapter is that of the last")
    arguments.save_strategy, arguments.load_best_model_at_end = SaveStrategy.NO, False


def _leave_process_group() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def fit(method: MethodConfig, training: TrainingConfig, record: RunRecord, prepared: Prepared) -> Training:
    """Trains into ``record`` and saves the adapter; resumes from the run's last checkpoint.

    Raises:
        UserError: a diverged training.
    """
    model, arguments = prepared.model, prepared.arguments
    trainable, total = model.get_nb_trainable_parameters()
    counts = f"{trainable:,} trainable of {total:,} parameters"
    logger.info("%s: %s, %d steps", method.name, counts, arguments.max_steps)
    if method.tuner == "adalora":
        _keep_no_checkpoints(arguments)
    takes_best = arguments.load_best_model_at_end

    checkpoint = resume_point(record)
    if checkpoint:
        logger.info("resuming from %s", checkpoint)
    rows = record.metrics()
    stopwatch = Stopwatch(before=rows[-1]["seconds"] if rows else 0.0)
    # A process that ends while the threads of its group still run may abort after all work is done.
    atexit.register(_leave_process_group)
    trainer = prepared.trainer(
        model=model,
        args=arguments,
        train_dataset=prepared.train_set,
        eval_dataset=prepared.validation_set,
        data_collator=prepared.collator,
        callbacks=[*_callbacks(method, training, record, stopwatch), *prepared.callbacks],
        optimizers=(_loraplus(model, method, training), None),
    )
    trainer.remove_callback(PrinterCallback)
    if training.keep_steps is not None:

        def keep(step: int) -> None:
            _save_adapter(trainer, record, record.kept_adapter_path(step), bare=True)

        trainer.add_callback(AdapterCopies(training.keep_steps, keep))
    trainer.add_callback(CheckSharding(trainer, zero_stage(training)))
    trainer.add_callback(Sealing(record.checkpoints_path, training.save_total_limit, world_size()))
    with writing(record.path):
        output = trainer.train(resume_from_checkpoint=checkpoint)
    if takes_best and (best := trainer.state.best_model_checkpoint) and (wrong := damage(Path(best))):
        raise UserError(f"the checkpoint of the lowest validation loss cannot be used: {wrong}; train the run again")
    if not math.isfinite(output.training_loss):  # steps after the last logged one
        raise _diverged(output.global_step, "loss", output.training_loss)
    memory, kind = peak_memory()
    with writing(record.path):
        _save_adapter(trainer, record, record.adapter_path)
    if prepared.finish is not None and is_main_process():
        prepared.finish()
    rows = record.metrics()
    losses = [row["loss"] for row in rows if "loss" in row]
    validation = [row["eval_loss"] for row in rows if "eval_loss" in row]
    return Training(
        seconds=round(stopwatch.seconds, 3),
        steps=trainer.state.global_step,
        peak_memory_bytes=memory,
        peak_memory_kind=kind,
        trainable_parameters=trainable,
        total_parameters=total,
        final_loss=losses[-1] if losses else None,
        validation_loss=min(validation) if validation and takes_best else (validation or [None])[-1],
        adapter_sha256=adapter_sha256(record.adapter_path) if is_main_process() else None,
    )


# ------------------------------------------------------------------------------------------------------------ command


def check_on_finished(value: str) -> None:
    if value not in ON_FINISHED:
        raise UserError(f"on_finished must be refuse, skip or overwrite, found {value!r}")


def _is_done(record: RunRecord, on_finished: str) -> bool:
    """Whether there is nothing to do; refuses a finished run unless ``on_finished`` says otherwise."""
    check_on_finished(on_finished)
    if not record.is_trained():
        return False
    if on_finished != "overwrite":
        record.settle(STAGE, leftovers=[record.checkpoints_path])
    if on_finished == "skip":
        logger.info("already trained: %s", record.path)
        return True
    if on_finished == "refuse":
        raise UserError(
            f"{record.path} is a finished run; on_finished=skip keeps it, on_finished=overwrite replaces it"
        )
    return False


def _check_resumable(config: Any, record: RunRecord) -> None:
    """Refuses to go on with a stopped run under settings that would have trained something else."""
    if not record.checkpoints_path.exists() or not record.config_path.exists():
        return
    if changed := launch.differences(config, record.config_path, ignore=_NOT_IN_TRAINING):
        raise UserError(
            f"{record.path} holds a stopped run of another configuration: {', '.join(changed)}; "
            "start it with the same settings, or remove the folder"
        )


def train_command(config: Any, record: RunRecord, prepare: Callable[[], Prepared]) -> None:
    """The whole of a ``train`` command after its dry run: from the state of the record to a finished training.

    Args:
        config: the experiment's configuration, with ``method``, ``training`` and ``on_finished``.
        prepare: reads data and model; called before the run folder is touched, and not for a finished run.

    Raises:
        UserError: a finished run, a stopped one of other settings, bad configuration, data or model.
    """
    if _is_done(record, config.on_finished):
        return
    overwrites = record.is_trained()
    if not overwrites:
        _check_resumable(config, record)
    prepared = prepare()
    if not is_main_process():  # the first process alone writes the record
        fit(config.method, config.training, record, prepared)
        return
    with record.stage(STAGE, fresh=overwrites):
        write_atomic(record.config_path, launch.dump(config))
        record.set_training(fit(config.method, config.training, record, prepared))
        shutil.rmtree(record.checkpoints_path, ignore_errors=True)
    logger.info("finished: %s", record.path)

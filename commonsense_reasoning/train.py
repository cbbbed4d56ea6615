"""Trains one adapter: ``python -m commonsense_reasoning.train scale=smoke method=moslora seed=1``.

Writes the run record (moslora_core/record.py). A stopped run goes on from its last checkpoint when it is started
again; a finished one is left alone unless ``on_finished`` says otherwise. ``--dry-run`` only counts.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from moslora_core import launch
from moslora_core.count import (
    DecoderShape,
    DryRun,
    accumulation_steps,
    count_parameters,
    estimate_memory,
    meta_causal_lm,
    optimiser_steps,
)
from moslora_core.errors import UserError
from moslora_core.methods import attach, peft_config
from moslora_core.record import RunRecord, Stopwatch, Training, append_jsonl, peak_memory, repair_jsonl, write_atomic

from .config import CONF_MODULE, EXPERIMENT, NOT_IN_LABEL, Config, check_on_finished, locate
from .data import check_prepared, load_training
from .models import architecture, load_base, load_tokenizer
from .tasks import PUBLISHED_TRAIN_ITEMS

logger = logging.getLogger(__name__)

STAGE = "train"
# A stopped run may go on with other values of these.
_NOT_IN_TRAINING = ("evaluation", "runs_dir", "run_name", "on_finished", "dry_run")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")


# --------------------------------------------------------------------------------------------------------------- plan


def world_size() -> int:
    """Number of processes that the launcher (torchrun, deepspeed, accelerate) started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main_process() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def total_steps(config: Config, examples: int) -> int:
    training = config.training
    if training.max_steps is not None:
        if training.max_steps < 1:
            raise UserError(f"training.max_steps must be positive or null, found {training.max_steps}")
        return training.max_steps
    return optimiser_steps(examples, training.global_batch_size, training.epochs)


def dry_run(config: Config) -> DryRun:
    """Counts parameters, memory and steps on the meta device, without data or weights."""
    training = config.training
    examples = (config.data.train_items or PUBLISHED_TRAIN_ITEMS) - config.data.validation_items
    accumulation = accumulation_steps(training.global_batch_size, training.per_device_batch_size, world_size())
    steps = total_steps(config, examples)
    model = meta_causal_lm(architecture(config.model))
    count = count_parameters(
        model, peft_config(config.method, config.adapter, seed=config.seed, total_steps=max(steps, 10))
    )
    dtype = config.model.dtype if config.model.quantization == "none" else config.model.quantization
    memory = estimate_memory(
        count,
        dtype="bfloat16" if dtype == "auto" else dtype,
        decoder=DecoderShape.from_config(model.config),
        batch=training.per_device_batch_size,
        sequence=config.data.cutoff,
        gradient_checkpointing=config.model.gradient_checkpointing,
        dropout=config.adapter.lora_dropout,
    )
    name = f"{EXPERIMENT} scale={config.scale.name} method={config.method.name}"
    return DryRun(
        name, count, memory, steps, training.global_batch_size, accumulation, {"training_examples": f"{examples:,}"}
    )


def _precision(name: str) -> dict[str, bool]:
    if name not in PRECISIONS:
        raise UserError(f"training.precision must be one of {', '.join(PRECISIONS)}, found {name!r}")
    if name == "auto":
        bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        name = "bf16" if bf16 else "fp32"
    if name == "fp16" and not torch.cuda.is_available():
        raise UserError("training.precision=fp16 needs a GPU; use fp32 or bf16 on a CPU")
    return {"bf16": name == "bf16", "fp16": name == "fp16"}


def _deepspeed(name: str | None) -> str | None:
    if name is None:
        return None
    packaged = Path(__file__).parent / "conf" / "deepspeed" / f"{name}.json"
    path = packaged if packaged.exists() else Path(name)
    if not path.is_file():
        known = sorted(p.stem for p in packaged.parent.glob("*.json"))
        raise UserError(f"training.deepspeed={name}: no such file; expected a JSON file or one of {', '.join(known)}")
    return str(path)


def training_arguments(config: Config, record: RunRecord, steps: int, validates: bool) -> TrainingArguments:
    """transformers' arguments of a run; what is published is in ``conf/scale/paper.yaml``."""
    training = config.training
    if training.learning_rate <= 0:
        raise UserError(f"training.learning_rate must be positive, found {training.learning_rate}")
    if training.load_best and (not validates or training.eval_steps is None or training.save_steps is None):
        raise UserError("training.load_best needs data.validation_items, training.eval_steps and training.save_steps")
    evaluates = validates and training.eval_steps is not None
    accumulation = accumulation_steps(training.global_batch_size, training.per_device_batch_size, world_size())
    try:
        return TrainingArguments(
            output_dir=str(record.checkpoints_path),
            per_device_train_batch_size=training.per_device_batch_size,
            per_device_eval_batch_size=training.per_device_batch_size,
            gradient_accumulation_steps=accumulation,
            learning_rate=training.learning_rate,
            lr_scheduler_type=training.lr_scheduler,
            warmup_steps=training.warmup_steps,
            max_steps=steps,
            weight_decay=training.weight_decay,
            max_grad_norm=training.max_grad_norm,
            optim=training.optimizer,
            train_sampling_strategy="group_by_length" if training.group_by_length else "random",
            logging_steps=training.logging_steps,
            eval_strategy="steps" if evaluates else "no",
            eval_steps=training.eval_steps if evaluates else None,
            save_strategy="no" if training.save_steps is None else "steps",
            save_steps=training.save_steps or 500,
            save_total_limit=training.save_total_limit,
            logging_nan_inf_filter=False,  # it would log a diverged training as one without loss
            load_best_model_at_end=training.load_best,
            metric_for_best_model="loss" if training.load_best else None,
            gradient_checkpointing=config.model.gradient_checkpointing,
            disable_tqdm=not sys.stderr.isatty(),
            include_num_input_tokens_seen="non_padding",
            deepspeed=_deepspeed(training.deepspeed),
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            ddp_find_unused_parameters=False if world_size() > 1 else None,
            seed=config.seed,
            data_seed=config.seed,
            **_precision(training.precision),
        )
    except (ValueError, ImportError) as error:
        raise UserError(f"training: {str(error).strip().splitlines()[0]}") from None


# -------------------------------------------------------------------------------------------------------------- train


def _diverged(step: int, name: str, value: float) -> UserError:
    return UserError(f"training diverged at step {step}: {name} is {value}; lower training.learning_rate")


class _Recorder(TrainerCallback):
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
            "tokens": int(state.num_input_tokens_seen),
            "seconds": round(self.stopwatch.seconds, 3),
            "peak_memory_bytes": peak_memory()[0],
        }
        append_jsonl(self.record.metrics_path, [row])
        if args.disable_tqdm:  # a log file takes lines, not a progress bar
            shown = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
            logger.info("step %d of %d: %s, %.0f s", state.global_step, state.max_steps, shown, row["seconds"])


class _AdaLoraBudget(TrainerCallback):
    """AdaLoRA prunes its ranks after each optimiser step, while the gradients are still there."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        tuner = getattr(model, "module", model)
        tuner.base_model.update_and_allocate(state.global_step)


def _resume_point(record: RunRecord) -> str | None:
    """Last complete checkpoint of a stopped run; the log is cut back to it."""
    # Trainer writes its state last: a checkpoint without it was being written when the run was killed. It stays where
    # it is, since other processes may be looking too, until the resumed training writes it again.
    complete = {
        int(state.parent.name.rsplit("-", 1)[1]): state.parent
        for state in record.checkpoints_path.glob("checkpoint-*/trainer_state.json")
        if state.stat().st_size
    }
    step = max(complete, default=0)
    if is_main_process():
        repair_jsonl(record.metrics_path, keep=lambda row: row["step"] <= step)
    return str(complete[step]) if complete else None


def _save_adapter(trainer: Trainer, record: RunRecord) -> None:
    """Saves the adapter beside its place and renames it: an ``adapter`` folder is always whole."""
    temporary = record.path / ".adapter.partial"
    trainer.save_model(str(temporary))  # every process: sharded parameters are gathered here
    if is_main_process():
        (temporary / "training_args.bin").unlink(missing_ok=True)  # a pickle; config.yaml says it all
        if record.adapter_path.exists():
            shutil.rmtree(record.adapter_path)
        temporary.rename(record.adapter_path)


@dataclass
class Prepared:
    """All that a training needs, checked: what can be wrong is found before the run folder is touched."""

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    train_set: Dataset
    validation_set: Dataset | None
    arguments: TrainingArguments


def prepare(config: Config, record: RunRecord) -> Prepared:
    """Reads data and model and attaches the adapter.

    Raises:
        UserError: bad configuration, data or model.
    """
    check_prepared(config.data)
    accumulation_steps(config.training.global_batch_size, config.training.per_device_batch_size, world_size())
    # Before anything is drawn: the adapter's start, the order of the items and dropout all follow from the seed.
    set_seed(config.seed)
    tokenizer = load_tokenizer(config.model)
    train_set, validation_set = load_training(config.data, config.protocol, tokenizer)
    steps = total_steps(config, len(train_set))
    arguments = training_arguments(config, record, steps, validates=validation_set is not None)
    method_config = peft_config(config.method, config.adapter, seed=config.seed, total_steps=steps)

    model = load_base(config.model)
    model.config.use_cache = False
    if config.model.quantization != "none":
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=config.model.gradient_checkpointing)
    elif config.model.gradient_checkpointing:
        model.enable_input_require_grads()
    model = attach(model, config.method, method_config)
    return Prepared(model, tokenizer, train_set, validation_set, arguments)


def train(config: Config, record: RunRecord, prepared: Prepared) -> Training:
    """Runs the training of ``config`` into ``record``; resumes from its last checkpoint.

    Raises:
        UserError: a diverged training.
    """
    model, arguments = prepared.model, prepared.arguments
    trainable, total = model.get_nb_trainable_parameters()
    logger.info(
        "%s: %s trainable of %s parameters, %d steps",
        config.method.name,
        f"{trainable:,}",
        f"{total:,}",
        arguments.max_steps,
    )

    checkpoint = _resume_point(record)
    if checkpoint:
        logger.info("resuming from %s", checkpoint)
    rows = record.metrics()
    stopwatch = Stopwatch(before=rows[-1]["seconds"] if rows else 0.0)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=prepared.train_set,
        eval_dataset=prepared.validation_set,
        data_collator=DataCollatorForSeq2Seq(prepared.tokenizer, pad_to_multiple_of=8, padding=True),
        callbacks=_callbacks(config, record, stopwatch),
        optimizers=(_loraplus(model, config), None),
    )
    trainer.remove_callback(PrinterCallback)
    output = trainer.train(resume_from_checkpoint=checkpoint)
    if not math.isfinite(output.training_loss):  # steps after the last logged one
        raise _diverged(output.global_step, "loss", output.training_loss)
    memory, kind = peak_memory()
    _save_adapter(trainer, record)
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
        validation_loss=min(validation) if validation and config.training.load_best else (validation or [None])[-1],
    )


def _callbacks(config: Config, record: RunRecord, stopwatch: Stopwatch) -> list[TrainerCallback]:
    callbacks: list[TrainerCallback] = [_Recorder(record, stopwatch)]
    if config.method.tuner == "adalora":
        callbacks.append(_AdaLoraBudget())
    if config.training.tensorboard and is_main_process():
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations import TensorBoardCallback

        # Trainer's own place for it is below the checkpoints, which go when the training has finished.
        callbacks.append(TensorBoardCallback(SummaryWriter(str(record.path / "tensorboard"))))
    return callbacks


def _loraplus(model: PeftModel, config: Config) -> torch.optim.Optimizer | None:
    if config.method.lora_plus_ratio is None:
        return None
    return create_loraplus_optimizer(
        model,
        torch.optim.AdamW,
        lr=config.training.learning_rate,
        loraplus_lr_ratio=config.method.lora_plus_ratio,
        weight_decay=config.training.weight_decay,
    )


# ------------------------------------------------------------------------------------------------------------ command


def _is_done(config: Config, record: RunRecord) -> bool:
    """Whether there is nothing to do; refuses a finished run unless ``on_finished`` says otherwise."""
    check_on_finished(config)
    if not record.is_trained():
        return False
    if config.on_finished == "skip":
        logger.info("already trained: %s", record.path)
        return True
    if config.on_finished == "refuse":
        raise UserError(
            f"{record.path} is a finished run; on_finished=skip keeps it, on_finished=overwrite replaces it"
        )
    return False


def _check_resumable(config: Config, record: RunRecord) -> None:
    """Refuses to go on with a stopped run under settings that would have trained something else."""
    if not record.checkpoints_path.exists() or not record.config_path.exists():
        return
    if changed := launch.differences(config, record.config_path, ignore=_NOT_IN_TRAINING):
        raise UserError(
            f"{record.path} holds a stopped run of another configuration: {', '.join(changed)}; "
            "start it with the same settings, or remove the folder"
        )


def main(config: Config) -> None:
    if config.dry_run:
        for line in dry_run(config).lines():
            logger.info(line)
        return
    record = locate(config)
    if _is_done(config, record):
        return
    overwrites = record.is_trained()
    if not overwrites:
        _check_resumable(config, record)
    prepared = prepare(config, record)
    if not is_main_process():  # the first process alone writes the record
        train(config, record, prepared)
        return
    with record.stage(STAGE, fresh=overwrites):
        write_atomic(record.config_path, launch.dump(config))
        record.set_training(train(config, record, prepared))
        shutil.rmtree(record.checkpoints_path, ignore_errors=True)
    logger.info("finished: %s", record.path)


if __name__ == "__main__":
    launch.run(main, Config, CONF_MODULE, not_in_label=NOT_IN_LABEL)

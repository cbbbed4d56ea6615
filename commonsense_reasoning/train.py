"""Trains one adapter: ``python -m commonsense_reasoning.train scale=smoke method=moslora seed=1``.

Writes the run record (moslora_core/record.py). A stopped run goes on from its last checkpoint when it is started
again; a finished one is left alone unless ``on_finished`` says otherwise. ``--dry-run`` only counts.
"""

from __future__ import annotations

import logging

from peft import prepare_model_for_kbit_training
from transformers import DataCollatorForSeq2Seq, set_seed

from moslora_core import launch
from moslora_core.count import DecoderShape, DryRun, count_parameters, estimate_memory, meta_causal_lm
from moslora_core.methods import attach, peft_config
from moslora_core.record import RunRecord
from moslora_core.running import Prepared, accumulation, check_settings, total_steps, train_command, training_arguments

from .config import CONF_MODULE, EXPERIMENT, NOT_IN_LABEL, Config, locate
from .data import Collator, check_prepared, load_training
from .models import architecture, load_base, load_tokenizer
from .tasks import PUBLISHED_TRAIN_ITEMS

logger = logging.getLogger(__name__)


def dry_run(config: Config) -> DryRun:
    """Counts parameters, memory and steps on the meta device, without data or weights."""
    training = config.training
    examples = (config.data.train_items or PUBLISHED_TRAIN_ITEMS) - config.data.validation_items
    accumulated = accumulation(training)
    steps = total_steps(training, examples)
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
    details = {"training_examples": f"{examples:,}"}
    return DryRun(name, count, memory, steps, training.global_batch_size, accumulated, details)


def prepare(config: Config, record: RunRecord) -> Prepared:
    """Reads data and model and attaches the adapter.

    Raises:
        UserError: bad configuration, data or model.
    """
    check_prepared(config.data)
    accumulation(config.training)
    tokenizer = load_tokenizer(config.model)
    train_set, validation_set = load_training(config.data, config.protocol, tokenizer)
    steps = total_steps(config.training, len(train_set))
    arguments = training_arguments(
        config.training,
        record,
        seed=config.seed,
        steps=steps,
        validates=validation_set is not None,
        gradient_checkpointing=config.model.gradient_checkpointing,
    )
    method_config = peft_config(config.method, config.adapter, seed=config.seed, total_steps=steps)

    model = load_base(config.model)
    model.config.use_cache = False
    if config.model.quantization != "none":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=config.model.gradient_checkpointing)
    elif config.model.gradient_checkpointing:
        model.enable_input_require_grads()
    # The adapter's start, the order of the items and dropout all follow from the seed, however the base was loaded:
    # ZeRO-3 draws numbers of its own there.
    set_seed(config.seed)
    model = attach(model, config.method, method_config)
    select = Collator if model._supports_logits_to_keep() else DataCollatorForSeq2Seq
    collator = select(tokenizer, pad_to_multiple_of=8, padding=True)
    return Prepared(model, train_set, validation_set, collator, arguments)


def main(config: Config) -> None:
    check_settings(config)
    if config.dry_run:
        for line in dry_run(config).lines():
            logger.info(line)
        return
    record = locate(config)
    train_command(config, record, lambda: prepare(config, record))


if __name__ == "__main__":
    launch.run(main, Config, CONF_MODULE, not_in_label=NOT_IN_LABEL)

"""Trains the adapters of one LLaVA: ``python -m visual_instruction.train scale=smoke method=moslora seed=1``.

Writes the run record (moslora_core/record.py). A stopped run goes on from its last checkpoint when it is started
again; a finished one is left alone unless ``on_finished`` says otherwise. ``--dry-run`` only counts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import torch
from peft import prepare_model_for_kbit_training
from torch import nn
from torch.utils.data import Dataset, Sampler
from transformers import LlavaConfig, Trainer, set_seed

from moslora_core import launch
from moslora_core.count import Count, DecoderShape, DryRun, MemoryEstimate, count_parameters, estimate_memory
from moslora_core.methods import attach, peft_config
from moslora_core.record import RunRecord
from moslora_core.running import (
    Prepared,
    accumulation,
    check_devices,
    check_settings,
    planned_devices,
    total_steps,
    train_command,
    training_arguments,
    zero_stage,
)

from .config import CONF_MODULE, EXPERIMENT, NOT_IN_LABEL, Config, TowersConfig, locate
from .data import Collator, check_prepared, load_training
from .models import (
    PROJECTOR,
    adapter_config,
    architecture,
    load_base,
    load_processor,
    meta_llava,
    template_of,
)
from .sampling import FollowEpochs

logger = logging.getLogger(__name__)

PUBLISHED_TRAIN_ITEMS = 665_298  # llava_v1_5_mix665k


# -------------------------------------------------------------------------------------------------------------- train


class LlavaTrainer(Trainer):
    """transformers' Trainer with batches of one modality, in which every adapter takes part in every step."""

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        dataset = self.train_dataset if train_dataset is None else train_dataset
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        sampler = dataset.sampler(batch, seed=self.args.data_seed)
        self.add_callback(FollowEpochs(sampler))
        return sampler

    def compute_loss(self, model: nn.Module, inputs: dict, *args, **kwargs):
        """The model's loss; of a batch without images too, a function of the vision tower and the projector.

        Data-parallel processes wait for one another's gradients: where one has a batch of text and another one of
        images, the tower has to be in both graphs. As LLaVA does, a black image is looked at, and counts nothing.
        """
        result = super().compute_loss(model, inputs, *args, **kwargs)
        if inputs.get("pixel_values") is not None:
            return result
        with self.accelerator.autocast():
            nothing = 0.0 * _look_at_black(self.accelerator.unwrap_model(model)).sum()
        return (result[0] + nothing, *result[1:]) if isinstance(result, tuple) else result + nothing


def _look_at_black(model: nn.Module) -> torch.Tensor:
    """Features of one black image: (image tokens, hidden)."""
    llava = model.get_base_model()
    size = llava.config.vision_config.image_size
    weight = llava.get_input_embeddings().weight
    image = torch.zeros(1, 3, size, size, device=weight.device, dtype=llava.model.vision_tower.dtype)
    return torch.cat(llava.get_image_features(pixel_values=image, return_dict=True).pooler_output)


def _raise_trained(model: nn.Module) -> None:
    """Trains the projector in float32, as PEFT does with A, B and mixers: in 16 bits small steps would round to none.

    DeepSpeed's split parameters are left alone: it keeps float32 copies of its own.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype.itemsize == 2 and not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.float()


def prepare(config: Config, record: RunRecord) -> Prepared:
    """Reads data and model and attaches the adapters.

    Raises:
        UserError: bad configuration, data or model.
    """
    check_devices(config.training)
    accumulation(config.training)
    check_prepared(config.data)
    processor, template = load_processor(config.model), template_of(config.model)
    train_set = load_training(config.data, processor.tokenizer, processor, template, config.data.over_long)
    steps = total_steps(config.training, len(train_set))
    checkpointing = config.model.gradient_checkpointing
    arguments = training_arguments(
        config.training,
        record,
        seed=config.seed,
        steps=steps,
        gradient_checkpointing=checkpointing,
        # Pixels carry no gradient into the vision tower, which the reentrant kind needs.
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        remove_unused_columns=False,
    )
    model = load_base(config.model)
    adapter = adapter_config(config.adapter, model.config)
    method_config = peft_config(config.method, adapter, seed=config.seed, total_steps=steps)
    model.config.text_config.use_cache = False
    if config.model.quantization != "none":
        model = prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
    elif checkpointing:
        model.enable_input_require_grads()
    # The adapters' start, the order of the items and dropout all follow from the seed, however the base was loaded:
    # ZeRO-3 draws numbers of its own there.
    set_seed(config.seed)
    model = attach(model, config.method, method_config)
    if arguments.bf16 or arguments.fp16:
        _raise_trained(model)
    collator = Collator(processor.tokenizer.pad_token_id)
    return Prepared(model, train_set, None, collator, arguments, LlavaTrainer)


# ------------------------------------------------------------------------------------------------------------ dry run


def dry_run(config: Config) -> DryRun:
    """Counts parameters, memory and steps on the meta device, without data or weights."""
    training, llava = config.training, architecture(config.model)
    devices, accumulated = planned_devices(training), accumulation(training)
    examples = config.data.train_items or PUBLISHED_TRAIN_ITEMS
    steps = total_steps(training, examples)
    model = meta_llava(llava)

    def count(towers: TowersConfig) -> Count:
        adapter = adapter_config(towers, llava)
        return count_parameters(
            model, peft_config(config.method, adapter, seed=config.seed, total_steps=max(steps, 10))
        )

    whole = count(config.adapter)
    memory = _memory(config, llava, whole)
    arithmetic = f"{devices} devices x {training.per_device_batch_size} x {accumulated} accumulated"
    details = {
        **{f"trainable in the {part}": size for part, size in _by_part(config.adapter, count, model).items()},
        "batch arithmetic": f"{training.global_batch_size} = {arithmetic}",
        "memory": f"per device, of {devices}, ZeRO stage {zero_stage(training)}",
        "training examples": f"{examples:,}",
    }
    name = f"{EXPERIMENT} scale={config.scale.name} model={config.model.name} method={config.method.name}"
    return DryRun(name, whole, memory, steps, training.global_batch_size, accumulated, details)


def _by_part(towers: TowersConfig, count: Callable[[TowersConfig], Count], model: nn.Module) -> dict[str, str]:
    """Trainable parameters of each part of the LLaVA, each tower counted with the other left as it is."""
    alone = {"LLM": "vision", "ViT": "llm"}
    sizes = {}
    for part, other in alone.items():
        only = replace(towers, train_projector=False, **{other: replace(getattr(towers, other), r=0)})
        found = count(only) if only.llm.r or only.vision.r else Count(0, 0, 0)
        sizes[part] = f"{found.trainable:,} (mixers {found.mixer:,})"
    projector = sum(p.numel() for name, p in model.named_parameters() if PROJECTOR in name)
    return sizes | {"projector": f"{projector if towers.train_projector else 0:,}"}


def _memory(config: Config, llava: LlavaConfig, count: Count) -> MemoryEstimate:
    """Estimate for one device: both towers' activations, the longest text behind an image."""
    training, vision = config.training, llava.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    common = {
        "batch": training.per_device_batch_size,
        "gradient_checkpointing": config.model.gradient_checkpointing,
        "dropout": config.adapter.lora_dropout,
    }
    dtype = "bfloat16" if config.model.dtype == "auto" else config.model.dtype
    whole = estimate_memory(
        count,
        dtype=dtype if config.model.quantization == "none" else config.model.quantization,
        decoder=DecoderShape.from_config(llava),
        sequence=config.data.text_limit + patches,
        zero_stage=zero_stage(training),
        devices=planned_devices(training),
        **common,
    )
    # A vision layer without its gate: half the MLP of the decoder's formula, and no logits.
    width, layers = vision.hidden_size, vision.num_hidden_layers
    shape = DecoderShape(width, layers, vision.intermediate_size // 2, 0, vision.num_attention_heads, width)
    tower = estimate_memory(Count(0, 0, 0), dtype=dtype, decoder=shape, sequence=patches + 1, **common)
    return replace(whole, activations=whole.activations + tower.activations)


# ------------------------------------------------------------------------------------------------------------ command


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

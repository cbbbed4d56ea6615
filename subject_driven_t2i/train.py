"""Teaches SDXL one subject: ``python -m subject_driven_t2i.train scale=smoke method=moslora data.subject=toy seed=1``.

DreamBooth with adapters on the UNet; text encoders and VAE stay as they are, and what they make of the images and
captions is computed once. Writes the run record (moslora_core/record.py), with the adapter a second time for
diffusers' pipelines (:mod:`subject_driven_t2i.export`). A stopped run goes on from its last checkpoint when it is
started again; a finished one is left alone unless ``on_finished`` says otherwise. ``--dry-run`` only counts.

The loop is transformers' ``Trainer``, as in the other experiments, on examples that are numbered and seeded one by one
(:mod:`subject_driven_t2i.draws`).
"""

from __future__ import annotations

import gc
import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from peft import PeftConfig
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback, set_seed

from moslora_core import launch
from moslora_core.base_models import weights_dtype
from moslora_core.count import DryRun, count_parameters, estimate_memory
from moslora_core.errors import UserError
from moslora_core.methods import attach, peft_config
from moslora_core.record import RunRecord
from moslora_core.running import (
    Prepared,
    accumulation,
    check_devices,
    check_settings,
    is_main_process,
    planned_devices,
    total_steps,
    train_command,
    training_arguments,
    zero_stage,
)

from .activations import saved_for_backward
from .config import CONF_MODULE, EXPERIMENT, NOT_IN_LABEL, Config, locate
from .drawing import Request, draw, request_of, resolution_of
from .draws import Draws, Source, collate
from .encoding import Captions, encode_captions, encode_images, encode_prompt
from .export import DIFFUSERS_FOLDER, export_diffusers, obstacle
from .models import architecture, check_resolution, load_pipeline, load_unet, meta_unet, noise_schedule
from .prior import class_latents
from .subjects import Subject, check_template, subject_of

logger = logging.getLogger(__name__)

VALIDATION_FOLDER = "validation"
IMAGES_PER_SUBJECT = 5  # DreamBooth's subjects have four to six
LATENT_FACTOR = 8  # pixels a latent of SDXL's VAE, for the estimate of memory


# -------------------------------------------------------------------------------------------------------------- train


class DreamBoothTrainer(Trainer):
    """transformers' Trainer on a UNet: the loss of denoising, on examples in the order of their numbers."""

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def compute_loss(self, model: nn.Module, inputs: dict[str, torch.Tensor], return_outputs: bool = False, **kwargs):
        """Weighted mean squared error of an example's rows, averaged over the examples; whole in float32."""
        dtype = self.accelerator.unwrap_model(model).get_base_model().dtype
        predicted = model(
            inputs["noisy"].to(dtype),
            inputs["timestep"],
            encoder_hidden_states=inputs["tokens"].to(dtype),
            # Sizes in pixels stay in float32: bfloat16 would round 687 to 688.
            added_cond_kwargs={"text_embeds": inputs["pooled"].to(dtype), "time_ids": inputs["time_ids"]},
        ).sample
        errors = functional.mse_loss(predicted.float(), inputs["target"], reduction="none").flatten(1).mean(1)
        examples = len(errors) // self.train_dataset.rows
        loss = (inputs["weight"] * errors).sum() / examples
        return (loss, predicted) if return_outputs else loss


class ValidationImages(TrainerCallback):
    """Draws some of the subject's prompts every so many steps, with the noise that generation will start from.

    Args:
        pipeline: VAE and scheduler; the UNet is the one in training.
    """

    def __init__(
        self,
        config: Config,
        record: RunRecord,
        pipeline: StableDiffusionXLPipeline,
        unet: UNet2DConditionModel,
        wanted: Sequence[Request],
        captions: Captions,
    ):
        self.config, self.record = config, record
        self.pipeline, self.unet = pipeline, unet
        self.wanted, self.captions = list(wanted), captions

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.config.training.validation_steps or not is_main_process():
            return
        folder = self.record.path / VALIDATION_FOLDER / f"step-{state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        self.pipeline.unet = self.unet.eval()  # Trainer sets the training mode before every step
        generation, resolution = self.config.generation, resolution_of(self.config)
        for request in self.wanted:
            (image,) = draw(self.pipeline, [request], self.captions, generation, resolution)
            image.save(folder / f"{request.prompt_index:03d}.png")


def prepare(config: Config, record: RunRecord) -> Prepared:
    """Encodes data, loads the UNet and attaches the adapter.

    Raises:
        UserError: bad configuration, data or model.
    """
    training = config.training
    check_devices(training)
    accumulation(training)
    _check_settings(config)
    subject = subject_of(config.data)
    wanted = _validation_requests(config, subject)
    pipeline = load_pipeline(config.model, without=[] if training.prior_weight else ["unet"])
    check_resolution(pipeline, training.resolution, "training.resolution")
    sources = _sources(config, subject, pipeline)
    captions = encode_captions(pipeline, [request.prompt for request in wanted], config.generation.negative_prompt)
    schedule = noise_schedule(pipeline)
    pipeline = _for_validation(pipeline) if wanted else None
    _free_memory()

    steps = total_steps(training, len(sources[0].latents))
    arguments = training_arguments(
        training,
        record,
        seed=config.seed,
        steps=steps,
        remove_unused_columns=False,
        include_num_input_tokens_seen="no",
    )
    train_set = Draws(sources, schedule, steps * training.global_batch_size, config.seed)
    unet = load_unet(config.model)
    adapter = peft_config(config.method, config.adapter, seed=config.seed, total_steps=steps, task_type=None)
    set_seed(config.seed)  # the adapter's start and dropout
    model = attach(unet, config.method, adapter)
    # Trainer writes transformers' settings into a model's configuration, which diffusers has frozen.
    model.config = None
    if config.model.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    validation = [ValidationImages(config, record, pipeline, unet, wanted, captions)] if wanted else []
    return Prepared(
        model,
        train_set,
        None,
        collate,
        arguments,
        DreamBoothTrainer,
        callbacks=validation,
        finish=lambda: _export(record),
    )


def _check_settings(config: Config) -> None:
    training = config.training
    if training.eval_steps is not None:
        raise UserError("training.eval_steps: no validation loss here; training.validation_steps draws images")
    for key in ("validation_steps", "prior_images"):
        if (value := getattr(training, key)) is not None and value < 1:
            raise UserError(f"training.{key} must be positive, found {value}")
    if training.prior_weight < 0:
        raise UserError(f"training.prior_weight must be at least 0, found {training.prior_weight}")
    check_template(config.data.instance_prompt, "data.instance_prompt")
    check_template(training.class_prompt, "training.class_prompt")


def _validation_requests(config: Config, subject: Subject) -> list[Request]:
    if config.training.validation_steps is None:
        return []
    key = "training.validation_prompts"
    return [request_of(subject, index, 0, config.generation.seed, key) for index in config.training.validation_prompts]


def _sources(config: Config, subject: Subject, pipeline: StableDiffusionXLPipeline) -> list[Source]:
    """The subject's images under its caption and, under prior preservation, its class's."""
    training = config.training
    caption = config.data.instance_prompt.format(subject.token, subject.class_name)
    sources = [Source(encode_images(pipeline, subject.images, training.resolution), encode_prompt(pipeline, caption))]
    if training.prior_weight:
        prior = " ".join(training.class_prompt.format("", subject.class_name).split())
        latents = class_latents(config, pipeline, prior)
        sources.append(Source(latents, encode_prompt(pipeline, prior), training.prior_weight))
    return sources


def _for_validation(pipeline: StableDiffusionXLPipeline) -> StableDiffusionXLPipeline:
    """What decodes images, without the parts that only take memory."""
    for part in ("unet", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        setattr(pipeline, part, None)
    return pipeline


def _free_memory() -> None:
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def _export(record: RunRecord) -> None:
    """The saved adapter once more, for diffusers' pipelines."""
    target = record.path / DIFFUSERS_FOLDER
    if target.exists():
        shutil.rmtree(target)
    if reason := obstacle(record.adapter_path):
        logger.info("no %s: %s", DIFFUSERS_FOLDER, reason)
    else:
        export_diffusers(record.adapter_path, target)


# ------------------------------------------------------------------------------------------------------------ dry run


def dry_run(config: Config) -> DryRun:
    """Counts parameters, memory and steps on the meta device, without data or weights."""
    training, shape = config.training, architecture(config.model)
    steps = total_steps(training, IMAGES_PER_SUBJECT)
    devices, accumulated = planned_devices(training), accumulation(training)

    def adapter() -> PeftConfig:
        return peft_config(config.method, config.adapter, seed=config.seed, total_steps=max(steps, 10), task_type=None)

    count = count_parameters(meta_unet(shape), adapter())
    dtype, rows = weights_dtype(config.model.dtype), 2 if training.prior_weight else 1
    memory = replace(
        estimate_memory(count, dtype=config.model.dtype, zero_stage=zero_stage(training), devices=devices),
        activations=saved_for_backward(
            meta_unet(shape),
            adapter(),
            size=training.resolution // LATENT_FACTOR,
            batch=rows * training.per_device_batch_size,
            dtype=dtype,
            gradient_checkpointing=config.model.gradient_checkpointing,
        ),
        logits=0,
    )
    arithmetic = f"{devices} devices x {training.per_device_batch_size} x {accumulated} accumulated"
    details = {
        "batch arithmetic": f"{training.global_batch_size} = {arithmetic}",
        "training images": f"{training.resolution} x {training.resolution} pixels"
        + (", one of the class beside each" if training.prior_weight else ""),
        "memory": "of the UNet's training; text encoders and VAE are gone by then",
    }
    name = f"{EXPERIMENT} scale={config.scale.name} model={config.model.name} method={config.method.name}"
    return DryRun(name, count, memory, steps, training.global_batch_size, accumulated, details)


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

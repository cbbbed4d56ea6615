"""Configuration schema of subject-driven generation; values live in ``conf/``. An unknown key is refused by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from moslora_core.methods import AdapterConfig, MethodConfig
from moslora_core.record import RunRecord
from moslora_core.running import TrainingConfig

EXPERIMENT = "subject_driven_t2i"
CONF_MODULE = f"{EXPERIMENT}.conf"
# Keys that change what is drawn with a run, how it is scored or where its input lies, not which run it is.
NOT_IN_LABEL = (
    "generation",
    "evaluation",
    "data.dir",
    "data.source",
    "data.path",
    "data.revision",
    "data.subjects",
    "data.live_classes",
    "data.min_size",
    "model.cache_dir",
    "training.validation_steps",
    "training.validation_prompts",
)


@dataclass
class ScaleConfig:
    name: str = MISSING


@dataclass
class ModelConfig:
    """The base: a pipeline of SDXL's architecture in diffusers' layout.

    Attributes:
        name: short name in tables.
        path: ``StableDiffusionXLPipeline``: folder, hub id or ``package:<module>[/<folder>]``.
        variant: which of several sets of weights, such as ``fp16``; null for the plain one.
        vae: another autoencoder than the pipeline's own: folder or hub id; null for its own.
        cache_dir: where latents of class images are kept, if prior preservation asks for them.
        architecture: configuration of the UNet as a dictionary, with which a dry run needs no download.
        dtype: dtype of the frozen weights: float32 | bfloat16 | float16.
    """

    name: str = MISSING
    path: str = MISSING
    revision: str | None = None
    variant: str | None = None
    vae: str | None = None
    cache_dir: str = "models"
    architecture: dict[str, Any] | None = None
    dtype: str = "float32"
    gradient_checkpointing: bool = False


@dataclass
class DataConfig:
    """Which subjects there are, and which of them a run learns.

    Attributes:
        dir: folder that prepare_data writes and the other commands read.
        source: smoke (generated) | folder | hub.
        path: DreamBooth folder (one folder of images a subject, and ``prompts_and_classes.txt``) for
            ``source=folder``; id of a dataset repository of that layout for ``source=hub``.
        subjects: names of the subjects to prepare; null for all.
        subject: name of the subject that a run learns.
        token: word that comes to mean the subject.
        live_classes: classes of living things; their subjects have DreamBooth's prompts for live subjects.
        min_size: least width and height of a subject image, in pixels.
        instance_prompt: caption of the subject's images in training; {0} is the token, {1} the class.
    """

    dir: str = MISSING
    source: str = MISSING
    path: str | None = None
    revision: str | None = None
    subjects: list[str] | None = None
    subject: str | None = None
    token: str = "sks"
    live_classes: list[str] = field(default_factory=lambda: ["cat", "dog"])
    min_size: int = MISSING
    instance_prompt: str = "a photo of {0} {1}"


@dataclass
class DreamBoothConfig(TrainingConfig):
    """Hyperparameters of a DreamBooth training, beside those of any training.

    Attributes:
        resolution: width and height of the training images in pixels; they are scaled and cropped about the centre.
        prior_weight: weight of the loss on class images (prior preservation); 0 trains without them.
        prior_images: number of class images, which the base draws once.
        class_prompt: their caption; {0} is empty, {1} the class.
        validation_steps: optimiser steps between drawings of ``validation_prompts``; null for none.
        validation_prompts: indices of the subject's prompts that are drawn on the way.
    """

    resolution: int = MISSING
    prior_weight: float = 0.0
    prior_images: int = 100
    class_prompt: str = "a photo of {1}"
    validation_steps: int | None = None
    validation_prompts: list[int] = field(default_factory=lambda: [0])


@dataclass
class GenerationConfig:
    """How images are drawn with a run, the same for every method.

    Attributes:
        prompts: indices of the subject's prompts; null for all.
        images_per_prompt: images of each prompt.
        steps: denoising steps.
        guidance_scale: classifier-free guidance; 1 is without.
        negative_prompt: what guidance leads away from; null for the pipeline's empty embedding.
        resolution: width and height in pixels; null for that of the training.
        seed: of the starting noise, with the subject's name, the prompt's index and the image's.
        batch_size: images drawn at once; no image depends on it beyond rounding.
    """

    prompts: list[int] | None = None
    images_per_prompt: int = 4
    steps: int = 50
    guidance_scale: float = 5.0
    negative_prompt: str | None = None
    resolution: int | None = None
    seed: int = 0
    batch_size: int = 4


@dataclass
class EncoderConfig:
    """A model that images are compared by, and what an image goes through before it.

    Attributes:
        path: folder, hub id or ``package:<module>[/<folder>]``.
        resize: pixels that the shorter side is resized to (bicubic).
        crop: side of the square that is then cut from the centre: the model's input size.
    """

    path: str = MISSING
    revision: str | None = None
    resize: int = 224
    crop: int = 224


@dataclass
class EvaluationConfig:
    """How drawn images are scored.

    Attributes:
        evaluations: oracle (the smoke world's own) | dreambooth (DINO, CLIP-I, CLIP-T).
        dino: self-supervised ViT that DINO similarity is taken with; its own preprocessing by default.
        clip: CLIP model of CLIP-I and CLIP-T.
        batch_size: images looked at at once.
        chunk: images between two saves of a running evaluation.
    """

    evaluations: list[str] = MISSING
    dino: EncoderConfig = field(default_factory=lambda: EncoderConfig("facebook/dino-vits16", resize=256))
    clip: EncoderConfig = field(default_factory=lambda: EncoderConfig("openai/clip-vit-base-patch32"))
    batch_size: int = 16
    chunk: int = 64


@dataclass
class Config:
    """One run. ``on_finished`` says what to do with a finished run: refuse | skip | overwrite."""

    method: MethodConfig = MISSING
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: DreamBoothConfig = field(default_factory=DreamBoothConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    seed: int = 0
    runs_dir: str = "runs"
    run_name: str | None = None
    on_finished: str = "refuse"
    dry_run: bool = False


def locate(config: Config) -> RunRecord:
    """The run record of a configuration."""
    label = config.run_name or "default"
    return RunRecord.locate(config.runs_dir, EXPERIMENT, config.scale.name, config.method.name, label, config.seed)

"""Configuration schema of the visual experiment; values live in ``conf/``. An unknown key is refused by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from moslora_core.knock_out_curve import KnockOutConfig
from moslora_core.methods import MethodConfig
from moslora_core.record import RunRecord
from moslora_core.running import TrainingConfig

EXPERIMENT = "visual_instruction"
CONF_MODULE = f"{EXPERIMENT}.conf"
# Keys that change how a run is evaluated or where its input lies, not which run it is.
NOT_IN_LABEL = (
    "evaluation",
    "data.dir",
    "data.source",
    "data.path",
    "data.image_root",
    "data.benchmark_root",
    "data.benchmarks",
    "data.test_items",
    "data.validation_items",
    "model.cache_dir",
)


@dataclass
class ScaleConfig:
    name: str = MISSING


@dataclass
class ModelConfig:
    """The base: a LLaVA, or the parts that one is assembled from at its first use.

    Attributes:
        name: short name in tables: smoke | small | llama3_8b | internlm2_7b, or the user's own.
        path: LLaVA in transformers' layout: folder, hub id or ``package:<module>[/<folder>]``; null to assemble.
        llm: language model in Llama's layout, if assembled: folder, hub id or ``package:``.
        llm_gguf_file: file name of GGUF weights below ``llm``; converted once.
        vision: CLIP checkpoint, if assembled (of a whole CLIP model or a LLaVA, the vision tower is taken).
        projector: converted projector (``python -m visual_instruction.convert projector``); null draws a new one.
        cache_dir: where assembled models are kept.
        template: prompt template, a key of ``chat.TEMPLATES``.
        architecture: LlavaConfig as a dictionary, with which a dry run needs no download.
        dtype: dtype of the frozen weights: auto | float32 | bfloat16 | float16.
        quantization: of the language model: none | nf4 | int8 (bitsandbytes); the vision tower and the projector are
            left as they are, as in the published QLoRA configuration.
    """

    name: str = MISSING
    path: str | None = None
    revision: str | None = None
    llm: str | None = None
    llm_gguf_file: str | None = None
    vision: str | None = None
    projector: str | None = None
    cache_dir: str = "models"
    template: str = MISSING
    architecture: dict[str, Any] | None = None
    dtype: str = "float32"
    quantization: str = "none"
    gradient_checkpointing: bool = False


@dataclass
class TowerConfig:
    """Adapters of one tower.

    Attributes:
        r: rank; 0 leaves the tower as it is.
        target_modules: names of the linear layers to adapt in every layer of the tower.
        mixer: whether methods with a mixer have it in this tower; the published configurations differ on that.
    """

    r: int = MISSING
    lora_alpha: int = MISSING
    mixer: bool = True
    target_modules: list[str] = MISSING


@dataclass
class TowersConfig:
    """Adapters of both towers. The projector is trained whole and saved with them.

    Attributes:
        lora_dropout: dropout on every adapter's input.
        train_projector: train the projector; the paper does.
    """

    llm: TowerConfig = field(default_factory=TowerConfig)
    vision: TowerConfig = field(default_factory=TowerConfig)
    lora_dropout: float = 0.05
    train_projector: bool = True


@dataclass
class DataConfig:
    """Where instructions, images and benchmarks come from and which of them are used.

    Attributes:
        dir: folder that prepare_data writes and the other commands read.
        source: smoke (generated) | folder.
        path: LLaVA instruction file (JSON), such as ``llava_v1_5_mix665k.json``, for ``source=folder``.
        image_root: folder that the ``image`` entries of the instruction file are relative to.
        benchmark_root: folder of VLMEvalKit's TSV files.
        benchmarks: names of the benchmarks to prepare and evaluate.
        train_items: number of training items drawn at random (seeded by ``subset_seed``); null for all.
        test_items: the first that many items of each benchmark; null for all.
        validation_items: smoke: items of each validation file.
        on_fault: what prepare_data does with a faulty training item: refuse | skip (counted by the kind of fault).
        check_images: none | exists | decode, how far prepare_data looks at every image.
        text_limit: longest text of a training item in tokens, image tokens apart (published: 2048 - 576).
        over_long: what training does with longer ones: cut (at the right, as XTuner; counted) | skip | refuse.
        square_padding: pad images to a square in the processor's mean colour, as LLaVA-1.5 and XTuner do.
    """

    dir: str = MISSING
    source: str = MISSING
    path: str | None = None
    image_root: str | None = None
    benchmark_root: str | None = None
    benchmarks: list[str] = MISSING
    train_items: int | None = None
    test_items: int | None = None
    validation_items: int | None = None
    subset_seed: int = 0
    on_fault: str = "refuse"
    check_images: str = "decode"
    text_limit: int = 1472
    over_long: str = "cut"
    square_padding: bool = True


@dataclass
class EvaluationConfig:
    """How a trained adapter is evaluated.

    Attributes:
        split: benchmarks | validation: which TSV files below ``data.dir``. Settings are chosen on validation alone.
        benchmarks: subset of ``data.benchmarks``; null for all.
        limit: first that many items of each benchmark; null for all.
        chunk: items between two saves of a running evaluation.
        max_new_tokens: length limit of an answer.
        knock_out: what the command ``knock_out`` leaves out of the adapter.
    """

    split: str = "benchmarks"
    batch_size: int = 16
    benchmarks: list[str] | None = None
    limit: int | None = None
    chunk: int = 256
    max_new_tokens: int = 16
    knock_out: KnockOutConfig = field(default_factory=KnockOutConfig)


@dataclass
class Config:
    """One run. ``on_finished`` says what to do with a finished run: refuse | skip | overwrite."""

    method: MethodConfig = MISSING
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: TowersConfig = field(default_factory=TowersConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
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

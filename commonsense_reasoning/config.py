"""Configuration schema of the commonsense experiment; values live in ``conf/``. An unknown key is refused by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from moslora_core.knock_out_curve import KnockOutConfig
from moslora_core.methods import AdapterConfig, MethodConfig
from moslora_core.record import RunRecord
from moslora_core.running import TrainingConfig

from .tasks import TASKS

EXPERIMENT = "commonsense_reasoning"
CONF_MODULE = f"{EXPERIMENT}.conf"
# Keys that change how a run is evaluated, not which run it is.
# data.train_items stays in the name: it is the fraction of Figure 4.
NOT_IN_LABEL = (
    "evaluation",
    "data.dir",
    "data.source",
    "data.path",
    "data.train_files",
    "data.test_file",
    "data.test_items",
    "data.validation_file",
    "data.validation_file_items",
    "data.tasks",
    "data.published_sizes",
    "model.cache_dir",
)


@dataclass
class ScaleConfig:
    name: str = MISSING


@dataclass
class ProtocolConfig:
    """Where the published protocol differs from a correct one (see ``conf/protocol``).

    Attributes:
        name: paper | corrected; picks the prompts of training and evaluation.
        loss_on_prompt: train on the prompt's tokens too.
        num_beams: beams of the ``generate`` evaluation.
        max_new_tokens: length limit of the ``generate`` evaluation.
    """

    name: str = MISSING
    loss_on_prompt: bool = MISSING
    num_beams: int = MISSING
    max_new_tokens: int = MISSING


@dataclass
class ModelConfig:
    """The base model.

    Attributes:
        path: local folder, hub id, or ``package:<module>[/<folder>]`` for weights inside an installed package.
        gguf_file: file name of GGUF weights below ``path``; converted once into ``cache_dir``.
        architecture: a transformers configuration as a dictionary, with which a dry run needs no download.
        dtype: dtype of the frozen weights: auto | float32 | bfloat16 | float16.
        quantization: none | nf4 | int8 (bitsandbytes).
    """

    path: str = MISSING
    revision: str | None = None
    gguf_file: str | None = None
    cache_dir: str = "models"
    architecture: dict[str, Any] | None = None
    dtype: str = "float32"
    quantization: str = "none"
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False


@dataclass
class DataConfig:
    """Where the items come from and which of them are used.

    Attributes:
        dir: folder that prepare_data writes and the other commands read.
        source: smoke (generated) | folder | hub.
        path: folder of LLM-Adapters JSON files, or hub id, for the two latter sources.
        train_files: files below ``path``, in the order in which they are joined.
        test_file: file of a task's test items below ``path``; ``{task}`` stands for the task's name.
        tasks: the benchmarks to prepare, train's composition aside.
        train_items: number of training items drawn at random (seeded by ``subset_seed``) from the files; null for all.
        test_items: the first that many test items of each task; null for all.
        validation_file: file of a task's items to choose settings by (``evaluation.split=validation``) below ``path``,
            null for none.
        validation_file_items: the first that many of them, null for all; smoke: how many there are of each task.
        validation_items: items held out of training for a validation loss, drawn with ``validation_seed``.
        cutoff: longest training sequence in tokens.
        published_sizes: require the published sizes of the test sets.
    """

    dir: str = MISSING
    source: str = MISSING
    path: str | None = None
    train_files: list[str] = field(default_factory=lambda: ["commonsense_170k.json"])
    test_file: str = "{task}/test.json"
    tasks: list[str] = field(default_factory=lambda: list(TASKS))
    train_items: int | None = None
    test_items: int | None = None
    validation_file: str | None = None
    validation_file_items: int | None = None
    subset_seed: int = 0
    validation_items: int = 0
    validation_seed: int = 42
    cutoff: int = 256
    published_sizes: bool = False


@dataclass
class EvaluationConfig:
    """How a trained adapter is evaluated.

    Attributes:
        mode: generate | loglikelihood | harness (lm-eval's own tasks; needs the hub).
        split: test | validation: which files below ``data.dir``. Settings are chosen on validation alone.
        tasks: subset of ``data.tasks``; null for all.
        limit: first that many items of each task; null for all.
        chunk: items between two saves of a running evaluation.
        knock_out: what the command ``knock_out`` leaves out of the adapter.
    """

    mode: str = "generate"
    split: str = "test"
    batch_size: int = 16
    tasks: list[str] | None = None
    limit: int | None = None
    chunk: int = 256
    knock_out: KnockOutConfig = field(default_factory=KnockOutConfig)


@dataclass
class Config:
    """One run. ``on_finished`` says what to do with a finished run: refuse | skip | overwrite."""

    method: MethodConfig = MISSING
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
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

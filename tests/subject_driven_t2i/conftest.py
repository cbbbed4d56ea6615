"""Fixtures of the tests of subject-driven generation: a saved tiny pipeline, prepared subjects, a configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from moslora_core.methods import METHODS, AdapterConfig
from subject_driven_t2i.config import (
    Config,
    DataConfig,
    DreamBoothConfig,
    EvaluationConfig,
    GenerationConfig,
    ModelConfig,
    ScaleConfig,
)

from .tiny import RESOLUTION, TOKEN, build_pipeline, write_prepared


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved random pipeline of SDXL's architecture."""
    folder = tmp_path_factory.mktemp("tiny_sdxl")
    build_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def prepared_dir(tmp_path: Path) -> Path:
    """A folder in the layout of prepare_data: two subjects, rex the dog and cola the can."""
    write_prepared(tmp_path / "prepared")
    return tmp_path / "prepared"


@pytest.fixture
def config(tiny_dir: Path, prepared_dir: Path, tmp_path: Path) -> Config:
    """Four steps of four images, of rex."""
    return Config(
        method=METHODS["moslora"],
        scale=ScaleConfig("tiny"),
        model=ModelConfig("tiny", str(tiny_dir), cache_dir=str(tmp_path / "models")),
        adapter=AdapterConfig(
            r=4,
            lora_alpha=4,
            lora_dropout=0.0,
            target_modules=["to_q", "to_k", "to_v", "to_out.0"],
            init_lora_weights="gaussian",
        ),
        data=DataConfig(dir=str(prepared_dir), source="folder", subject="rex", token=TOKEN, min_size=8),
        training=DreamBoothConfig(
            learning_rate=1e-2,
            lr_scheduler="constant",
            max_steps=4,
            global_batch_size=4,
            per_device_batch_size=2,
            logging_steps=1,
            save_steps=2,
            resolution=RESOLUTION,
        ),
        generation=GenerationConfig(images_per_prompt=2, steps=2, batch_size=4),
        evaluation=EvaluationConfig(evaluations=["dreambooth"]),
        runs_dir=str(tmp_path / "runs"),
    )

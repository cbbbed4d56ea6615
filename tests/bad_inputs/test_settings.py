"""Bad settings of the three experiments: what their commands refuse before they read data or a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from commonsense_reasoning import config as commonsense
from commonsense_reasoning import train as commonsense_train
from moslora_core import launch
from subject_driven_t2i import config as t2i
from subject_driven_t2i import train as t2i_train
from visual_instruction import config as visual
from visual_instruction import train as visual_train

from .row import BadInput, check_refused

EXPERIMENTS = {"commonsense": commonsense, "visual": visual, "images": t2i}


def composed(experiment: ModuleType, overrides: list[str], folder: Path) -> Any:
    """The configuration of a command line, as ``launch.run`` composes it; its folders are below ``folder``."""
    places = [f"data.dir={folder}/data", f"runs_dir={folder}/runs", f"model.cache_dir={folder}/models"]
    launch.register(experiment.Config)
    try:
        with initialize_config_module(experiment.CONF_MODULE, version_base="1.3"):
            return launch.instantiate(experiment.Config, compose("config", overrides=[*places, *overrides]))
    except (HydraException, OmegaConfBaseException) as error:
        raise launch.UserError(launch._one_line(error)) from None


def refused(
    experiment: str, main: Callable[[Any], object], setting: str, names: tuple[str, ...] = (), further: str = ""
) -> BadInput:
    """A row of one override, whose key the message names, unless ``names`` says otherwise."""
    overrides = [*further.split(), setting]
    return BadInput(
        f"{experiment}, {main.__module__.rsplit('.', 1)[1]}: {' '.join(overrides)}",
        lambda folder: None,
        lambda folder: main(composed(EXPERIMENTS[experiment], overrides, folder)),
        names or (setting.lstrip("+~").split("=")[0].split(".")[-1],),
    )


# What every experiment's training has in common, on its dry run: sizes, rates, the method and the adapter.
TRAINING = {
    "training.learning_rate=nan": (),
    "training.learning_rate=inf": (),
    "training.learning_rate=0": (),
    "training.learning_rate=-1e-4": (),
    "training.learning_rate=fast": (),
    "training.learning_rate=null": (),
    "training.learning_rate=[1e-4]": (),
    "training.lr_scheduler=zigzag": (),
    "training.optimizer=magic": (),
    "training.precision=fp4": (),
    "training.warmup_steps=-1": (),
    "training.warmup_steps=nan": (),
    "training.max_steps=0": (),
    "training.max_steps=-5": (),
    "training.max_steps=2.5": (),
    "training.global_batch_size=0": (),
    "training.global_batch_size=-8": (),
    "training.global_batch_size=7": ("global_batch_size 7",),
    "training.per_device_batch_size=0": (),
    "training.per_device_batch_size=many": (),
    "training.devices=0": (),
    "training.devices=-1": (),
    "training.weight_decay=-0.1": (),
    "training.weight_decay=nan": (),
    "training.max_grad_norm=nan": (),
    "training.max_grad_norm=-1": (),
    "training.logging_steps=0": (),
    "training.save_steps=0": (),
    "training.save_total_limit=0": (),
    "training.keep_steps=0": (),
    "training.workers=-1": (),
    "training.deepspeed=zero9": ("deepspeed=zero9", "zero2"),
    "training.epochs=0": (),
    "training.epochs=nan": (),
    "training.epoch=3": ("epoch",),
    "+training.epoch=3": ("epoch",),
    "seed=-1": (),
    "seed=one": (),
    "seed=99999999999999999999": (),
    "method=lorra": ("lorra", "moslora"),
    "method.tuner=lorra": ("lorra", "adalora"),
    "method.mixer=stirred": ("stirred", "learned"),
    "method.mixer_init=odd": ("mixer_init",),
    "method.alpha_scale=nan": (),
    "method.alpha_scale=0": (),
    "method.lora_plus_ratio=nan": (),
    "method.lora_plus_ratio=-16": (),
    "method.init_lora_weights=magic": (),
    "on_finished=retry": (),
    "scale=huge": ("huge", "smoke"),
    "scale.name=null": (),
    "model.dtype=float8": (),
    "dry_run=maybe": (),
}
# Keys that only commonsense and images have, as the visual experiment has an adapter for each tower.
ADAPTER = {
    "adapter.r=0": (),
    "adapter.r=-4": (),
    "adapter.r=4.5": (),
    "adapter.lora_alpha=0": (),
    "adapter.lora_dropout=1": (),
    "adapter.lora_dropout=-0.1": (),
    "adapter.lora_dropout=nan": (),
    "adapter.target_modules=[]": (),
    "adapter.target_modules=q_proj": (),
    "adapter.target_modules=['(']": (),
    "adapter.target_modules=[nothing]": ("nothing",),
    "+adapter.rank_pattern.to_q=0": ("rank_pattern",),
    "+adapter.rank_pattern.to_q=-1": ("rank_pattern",),
    "+adapter.alpha_pattern.to_q=nan": ("alpha_pattern",),
    "+adapter.alpha_pattern.to_q=0": ("alpha_pattern",),
    "+adapter.mixer_pattern.to_q=odd": ("mixer_pattern", "odd"),
    "adapter.init_lora_weights=magic": (),
}
TOWERS = {
    "adapter.llm.r=-1": (),
    "adapter.vision.r=-1": (),
    "adapter.llm.r=wide": (),
    "adapter.llm.lora_alpha=0": (),
    "adapter.vision.lora_alpha=-16": ("alpha", "-16"),
    "adapter.lora_dropout=nan": (),
    "adapter.llm.target_modules=[]": (),
    "adapter.llm.target_modules=[nothing]": ("nothing",),
    "adapter.r=8": ("'r'",),
}


def of(experiment: str, main: Callable, settings: dict[str, tuple[str, ...]], further: str = "") -> list[BadInput]:
    return [refused(experiment, main, setting, names, further) for setting, names in settings.items()]


ROWS = [
    *of("commonsense", commonsense_train.main, TRAINING | ADAPTER, "method=moslora dry_run=true"),
    *of("visual", visual_train.main, TRAINING | TOWERS, "method=moslora dry_run=true"),
    *of("images", t2i_train.main, TRAINING | ADAPTER, "method=moslora data.subject=toy dry_run=true"),
]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_bad_settings_are_refused(row, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_refused(row, tmp_path)

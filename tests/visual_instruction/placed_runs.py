"""Runs as train leaves them, without a training."""

from __future__ import annotations

from pathlib import Path

import torch
from hydra import compose, initialize_config_module
from peft import LoraConfig, get_peft_model
from transformers import LlavaForConditionalGeneration

from moslora_core import MoSLoraConfig, launch
from moslora_core.record import RunRecord, write_atomic
from visual_instruction.config import CONF_MODULE, Config

TARGETS = r".*\.(q_proj|v_proj|fc1|down_proj)"
PROJECTOR = "multi_modal_projector"


def place_run(folder: Path, base: Path, *overrides: str, mixer: bool = True) -> RunRecord:
    """A run as train leaves it: configuration and an adapter that changes the answers, projector included."""
    launch.register(Config)
    common = [f"model.path={base}", "model.template=llama3", "method=moslora" if mixer else "method=lora"]
    with initialize_config_module(CONF_MODULE, version_base="1.3"):
        config = launch.instantiate(Config, compose("config", overrides=[*common, *overrides]))
    record = RunRecord(folder)
    write_atomic(record.config_path, launch.dump(config))
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "modules_to_save": [PROJECTOR]}
    peft_config = MoSLoraConfig(**settings, mixer="learned") if mixer else LoraConfig(**settings)
    model = get_peft_model(LlavaForConditionalGeneration.from_pretrained(base), peft_config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(record.adapter_path)
    return record

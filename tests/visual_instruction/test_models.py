"""Loading a LLaVA and its adapters: assembled once, and every misfit told in a line."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from moslora_core.errors import UserError
from visual_instruction.config import ModelConfig
from visual_instruction.models import (
    architecture,
    base_path,
    load_adapted,
    load_base,
    load_processor,
    used_vision_layers,
)

from .placed_runs import place_run


@pytest.fixture
def config(tiny_llava_dir) -> ModelConfig:
    return ModelConfig(name="tiny", path=str(tiny_llava_dir), template="llama3")


@pytest.fixture
def copy(tiny_llava_dir, tmp_path) -> Path:
    """A copy of the tiny LLaVA to damage."""
    return Path(shutil.copytree(tiny_llava_dir, tmp_path / "copy"))


def refusal(load, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        load(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_checkpoint_of_another_shape_is_refused(config, copy):
    settings = json.loads((copy / "config.json").read_text())
    settings["text_config"]["intermediate_size"] *= 2
    (copy / "config.json").write_text(json.dumps(settings))
    message = refusal(load_base, replace(config, path=str(copy)))
    assert message.startswith(f"model.path={copy}: the weights have other shapes than its config.json says")


def test_a_damaged_checkpoint_is_refused(config, copy):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert refusal(load_base, replace(config, path=str(copy))).startswith(f"model.path={copy}: ")


def test_a_language_model_alone_is_no_llava(config, copy):
    settings = json.loads((copy / "config.json").read_text())["text_config"]
    (copy / "config.json").write_text(json.dumps(settings))
    message = refusal(load_base, replace(config, path=str(copy)))
    assert "expected a LLaVA (model_type llava), found model_type llama" in message


def test_an_adapter_of_another_shape_is_refused(config, tiny_llava_dir, tmp_path):
    record = place_run(tmp_path / "run", tiny_llava_dir)
    file = record.adapter_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("lora_A.weight"))
    save_file(tensors | {name: torch.zeros(tensors[name].shape[0], 7)}, file)
    message = refusal(load_adapted, config, record.adapter_path)
    assert f"{record.adapter_path} is no adapter of model.path={config.path}" in message and "size mismatch" in message


def test_a_llava_is_assembled_from_its_parts_at_the_first_use(config, tiny_llava_dir, tmp_path, monkeypatch):
    whole = LlavaForConditionalGeneration.from_pretrained(tiny_llava_dir)
    llm = tmp_path / "llm"
    whole.model.language_model.save_pretrained(llm)
    settings = json.loads((llm / "config.json").read_text()) | {"architectures": ["LlamaForCausalLM"]}
    (llm / "config.json").write_text(json.dumps(settings))
    tensors = {f"model.{name}": tensor for name, tensor in load_file(llm / "model.safetensors").items()}
    save_file(tensors | {"lm_head.weight": whole.lm_head.weight.detach().clone()}, llm / "model.safetensors")
    load_processor(config).tokenizer.save_pretrained(llm)
    parts = replace(config, path=None, llm=str(llm), vision=str(tiny_llava_dir), cache_dir=str(tmp_path / "models"))
    folder = base_path(parts)
    assert isinstance(load_processor(parts), LlavaProcessor)
    assembled = load_base(parts)
    for name, tensor in whole.state_dict().items():
        if "multi_modal_projector" not in name:  # that is a new one
            torch.testing.assert_close(assembled.state_dict()[name], tensor, rtol=0, atol=0)

    def assemble(*_):
        raise AssertionError("assembled again")

    monkeypatch.setattr("visual_instruction.models.assemble", assemble)
    assert base_path(parts) == folder


@pytest.mark.parametrize(("selected", "used"), [(-2, 2), (-1, 3), (1, 1), ([-2, 1], 2)])
def test_layers_behind_the_features_are_not_used(config, selected, used):
    """Against the gradients that the vision tower's layers receive."""
    model = load_base(config)
    model.config.vision_feature_layer = selected
    if isinstance(selected, list):
        assert used_vision_layers(model.config) == used
        return
    features = model.get_image_features(pixel_values=torch.rand(1, 3, 28, 28), return_dict=True).pooler_output
    torch.cat(features).sum().backward()
    layers = model.model.vision_tower.encoder.layers
    reached = [any(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters()) for layer in layers]
    assert sum(reached) == used_vision_layers(model.config) == used


def test_an_architecture_in_the_configuration_needs_no_folder(config):
    written = json.loads(architecture(config).to_json_string(use_diff=False))
    kept = {key: written[key] for key in ("text_config", "vision_config", "image_token_index", "vision_feature_layer")}
    found = architecture(replace(config, path="nowhere", architecture=kept))
    assert found.text_config.hidden_size == architecture(config).text_config.hidden_size
    assert used_vision_layers(found) == 2

"""Pretrained projectors under transformers' names compute what they computed under their own."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from moslora_core.errors import UserError
from visual_instruction.convert.assemble import assemble
from visual_instruction.convert.projector import convert_projector, read_projector

from .convert_parts import left_over, save_clip, save_llm

XTUNER = {"model_type": "projector", "visual_hidden_size": 32, "llm_hidden_size": 48, "depth": 2, "hidden_act": "gelu"}
LLAVA = {"model_type": "llava_llama", "mm_projector_type": "mlp2x_gelu"}


def original(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """The module of XTuner and LLaVA."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 48)).to(dtype)


def write(folder: Path, prefix: str, module: nn.Module, config: dict | None, pickled: str | None = None) -> Path:
    folder.mkdir()
    tensors = {prefix + name: tensor for name, tensor in module.state_dict().items()}
    if pickled is None:
        save_file(tensors, folder / "model.safetensors")
    else:
        torch.save(tensors, folder / pickled)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def transformers_projector(folder: Path) -> nn.Module:
    config = LlavaConfig(
        text_config=LlamaConfig(hidden_size=48, num_attention_heads=2),
        vision_config=CLIPVisionConfig(hidden_size=32, num_attention_heads=2),
    )
    module = LlavaMultiModalProjector(config)
    prefix = "multi_modal_projector."
    tensors = load_file(folder / "model.safetensors")
    assert all(name.startswith(prefix) for name in tensors)
    module.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in tensors.items()})
    return module


@pytest.mark.parametrize("config", [XTUNER, None], ids=["with config", "without"])
@pytest.mark.parametrize("prefix", ["model.", "projector.model.", "mm_projector.", "model.mm_projector."])
def test_every_naming_gives_the_same_features(tmp_path, prefix, config):
    module = original()
    out = convert_projector(write(tmp_path / "source", prefix, module, config), tmp_path / "out")
    features = torch.randn(3, 5, 32)
    with torch.no_grad():
        assert torch.equal(transformers_projector(out)(features), module(features))


def test_what_is_written_is_read_again_and_keeps_its_dtype(tmp_path):
    module = original(torch.bfloat16)
    first = convert_projector(write(tmp_path / "source", "model.", module, XTUNER), tmp_path / "first")
    again = read_projector(convert_projector(first, tmp_path / "again"))
    for ours, theirs in (("linear_1", module[0]), ("linear_2", module[2])):
        for leaf in ("weight", "bias"):
            found = again.tensors[f"{ours}.{leaf}"]
            assert found.dtype == torch.bfloat16 and torch.equal(found, getattr(theirs, leaf))


@pytest.mark.parametrize("name", ["mm_projector.bin", "pytorch_model.bin"])
def test_pickles_need_permission(tmp_path, name):
    module = original()
    source = write(tmp_path / "source", "model.mm_projector.", module, LLAVA, pickled=name)
    with pytest.raises(UserError, match=rf"source: holds {name}, a pickle, which is not read"):
        convert_projector(source, tmp_path / "out")
    assert left_over(tmp_path) == ["source"]
    out = convert_projector(source, tmp_path / "out", allow_pickle=True)
    features = torch.randn(2, 32)
    with torch.no_grad():
        assert torch.equal(transformers_projector(out)(features), module(features))


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    (tmp_path / "source").mkdir()
    torch.save({"model.0.weight": Harm()}, tmp_path / "source" / "mm_projector.bin")
    with pytest.raises(UserError, match=r"mm_projector\.bin: not a plain pickle of tensors .*; it was not executed"):
        convert_projector(tmp_path / "source", tmp_path / "out", allow_pickle=True)
    assert left_over(tmp_path) == ["source"]


def test_activation_and_missing_biases_reach_the_llava(tmp_path):
    """A projector without biases, with another activation: what the assembled model computes shows both."""
    module = nn.Sequential(nn.Linear(32, 48, bias=False), nn.ReLU(), nn.Linear(48, 48, bias=False))
    source = write(tmp_path / "source", "model.", module, XTUNER | {"hidden_act": "relu", "bias": False})
    save_llm(tmp_path / "llm")
    save_clip(tmp_path / "vision")
    out = assemble(
        tmp_path / "llm", tmp_path / "vision", convert_projector(source, tmp_path / "out"), tmp_path / "llava"
    )
    model, report = LlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    features = torch.randn(2, 32)
    with torch.no_grad():
        assert torch.equal(model.model.multi_modal_projector(features), module(features))


def _depth(source):
    module = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 48), nn.GELU(), nn.Linear(48, 48))
    save_file({f"model.{name}": tensor for name, tensor in module.state_dict().items()}, source / "model.safetensors")


def _without(name):
    def spoil(source):
        tensors = load_file(source / "model.safetensors")
        del tensors[name]
        save_file(tensors, source / "model.safetensors")

    return spoil


def _wide(source):
    tensors = load_file(source / "model.safetensors") | {"model.2.weight": torch.zeros(48, 40)}
    save_file(tensors, source / "model.safetensors")


def _set(**values):
    def spoil(source):
        (source / "config.json").write_text(json.dumps(XTUNER | values))

    return spoil


def _cut(source):
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def _empty(source):
    (source / "model.safetensors").unlink()


BAD = [
    (_depth, r"source: model\.4\.(weight|bias) .*is no part of a projector of depth 2"),
    (_without("model.2.weight"), r"source: has no linear_2\.weight"),
    (_without("model.0.bias"), r"source: has no linear_1\.bias"),
    (_wide, r"source: linear_2\.weight has shape \(48, 40\); expected \(48, 48\)"),
    (_set(llm_hidden_size=64), r"config\.json says llm_hidden_size=64; the weights say 48"),
    (_set(depth=3), r"config\.json says depth=3; the weights say 2"),
    (_set(model_type="llama"), r"config\.json: model_type is 'llama' .*expected XTuner's 'projector'"),
    (_cut, r"model\.safetensors: not a complete safetensors file"),
    (_empty, r"source: has neither model\.safetensors nor model\.safetensors\.index\.json"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD, ids=[str(number) for number in range(len(BAD))])
def test_bad_projectors_are_refused_in_a_line(spoil, message, tmp_path):
    source = write(tmp_path / "source", "model.", original(), XTUNER)
    spoil(source)
    with pytest.raises(UserError, match=message) as caught:
        convert_projector(source, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert left_over(tmp_path) == ["source"]

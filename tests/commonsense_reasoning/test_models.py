"""Loading base models and tokenizers, and how each failure is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import commonsense_reasoning
from commonsense_reasoning.config import ModelConfig
from commonsense_reasoning.models import architecture, base_path, load_base, load_tokenizer
from moslora_core.base_models import resolve_path
from moslora_core.errors import UserError


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def copied(tiny_llama_dir, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))


def refusal(call, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -------------------------------------------------------------------------------------------------------------- paths


def test_a_package_path_is_the_folder_of_the_package():
    package = Path(commonsense_reasoning.__file__).parent
    assert resolve_path("package:commonsense_reasoning/smoke_base") == str(package / "smoke_base")
    assert resolve_path("package:commonsense_reasoning") == str(package)
    assert resolve_path("someone/model") == "someone/model"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("package:no_such_package_at_all", "no package 'no_such_package_at_all' is installed"),
        ("package:no_such_package.at_all/base", "no package 'no_such_package.at_all' is installed"),
        ("package:", "no package '' is installed"),
        ("package:json.decoder", "no package 'json.decoder' is installed"),  # a module is no folder
        ("package:commonsense_reasoning/nowhere", "the package has no folder 'nowhere'"),
    ],
)
def test_a_package_that_is_not_there_is_named(path, expected):
    message = refusal(resolve_path, path)
    assert message.startswith(f"model.path={path}: ") and expected in message


def test_missing_gguf_weights_are_named(tmp_path):
    config = ModelConfig(path=str(tmp_path), gguf_file="a.gguf", cache_dir=str(tmp_path / "cache"))
    assert refusal(base_path, config) == f"model.gguf_file=a.gguf: not found in {tmp_path}"
    assert refusal(load_tokenizer, config) == f"model.gguf_file=a.gguf: not found in {tmp_path}"


@pytest.mark.parametrize("call", [load_base, load_tokenizer, architecture])
@pytest.mark.parametrize("path", ["/no/such/folder", "someone/unreachable-model"])
def test_a_model_that_is_nowhere_is_named(call, path):
    assert refusal(call, ModelConfig(path=path)).startswith(f"model.path={path}: ")


@pytest.mark.parametrize("call", [load_base, architecture])
def test_a_folder_without_a_model_is_named(call, tmp_path):
    assert str(tmp_path) in refusal(call, ModelConfig(path=str(tmp_path)))
    (tmp_path / "config.json").write_text("{}")
    assert str(tmp_path) in refusal(call, ModelConfig(path=str(tmp_path)))


def test_cut_off_weights_are_named(copied):
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert refusal(load_base, ModelConfig(path=str(copied))).startswith(f"model.path={copied}: ")


# ---------------------------------------------------------------------------------------------------------- tokenizer


def without_pad(folder: Path, *special: str) -> ModelConfig:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.add_tokens(["padding", "(pad"])  # ordinary words, the first of the vocabulary to hold "pad"
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(folder)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (path := folder / name).exists():
            path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "pad_token"}))
    raw = json.loads((folder / "tokenizer.json").read_text())
    for token in raw["added_tokens"]:
        token["special"] = token["special"] and token["content"] != "<pad>"
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    assert AutoTokenizer.from_pretrained(folder).pad_token is None
    return ModelConfig(path=str(folder))


def test_padding_is_on_the_left_with_the_tokenizers_own_token(tiny_llama_dir):
    tokenizer = load_tokenizer(ModelConfig(path=str(tiny_llama_dir)))
    batch = tokenizer(["a", "a much longer text"], padding=True)
    assert batch["input_ids"][0][0] == tokenizer.pad_token_id and batch["attention_mask"][0][0] == 0
    assert tokenizer.pad_token == "<pad>"


def test_a_reserved_token_pads_where_the_tokenizer_names_none(copied):
    tokenizer = load_tokenizer(without_pad(copied, "<|reserved_special_token_0|>"))
    assert tokenizer.pad_token == "<|reserved_special_token_0|>" != tokenizer.eos_token
    assert tokenizer.padding_side == "left"


def test_the_end_token_pads_where_there_is_no_other(copied):
    """Never an ordinary word that happens to hold "pad"."""
    tokenizer = load_tokenizer(without_pad(copied))
    assert tokenizer.pad_token == tokenizer.eos_token == "</s>"


# --------------------------------------------------------------------------------------------------------- base model


@pytest.mark.parametrize(
    ("name", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("auto", torch.float32)]
)
def test_the_base_has_the_dtype_asked_for(tiny_llama_dir, name, dtype):
    assert load_base(ModelConfig(path=str(tiny_llama_dir), dtype=name)).dtype == dtype


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"dtype": "int8"}, "model.dtype must be auto, float32, bfloat16 or float16, found 'int8'"),
        ({"dtype": "nn"}, "model.dtype must be auto, float32, bfloat16 or float16, found 'nn'"),
        ({"quantization": "int3"}, "model.quantization must be none, nf4 or int8, found 'int3'"),
    ],
)
def test_bad_settings_are_named(tiny_llama_dir, settings, expected):
    assert refusal(load_base, ModelConfig(path=str(tiny_llama_dir), **settings)) == expected


def test_the_architecture_comes_from_the_configuration_where_it_is_written(tiny_llama_dir):
    written = {"model_type": "llama", "hidden_size": 48, "num_attention_heads": 4}
    found = architecture(ModelConfig(path="someone/unreachable-model", architecture=written))
    assert (found.model_type, found.hidden_size, found.num_attention_heads) == ("llama", 48, 4)
    assert written["model_type"] == "llama", "the configuration is left as it was"
    assert architecture(ModelConfig(path=str(tiny_llama_dir))).hidden_size == 32


@pytest.mark.parametrize("written", [{"hidden_size": 8}, {"model_type": "lllama"}])
def test_an_unknown_architecture_is_named(written):
    assert "model.architecture: model_type" in refusal(architecture, ModelConfig(path="x", architecture=written))

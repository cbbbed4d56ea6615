"""Modules that are trained whole beside the adapter, as LLaVA's projector: through saving, folding and merging."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from moslora_core import MoSLoraConfig
from moslora_core.count import count_parameters
from moslora_core.fold import fold_adapter, fold_into_init, fold_to_lora

R, IMAGE = 4, 19
PROJECTOR = "multi_modal_projector"
PREFIX = f"base_model.model.model.{PROJECTOR}."
TENSORS = {f"{PREFIX}{layer}.{part}" for layer in ("linear_1", "linear_2") for part in ("weight", "bias")}
IDS = torch.tensor([[1, IMAGE, IMAGE, IMAGE, IMAGE, 5, 7]])


def llava() -> LlavaForConditionalGeneration:
    """A LLaVA of a few thousand parameters: four patches an image."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = LlamaConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    return LlavaForConditionalGeneration(config).eval()


def config(**settings) -> MoSLoraConfig:
    """Mixers in the language model alone; the projector is trained whole."""
    defaults = {
        "r": R,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "mixer_pattern": {r".*vision_tower\..*": "identity"},
        "modules_to_save": [PROJECTOR],
        "task_type": "CAUSAL_LM",
    }
    return MoSLoraConfig(**defaults | settings)


def pixels() -> torch.Tensor:
    return torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(9))


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, pixel_values=pixels()).logits


@pytest.fixture
def trained() -> PeftModel:
    """Trained for some steps, so that adapters of both towers, mixers and the projector have moved."""
    torch.manual_seed(1)
    model = get_peft_model(llava(), config()).train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        model(input_ids=IDS, pixel_values=pixels(), labels=IDS).loss.backward()
        optimiser.step()
    return model.eval()


def projector(model: nn.Module) -> dict[str, torch.Tensor]:
    """The trained projector of an adapted model, under the names on disk."""
    return {key: tensor for key, tensor in get_peft_model_state_dict(model).items() if PROJECTOR in key}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Same names, dtypes and bits."""
    return left.keys() == right.keys() and all(
        tensor.dtype == right[key].dtype and torch.equal(tensor, right[key]) for key, tensor in left.items()
    )


def test_the_projector_is_trained_whole_and_the_rest_by_adapters(trained):
    start, end = llava().model.multi_modal_projector.state_dict(), projector(trained)
    assert end.keys() == TENSORS
    assert not any(torch.equal(end[f"{PREFIX}{key}"], tensor) for key, tensor in start.items())
    names = {name for name, p in trained.named_parameters() if p.requires_grad}
    assert all("lora_" in name or f"{PROJECTOR}.modules_to_save" in name for name in names)
    mixers = {name for name in names if name.endswith("mixer")}
    assert len(mixers) == 2 and all("language_model" in name for name in mixers)
    assert any("vision_tower" in name for name in names)


def test_the_projector_counts_as_trained(trained):
    whole, adapters = count_parameters(llava(), config()), count_parameters(llava(), config(modules_to_save=None))
    size = sum(tensor.numel() for tensor in projector(trained).values())
    assert (whole.trainable, whole.adapter) == (adapters.trainable + size, adapters.adapter + size)
    assert whole.trainable == trained.get_nb_trainable_parameters()[0]


def test_folding_in_memory_keeps_the_projector_bit_for_bit(trained):
    expected = logits(trained)
    plain, tensors = fold_to_lora(trained, dtype=torch.bfloat16)
    assert same({key: tensors[key] for key in TENSORS}, projector(trained)), "dtype is for the adapter's factors alone"
    assert {tensor.dtype for key, tensor in tensors.items() if key not in TENSORS} == {torch.bfloat16}

    plain, tensors = fold_to_lora(trained)
    assert type(plain) is LoraConfig and plain.modules_to_save == [PROJECTOR]
    stock = get_peft_model(llava(), plain).eval()
    result = set_peft_model_state_dict(stock, tensors)
    assert not result.unexpected_keys
    assert same(projector(stock), projector(trained))
    assert torch.equal(logits(stock), expected)
    assert torch.equal(logits(trained), expected), "folding changed the model it read"


def test_folding_files_keeps_the_projector_bit_for_bit(trained, tmp_path):
    trained.save_pretrained(tmp_path / "mixed")
    weights = tmp_path / "mixed" / "adapter_model.safetensors"
    # Another dtype than the factors', as with a bfloat16 base whose adapter PEFT keeps in float32.
    stored = {key: t.bfloat16() if PROJECTOR in key else t for key, t in load_file(weights).items()}
    save_file(stored, weights)
    for dtype in (None, torch.float16):
        out = fold_adapter(tmp_path / "mixed", tmp_path / f"folded_{dtype}", dtype=dtype)
        folded = load_file(out / "adapter_model.safetensors")
        assert same({key: folded[key] for key in TENSORS}, {key: stored[key] for key in TENSORS})
        assert not any("mixer" in key or key.endswith(".raw") for key in folded)


def test_stock_peft_loads_the_folded_folder_in_a_process_without_this_package(trained, tmp_path):
    llava().save_pretrained(tmp_path / "base")
    trained.save_pretrained(tmp_path / "mixed")
    fold_adapter(tmp_path / "mixed", tmp_path / "folded")
    save_file({"logits": logits(trained), "ids": IDS, "pixels": pixels()} | projector(trained), tmp_path / "expected")
    script = """
        import sys, torch
        from peft import LoraConfig, PeftModel, get_peft_model_state_dict
        from safetensors.torch import load_file
        from transformers import LlavaForConditionalGeneration
        expected = load_file("expected")
        model = LlavaForConditionalGeneration.from_pretrained("base")
        model = PeftModel.from_pretrained(model, "folded").eval()
        assert type(model.peft_config["default"]) is LoraConfig
        inputs = {"input_ids": expected.pop("ids"), "pixel_values": expected.pop("pixels")}
        logits = expected.pop("logits")
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, logits), "adapted"
            merged = model.merge_and_unload()
            torch.testing.assert_close(merged(**inputs).logits, logits)
        for key, tensor in expected.items():
            assert torch.equal(merged.state_dict()[key.removeprefix("base_model.model.")], tensor), key
        merged.save_pretrained("merged")
        assert not any(name.startswith("moslora") for name in sys.modules)
    """
    result = subprocess.run(
        [sys.executable, "-W", "error::peft.utils.warning.PeftWarning", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    # What that process merged and saved is a LLaVA like any other.
    torch.testing.assert_close(
        logits(LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()), logits(trained)
    )


def test_a_saved_adapter_loads_the_projector(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llava(), str(tmp_path)).eval()
    assert same(projector(loaded), projector(trained))
    assert torch.equal(logits(loaded), logits(trained))


def test_merging_keeps_the_trained_projector(trained, tmp_path):
    expected, weights = logits(trained), projector(trained)
    merged = trained.merge_and_unload()
    assert type(merged) is LlavaForConditionalGeneration
    found = {f"{PREFIX}{key}": t for key, t in merged.model.multi_modal_projector.state_dict().items()}
    assert same(found, weights)
    torch.testing.assert_close(logits(merged), expected)
    assert not any("lora" in key or "modules_to_save" in key or "mixer" in key for key in merged.state_dict())
    merged.save_pretrained(tmp_path)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(merged))


def test_unloading_leaves_the_trained_projector_in_the_base(trained):
    """As PEFT has it: only what adapters added is taken away; whoever wants the old projector loads the base again."""
    weights = {key.removeprefix("base_model.model."): tensor for key, tensor in projector(trained).items()}
    assert same(dict(trained.unload().state_dict()), dict(llava().state_dict()) | weights)


def test_the_folded_start_trains_the_projector_from_where_it_was(tmp_path):
    torch.manual_seed(1)
    model = fold_into_init(llava(), config())
    assert type(model.peft_config["default"]) is LoraConfig
    start = llava().model.multi_modal_projector.state_dict()
    assert same(projector(model), {f"{PREFIX}{key}": tensor for key, tensor in start.items()})
    assert torch.equal(logits(model.eval()), logits(llava()))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad and PROJECTOR in name}
    assert len(trainable) == 4 and all("modules_to_save.default" in name for name in trainable)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors").keys() >= TENSORS

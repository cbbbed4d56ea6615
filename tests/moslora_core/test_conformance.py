"""What PEFT promises for LoRA holds with mixers: every feature, on every kind of layer."""

from __future__ import annotations

import copy
import json
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
import torch.distributed as dist
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.lora import Linear as LoraLinear
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from moslora_core import MOSLORA, MoSLoraConfig, MoSLoraModel, UserError
from moslora_core.fold import fold_to_lora

from .kinds import (
    ATTENTION,
    BIAS,
    CONV1D_GPT2,
    CONV2D,
    DORA_LINEAR,
    DORAS,
    EMBEDDING,
    FEW_MIXERS,
    GROUPED2D,
    KINDS,
    LINEAR,
    LLAMA,
    MIXERS,
    factors,
    lora_layers,
    scramble,
    tiny_llama,
    train,
)

# PEFT has no mixed batches for attention, DoRA or biases.
MIXED_BATCHES = [kind for kind in KINDS if kind not in (ATTENTION, BIAS, *DORAS)]
MERGING = [kind for kind in KINDS if kind.merges]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)
merging_kind = pytest.mark.parametrize("kind", MERGING, ids=str)
every_mixer = pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
few_mixers = pytest.mark.parametrize("mixer", FEW_MIXERS.values(), ids=FEW_MIXERS)

pytestmark = [
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted"),
]


def close(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-5) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=atol)


def same(kind, a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal; PEFT's attention layer merges and unmerges in every forward pass, which costs it the last bits."""
    return close(a, b) if kind is ATTENTION else torch.equal(a, b)


def adapter_tensors(model: nn.Module, adapter: str = "default") -> dict[str, torch.Tensor]:
    return get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)


# ------------------------------------------------------------------------------------------------ start and training


@every_mixer
@every_kind
def test_starts_as_the_base_model(kind, mixer):
    x = kind.batch()
    base = kind.base()(x)
    assert close(kind.model(**mixer)(x), base, atol=1e-6)


@every_mixer
@every_kind
def test_training_moves_every_trainable_tensor_and_nothing_else(kind, mixer):
    model, x = kind.model(**mixer), kind.batch()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {key for key in before if "lora_" in key} - {
        key for key in before if "mixer" in key and mixer["mixer"] != "learned"
    }
    y = model(x)
    train(model, x, steps=3, optimizer=torch.optim.AdamW)
    assert not close(model(x), y)
    for key, value in model.state_dict().items():
        if key in trainable:
            assert not torch.equal(value, before[key]), key
        else:
            assert same(kind, value, before[key]), key


# --------------------------------------------------------------------------------------------------------- save, load


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@few_mixers
@every_kind
def test_saved_adapter_loads_with_the_same_outputs(kind, mixer, low_cpu_mem_usage, tmp_path):
    model, x = scramble(kind.model(**mixer)), kind.batch()
    y = model(x)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "MOSLORA"

    loaded = PeftModel.from_pretrained(kind.base(), str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert same(kind, loaded(x), y)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    found, wanted = adapter_tensors(loaded), adapter_tensors(model)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert list(found) == list(wanted)
    assert loaded.peft_config["default"].mixer == mixer["mixer"]


@pytest.mark.parametrize(
    "kind, keys",
    [
        (LINEAR, ["lora_A.weight", "lora_B.raw", "lora_B.mixer"]),
        (CONV2D, ["lora_A.weight", "lora_B.raw", "lora_B.mixer"]),
        (GROUPED2D, ["lora_A.raw", "lora_A.mixer", "lora_B.weight"]),
        (EMBEDDING, ["lora_embedding_A", "lora_embedding_B", "lora_mixer"]),
        (DORA_LINEAR, ["lora_A.weight", "lora_B.raw", "lora_B.mixer", "lora_magnitude_vector"]),
        (BIAS, ["lora_A.weight", "lora_B.raw", "lora_B.mixer", "lora_B.bias"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("mixer", ["learned", "frozen", "two_subspaces"])
def test_layout_on_disk(kind, keys, mixer, tmp_path):
    kind.model(mixer=mixer).save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {f"base_model.model.layer.{key}" for key in keys}


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_of_the_base_are_saved(bias, tmp_path):
    model, x = LINEAR.model(bias=bias), LINEAR.batch()
    start = model(x)
    train(model, x)
    assert not close(model(x), start)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(LINEAR.base(), str(tmp_path)).eval()(x), model(x))


def test_layout_on_disk_of_attention(tmp_path):
    ATTENTION.model().save_pretrained(tmp_path)
    parts = {"lora_A.weight", "lora_B.raw", "lora_B.mixer"}
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {
        f"base_model.model.layer.{where}{part}" for where in ("", "base_layer.out_proj.") for part in parts
    }


@few_mixers
def test_loaded_to_train_on(mixer, tmp_path):
    model, x = scramble(LLAMA.model(**mixer)), LLAMA.batch()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(LLAMA.base(), str(tmp_path), is_trainable=True).eval()
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    train(model, x)
    train(loaded, x)
    assert torch.equal(loaded(x), model(x))


@few_mixers
def test_auto_classes(mixer, tmp_path):
    torch.manual_seed(0)
    tiny_llama().save_pretrained(tmp_path / "base")
    llama = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = MoSLoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM", **mixer)
    model = scramble(get_peft_model(llama, config)).eval()
    ids = LLAMA.batch()
    y = model(ids).logits
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert isinstance(loaded.base_model, MoSLoraModel)
    assert torch.equal(loaded(ids).logits, y)
    assert isinstance(PeftConfig.from_pretrained(tmp_path / "adapter"), MoSLoraConfig)


@few_mixers
def test_auto_class_without_a_task(mixer, tmp_path):
    torch.manual_seed(0)
    tiny_llama().save_pretrained(tmp_path / "base")
    llama = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = scramble(get_peft_model(llama, MoSLoraConfig(r=4, target_modules=["q_proj"], **mixer))).eval()
    y = model(LLAMA.batch()).logits
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(AutoPeftModel.from_pretrained(tmp_path / "adapter")(LLAMA.batch()).logits, y)


def test_missing_mixer_is_reported(tmp_path):
    model = scramble(LINEAR.model())
    tensors = adapter_tensors(model)
    del tensors["base_model.model.layer.lora_B.mixer"]
    result = set_peft_model_state_dict(LINEAR.model(), tensors)
    assert any("lora_B.default.mixer" in key for key in result.missing_keys)


@few_mixers
@every_kind
def test_state_dict_loads_strictly(kind, mixer):
    model, x = scramble(kind.model(**mixer)), kind.batch()
    other = kind.model(seed=7, **mixer)
    other.load_state_dict(model.state_dict(), strict=True)
    assert same(kind, other(x), model(x))


# --------------------------------------------------------------------------------------------------- merge and unload


@pytest.mark.parametrize("safe", [False, True])
@every_mixer
@merging_kind
def test_merged_base_is_the_adapted_model(kind, mixer, safe):
    model, x = scramble(kind.model(**mixer)), kind.batch()
    y = model(x)
    merged = model.merge_and_unload(safe_merge=safe)
    assert close(merged(x), y)
    assert not lora_layers(merged)
    assert not any("lora_" in key or "mixer" in key for key in merged.state_dict())


@few_mixers
@merging_kind
def test_unmerging_returns_to_the_base(kind, mixer):
    model, x = scramble(kind.model(**mixer)), kind.batch()
    y = model(x)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    model.merge_adapter()
    assert close(model(x), y)
    model.unmerge_adapter()
    assert close(model(x), y)
    assert all(close(value, weights[key]) for key, value in model.state_dict().items())
    if kind is not BIAS:
        assert close(model.unload()(x), kind.base()(x))


@few_mixers
@every_kind
def test_unload_returns_the_base(kind, mixer):
    model, x = scramble(kind.model(**mixer)), kind.batch()
    assert same(kind, model.unload()(x), kind.base()(x))


@pytest.mark.parametrize("mixer", ["learned", "frozen"])
def test_grouped_convolutions_do_not_merge_as_in_lora(mixer):
    with pytest.raises(NotImplementedError, match="groups > 1"):
        GROUPED2D.model(mixer=mixer).merge_and_unload()


def test_broken_mixer_stops_a_safe_merge():
    model = scramble(LINEAR.model())
    factors(next(iter(lora_layers(model).values())))[1].data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_and_unload(safe_merge=True)


# ---------------------------------------------------------------------------------------------------- several adapters


def two_adapters(kind, mixer: dict, other: dict | None = None, **settings) -> PeftModel:
    model = kind.model(**mixer, **settings)
    torch.manual_seed(11)
    model.add_adapter("other", kind.config(**(mixer if other is None else other), **settings))
    scramble(model, seed=5, adapter="default")
    return scramble(model, seed=6, adapter="other").eval()


def outputs(model: PeftModel, x: torch.Tensor) -> dict[str, torch.Tensor]:
    found = {}
    for name in model.peft_config:
        model.set_adapter(name)
        found[name] = model(x)
    with model.disable_adapter():
        found["__base__"] = model(x)
    model.set_adapter("default")
    return found


@few_mixers
@every_kind
def test_disabling_restores_the_base(kind, mixer):
    model, x = scramble(kind.model(**mixer)), kind.batch()
    y = model(x)
    with model.disable_adapter():
        assert same(kind, model(x), kind.base()(x))
    assert same(kind, model(x), y)


@few_mixers
@every_kind
def test_only_the_active_adapter_trains(kind, mixer):
    def trainable():
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    model = kind.model(**mixer)
    first = trainable()
    model.add_adapter("other", kind.config(**mixer))
    second = {name.replace(".default", ".other") for name in first}
    assert trainable() == first
    model.set_adapter("other")
    assert trainable() == second
    model.set_adapter("default")
    assert trainable() == first
    model.set_requires_grad("other")
    assert trainable() == first | second
    model.set_requires_grad(["default", "other"], False)
    assert not trainable()
    model.set_adapter("other", inference_mode=True)
    assert not trainable()
    model.base_model.set_adapter(["default", "other"])
    assert trainable() == first | second
    assert not any(buffer.requires_grad for buffer in model.buffers())


@few_mixers
@every_kind
def test_adapters_do_not_touch_each_other(kind, mixer):
    model, x = two_adapters(kind, mixer), kind.batch()
    y = outputs(model, x)
    assert not close(y["default"], y["other"])
    model.set_adapter("other")
    train(model, x)
    changed = outputs(model, x)
    assert same(kind, changed["default"], y["default"])
    assert not close(changed["other"], y["other"])


@few_mixers
@every_kind
def test_deleting_leaves_nothing_behind(kind, mixer):
    model, x = two_adapters(kind, mixer), kind.batch()
    y = outputs(model, x)
    model.delete_adapter("other")
    assert not any(".other" in key for key in model.state_dict())
    assert same(kind, model(x), y["default"])
    model.add_adapter("other", kind.config(**mixer))
    model.set_adapter("other")
    assert close(model(x), y["__base__"], atol=1e-6)
    model.delete_adapter("other")
    model.set_adapter("default")
    assert same(kind, model(x), y["default"])


@every_kind
def test_lora_beside_a_learned_mixer(kind):
    """Adapters with and without a mixer share layers; each computes what it computes alone."""
    x = kind.batch()
    model = two_adapters(kind, MIXERS["learned"], MIXERS["lora"])
    y = outputs(model, x)
    alone = kind.model(mixer="identity")
    scramble(alone, seed=6)
    assert close(y["other"], alone(x))
    assert close(y["default"], scramble(kind.model(), seed=5)(x))


@pytest.mark.parametrize("second", ["learned", "lora"])
@few_mixers
@pytest.mark.parametrize("kind", MIXED_BATCHES, ids=str)
def test_mixed_batch_gives_each_sample_its_adapter(kind, mixer, second):
    model, x = two_adapters(kind, mixer, MIXERS[second]), kind.batch(6)
    y = outputs(model, x)
    names = ["default", "__base__", "other", "other", "default", "__base__"]
    expected = torch.stack([y[name][row] for row, name in enumerate(names)])
    with torch.no_grad():
        assert close(model(x, adapter_names=names), expected)


# ------------------------------------------------------------------------------------------------------ combinations

EXACT = ["svd", "cat"]
ROUGH = ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
WITH_SVD = ["ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd"]
COMBINED = [LINEAR, CONV1D_GPT2, CONV2D, EMBEDDING, LLAMA]


def folded_twin(kind, model: PeftModel) -> PeftModel:
    """Stock LoRA with the model's adapters, folded."""
    twin = None
    for name in list(model.peft_config):
        config, tensors = fold_to_lora(model, name)
        config.inference_mode = False
        if twin is None:
            twin = get_peft_model(kind.base(), config, name)
        else:
            twin.add_adapter(name, config)
        set_peft_model_state_dict(twin, tensors, name)
    return twin.eval()


@pytest.mark.parametrize("combination", EXACT)
@few_mixers
@pytest.mark.parametrize("kind", COMBINED, ids=str)
def test_exact_combinations_add_the_updates(kind, mixer, combination):
    # Ranks that add up to no more than the smallest matrix has, or the decomposition would cut.
    model, x = two_adapters(kind, mixer, r=2), kind.batch()
    before = outputs(model, x)
    updates = {
        name: [layer.get_delta_weight(adapter) for adapter in ("default", "other")]
        for name, layer in lora_layers(model).items()
    }
    model.add_weighted_adapter(["default", "other"], [0.7, -0.4], "sum", combination_type=combination, svd_rank=4)
    for name, layer in lora_layers(model).items():
        first, second = updates[name]
        assert close(layer.get_delta_weight("sum"), 0.7 * first - 0.4 * second), name
    assert not model.peft_config["sum"].has_mixer
    assert model.peft_config["default"].mixer == mixer["mixer"]
    after = outputs(model, x)
    assert all(torch.equal(after[name], y) for name, y in before.items())


@pytest.mark.parametrize("combination", EXACT + ROUGH + WITH_SVD)
@pytest.mark.parametrize("mixer", [MIXERS["learned"], MIXERS["two_subspaces"]], ids=["learned", "two_subspaces"])
@pytest.mark.parametrize("kind", [LINEAR, CONV2D, EMBEDDING], ids=str)
def test_combinations_are_those_of_the_folded_adapters(kind, mixer, combination):
    model, x = two_adapters(kind, mixer), kind.batch()
    twin = folded_twin(kind, model)
    settings = {"combination_type": combination} | ({} if combination in [*EXACT, "linear"] else {"density": 0.6})
    found = []
    for each in (model, twin):
        torch.manual_seed(4)
        each.add_weighted_adapter(["default", "other"], [0.7, 0.4], "sum", **settings)
        each.set_adapter("sum")
        found.append(each(x))
    assert close(*found)


@few_mixers
@pytest.mark.parametrize("kind", [GROUPED2D, ATTENTION], ids=str)
def test_linear_combination_is_that_of_the_folded_adapters(kind, mixer):
    model, x = two_adapters(kind, mixer), kind.batch()
    twin = folded_twin(kind, model)
    for each in (model, twin):
        each.add_weighted_adapter(["default", "other"], [0.7, 0.4], "sum", combination_type="linear")
        each.set_adapter("sum")
    assert close(model(x), twin(x))
    model.set_adapter("default")
    y = model(x)
    model.add_weighted_adapter(["default"], [1.0], "copy")
    model.set_adapter("copy")
    assert close(model(x), y)


@pytest.mark.parametrize("combination", EXACT + WITH_SVD)
def test_combinations_that_ignore_groups_are_refused(combination):
    model = two_adapters(GROUPED2D, MIXERS["learned"])
    with pytest.raises(UserError, match=f"layer: combination_type='{combination}' is not defined for grouped"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", combination_type=combination)
    assert list(model.peft_config) == ["default", "other"]


def test_combination_of_an_odd_total_rank_from_two_subspaces():
    model = LINEAR.model(mixer="two_subspaces")
    model.add_adapter("other", LINEAR.config(mixer="identity", r=3))
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", combination_type="cat")
    assert model.peft_config["sum"].r == 7


def test_combined_adapter_saves_as_one_without_mixers(tmp_path):
    model, x = two_adapters(EMBEDDING, MIXERS["learned"]), EMBEDDING.batch()
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    y = model(x)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(EMBEDDING.base(), str(tmp_path / "sum"))
    assert torch.equal(loaded(x), y)


def test_unknown_adapter_in_a_combination_is_pefts_error():
    with pytest.raises(ValueError, match="Adapter nobody does not exist"):
        LINEAR.model().add_weighted_adapter(["nobody"], [1.0], "sum")


# ------------------------------------------------------------------------------------------------ patterns and extras


@few_mixers
def test_rank_and_alpha_patterns_survive_a_round_trip(mixer, tmp_path):
    settings = {"rank_pattern": {"q_proj": 2, "embed_tokens": 6}, "alpha_pattern": {"v_proj": 3}} | mixer
    model, x = scramble(LLAMA.model(**settings)), LLAMA.batch()
    model.save_pretrained(tmp_path)
    y = model(x)
    assert torch.equal(PeftModel.from_pretrained(LLAMA.base(), str(tmp_path))(x), y)
    assert close(model.merge_and_unload()(x), y)


@few_mixers
def test_modules_to_save(mixer, tmp_path):
    model, x = LINEAR.model(modules_to_save=["head"], **mixer), LINEAR.batch()
    train(model, x)
    y = model(x)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(LINEAR.base(), str(tmp_path))
    assert torch.equal(loaded(x), y)
    assert not torch.equal(y, LINEAR.base()(x))
    assert close(model.merge_and_unload()(x), y)


@few_mixers
def test_all_linear(mixer):
    model = LLAMA.model(target_modules="all-linear", **mixer)
    assert len(lora_layers(model)) == 15  # the head too, since the wrapper is no transformers model
    assert close(model(LLAMA.batch()), LLAMA.base()(LLAMA.batch()), atol=1e-6)


@few_mixers
def test_layer_replication(mixer):
    torch.manual_seed(0)
    llama = tiny_llama().eval()
    config = MoSLoraConfig(
        r=4, target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]], init_lora_weights=False, **mixer
    )
    model = get_peft_model(llama, config)
    layers = lora_layers(model)
    assert len(layers) == 3
    assert model(LLAMA.batch()).logits.isfinite().all()


@few_mixers
def test_activated_lora_applies_from_the_invocation_on(mixer):
    """aLoRA's forward goes through ``lora_A`` and ``lora_B``, so that the mixer is switched on with them."""
    torch.manual_seed(0)
    llama = tiny_llama().eval()
    ids = torch.tensor([[4, 5, 1, 2, 6, 7]])
    base = llama(ids).logits
    config = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False} | mixer
    model = get_peft_model(llama, MoSLoraConfig(alora_invocation_tokens=[1, 2], **config)).eval()
    y = model(ids).logits
    assert torch.equal(y[:, :2], base[:, :2])
    assert not close(y[:, 3:], base[:, 3:])
    plain, tensors = fold_to_lora(model)
    torch.manual_seed(0)
    twin = get_peft_model(tiny_llama(), plain).eval()
    set_peft_model_state_dict(twin, tensors)
    assert close(twin(ids).logits, y)


# -------------------------------------------------------------------------------------------------- other ways to add


@few_mixers
def test_transformers_add_adapter(mixer, tmp_path):
    torch.manual_seed(0)
    model = tiny_llama().eval()
    ids = LLAMA.batch()
    base = model(ids).logits
    model.add_adapter(MoSLoraConfig(r=4, target_modules=["q_proj", "down_proj", "embed_tokens"], **mixer))
    assert torch.equal(model(ids).logits, base)
    before = adapter_tensors(model)
    before = {key: value.clone() for key, value in before.items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    moved = {key for key, value in adapter_tensors(model).items() if not torch.equal(value, before[key])}
    assert moved == {key for key in before if mixer["mixer"] == "learned" or "mixer" not in key}
    model.eval()  # transformers leaves a new adapter's layers in training mode
    y = model(ids).logits
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    other = tiny_llama().eval()
    other.load_adapter(str(tmp_path))
    assert torch.equal(other(ids).logits, y)
    model.disable_adapters()
    assert torch.equal(model(ids).logits, base)


def test_inject_adapter_in_model():
    base = LINEAR.base()
    model, x = inject_adapter_in_model(LINEAR.config(init_lora_weights=False), base), LINEAR.batch()
    assert list(adapter_tensors(model)) == ["layer.lora_A.weight", "layer.lora_B.raw", "layer.lora_B.mixer"]
    assert not close(model(x), LINEAR.base()(x))


@pytest.mark.parametrize("order", [(MoSLoraConfig, LoraConfig), (LoraConfig, MoSLoraConfig)], ids=["first", "second"])
def test_beside_plain_lora_in_a_transformers_model(order):
    """There, unlike in a PeftModel, adapters of different types meet in the same layers."""
    torch.manual_seed(0)
    model, ids = tiny_llama().eval(), LLAMA.batch()
    for name, cls in zip(("one", "two"), order, strict=True):
        model.add_adapter(
            cls(r=4, target_modules=["q_proj", "embed_tokens"], init_lora_weights=False), adapter_name=name
        )
    for name, cls in zip(("one", "two"), order, strict=True):
        model.set_adapter(name)
        keys = adapter_tensors(model, name)
        assert any("mixer" in key for key in keys) == (cls is MoSLoraConfig)
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trained and all(f".{name}" in n for n in trained)
        y = model(ids).logits
        torch.manual_seed(0)
        alone = tiny_llama().eval()
        alone.add_adapter(cls(r=4, target_modules=["q_proj", "embed_tokens"]), adapter_name=name)
        set_peft_model_state_dict(alone, keys, name)
        assert torch.equal(alone(ids).logits, y)


@few_mixers
def test_diffusers_unet(mixer):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=4,
        in_channels=2,
        out_channels=2,
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        attention_head_dim=2,
        cross_attention_dim=6,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()
    inputs = (torch.randn(2, 2, 4, 4), torch.tensor([1, 7]), torch.randn(2, 3, 6))
    with torch.no_grad():
        before = unet(*inputs).sample
    unet.requires_grad_(False)
    unet.add_adapter(MoSLoraConfig(r=2, target_modules=["to_q", "to_v", "conv1"], **mixer))
    assert torch.equal(unet(*inputs).sample, before)
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.05)
    losses = []
    for _ in range(4):
        loss = (unet(*inputs).sample - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    unet.disable_adapters()
    with torch.no_grad():
        assert torch.equal(unet(*inputs).sample, before)


def test_hot_swapping_is_refused_by_peft(tmp_path):
    """It is defined for adapters of type LORA: fold first."""
    model = LINEAR.model()
    model.save_pretrained(tmp_path)
    with pytest.raises((KeyError, ValueError), match="MOSLORA"):
        hotswap_adapter(model, str(tmp_path), "default")


def test_preparing_for_compiled_hot_swapping_folds_the_mixer():
    """PEFT pads factors to a common rank in layers of its own: the same update, and no mixer to train any more."""
    model, x = scramble(LINEAR.model()), LINEAR.batch()
    expected = model(x)
    prepare_model_for_compiled_hotswap(model, target_rank=16)
    torch.testing.assert_close(model(x), expected)
    assert not [name for name, _ in model.named_parameters() if "mixer" in name]


def test_lora_config_on_a_moslora_model_is_pefts_error():
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        LINEAR.model().add_adapter("plain", LoraConfig(target_modules=["layer"]))


def test_mixed_peft_models_are_refused_by_peft():
    with pytest.raises(ValueError, match="MOSLORA"):
        get_peft_model(LINEAR.base(), LINEAR.config(), mixed=True)


def test_conversion_of_the_initial_model_is_refused(tmp_path):
    model = LINEAR.model()
    model.save_pretrained(tmp_path / "start")
    with pytest.raises(UserError, match="path_initial_model_for_weight_conversion"):
        model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path / "start"))


# ------------------------------------------------------------------------------------------------- kinds that do not


class OwnConv(nn.Conv2d):
    """A subclass of torch's convolution, as some vision models have."""


def test_subclasses_of_convolutions_are_refused_by_name():
    net = nn.Sequential()
    net.add_module("layer", OwnConv(3, 4, 3))
    with pytest.raises(UserError, match=r"layer: a mixer cannot go into .*OwnConv"):
        get_peft_model(net, MoSLoraConfig(target_modules=["layer"]))


def test_custom_lora_layers_are_refused_by_name():
    class OwnLinear(LoraLinear):
        pass

    config = LINEAR.config()
    config._register_custom_module({nn.Linear: OwnLinear})
    with pytest.raises(UserError, match=r"layer: a mixer cannot go into a layer of type .*OwnLinear"):
        get_peft_model(LINEAR.base(), config)
    config = LINEAR.config(mixer="identity")
    config._register_custom_module({nn.Linear: OwnLinear})
    assert isinstance(get_peft_model(LINEAR.base(), config).base_model.model.layer, OwnLinear)


def test_tied_targets_are_refused():
    llama = tiny_llama(tie_word_embeddings=True)
    config = {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True, "task_type": "CAUSAL_LM"}
    with pytest.raises(UserError, match=r"lm_head: ensure_weight_tying"):
        get_peft_model(llama, MoSLoraConfig(**config))
    get_peft_model(tiny_llama(tie_word_embeddings=True), MoSLoraConfig(mixer="identity", **config))


def test_tensor_parallel_modules_are_refused():
    base = LINEAR.base()
    base.layer._hf_tp_plan = "colwise"
    with pytest.raises(UserError, match="layer: the module is split by tensor parallelism"):
        get_peft_model(base, LINEAR.config())


def test_settings_changed_after_construction_are_checked():
    config = LINEAR.config()
    config.mixer = "blended"
    with pytest.raises(UserError, match="mixer='blended' is unknown"):
        get_peft_model(LINEAR.base(), config)


# ----------------------------------------------------------------------------------------- precision, graphs, copies


@few_mixers
@pytest.mark.parametrize("kind", [LINEAR, CONV2D, EMBEDDING, ATTENTION, DORA_LINEAR], ids=str)
def test_bfloat16_base_trains_the_adapter_in_float32(kind, mixer):
    base = kind.base().to(torch.bfloat16)
    model = get_peft_model(base, kind.config(**mixer)).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32, name
    x = kind.batch()
    x = x.bfloat16() if x.is_floating_point() else x
    # One context for each, since autocast keeps the weights that it cast for as long as it lasts.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        train(model, x, steps=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        merged = copy.deepcopy(model).merge_and_unload()(x)
    assert y.dtype == torch.bfloat16
    assert torch.allclose(merged.float(), y.float(), atol=0.05)


@few_mixers
@every_kind
def test_autocast_is_near_full_precision(kind, mixer):
    model, x = scramble(kind.model(**mixer), std=0.1), kind.batch()
    y = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(x)
    half.float().sum().backward()
    assert torch.allclose(half.float(), y, atol=0.05)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@few_mixers
@pytest.mark.parametrize("kind", [LINEAR, CONV2D, GROUPED2D, EMBEDDING], ids=str)
def test_moves_to_other_dtypes_as_a_whole(kind, mixer):
    model, x = scramble(kind.model(**mixer)), kind.batch()
    y = model(x)
    double = model.double()
    assert all(t.dtype == torch.float64 for t in double.state_dict().values())
    assert close(double(x.double() if x.is_floating_point() else x).float(), y)
    assert all(t.dtype == torch.float16 for t in double.half().state_dict().values())


@few_mixers
@every_kind
def test_meta_device(kind, mixer):
    with torch.device("meta"):
        base = kind.build()
    torch.manual_seed(0)
    model = get_peft_model(base, kind.config(**mixer))
    assert all(tensor.device.type == "meta" for tensor in model.state_dict().values())
    real = kind.model(**mixer)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in real.state_dict().items()}
    assert model.get_nb_trainable_parameters() == real.get_nb_trainable_parameters()


@few_mixers
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(mixer, use_reentrant):
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = tiny_llama()
        config = MoSLoraConfig(r=4, target_modules=LLAMA.targets, init_lora_weights=False, **mixer)
        model = get_peft_model(model, config).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model(LLAMA.batch()).logits.square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    assert list(plain) == list(checkpointed)
    assert all(close(plain[name], checkpointed[name], atol=1e-7) for name in plain)


@pytest.mark.parametrize("mixer", [MIXERS["learned"], MIXERS["frozen_orthogonal"]], ids=["learned", "frozen"])
@pytest.mark.parametrize("kind", [LINEAR, CONV2D, GROUPED2D, EMBEDDING, DORA_LINEAR], ids=str)
def test_compiles(kind, mixer):
    # As one graph, but for DoRA, in which PEFT itself breaks the graph.
    torch._dynamo.reset()
    model, x = scramble(kind.model(**mixer)), kind.batch()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=kind is not DORA_LINEAR)
    y, z = model(x), compiled(x)
    assert close(z, y)
    expected = torch.autograd.grad(y.sum(), [p for p in model.parameters() if p.requires_grad])
    found = torch.autograd.grad(z.sum(), [p for p in model.parameters() if p.requires_grad])
    assert all(close(a, b) for a, b in zip(found, expected, strict=True))


@few_mixers
@every_kind
def test_a_deep_copy_is_independent(kind, mixer):
    model, x = scramble(kind.model(**mixer)), kind.batch()
    y = model(x)
    twin = copy.deepcopy(model)
    assert same(kind, twin(x), y)
    train(twin, x)
    assert not close(twin(x), y)
    assert same(kind, model(x), y)


@few_mixers
@pytest.mark.parametrize("kind", [LINEAR, CONV2D, GROUPED2D, EMBEDDING, LLAMA], ids=str)
def test_a_model_can_be_sent_to_another_process(kind, mixer):
    model, x = scramble(kind.model(**mixer)), kind.batch()
    received = ForkingPickler.loads(ForkingPickler.dumps(model))
    assert torch.equal(received(x), model(x))
    assert {n for n, p in received.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


@few_mixers
@every_kind
def test_every_parameter_is_found_under_its_name(kind, mixer):
    """FSDP, ZeRO and offloading look parameters up by name; a property in the way would give them a product."""
    model = kind.model(**mixer)
    for name, parameter in model.named_parameters():
        parent, _, leaf = name.rpartition(".")
        assert getattr(model.get_submodule(parent), leaf) is parameter, name


@pytest.fixture
def process_group():
    """A process group of this process alone: parameters become sharded tensors, without a second process."""
    if dist.is_initialized():
        pytest.skip("another process group is in use")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@few_mixers
@pytest.mark.parametrize("kind", [LINEAR, EMBEDDING, LLAMA], ids=str)
def test_fully_sharded(kind, mixer, process_group):
    model, x = kind.model(**mixer), kind.batch()
    sharded = copy.deepcopy(model)
    fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
    train(model, x, optimizer=torch.optim.AdamW)
    train(sharded, x, optimizer=torch.optim.AdamW)
    assert close(sharded(x), model(x))
    found = {
        key: getattr(value, "full_tensor", lambda value=value: value)() for key, value in sharded.state_dict().items()
    }
    assert all(close(value, found[key]) for key, value in model.state_dict().items())


@few_mixers
@every_kind
def test_status_of_layers_and_model(kind, mixer):
    model = two_adapters(kind, mixer)
    status = model.get_model_status()
    assert (status.enabled, status.active_adapters) == (True, ["default"])
    assert status.available_adapters == ["default", "other"]
    assert status.requires_grad == {"default": True, "other": False}
    for layer in model.get_layer_status():
        assert layer.requires_grad == {"default": True, "other": False}, layer.name


def test_embeddings_may_be_used_from_several_threads():
    model, x = scramble(EMBEDDING.model()), EMBEDDING.batch()
    with torch.no_grad():
        y = model(x)
        with ThreadPoolExecutor(4) as pool:
            for z in pool.map(lambda _: model(x), range(64)):
                assert torch.equal(z, y)


def test_gradients_can_be_penalised_through_the_product():
    """Second derivatives: B @ M is an ordinary node of the graph."""
    model, x = scramble(LINEAR.model()), LINEAR.batch()
    A, M, B = factors(next(iter(lora_layers(model).values())))
    (gradient,) = torch.autograd.grad(model(x).sum(), M, create_graph=True)
    gradient.square().sum().backward()
    assert A.grad is not None and B.grad is not None


def test_the_peft_type_is_a_member_of_the_enum():
    from peft import PeftType

    model = LINEAR.model()
    assert model.peft_config["default"].peft_type is MOSLORA is PeftType("MOSLORA") is PeftType.MOSLORA
    assert MOSLORA.value == MOSLORA.name == "MOSLORA"
    assert isinstance(model.base_model, MoSLoraModel)
    assert copy.deepcopy(MOSLORA) is MOSLORA


# ------------------------------------------------------------------------------------------------------ quantised base


class Quantised(nn.Module):
    """A model that says, as transformers' do, how it was loaded."""

    def __init__(self, layer: nn.Module, bits: int):
        super().__init__()
        self.layer = layer
        self.is_loaded_in_4bit, self.is_loaded_in_8bit = bits == 4, bits == 8

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def near(a: torch.Tensor, b: torch.Tensor, within: float) -> bool:
    return (a - b).norm() < within * b.norm()


@few_mixers
def test_nf4_base(mixer):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    weight = torch.randn(64, 64)
    layer = bnb.nn.Linear4bit(64, 64, quant_type="nf4", compress_statistics=True, compute_dtype=torch.float32)
    layer.weight = bnb.nn.Params4bit(weight, quant_type="nf4", compress_statistics=True, requires_grad=False)
    layer = layer.to("cpu")

    base, x = Quantised(layer, 4).eval(), torch.randn(3, 64)
    before = base(x)
    model = get_peft_model(base, MoSLoraConfig(r=4, lora_alpha=8, target_modules=["layer"], **mixer)).eval()
    # The same layer takes another path through bitsandbytes where gradients are wanted.
    assert near(model(x), before, 0.01)
    train(model, x, lr=1.0)
    y = model(x)
    assert not near(y, before, 0.02)
    (adapted,) = lora_layers(model).values()
    assert type(adapted).__name__ == "Linear4bit"
    assert ("mixer" in dict(adapted.lora_B["default"].named_parameters())) == (mixer["mixer"] == "learned")
    update = 2 * x @ (adapted.lora_B["default"].weight @ adapted.lora_A["default"].weight).T
    assert near(y, before + update, 0.01)
    with torch.no_grad():
        # Merging quantises the sum again.
        assert near(model.merge_and_unload()(x), y, 0.15)


@few_mixers
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_8_bit_base(mixer, device):
    bnb = pytest.importorskip("bitsandbytes")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.manual_seed(0)
    layer = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False, threshold=6.0)
    layer.weight = bnb.nn.Int8Params(torch.randn(64, 64), requires_grad=False, has_fp16_weights=False)
    base, x = Quantised(layer.to(device), 8).eval(), torch.randn(3, 64, device=device)
    before = base(x)
    model = get_peft_model(base, MoSLoraConfig(r=4, lora_alpha=8, target_modules=["layer"], **mixer)).eval()
    assert near(model(x), before, 0.01)
    train(model, x, lr=1.0)
    y = model(x)
    assert not near(y, before, 0.02)
    (adapted,) = lora_layers(model).values()
    assert type(adapted).__name__ == "Linear8bitLt"
    update = 2 * x @ (adapted.lora_B["default"].weight @ adapted.lora_A["default"].weight).T
    assert near(y, before + update, 0.02)
    if device == "cuda":  # on the CPU, merging into 8 bits gives NaN for plain LoRA as well
        with torch.no_grad():
            assert near(model.merge_and_unload()(x), y, 0.1)

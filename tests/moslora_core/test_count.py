"""Counts: the paper's parameter table, other tuners, memory by its formula, steps and accumulation."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import AdaLoraConfig, LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from torch import nn

from moslora_core import MoSLoraConfig
from moslora_core.count import (
    Count,
    DecoderShape,
    DryRun,
    MemoryEstimate,
    accumulation_steps,
    count_parameters,
    estimate_memory,
    meta_causal_lm,
    optimiser_steps,
)
from moslora_core.errors import UserError

LLAMA3_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "tie_word_embeddings": False,
}
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
TINY = LLAMA3_8B | {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}


@pytest.fixture(scope="module")
def llama3() -> nn.Module:
    return meta_causal_lm(LLAMA3_8B)


# ------------------------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize(
    ("r", "lora", "mixer", "shares"),
    [
        (4, 7_077_888, 2_560, ("0.0881", "0.0881")),
        (8, 14_155_776, 10_240, ("0.1760", "0.1761")),
        (16, 28_311_552, 40_960, ("0.3513", "0.3518")),
        (32, 56_623_104, 163_840, ("0.7002", "0.7022")),
        (64, 113_246_208, 655_360, ("1.3906", "1.3986")),
    ],
)
def test_llama3_8b_has_the_papers_parameter_counts(llama3, r, lora, mixer, shares):
    plain = count_parameters(llama3, LoraConfig(r=r, target_modules=TARGETS))
    mixed = count_parameters(llama3, MoSLoraConfig(r=r, target_modules=TARGETS))
    assert (plain.trainable, plain.adapter, plain.mixer) == (lora, lora, 0)
    assert (mixed.trainable, mixed.adapter, mixed.mixer) == (lora + mixer, lora + mixer, mixer)
    assert plain.base == mixed.base == 8_030_261_248
    assert plain.modules == mixed.modules == 160
    assert tuple(f"{100 * count.share:.4f}" for count in (plain, mixed)) == shares


def test_an_8b_model_is_built_and_counted_in_under_three_seconds():
    count_parameters(TINY, LoraConfig(target_modules=TARGETS))  # imports and caches are not what is measured
    start = time.perf_counter()
    count_parameters(LLAMA3_8B, MoSLoraConfig(r=16, target_modules=TARGETS))
    assert time.perf_counter() - start < 3


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, target_modules=TARGETS),
        LoraConfig(r=4, target_modules=TARGETS, use_dora=True),
        LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        LoHaConfig(r=4, target_modules=TARGETS),
        LoKrConfig(r=4, target_modules=TARGETS),
        AdaLoraConfig(init_r=4, target_modules=TARGETS, total_step=100),
        MoSLoraConfig(r=4, target_modules=TARGETS, rank_pattern={"q_proj": 2}),
        MoSLoraConfig(r=4, target_modules=TARGETS, use_dora=True),
    ],
    ids=["lora", "dora", "modules_to_save", "loha", "lokr", "adalora", "rank_pattern", "moslora_dora"],
)
def test_the_meta_count_is_that_of_the_real_model(config):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in TINY.items() if k != "model_type"}))
    base = sum(p.numel() for p in model.parameters())
    count = count_parameters(model, config)
    assert all(p.device.type == "cpu" and "lora" not in name for name, p in model.named_parameters())
    assert count == count_parameters(TINY, config) == count_parameters(lambda: type(model)(model.config), config)
    adapted = get_peft_model(model, config)
    trainable, total = adapted.get_nb_trainable_parameters()
    assert (count.base, count.trainable, count.adapter) == (base, trainable, total - base)


@pytest.mark.parametrize("mixer", ["learned", "frozen", "two_subspaces", "identity"])
def test_frozen_mixers_belong_to_the_adapter_and_are_not_trained(mixer):
    count = count_parameters(TINY, MoSLoraConfig(r=4, target_modules=TARGETS, mixer=mixer))
    plain = count_parameters(TINY, LoraConfig(r=4, target_modules=TARGETS))
    mixers = 0 if mixer == "identity" else 10 * 4 * 4
    assert count.mixer == mixers
    assert count.adapter == plain.adapter + mixers
    assert count.trainable == plain.trainable + (mixers if mixer == "learned" else 0)


def test_embedding_and_grouped_convolution_mixers_are_counted():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(11, 8)
            self.conv = nn.Conv2d(4, 8, 3, groups=2)

    count = count_parameters(Net, MoSLoraConfig(r=4, target_modules=["embed", "conv"]))
    assert (count.mixer, count.modules) == (32, 2)


def test_full_fine_tuning_trains_everything():
    count = count_parameters(TINY, None)
    assert count.trainable == count.base and count.adapter == 0 and count.share == 1.0


def test_tied_weights_count_once():
    tied = count_parameters(TINY | {"tie_word_embeddings": True}, None)
    assert count_parameters(TINY, None).base - tied.base == 50 * 32


def test_the_callers_configuration_stays_as_it_is():
    config = MoSLoraConfig(r=2, target_modules="all-linear", inference_mode=True)
    assert count_parameters(TINY, config).trainable > 0
    assert (config.target_modules, config.inference_mode) == ("all-linear", True)


def test_impossible_models_and_targets_are_refused():
    with pytest.raises(UserError, match="no_such_proj"):
        count_parameters(TINY, LoraConfig(target_modules=["no_such_proj"]))
    with pytest.raises(UserError, match="model_type"):
        count_parameters({"hidden_size": 3}, LoraConfig())
    with pytest.raises(UserError, match="model_type"):
        count_parameters({"model_type": "no-such-model"}, LoraConfig())
    with pytest.raises(UserError, match="not a causal language model"):
        count_parameters({"model_type": "clip_vision_model"}, LoraConfig())


# ----------------------------------------------------------------------------------------------------------- memory

SHAPE = DecoderShape(hidden=8, layers=3, intermediate=20, vocabulary=100, heads=2, kv_width=4)
COUNT = Count(base=10_000, adapter=500, trainable=400, mixer=32, modules=6, adapted_inputs=60)


def test_memory_follows_the_documented_formula():
    memory = estimate_memory(COUNT, decoder=SHAPE, batch=2, sequence=5)
    assert memory.weights == 20_000
    assert (memory.adapter, memory.gradients, memory.optimiser) == (2_000, 1_600, 3_200)
    layer = 2 * (6 * 8 + 2 * 4 + 4 * 20)
    assert memory.activations == 10 * 3 * layer
    assert memory.logits == 10 * 100 * (2 + 8)
    assert memory.total == 20_000 + 2_000 + 1_600 + 3_200 + memory.activations + memory.logits
    checkpointed = estimate_memory(COUNT, decoder=SHAPE, batch=2, sequence=5, gradient_checkpointing=True)
    assert checkpointed.activations == 10 * (2 * 3 * 8 + layer)
    eager = estimate_memory(COUNT, decoder=SHAPE, batch=2, sequence=5, attention="eager")
    assert eager.activations - memory.activations == 10 * 3 * 2 * (2 * 2 * 5)
    dropout = estimate_memory(COUNT, decoder=SHAPE, batch=2, sequence=5, dropout=0.1)
    assert dropout.activations - memory.activations == 10 * 3 * (2 + 1) * 20


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_activation_formula_is_near_what_autograd_keeps(attention, dropout):
    from transformers import LlamaConfig, LlamaForCausalLM

    wide = {k: v for k, v in TINY.items() if k != "model_type"} | {"hidden_size": 64, "intermediate_size": 160}
    config = LlamaConfig(**wide, attn_implementation=attention)
    adapter = LoraConfig(r=2, target_modules=TARGETS, lora_dropout=dropout)
    count = count_parameters(config, adapter)
    model = get_peft_model(LlamaForCausalLM(config), adapter).train()
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept = {}

    def pack(tensor):
        # The tensor is kept too, so that its address is not given to another one.
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(50, (2, 64))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids, labels=ids)
    measured = sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in own)
    shape = DecoderShape.from_config(config)
    setting = {"decoder": shape, "batch": 2, "sequence": 64, "attention": attention, "dropout": dropout}
    memory = estimate_memory(count, dtype="float32", **setting)
    assert 0.85 < (memory.activations + memory.logits) / measured < 1.25


def test_dtypes_change_weights_and_adapter():
    full = estimate_memory(COUNT, dtype="float32", adapter_dtype="bfloat16", decoder=SHAPE)
    assert (full.weights, full.adapter, full.gradients, full.optimiser) == (40_000, 1_000, 800, 3_200)
    nf4 = estimate_memory(COUNT, dtype="nf4", decoder=SHAPE)
    # Embeddings and output head, 2 * 100 * 8 weights, keep 16 bits.
    assert nf4.weights == 2 * 1600 + round(8400 * (4 + 0.125 + 32 / 16384) / 8)
    int8 = estimate_memory(COUNT, dtype="int8", decoder=DecoderShape(8, 3, 20, 100, 2, 4, tied=True))
    assert int8.weights == 2 * 800 + 9200


def test_without_a_decoder_activations_are_not_estimated():
    memory = estimate_memory(COUNT)
    assert memory.activations is None and memory.logits is None
    assert memory.total == 20_000 + 2_000 + 1_600 + 3_200


def test_shapes_are_read_from_a_configuration():
    shape = DecoderShape.from_config(LLAMA3_8B)
    assert shape == DecoderShape(4096, 32, 14336, 128256, 32, 1024)
    assert DecoderShape.from_config(meta_causal_lm(LLAMA3_8B).config) == shape
    with pytest.raises(UserError, match="not a decoder language model"):
        DecoderShape.from_config({"hidden_size": 3})


def test_the_papers_setting_fits_its_card():
    # One A100 80G in the paper; its 8B model in 16 bits alone is 15 GiB.
    count = count_parameters(LLAMA3_8B, MoSLoraConfig(r=16, target_modules=TARGETS))
    shape = DecoderShape.from_config(LLAMA3_8B)
    memory = estimate_memory(
        count, dtype="float16", decoder=shape, batch=4, sequence=256, attention="eager", dropout=0.05
    )
    assert 18 < memory.total / 2**30 < 40


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"dtype": "fp8"}, "dtype is 'fp8'"),
        ({"adapter_dtype": "nf4"}, "adapter_dtype is 'nf4'"),
        ({"attention": "flash"}, "attention is 'flash'"),
        ({"batch": 0}, "batch is 0"),
        ({"sequence": -1}, "sequence is -1"),
        ({"devices": 0}, "devices is 0"),
        ({"zero_stage": 4}, "zero_stage is 4"),
    ],
)
def test_impossible_memory_settings_are_refused(setting, message):
    with pytest.raises(UserError, match=message):
        estimate_memory(COUNT, **setting)


def test_zero_spreads_what_its_stage_says_over_the_devices():
    whole = estimate_memory(COUNT, decoder=SHAPE, batch=2, sequence=5)
    spread = {1: ["optimiser"], 2: ["optimiser", "gradients"], 3: ["optimiser", "gradients", "weights", "adapter"]}
    for stage, parts in spread.items():
        sharded = estimate_memory(COUNT, decoder=SHAPE, batch=2, sequence=5, zero_stage=stage, devices=4)
        for name, size in asdict(whole).items():
            assert getattr(sharded, name) == (math.ceil(size / 4) if name in parts else size), (stage, name)
    assert estimate_memory(COUNT, decoder=SHAPE, batch=2, sequence=5, zero_stage=3, devices=1) == whole


# ------------------------------------------------------------------------------------------------------------ steps


def test_the_papers_training_has_its_steps():
    # 170,420 examples less 120 for validation, 3 epochs of batch 16.
    assert optimiser_steps(170_300, 16, 3) == 3 * 10_644
    assert optimiser_steps(170_300, 16, 3, drop_last=True) == 3 * 10_643
    assert optimiser_steps(10, 16, 2) == 2
    assert optimiser_steps(100, 10, 0.25) == 3


@pytest.mark.parametrize("sizes", [(0, 4, 1), (4, 0, 1), (4, 4, 0), (-1, 4, 1)])
def test_impossible_step_sizes_are_refused(sizes):
    with pytest.raises(UserError, match="expected more than 0"):
        optimiser_steps(*sizes)
    with pytest.raises(UserError, match="make no batch of 16"):
        optimiser_steps(10, 16, 1, drop_last=True)


@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 8))
def test_accumulation_makes_up_the_global_batch_or_is_refused(global_batch, per_device, world_size):
    if global_batch % (per_device * world_size):
        with pytest.raises(UserError, match="not a multiple"):
            accumulation_steps(global_batch, per_device, world_size)
    else:
        assert accumulation_steps(global_batch, per_device, world_size) * per_device * world_size == global_batch


def test_the_refusal_shows_the_arithmetic():
    with pytest.raises(UserError) as caught:
        accumulation_steps(16, 3, 2)
    assert str(caught.value) == (
        "global_batch_size 16 is not a multiple of per_device_batch_size 3 x world_size 2 = 6: 16 = 2 x 6 + 4"
    )
    with pytest.raises(UserError, match="world_size is 0"):
        accumulation_steps(16, 4, 0)


# ---------------------------------------------------------------------------------------------------------- dry run


def test_a_dry_run_renders_as_lines_and_as_json():
    memory = estimate_memory(COUNT, decoder=SHAPE, batch=2, sequence=5)
    run = DryRun("paper moslora", COUNT, memory, 1200, 16, 4, {"learning_rate": 3e-4})
    text = "\n".join(run.lines())
    for expected in ("paper moslora", "400", "3.8095 %", "1,200", "16 (accumulation 4)", "0.0003", "mixers 32"):
        assert expected in text
    data = json.loads(json.dumps(run.as_dict()))
    assert data["parameters"]["share"] == pytest.approx(400 / 10_500)
    assert data["memory_bytes"]["total"] == memory.total
    assert data["optimiser_steps"] == 1200 and data["details"] == {"learning_rate": 3e-4}


def test_a_dry_run_says_what_it_does_not_estimate():
    lines = DryRun("t2i", COUNT, MemoryEstimate(1, 2, 3, 4)).lines()
    assert any("without activations and logits" in line for line in lines)
    assert DryRun("t2i", COUNT).as_dict()["memory_bytes"] is None
    assert math.isfinite(Count(0, 0, 0).share)

"""Every method name builds, attaches and learns; what cannot be is refused in a line."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import AdaLoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from moslora_core import UserError
from moslora_core.methods import KAIMING_SCALE, METHODS, AdapterConfig, MethodConfig, attach, peft_config

HIDDEN, INTERMEDIATE, KV, LAYERS, R = 16, 24, 8, 2, 4
TRAINED = [name for name in METHODS if name != "base"]
ADAPTER = AdapterConfig(r=R, lora_alpha=8, lora_dropout=0.0)
# (in, out) of the adapted modules of one layer: q, k, v, up, down.
SHAPES = [(HIDDEN, HIDDEN), (HIDDEN, KV), (HIDDEN, KV), (HIDDEN, INTERMEDIATE), (INTERMEDIATE, HIDDEN)]


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.3,
        )
    )


def build(name: str, *, seed: int = 3, adapter: AdapterConfig = ADAPTER) -> PeftModel:
    model = llama()
    method = METHODS[name]
    config = peft_config(method, adapter, seed=seed, total_steps=100)
    assert isinstance(config, PeftConfig)
    torch.manual_seed(seed)
    return attach(model, method, config)


def trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def factors(model: nn.Module, part: str) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if f".{part}." in name}


def test_every_method_is_known_by_its_own_name():
    assert all(method.name == name for name, method in METHODS.items())
    assert {
        "lora", "lora_scaled", "two_subspaces", "moslora", "moslora_frozen", "moslora_folded", "dora", "rslora",
        "pissa", "lora_plus", "adalora", "lokr", "loha", "base",
    } == set(METHODS)  # fmt: skip


@pytest.mark.parametrize(("name", "init"), [("lora", "gaussian"), ("moslora", "gaussian"), ("pissa", "pissa")])
def test_the_adapters_initialisation_is_that_of_methods_without_their_own(name, init):
    adapter = replace(ADAPTER, init_lora_weights="gaussian")
    assert peft_config(METHODS[name], adapter, seed=0, total_steps=100).init_lora_weights == init


def test_a_gaussian_start_of_a_has_a_standard_deviation_of_one_over_the_rank():
    drawn = factors(build("moslora", adapter=replace(ADAPTER, init_lora_weights="gaussian")), "lora_A")
    values = torch.cat([tensor.flatten() for tensor in drawn.values()])
    assert values.numel() > 500 and values.std().item() == pytest.approx(1 / R, rel=0.1)
    assert values.abs().max() > 2 / R, "a uniform distribution would end before"


@pytest.mark.parametrize("name", TRAINED)
def test_a_method_starts_at_the_base_and_learns(name):
    tokens = torch.randint(0, 32, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        base = llama()(tokens).logits
    model = build(name)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, base, atol=1e-4, rtol=1e-4)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    first = model(tokens, labels=tokens).loss
    first.backward()
    optimizer.step()
    after = model(tokens, labels=tokens).loss
    assert after < first
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


_LORA = LAYERS * sum(R * (i + o) for i, o in SHAPES)
_MIXERS = LAYERS * len(SHAPES) * R * R
_ADALORA_R = 6  # 1.5 r


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("lora", _LORA),
        ("lora_scaled", _LORA),
        ("two_subspaces", _LORA),
        ("moslora", _LORA + _MIXERS),
        ("moslora_frozen", _LORA),
        ("moslora_folded", _LORA),
        ("dora", _LORA + LAYERS * sum(o for _, o in SHAPES)),  # a magnitude an output
        ("rslora", _LORA),
        ("pissa", _LORA),
        ("lora_plus", _LORA),
        ("adalora", LAYERS * sum(_ADALORA_R * (i + o) + _ADALORA_R for i, o in SHAPES)),  # and singular values
        ("loha", 2 * _LORA),
    ],
)
def test_trainable_parameters_follow_from_the_shapes(name, count):
    assert trainable(build(name)) == count


def test_methods_of_a_seed_start_from_the_same_a():
    lora, moslora, frozen = (factors(build(name), "lora_A") for name in ("lora", "moslora", "moslora_frozen"))
    assert len(lora) == LAYERS * len(SHAPES) and lora.keys() == moslora.keys() == frozen.keys()
    for name, a in lora.items():
        assert torch.equal(a, moslora[name]) and torch.equal(a, frozen[name])
    other = factors(build("lora", seed=4), "lora_A")
    assert not any(torch.equal(a, other[name]) for name, a in lora.items())


def test_folding_starts_from_the_mixed_a():
    """A0' = M0 A0 with the A of lora and the mixer of moslora at the same seed."""
    a, folded = factors(build("lora"), "lora_A"), factors(build("moslora_folded"), "lora_A")
    mixers = {
        name.removesuffix(".mixer").replace(".lora_B.", ".lora_A."): p.detach()
        for name, p in build("moslora").named_parameters()
        if name.endswith(".mixer")
    }
    assert len(mixers) == len(a)
    for name, mixer in mixers.items():
        key = name if name in a else f"{name}.weight"
        torch.testing.assert_close(folded[key], mixer @ a[key])


def scaling(model: nn.Module) -> set[float]:
    return {module.scaling["default"] for module in model.modules() if isinstance(module, LoraLayer)}


def test_scalings():
    assert scaling(build("lora")) == {8 / R}
    assert scaling(build("moslora")) == {8 / R}
    assert scaling(build("lora_scaled")) == {8 * KAIMING_SCALE / R}
    assert scaling(build("rslora")) == {8 / R**0.5}


def test_rank_and_alpha_patterns_reach_the_adapter():
    adapter = replace(ADAPTER, target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 2})
    adapter = replace(adapter, alpha_pattern={"up_proj": 6})
    model = build("moslora", adapter=adapter)
    ranks = {a.shape[0] for name, a in factors(model, "lora_A").items() if "up_proj" in name}
    assert ranks == {2}
    assert trainable(model) == LAYERS * (R * 2 * HIDDEN + R * R + 2 * (HIDDEN + INTERMEDIATE) + 2 * 2)
    assert scaling(model) == {8 / R, 6 / 2}


def test_alpha_scale_is_a_factor_on_every_alpha():
    adapter = replace(ADAPTER, alpha_pattern={"up_proj": 6}, rank_pattern={"up_proj": 2})
    assert scaling(build("lora", adapter=adapter)) == {8 / R, 6 / 2}
    assert scaling(build("lora_scaled", adapter=adapter)) == {8 * KAIMING_SCALE / R, 6 * KAIMING_SCALE / 2}
    for name in ("loha", "lokr"):
        config = peft_config(replace(METHODS[name], alpha_scale=0.5), adapter, seed=0, total_steps=100)
        assert (config.alpha, config.alpha_pattern) == (4, {"up_proj": 3})


def mixed_modules(model: nn.Module) -> set[str]:
    """Names of the adapted modules that have a mixer, without their layers' prefix."""
    state = model.state_dict()
    return {name.split(".")[-4] for name in state if name.endswith(".mixer")}


@pytest.mark.parametrize(
    ("name", "pattern", "mixed"),
    [
        ("moslora", {"up_proj|down_proj": "identity"}, {"q_proj", "k_proj", "v_proj"}),
        ("moslora_frozen", {r".*self_attn\..*": "identity"}, {"up_proj", "down_proj"}),
        ("two_subspaces", {"q_proj": "identity"}, {"k_proj", "v_proj", "up_proj", "down_proj"}),
        ("lora", {"q_proj": "learned"}, set()),
        ("dora", {"q_proj": "learned"}, set()),
    ],
)
def test_a_mixer_pattern_reaches_methods_that_have_a_mixer(name, pattern, mixed):
    model = build(name, adapter=replace(ADAPTER, mixer_pattern=pattern))
    assert mixed_modules(model) == mixed
    mixers = LAYERS * len(mixed) * R * R if name == "moslora" else 0
    assert trainable(model) == _LORA + mixers + (LAYERS * sum(o for _, o in SHAPES) if name == "dora" else 0)


def test_the_folded_start_follows_the_mixer_pattern():
    adapter = replace(ADAPTER, mixer_pattern={"q_proj": "identity"})
    lora, folded = (factors(build(name, adapter=adapter), "lora_A") for name in ("lora", "moslora_folded"))
    assert {name for name, a in lora.items() if torch.equal(a, folded[name])} == {n for n in lora if ".q_proj." in n}


@pytest.mark.parametrize("name", TRAINED)
def test_one_setting_of_the_adapter_serves_every_method(name):
    """Some modules left out, one trained whole, the mixer in some: nothing of it may stop a sweep over methods."""
    adapter = replace(
        ADAPTER,
        target_modules=[r".*_proj"],
        exclude_modules=["o_proj", "gate_proj", "0.self_attn.q_proj"],
        modules_to_save=["lm_head"],
        mixer_pattern={"v_proj": "identity"},
    )
    model = build(name, adapter=adapter)
    layers = {module for module, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
    assert {layer.split(".layers.")[1] for layer in layers} == {
        f"{i}.{module}"
        for i in range(LAYERS)
        for module in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
    } - {"0.self_attn.q_proj"}
    head = model.base_model.model.lm_head
    tokens = torch.randint(0, 32, (2, 12), generator=torch.Generator().manual_seed(1))
    before = head.weight.detach().clone()
    assert head.weight.requires_grad
    model(tokens, labels=tokens).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    assert not torch.equal(head.weight, before) and torch.equal(head.original_module.weight, before)
    saved = get_peft_model_state_dict(model)
    assert torch.equal(saved["base_model.model.lm_head.weight"], head.weight)


def test_one_regular_expression_excludes_as_a_pattern():
    adapter = replace(ADAPTER, exclude_modules=[r".*\.layers\.0\..*"])
    assert all(".layers.1." in name for name in factors(build("moslora", adapter=adapter), "lora_A"))


def test_one_regular_expression_is_one_pattern():
    adapter = replace(ADAPTER, target_modules=[r".*\.layers\.1\.self_attn\.(q|k)_proj"])
    names = factors(build("lora", adapter=adapter), "lora_A")
    assert len(names) == 2 and all(".layers.1." in name for name in names)
    everything = factors(build("lora", adapter=replace(ADAPTER, target_modules=["all-linear"])), "lora_A")
    assert len(everything) == LAYERS * 7


def test_adalora_spends_its_budget_within_the_training():
    config = peft_config(METHODS["adalora"], ADAPTER, seed=0, total_steps=200)
    assert isinstance(config, AdaLoraConfig)
    assert (config.init_r, config.target_r) == (6, R)
    assert 0 < config.tinit < config.total_step - config.tfinal < config.total_step == 200


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("method", "adapter", "expected"),
    [
        ("base", {}, "method=base is the untrained model"),
        ("lora", {"r": 0}, "adapter.r must be a positive rank, found 0"),
        ("lora", {"lora_alpha": 0}, "adapter.lora_alpha must be positive, found 0"),
        ("lora", {"lora_dropout": 1.0}, "adapter.lora_dropout must be in [0, 1), found 1.0"),
        ("lora", {"lora_dropout": -0.1}, "adapter.lora_dropout must be in [0, 1), found -0.1"),
        ("lora", {"target_modules": []}, "adapter.target_modules is empty"),
        ("two_subspaces", {"r": 3}, "must be even, found 3"),
        ("two_subspaces", {"rank_pattern": {"q_proj": 5}}, "rank_pattern['q_proj'] must be even, found 5"),
        (MethodConfig("mine", tuner="loha", mixer="learned"), {}, "method.mixer=learned is a setting of LoRA"),
        (MethodConfig("mine", tuner="adalora", use_dora=True), {}, "method.use_dora=True is a setting of LoRA"),
        (MethodConfig("mine", tuner="lorax"), {}, "method.tuner must be one of lora, adalora, lokr, loha"),
        (MethodConfig("mine", mixer="stirred"), {}, "mixer='stirred' is unknown"),
        (MethodConfig("mine", mixer="learned", mixer_init="ones"), {}, "mixer_init='ones' is unknown"),
        (MethodConfig("mine", init_lora_weights="xavier"), {}, "xavier"),
        (MethodConfig("mine", mixer="learned", init_lora_weights="pissa"), {}, "pissa"),
        (MethodConfig("mine", fold_into_init=True), {}, "fold_into_init"),
        ("adalora", {"rank_pattern": {"q_proj": 2}}, "adapter.rank_pattern"),
        ("lora", {"target_modules": ["no_such_proj"]}, "no_such_proj"),
        ("loha", {"target_modules": ["no_such_proj"]}, "no_such_proj"),
        ("lora", {"target_modules": ["(q|k"]}, "'(q|k' is no regular expression"),
        ("lora", {"exclude_modules": ["(q|k"]}, "adapter.exclude_modules: '(q|k' is no regular expression"),
        ("lora", {"exclude_modules": [".*"]}, "All modules were excluded"),
        ("lora", {"modules_to_save": ["lm_head", "projector"]}, "the model has no module 'projector'"),
        ("lokr", {"modules_to_save": ["projector"]}, "the model has no module 'projector'"),
        ("lora", {"alpha_pattern": {"q_proj": 0}}, "adapter.alpha_pattern['q_proj'] must be positive, found 0"),
        ("moslora", {"mixer_pattern": {"q_proj": "stirred"}}, "mixer_pattern['q_proj']='stirred' is unknown"),
        ("moslora", {"mixer_pattern": {"q_proj": "two_subspaces"}, "r": 3}, "r must be even, found 3"),
    ],
    ids=str,
)
def test_the_impossible_is_refused_in_a_line(method, adapter, expected):
    method = METHODS[method] if isinstance(method, str) else method
    with pytest.raises(UserError) as caught:
        attach(llama(), method, peft_config(method, replace(ADAPTER, **adapter), seed=0, total_steps=100))
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_adalora_needs_steps_for_its_schedule():
    with pytest.raises(UserError, match="at least 10 optimiser steps for its budget schedule, found 9"):
        peft_config(METHODS["adalora"], ADAPTER, seed=0, total_steps=9)

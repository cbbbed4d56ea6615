"""The adapter against MoSLoRA in plain torch, and against what the paper and its proof claim."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from moslora_core import MoSLoraConfig
from moslora_core.fused import keep_mask

from .kinds import (
    ATTENTION,
    CONV1D,
    CONV1D_GPT2,
    CONV2D,
    EMBEDDING,
    GROUPED2D,
    KINDS,
    LINEAR,
    LLAMA,
    MIXERS,
    SINGLE,
    factors,
    lora_layers,
    scramble,
    train,
)
from .reference import adapted

WITH_MIXER = {name: mixer for name, mixer in MIXERS.items() if name != "lora"}


def only_layer(model: nn.Module):
    (layer,) = lora_layers(model).values()
    return layer


# ------------------------------------------------------------------------------------------------------- reference


@pytest.mark.parametrize("mixer", WITH_MIXER.values(), ids=WITH_MIXER)
@pytest.mark.parametrize("kind", SINGLE, ids=str)
def test_forward_and_gradients_are_those_of_the_reference(kind, mixer):
    model = scramble(kind.model(**mixer).double())
    layer, x = only_layer(model), kind.batch()
    x = x.double() if x.is_floating_point() else x
    A, M, B = factors(layer)
    reference = [tensor.detach().clone().requires_grad_() for tensor in (A, M, B)]

    y = layer(x)
    expected = adapted(copy.deepcopy(layer.base_layer), x, *reference, scaling=8 / 4)
    assert torch.allclose(y, expected, rtol=1e-10, atol=1e-12)

    direction = torch.randn(y.shape, dtype=torch.float64)
    (y * direction).sum().backward()
    (expected * direction).sum().backward()
    for name, found, wanted in zip("AMB", (A, M, B), reference, strict=True):
        if name == "M" and mixer["mixer"] != "learned":
            assert found.grad is None
        else:
            assert torch.allclose(found.grad, wanted.grad, rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("settings, scaling", [({}, 8 / 4), ({"use_rslora": True}, 8 / math.sqrt(4))])
def test_scaling(settings, scaling):
    model = scramble(LINEAR.model(**settings))
    layer, x = only_layer(model), LINEAR.batch()
    A, M, B = factors(layer)
    assert torch.allclose(layer(x), layer.base_layer(x) + scaling * x @ (B @ M @ A).T, atol=1e-6)
    assert torch.allclose(layer.get_delta_weight("default"), scaling * B @ M @ A, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    r=st.integers(1, 6),
    alpha=st.integers(1, 64),
    sizes=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    init=st.sampled_from(["kaiming_uniform", "orthogonal", "gaussian", "identity"]),
    mixer=st.sampled_from(["learned", "frozen"]),
    seed=st.integers(0, 2**31),
)
def test_update_is_scaling_b_m_a_at_any_size(r, alpha, sizes, init, mixer, seed):
    torch.manual_seed(seed)
    base = nn.Sequential(nn.Linear(*sizes)).double()
    config = MoSLoraConfig(
        r=r, lora_alpha=alpha, target_modules=["0"], init_lora_weights=False, mixer=mixer, mixer_init=init
    )
    layer = only_layer(get_peft_model(base, config))
    A = layer.lora_A["default"].weight
    B = layer.lora_B["default"]
    if config.has_mixer:
        assert torch.allclose(layer.get_delta_weight("default"), alpha / r * B.raw @ B.mixer @ A, rtol=1e-9)
    else:
        assert torch.equal(layer.get_delta_weight("default"), (B.weight @ A) * (alpha / r))


def test_dropout_is_on_the_input_of_a():
    model = scramble(LINEAR.model(lora_dropout=0.5)).train()
    layer, x = only_layer(model), LINEAR.batch()
    torch.manual_seed(0)
    y = layer(x)
    torch.manual_seed(0)
    mask, kept = keep_mask(x, 0.5)
    dropped = x * mask / kept
    A, M, B = factors(layer)
    assert not torch.equal(dropped, x)
    assert torch.allclose(y, layer.base_layer(x) + 2 * dropped @ A.T @ M.T @ B.T, atol=1e-6)


def test_attention_is_plain_lora_with_folded_factors():
    """Input and output projection both: PEFT's layer for attention, with B @ M in the place of B."""
    model, x = scramble(ATTENTION.model()), ATTENTION.batch()
    lora = ATTENTION.model(mixer="identity")
    assert len(lora_layers(model)) == 2
    for name, layer in lora_layers(lora).items():
        A, M, B = factors(lora_layers(model)[name])
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(A)
            layer.lora_B["default"].weight.copy_(B @ M)
    assert torch.equal(model(x), lora(x))
    train(model, x, steps=1)
    mixers = [factors(layer)[1] for layer in lora_layers(model).values()]
    assert all(torch.count_nonzero(M.grad) > 0 for M in mixers)


# --------------------------------------------------------------------------------------------------- the mixer's draw


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key.replace(".raw", ".weight"): value for key, value in model.state_dict().items()}


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_with_a_mixer_seed_a_and_b_are_those_of_lora(kind):
    base = kind.base()
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": kind.targets} | kind.settings
    lora = get_peft_model(base, LoraConfig(**settings))
    after_lora = torch.get_rng_state()
    model = kind.model(mixer_seed=0)
    assert torch.equal(torch.get_rng_state(), after_lora)
    mixed = state(model)
    for key, value in lora.state_dict().items():
        assert torch.equal(mixed[key], value), key


@pytest.mark.parametrize("kind", [LINEAR, LLAMA, ATTENTION, EMBEDDING], ids=str)
def test_mixer_seed_gives_each_module_its_own_mixer_whatever_the_others(kind):
    def mixers(**settings):
        return {name: factors(layer)[1] for name, layer in lora_layers(kind.model(**settings)).items()}

    first, second, other = mixers(mixer_seed=3), mixers(mixer_seed=3, seed=8), mixers(mixer_seed=4)
    for name, M in first.items():
        assert torch.equal(M, second[name])
        assert not torch.equal(M, other[name])
    draws = list(first.values())
    assert not any(torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])
    if kind is LLAMA:
        fewer = lora_layers(kind.model(mixer_seed=3, target_modules=["v_proj"]))
        for name, layer in fewer.items():
            assert torch.equal(factors(layer)[1], first[name])


def test_without_a_mixer_seed_the_global_generator_decides():
    torch.manual_seed(0)
    first = factors(only_layer(LINEAR.model()))[1]
    assert torch.equal(first, factors(only_layer(LINEAR.model()))[1])
    assert not torch.equal(first, factors(only_layer(LINEAR.model(seed=1)))[1])


def test_mixer_has_the_rank_of_its_module():
    model = LLAMA.model(rank_pattern={"q_proj": 2, "embed_tokens": 6}, alpha_pattern={"q_proj": 3})
    for name, layer in lora_layers(model).items():
        rank = 2 if "q_proj" in name else 6 if "embed_tokens" in name else 4
        A, M, B = factors(layer)
        assert (A.shape[0], B.shape[1], tuple(M.shape)) == (rank, rank, (rank, rank))
        assert layer.scaling["default"] == (3 / 2 if "q_proj" in name else 8 / rank)


# ---------------------------------------------------------------------------------------------------------- identity


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("mixer", [{"mixer": "identity"}, {"mixer": "frozen", "mixer_init": "identity"}])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_identity_is_lora_bit_for_bit(kind, mixer, optimizer):
    base, x = kind.base(), kind.batch()
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": kind.targets} | kind.settings
    lora = get_peft_model(base, LoraConfig(**settings)).eval()
    model = kind.model(**mixer)
    assert torch.equal(model(x), lora(x))
    train(lora, x, optimizer=optimizer)
    train(model, x, optimizer=optimizer)
    assert torch.equal(model(x), lora(x))
    found, wanted = model.state_dict(), lora.state_dict()
    assert list(found) == list(wanted)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert [type(layer) for layer in lora_layers(model).values()] == [
        type(layer) for layer in lora_layers(lora).values()
    ]


def test_a_learned_identity_starts_as_lora_and_leaves_it():
    x = LINEAR.batch()
    lora, model = LINEAR.model(mixer="identity"), LINEAR.model(mixer_init="identity")
    assert torch.equal(model(x), lora(x))
    train(lora, x, steps=1)
    train(model, x, steps=1)
    assert torch.allclose(model(x), lora(x))
    train(lora, x, steps=3)
    train(model, x, steps=3)
    assert not torch.allclose(model(x), lora(x), rtol=1e-3)


# -------------------------------------------------------------------------------------------------------- the proof

# The proof in the authors' repository, sections A.1 to A.5: MoSLoRA against LoRA that starts from A0 := M0 A0.


def paired(mixer: dict, optimizer, steps: int, lr: float = 0.05):
    """Outputs of MoSLoRA and of its folded start, after each step of the same training, in float64."""
    x = LINEAR.batch().double()
    mixed = LINEAR.model(**mixer).double()
    folded = LINEAR.model(mixer="identity").double()
    A, M, _ = factors(only_layer(mixed))
    with torch.no_grad():
        only_layer(folded).lora_A["default"].weight.copy_(M @ A)
    outputs = [(mixed(x), folded(x))]
    for _ in range(steps):
        train(mixed, x, steps=1, lr=lr, optimizer=optimizer)
        train(folded, x, steps=1, lr=lr, optimizer=optimizer)
        outputs.append((mixed(x), folded(x)))
    return [(a - b).abs().max().item() for a, b in outputs], [
        (a - outputs[0][0]).abs().max().item() for a, _ in outputs
    ]


def test_under_sgd_a_frozen_orthogonal_mixer_is_a_rotation_of_a():
    gaps, moved = paired({"mixer": "frozen", "mixer_init": "orthogonal"}, torch.optim.SGD, steps=10)
    assert moved[-1] > 0.1
    # M is orthogonal to float32 precision, in which it is drawn.
    assert max(gaps) < 1e-6 * moved[-1]


def test_under_adamw_it_is_not():
    gaps, moved = paired({"mixer": "frozen", "mixer_init": "orthogonal"}, torch.optim.AdamW, steps=10)
    assert gaps[0] == 0
    assert gaps[-1] > 1e-3 * moved[-1]


@pytest.mark.parametrize("init", ["orthogonal", "kaiming_uniform", "gaussian"])
def test_a_learned_mixer_departs_from_its_folded_start_at_the_second_step(init):
    gaps, moved = paired({"mixer": "learned", "mixer_init": init}, torch.optim.SGD, steps=2)
    # B = 0 at first, so that the first step moves B alone, and alike.
    assert gaps[0] == 0
    assert gaps[1] < 1e-12
    assert gaps[2] > 1e-5 * moved[2]


def test_a_frozen_kaiming_mixer_is_no_rotation():
    gaps, moved = paired({"mixer": "frozen"}, torch.optim.SGD, steps=3)
    assert gaps[1] < 1e-12
    assert gaps[-1] > 1e-3 * moved[-1]


@pytest.mark.parametrize("kind", [LINEAR, CONV1D_GPT2, CONV1D, CONV2D, GROUPED2D, EMBEDDING, ATTENTION], ids=str)
def test_a_zero_mixer_never_learns(kind):
    model, x = kind.model(mixer_init="zero"), kind.batch()
    base = model(x)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train(model, x, steps=3)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.count_nonzero(parameter.grad) == 0, name
            assert torch.equal(parameter, before[name]), name
    assert torch.equal(model(x), base)


def test_two_subspaces_give_paired_ranks_the_same_gradient():
    model, x = scramble(LINEAR.model(mixer="two_subspaces")), LINEAR.batch()
    train(model, x, steps=1)
    A, _, B = factors(only_layer(model))
    assert torch.equal(A.grad[:2], A.grad[2:])
    assert torch.allclose(B.grad[:, :2], B.grad[:, 2:])


def test_parameter_count_grows_by_r_squared_a_module():
    def count(model):
        return model.get_nb_trainable_parameters()[0]

    for kind, modules in [(LINEAR, 1), (ATTENTION, 2), (LLAMA, 7)]:
        lora = count(kind.model(mixer="identity"))
        assert count(kind.model()) == lora + 16 * modules
        assert count(kind.model(mixer="frozen")) == lora


def test_the_default_is_moslora():
    config = MoSLoraConfig()
    assert (config.mixer, config.mixer_init, config.mixer_seed) == ("learned", "kaiming_uniform", None)

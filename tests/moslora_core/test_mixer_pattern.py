"""Mixers in some modules: a model of two towers, as LLaVA is, with mixers in one of them."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn

from moslora_core import MoSLoraConfig, UserError
from moslora_core.count import count_parameters
from moslora_core.fold import fold_to_lora
from moslora_core.layers import MixedEmbedding
from moslora_core.subspaces import adapter_factors

from .kinds import ATTENTION, factors, lora_layers, scramble, tiny_llama, train
from .reference import adapted

R = 4
TARGETS = ["patches", "embed", "q", "v"]
IN_LLM = ["llm.embed", "llm.q", "llm.v"]
IN_VISION = ["vision.patches", "vision.q", "vision.v"]
# The same model said twice: mixers but for the vision tower, and no mixers but for the language model.
SETTINGS = {
    "all_but_vision": {"mixer": "learned", "mixer_pattern": {r"vision\..*": "identity"}},
    "only_llm": {"mixer": "identity", "mixer_pattern": {r"llm\..*": "learned"}},
    "frozen": {"mixer": "frozen", "mixer_init": "orthogonal", "mixer_pattern": {r"vision\..*": "identity"}},
    "two_subspaces": {"mixer": "identity", "mixer_pattern": {"llm.*": "two_subspaces"}},
}
every_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


class Vision(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 2, stride=2)
        self.q = nn.Linear(8, 8)
        self.v = nn.Linear(8, 6)

    def forward(self, pixels):
        # Contiguous, or torch's kernel, and with it the last bit, depends on whether the weight requires gradients.
        return self.v(torch.tanh(self.q(self.patches(pixels).flatten(2).transpose(1, 2).contiguous())))


class Llm(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 6)
        self.q = nn.Linear(6, 7)
        self.v = nn.Linear(7, 5)

    def forward(self, ids, image):
        return self.v(torch.tanh(self.q(torch.cat([image, self.embed(ids)], 1))))


class Towers(nn.Module):
    """Vision tower, projector and language model; targets of both towers have the same names."""

    def __init__(self):
        super().__init__()
        self.vision = Vision()
        self.projector = nn.Linear(6, 6)
        self.llm = Llm()

    def forward(self, pixels):
        ids = torch.arange(len(pixels) * 3).view(len(pixels), 3) % 12
        return self.llm(ids, self.projector(self.vision(pixels)))


def base() -> Towers:
    torch.manual_seed(0)
    return Towers().eval()


def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(9))


def config(kind: type[LoraConfig] = MoSLoraConfig, **settings) -> LoraConfig:
    return kind(**{"r": R, "lora_alpha": 8, "target_modules": TARGETS} | settings)


def towers(kind: type[LoraConfig] = MoSLoraConfig, **settings) -> PeftModel:
    net = base()
    torch.manual_seed(1)
    return get_peft_model(net, config(kind, **settings)).eval()


def inner(model: PeftModel) -> Towers:
    return model.base_model.model


def mixed(model: nn.Module) -> list[str]:
    """Names of the modules that store a mixer."""
    return sorted(
        name.removeprefix("base_model.model.")
        for name, layer in lora_layers(model).items()
        if any("mixer" in key for key in layer.state_dict())
    )


def plain_factors(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


# ------------------------------------------------------------------------------------------------------- reference


@every_setting
def test_the_towers_compute_what_plain_torch_does(settings):
    model = scramble(towers(**settings).double())
    net, x = inner(model), pixels().double()
    assert mixed(model) == IN_LLM
    reference = {}
    for name, layer in lora_layers(net).items():
        A, M, B = factors(layer) if name in IN_LLM else (plain_factors(layer)[0], None, plain_factors(layer)[1])
        identity = torch.eye(R, dtype=torch.float64)
        leaves = [identity if t is None else t.detach().clone() for t in (A, M, B)]
        reference[name] = [leaf.requires_grad_() for leaf in leaves]

    def layer(name, x):
        return adapted(copy.deepcopy(net.get_submodule(name).base_layer), x, *reference[name], scaling=8 / R)

    y = model(x)
    image = layer("vision.patches", x).flatten(2).transpose(1, 2)
    image = net.projector(layer("vision.v", torch.tanh(layer("vision.q", image))))
    ids = torch.arange(6).view(2, 3)
    hidden = torch.cat([image, layer("llm.embed", ids)], 1)
    expected = layer("llm.v", torch.tanh(layer("llm.q", hidden)))
    assert torch.allclose(y, expected, rtol=1e-9, atol=1e-11)

    direction = torch.randn(y.shape, dtype=torch.float64)
    (y * direction).sum().backward()
    (expected * direction).sum().backward()
    for name, module in lora_layers(net).items():
        A, M, B = reference[name]
        if name in IN_LLM:
            found = factors(module)
            trained = "learned" in (settings["mixer"], *settings["mixer_pattern"].values())
            assert torch.allclose(found[1].grad, M.grad, rtol=1e-8) if trained else found[1].grad is None
            found = found[0], found[2]
        else:
            found = plain_factors(module)
        for tensor, leaf in zip(found, (A, B), strict=True):
            assert torch.allclose(tensor.grad, leaf.grad, rtol=1e-8, atol=1e-11), name


def test_what_is_said_twice_is_one_model():
    first, second = (towers(mixer_seed=3, **SETTINGS[name]) for name in ("all_but_vision", "only_llm"))
    left, right = first.state_dict(), second.state_dict()
    assert list(left) == list(right) and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@every_setting
def test_modules_without_a_mixer_are_pefts_bit_for_bit(settings, optimizer):
    model, lora, x = towers(mixer_seed=0, **settings), towers(LoraConfig), pixels()
    for name, layer in lora_layers(inner(lora).vision).items():
        ours = inner(model).vision.get_submodule(name)
        assert type(ours) is type(layer)
        left, right = ours.state_dict(), layer.state_dict()
        assert list(left) == list(right) and all(torch.equal(left[key], right[key]) for key in left)
    train(inner(model).vision, x, optimizer=optimizer)
    train(inner(lora).vision, x, optimizer=optimizer)
    assert torch.equal(inner(model).vision(x), inner(lora).vision(x))
    assert not torch.equal(inner(lora).vision(x), base().vision(x))
    # A of the other tower starts alike too, whatever the mixers.
    for name in ("q", "v"):
        A = inner(model).llm.get_submodule(name).lora_A["default"].weight
        assert torch.equal(A, inner(lora).llm.get_submodule(name).lora_A["default"].weight)


def test_each_module_follows_its_own_mixer():
    """Three kinds in one model: trained, fixed and none."""
    pattern = {r"llm\.q": "two_subspaces", "v": "identity", "embed": "frozen"}
    model = towers(mixer_init="orthogonal", mixer_pattern=pattern)
    assert mixed(model) == ["llm.embed", "llm.q", "vision.patches", "vision.q"]
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "mixer" in name}
    assert {name.split(".lora_")[0].removeprefix("base_model.model.") for name in trained} == {
        "vision.patches",
        "vision.q",
    }
    net = inner(model)
    assert torch.equal(factors(net.llm.q)[1], torch.eye(2).repeat(2, 2))
    M = factors(net.vision.q)[1].detach()
    assert torch.allclose(M @ M.T, torch.eye(R), atol=1e-5)


def test_attention_follows_as_a_whole():
    """The output projection, a layer of its own inside, has the mixer of the layer that the pattern names."""
    for pattern, default, has in (("layer", "learned", False), ("layer", "identity", True)):
        model = ATTENTION.model(
            mixer=default, mixer_pattern={pattern: "identity" if default == "learned" else "frozen"}
        )
        assert [any("mixer" in key for key in layer.state_dict()) for layer in lora_layers(model).values()] == [
            has
        ] * 2


# ---------------------------------------------------------------------------------------------- what PEFT does with it


@torch.no_grad()
@every_setting
def test_a_saved_adapter_loads_with_the_same_outputs(settings, tmp_path):
    model, x = scramble(towers(modules_to_save=["projector"], **settings)), pixels()
    inner(model).projector.weight.mul_(1.5)
    expected = model(x)
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(base(), str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage)
        assert mixed(loaded) == IN_LLM
        assert loaded.peft_config["default"].mixer_pattern == settings["mixer_pattern"]
        assert torch.equal(loaded(x), expected)


@torch.no_grad()
@every_setting
def test_merging_disabling_and_unloading(settings):
    model, x = scramble(towers(**settings)), pixels()
    expected, plain = model(x), base()(x)
    assert not torch.allclose(expected, plain, atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(model(x), plain)
    assert torch.allclose(copy.deepcopy(model).merge_and_unload()(x), expected, atol=1e-4)
    assert torch.equal(model.unload()(x), plain)


@pytest.mark.parametrize("first", ["all_but_vision", "only_llm"])
@pytest.mark.parametrize("combination", ["cat", "linear", "svd"])
def test_combinations_are_those_of_the_folded_adapters(combination, first):
    """Two adapters with mixers in opposite towers, and their plain twins."""
    model = towers(**SETTINGS[first])
    model.add_adapter("other", config(mixer_pattern={r"llm\..*": "identity"}))
    scramble(model)
    twin = None
    for name in ("default", "other"):
        plain, tensors = fold_to_lora(model, name)
        if twin is None:
            twin = get_peft_model(base(), plain, name)
        else:
            twin.add_adapter(name, plain)
        twin.load_state_dict(
            {key: tensors[short] for key in twin.state_dict() if (short := key.replace(f".{name}", "")) in tensors},
            strict=False,
        )
    x, found = pixels(), []
    for each in (model, twin.eval()):
        torch.manual_seed(4)
        each.add_weighted_adapter(["default", "other"], [0.7, 0.4], "sum", combination_type=combination)
        each.set_adapter("sum")
        found.append(each(x))
    assert torch.allclose(*found, atol=1e-4)
    assert not torch.allclose(found[0], base()(x), atol=1e-2)
    assert not model.peft_config["sum"].has_mixer
    assert model.peft_config["default"].mixer_pattern == SETTINGS[first]["mixer_pattern"]


def test_adapters_with_other_patterns_share_a_model():
    """An embedding with a mixer for one adapter is plain LoRA for the other, and each computes as it would alone."""
    first, second = SETTINGS["all_but_vision"], {"mixer_pattern": {"embed|q": "identity"}}
    model, x = towers(**first), pixels()
    model.add_adapter("other", config(**second))
    scramble(model, seed=5, adapter="default")
    scramble(model, seed=6, adapter="other")
    assert isinstance(inner(model).llm.embed, MixedEmbedding)
    alone = [scramble(towers(**settings), seed=seed)(x) for settings, seed in ((first, 5), (second, 6))]
    for name, expected in zip(("default", "other"), alone, strict=True):
        model.set_adapter(name)
        assert torch.allclose(model(x), expected, atol=1e-6)
    batch = model(x, adapter_names=["default", "other"])
    assert torch.allclose(batch, torch.stack([alone[0][0], alone[1][1]]), atol=1e-6)


def test_folding_leaves_plain_modules_as_they_are():
    model = scramble(towers(**SETTINGS["all_but_vision"]))
    stored, (_, folded) = get_peft_model_state_dict(model), fold_to_lora(model)
    plain = [key for key in stored if key.startswith("base_model.model.vision.")]
    assert len(plain) == 2 * len(IN_VISION)
    assert all(torch.equal(folded[key], stored[key]) for key in plain)


@every_setting
def test_counts_follow_the_pattern(settings):
    mixers = len(IN_LLM) * R * R
    plain, count = count_parameters(Towers, config(LoraConfig)), count_parameters(Towers, config(**settings))
    assert (count.modules, count.mixer, count.adapter) == (plain.modules, mixers, plain.adapter + mixers)
    trained = "learned" in (settings["mixer"], *settings["mixer_pattern"].values())
    assert count.trainable == plain.trainable + trained * mixers
    assert count.trainable == towers(**settings).get_nb_trainable_parameters()[0]


def test_subspaces_read_plain_modules_as_the_identity(tmp_path):
    model = scramble(towers(**SETTINGS["only_llm"]))
    model.save_pretrained(tmp_path)
    for found in (adapter_factors(model), adapter_factors(tmp_path)):
        assert sorted(found) == sorted(IN_LLM + IN_VISION)
        identity = torch.eye(R, dtype=torch.float64)
        assert {name for name, each in found.items() if torch.equal(each.M, identity)} == set(IN_VISION)
        layer = inner(model).vision.q
        assert torch.allclose(found["vision.q"].delta().float(), layer.get_delta_weight("default"), atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- refusals


def test_a_key_that_matches_nothing_is_told(caplog):
    with caplog.at_level(logging.WARNING, logger="moslora_core"):
        towers(mixer_pattern={"vision.*": "identity"})
        assert not caplog.records
        towers(mixer_pattern={"vision.*": "identity", "vison_tower.*": "identity"})
    assert [record.getMessage() for record in caplog.records] == [
        "mixer_pattern['vison_tower.*'] matches no adapted module and has no effect"
    ]


def test_an_odd_rank_is_refused_where_it_meets_two_subspaces():
    settings = {"rank_pattern": {"vision.*": 3}, "mixer_pattern": {"q": "two_subspaces"}}
    with pytest.raises(UserError, match=r"vision\.q: mixer='two_subspaces' .* the rank must be even, found 3"):
        towers(**settings)
    with pytest.raises(UserError, match=r"vision\.q: mixer='two_subspaces'"):
        count_parameters(Towers, config(**settings))  # on the meta device, where no mixer is drawn
    model = towers(rank_pattern={"vision.*": 3}, mixer_pattern={r"llm\.q": "two_subspaces"})
    assert tuple(factors(inner(model).vision.q)[1].shape) == (3, 3)


def test_layers_that_take_no_mixer_may_be_adapted_without_one():
    class OwnConv(nn.Conv2d):
        pass

    net = base()
    net.vision.patches = OwnConv(3, 8, 2, stride=2)
    with pytest.raises(UserError, match=r"vision\.patches: a mixer cannot go into .*OwnConv"):
        get_peft_model(copy.deepcopy(net), config())
    assert "vision.patches" not in mixed(get_peft_model(net, config(mixer_pattern={"patches": "identity"})))


@pytest.mark.parametrize("key", ["embed_tokens", "lm_head"])
def test_tied_targets_with_a_mixer_in_one_are_refused(key):
    settings = {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "ensure_weight_tying": True}
    settings |= {"task_type": "CAUSAL_LM"}
    with pytest.raises(UserError, match="lm_head: ensure_weight_tying"):
        get_peft_model(
            tiny_llama(tie_word_embeddings=True), MoSLoraConfig(mixer_pattern={key: "identity"}, **settings)
        )
    pattern = {"embed_tokens|lm_head": "identity"}
    model = get_peft_model(tiny_llama(tie_word_embeddings=True), MoSLoraConfig(mixer_pattern=pattern, **settings))
    assert len(mixed(model)) == 2 and all(name.endswith("q_proj") for name in mixed(model))

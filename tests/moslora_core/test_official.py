"""Adapters in the layouts of the authors' code, against their update computed in plain torch."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from moslora_core import MoSLoraConfig
from moslora_core.errors import UserError
from moslora_core.fold import fold_adapter
from moslora_core.official import convert_official, load_official, main, read_official
from moslora_core.subspaces import adapter_factors

PREFIX = "base_model.model."
R = 4


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(8, 6)
        self.up_proj = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(self.up_proj(torch.tanh(self.q_proj(x))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 3)

    def forward(self, ids):
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden)


IDS = torch.arange(10).view(2, 5) % 7
MODULES = {f"layers.{i}.{name}": shape for i in (0, 1) for name, shape in (("q_proj", (6, 8)), ("up_proj", (8, 6)))}


def base() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def factors(ranks: dict | None = None, dtype: torch.dtype = torch.float32) -> dict[str, tuple[torch.Tensor, ...]]:
    """Module -> lora_A (r, in), lora_AB (r, r), lora_B (out, r)."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return (torch.randn(*shape, generator=generator) * 0.5).to(dtype)

    made = {}
    for name, (out, inp) in MODULES.items():
        r = (ranks or {}).get(name, R)
        made[name] = (draw(r, inp), draw(r, r), draw(out, r))
    return made


def expected_output(made, scaling) -> torch.Tensor:
    """The base with delta = lora_B @ lora_AB @ lora_A * scaling added to its weights: no PEFT, none of our code."""
    net = base()
    with torch.no_grad():
        for name, (A, AB, B) in made.items():
            factor = scaling[name] if isinstance(scaling, dict) else scaling
            net.get_submodule(name).weight += (B.double() @ AB.double() @ A.double() * factor).float()
        return net(IDS)


def keyed(made, style: str) -> dict[str, torch.Tensor]:
    middle = {"stripped": "", "named": ".default"}[style]
    tensors = {}
    for name, parts in made.items():
        for part, tensor in zip(("lora_A", "lora_AB", "lora_B"), parts, strict=True):
            tensors[f"{PREFIX}{name}.{part}{middle}.weight"] = tensor
    return tensors


# What the authors' PEFT 0.3 and PEFT 0.10 copies write, with the fields that matter or that PEFT has dropped since.
COMMONSENSE = {
    "base_model_name_or_path": "meta-llama/Meta-Llama-3-8B",
    "bias": "none",
    "enable_lora": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "lora_alpha": 8,
    "lora_dropout": 0.05,
    "lora_use_mixer": True,
    "merge_weights": False,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": R,
    "target_modules": ["q_proj", "up_proj"],
    "task_type": "CAUSAL_LM",
}
VISUAL = {
    "alpha_pattern": {},
    "auto_mapping": None,
    "base_model_name_or_path": "internlm/internlm2-chat-7b",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_dropout": 0.05,
    "lora_use_mixer": True,
    "lora_use_mixer_pattern": {},
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": R,
    "rank_pattern": {},
    "revision": None,
    "target_modules": ["q_proj", "up_proj"],
    "task_type": "CAUSAL_LM",
    "use_dora": False,
    "use_rslora": False,
}


def write(folder: Path, config: dict, tensors: dict, kind: str = "safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config | {"task_type": None}))
    if kind == "bin":
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors")
    return folder


# ------------------------------------------------------------------------------------------------------------ layouts


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("style", ["stripped", "named"])
@pytest.mark.parametrize("config", [COMMONSENSE, VISUAL], ids=["commonsense", "visual"])
def test_both_layouts_give_the_authors_update(tmp_path, config, style, kind):
    made = factors()
    folder = write(tmp_path / "theirs", config, keyed(made, style), kind)
    expected = expected_output(made, 8 / R)
    assert not torch.allclose(expected, base()(IDS), atol=1e-2)
    model = load_official(base(), folder).eval()
    torch.testing.assert_close(model(IDS), expected, rtol=1e-4, atol=1e-5)

    assert main([str(folder), str(tmp_path / "ours")]) == 0
    reloaded = PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    assert isinstance(reloaded.peft_config["default"], MoSLoraConfig)
    assert torch.equal(reloaded(IDS), model(IDS))
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert written["peft_type"] == "MOSLORA" and written["mixer"] == "learned"
    assert not {"lora_use_mixer", "lora_use_mixer_pattern", "merge_weights", "enable_lora"} & written.keys()
    assert written["base_model_name_or_path"] == config["base_model_name_or_path"]

    fold_adapter(tmp_path / "ours", tmp_path / "folded")
    assert torch.equal(PeftModel.from_pretrained(base(), tmp_path / "folded").eval()(IDS), model(IDS))
    for name, found in adapter_factors(tmp_path / "ours").items():
        assert torch.equal(found.M.float(), made[name][1])


def test_patterns_and_rank_stabilised_scaling_are_theirs(tmp_path):
    ranks = {"layers.0.q_proj": 2, "layers.1.q_proj": 2}
    made = factors(ranks=ranks)
    config = VISUAL | {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers.1.up_proj": 3}, "use_rslora": True}
    scaling = {name: (3 if name == "layers.1.up_proj" else 8) / ranks.get(name, R) ** 0.5 for name in MODULES}
    model = load_official(base(), write(tmp_path / "x", config, keyed(made, "stripped")))
    torch.testing.assert_close(model(IDS), expected_output(made, scaling), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("source", ["folder", "file"])
def test_the_sdxl_layout_is_what_diffusers_makes_of_their_keys(tmp_path, source):
    utils = pytest.importorskip("diffusers.utils")

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.to_q, self.to_k, self.to_v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.to_out = nn.ModuleList([nn.Linear(8, 8)])

        def forward(self, x):
            return self.to_out[0](self.to_q(x) + self.to_k(x) * self.to_v(x))

    torch.manual_seed(0)
    net = nn.ModuleDict({"attn1": Attention(), "attn2": Attention()})
    names = [f"attn{i}.{to}" for i in (1, 2) for to in ("to_q", "to_k", "to_v", "to_out.0")]
    tensors = {}
    for name in names:
        for part, shape in (("lora_A", (R, 8)), ("lora_AB", (R, R)), ("lora_B", (8, R))):
            tensors[f"{name}.{part}.weight"] = torch.randn(shape)
    saved = {f"unet.{key}": value for key, value in utils.convert_state_dict_to_diffusers(tensors).items()}
    assert "unet.attn1.to_q.lora.downB.weight" in saved
    save_file(saved, tmp_path / "pytorch_lora_weights.safetensors")
    x = torch.randn(3, 8)
    expected = {}
    for name in names:
        A, AB, B = (tensors[f"{name}.{part}.weight"] for part in ("lora_A", "lora_AB", "lora_B"))
        expected[name] = net.get_submodule(name)(x) + x @ (B @ AB @ A).T
    path = tmp_path / "pytorch_lora_weights.safetensors" if source == "file" else tmp_path
    model = load_official(net, path)
    for name in names:
        layer = model.base_model.model.get_submodule(name)
        torch.testing.assert_close(layer(x), expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("unmixed", "pattern"),
    [
        (
            ["layers.1.q_proj", "layers.1.up_proj"],
            {r"^layers\.1\.q_proj": "identity", r"^layers\.1\.up_proj": "identity"},
        ),
        (["layers.0.q_proj", "layers.1.q_proj"], {"q_proj": "identity"}),
    ],
    ids=["of_a_layer", "of_a_name"],
)
def test_modules_without_a_mixer_stay_plain_lora(tmp_path, caplog, unmixed, pattern):
    made = factors()
    tensors = keyed(made, "stripped")
    for name in unmixed:
        del tensors[f"{PREFIX}{name}.lora_AB.weight"]
        made[name] = (made[name][0], torch.eye(R), made[name][2])
    folder = write(tmp_path / "x", VISUAL, tensors)
    model = load_official(base(), folder)
    torch.testing.assert_close(model(IDS), expected_output(made, 8 / R), rtol=1e-4, atol=1e-5)
    assert "2 of 4 modules have no mixer" in caplog.text and unmixed[0] in caplog.text
    assert model.peft_config["default"].mixer_pattern == pattern
    mixers = {key for key in get_peft_model_state_dict(model) if key.endswith("mixer")}
    assert mixers == {f"{PREFIX}{name}.lora_B.mixer" for name in MODULES if name not in unmixed}


def test_a_name_that_ends_as_another_one_is_told_apart(tmp_path):
    """The pattern of the plain "q" must not reach the "q" of a block."""
    A, B, M = torch.randn(2, 3), torch.randn(4, 2), torch.randn(2, 2)
    tensors = {f"{PREFIX}block.q.lora_AB.weight": M}
    for name in ("q", "block.q"):
        tensors |= {f"{PREFIX}{name}.lora_A.weight": A, f"{PREFIX}{name}.lora_B.weight": B}
    config, converted = convert_official({"r": 2, "lora_alpha": 2, "target_modules": ["q"]}, tensors)
    assert f"{PREFIX}q.lora_B.weight" in converted and f"{PREFIX}block.q.lora_B.raw" in converted
    assert (config.mixer_of("q").exists, config.mixer_of("block.q").exists) == (False, True)


def test_embeddings_biases_and_saved_modules_come_along(tmp_path):
    made = factors()
    tensors = keyed(made, "stripped")
    A, B = torch.randn(R, 7), torch.randn(8, R)
    bias, head = torch.randn(6), torch.randn(3, 8)
    tensors |= {
        f"{PREFIX}embed.lora_embedding_A": A,
        f"{PREFIX}embed.lora_embedding_B": B,
        f"{PREFIX}layers.0.q_proj.bias": bias,
        f"{PREFIX}head.weight": head,
        f"{PREFIX}head.bias": torch.zeros(3),
    }
    targets = ["q_proj", "up_proj", "embed"]
    config = COMMONSENSE | {"target_modules": targets, "modules_to_save": ["head"], "bias": "lora_only"}
    _, converted = convert_official(config, tensors)
    assert f"{PREFIX}embed.lora_mixer" not in converted
    assert torch.equal(converted[f"{PREFIX}layers.0.q_proj.base_layer.bias"], bias)
    model = load_official(base(), write(tmp_path / "x", config, tensors))
    delta = model.base_model.model.embed.get_delta_weight("default")
    torch.testing.assert_close(delta, (B @ A).T * 2, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.base_model.model.layers[0].q_proj.bias, bias)
    assert torch.equal(model.base_model.model.head.modules_to_save["default"].weight, head)


def test_half_precision_weights_stay_so(tmp_path):
    tensors = keyed(factors(dtype=torch.float16), "stripped")
    _, converted = read_official(write(tmp_path / "x", COMMONSENSE, tensors, "bin"))
    assert {tensor.dtype for tensor in converted.values()} == {torch.float16}


def test_targets_that_only_peft_0_3_would_match_are_spelt_out(tmp_path):
    made = factors()
    folder = write(tmp_path / "x", COMMONSENSE | {"target_modules": ["_proj"]}, keyed(made, "stripped"))
    assert read_official(folder)[0].target_modules == set(MODULES)
    torch.testing.assert_close(load_official(base(), folder)(IDS), expected_output(made, 2.0), rtol=1e-4, atol=1e-5)
    config = COMMONSENSE | {"target_modules": r".*\.(q|up)_proj"}
    assert read_official(write(folder, config, keyed(made, "stripped")))[0].target_modules == config["target_modules"]


def test_a_loaded_adapter_is_frozen_unless_asked_for(tmp_path):
    folder = write(tmp_path / "x", COMMONSENSE, keyed(factors(), "stripped"))
    frozen = load_official(base(), folder, "theirs")
    assert frozen.active_adapter == "theirs"
    assert not any(p.requires_grad for p in frozen.parameters())
    trainable = load_official(base(), folder, is_trainable=True)
    names = {
        name.split(".default")[0].rsplit(".", 1)[1] for name, p in trainable.named_parameters() if p.requires_grad
    }
    assert names == {"lora_A", "lora_B"}
    assert sum(p.requires_grad for p in trainable.parameters()) == 3 * len(MODULES)


# ----------------------------------------------------------------------------------------------------------- refusals


class Exploit:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def without(part: str, module: str = "layers.0.q_proj"):
    return lambda config, tensors: tensors.pop(f"{PREFIX}{module}.{part}.weight")


def drop_all_mixers(config, tensors):
    for key in [key for key in tensors if "lora_AB" in key]:
        del tensors[key]


REFUSED = {
    "plain lora": (
        lambda c, t: (drop_all_mixers(c, t), c.update(lora_use_mixer=False)),
        "has no lora_AB: plain LoRA",
    ),
    "lost mixers": (drop_all_mixers, "has no lora_AB though lora_use_mixer is true"),
    "dora": (lambda c, t: c.update(use_dora=True), "use_dora with lora_AB"),
    "merged layers": (lambda c, t: c.update(enable_lora=[True, False]), "enable_lora"),
    "another tuner": (lambda c, t: c.update(peft_type="MOSLORA"), "peft_type is 'MOSLORA'; expected LORA"),
    "no A": (without("lora_A"), r"layers\.0\.q_proj: has no lora_A"),
    "no B": (without("lora_B"), r"layers\.0\.q_proj: has no lora_B"),
    "another rank": (lambda c, t: c.update(r=8), r"rank 4, shape \(4, 8\); the configuration says 8"),
    "no alpha": (lambda c, t: c.update(lora_alpha=None), "lora_alpha must be a finite number, found None"),
    "modules of another kind": (lambda c, t: c.update(target_modules=1.5), "target_modules must be a list"),
    "modules by no expression": (lambda c, t: c.update(target_modules="*q"), r"'\*q' is no regular expression"),
    "ranks by no expression": (lambda c, t: c.update(rank_pattern={"(q": 4}), "is no regular expression"),
    "mixer of another rank": (
        lambda c, t: t.update({f"{PREFIX}layers.0.q_proj.lora_AB.weight": torch.eye(3)}),
        r"lora_AB \(3, 3\).*do not fit",
    ),
    "flat factor": (
        lambda c, t: t.update({f"{PREFIX}layers.0.q_proj.lora_A.weight": torch.ones(4)}),
        r"has shape \(4,\)",
    ),
    "two adapters": (
        lambda c, t: t.update({f"{PREFIX}layers.0.q_proj.lora_A.other.weight": torch.ones(4, 8)}),
        r"adapters \['None', 'other'\]; expected one",
    ),
}


@pytest.mark.parametrize(("damage", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_read_exactly_is_refused_in_one_line(tmp_path, capsys, damage, message):
    config, tensors = dict(VISUAL), keyed(factors(), "stripped")
    damage(config, tensors)
    folder = write(tmp_path / "x", config, tensors)
    assert main([str(folder), str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err
    assert len(line.splitlines()) == 1 and line.startswith(f"error: {folder}")
    with pytest.raises(UserError, match=message):
        read_official(folder)
    assert not (tmp_path / "out").exists()


def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path / "x", COMMONSENSE, {}, "bin")
    for content in (pickle.dumps({"a": Exploit()}), None):
        if content is None:
            torch.save({"a": Exploit()}, folder / "adapter_model.bin")
        else:
            (folder / "adapter_model.bin").write_bytes(content)
        with pytest.raises(UserError, match="it was not executed") as caught:
            read_official(folder)
        assert len(str(caught.value).splitlines()) == 1 and "weights_only" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04junk"])
def test_a_damaged_pickle_is_refused(tmp_path, content):
    folder = write(tmp_path / "x", COMMONSENSE, {}, "bin")
    (folder / "adapter_model.bin").write_bytes(content)
    with pytest.raises(UserError, match=r"adapter_model\.bin: not a plain pickle of tensors"):
        read_official(folder)


def test_a_pickle_of_something_else_is_refused(tmp_path):
    folder = write(tmp_path / "x", COMMONSENSE, {}, "bin")
    for content, found in (([torch.ones(1)], "list"), ({"step": 3}, "dict")):
        torch.save(content, folder / "adapter_model.bin")
        with pytest.raises(UserError, match=f"holds a {found}"):
            read_official(folder)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match="absent: no such folder"):
        read_official(tmp_path / "absent")
    folder = write(tmp_path / "x", COMMONSENSE, keyed(factors(), "stripped"))
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"neither adapter_model\.safetensors nor adapter_model\.bin"):
        read_official(folder)


def test_sdxl_files_of_another_kind_are_refused(tmp_path):
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file({"text_encoder.q_proj.lora_linear_layer.up.weight": torch.ones(2, 2)}, path)
    with pytest.raises(UserError, match="not of the UNet"):
        read_official(path)
    save_file({f"unet.x{r}.to_q.lora.down.weight": torch.ones(r, 2) for r in (2, 3)}, path)
    with pytest.raises(UserError, match=r"ranks \[2, 3\]"):
        read_official(path)


def test_an_adapter_of_another_model_is_refused(tmp_path):
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Block()])

    class Wider(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Block(), Block(), Block()])

    folder = write(tmp_path / "x", COMMONSENSE, keyed(factors(), "stripped"))
    with pytest.raises(UserError, match=r"does not fit the model; the model has no .*layers\.1"):
        load_official(Other(), folder)
    with pytest.raises(UserError, match=r"does not fit the model; the adapter has no .*layers\.2"):
        load_official(Wider(), folder)
    with pytest.raises(UserError, match="does not fit the model"):
        load_official(nn.Sequential(nn.Linear(2, 2)), folder)
    narrow = base()
    narrow.layers[0].q_proj = nn.Linear(9, 6)
    with pytest.raises(UserError, match="does not fit the model"):
        load_official(narrow, folder)

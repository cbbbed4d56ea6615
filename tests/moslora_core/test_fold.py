"""Folding: exact, complete, atomic, and readable where this package is not."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from moslora_core import MoSLoraConfig
from moslora_core.errors import UserError
from moslora_core.fold import fold_adapter, fold_into_init, fold_state_dict, fold_to_lora, main, plain_config
from moslora_core.mixer import fold_into_a, fold_into_b

TARGETS = ["embed", "q", "k", "conv", "grouped"]
pytestmark = pytest.mark.filterwarnings("ignore:.*groups > 1:UserWarning")


class Net(nn.Module):
    """One layer of each kind that the mixer knows, and a head to save."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(13, 16)
        self.q = nn.Linear(16, 12)
        self.k = nn.Linear(12, 16)
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.head = nn.Linear(8, 5)

    def forward(self, ids):
        hidden = self.k(torch.tanh(self.q(self.embed(ids))))
        pixels = torch.tanh(hidden).view(ids.shape[0], 4, ids.shape[1] // 2, 8)
        return self.head(self.grouped(self.conv(pixels)).mean((2, 3)))


IDS = torch.arange(24).view(3, 8) % 13


def base(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def mixed(*, seed: int = 0, **settings) -> PeftModel:
    """A MoSLoRA model with every adapter tensor, mixers and magnitudes included, away from its start."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS} | settings
    model = get_peft_model(base(), MoSLoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                noise = torch.randn(tensor.shape, generator=generator).to(tensor)
                tensor.copy_(tensor + 0.3 * noise if "magnitude" in name else 0.3 * noise)
    return model.eval()


VARIANTS = {
    "learned": {},
    "orthogonal": {"mixer_init": "orthogonal"},
    "frozen": {"mixer": "frozen"},
    "two_subspaces": {"mixer": "two_subspaces"},
    "identity": {"mixer": "identity"},
    "frozen_identity": {"mixer": "frozen", "mixer_init": "identity"},
    "patterns": {"rank_pattern": {"k": 2, "q": 6}, "alpha_pattern": {"q": 3}},
    "mixer_pattern": {"mixer_pattern": {"q|embed": "identity", "conv": "two_subspaces"}},
    "mixers_by_pattern_alone": {"mixer": "identity", "mixer_pattern": {"embed|k": "learned", "grouped": "frozen"}},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True, "target_modules": ["embed", "q", "k", "conv"]},
    "modules_to_save": {"modules_to_save": ["head"]},
    "lora_bias": {"lora_bias": True, "target_modules": ["q", "k", "conv"]},
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def variant(request) -> dict:
    return request.param


# ------------------------------------------------------------------------------------------------------------- exact


def test_a_folded_adapter_computes_the_same_bits(variant, tmp_path):
    model = mixed(**variant)
    expected = model(IDS)
    assert not torch.equal(expected, base().eval()(IDS))

    config, tensors = fold_to_lora(model)
    assert type(config) is LoraConfig
    in_memory = get_peft_model(base(), config).eval()
    result = set_peft_model_state_dict(in_memory, tensors)
    assert not result.unexpected_keys
    assert torch.equal(in_memory(IDS), expected)
    assert torch.equal(model(IDS), expected), "folding changed the model it read"

    model.save_pretrained(tmp_path / "mixed")
    fold_adapter(tmp_path / "mixed", tmp_path / "folded")
    from_disk = PeftModel.from_pretrained(base(), tmp_path / "folded").eval()
    assert type(from_disk.peft_config["default"]) is LoraConfig
    assert torch.equal(from_disk(IDS), expected)


def test_both_routes_write_the_same_tensors(variant, tmp_path):
    model = mixed(**variant)
    model.save_pretrained(tmp_path / "mixed")
    fold_adapter(tmp_path / "mixed", tmp_path / "folded")
    _, tensors = fold_to_lora(model)
    on_disk = load_file(tmp_path / "folded" / "adapter_model.safetensors")
    assert on_disk.keys() == tensors.keys()
    assert all(torch.equal(on_disk[key], tensors[key]) for key in tensors)
    assert not any("mixer" in key or key.endswith("raw") for key in tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_adapters_fold_as_they_run(dtype):
    model = get_peft_model(
        base().to(dtype), MoSLoraConfig(r=4, target_modules=["q", "k"]), autocast_adapter_dtype=False
    )
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_" in name:
                tensor.normal_()
    x = torch.randn(5, 16, dtype=dtype)
    config, tensors = fold_to_lora(model)
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    folded = get_peft_model(base().to(dtype), config, autocast_adapter_dtype=False)
    set_peft_model_state_dict(folded, tensors)
    with torch.no_grad():
        assert torch.equal(folded.base_model.model.q(x), model.base_model.model.q(x))


def test_sixteen_bit_adapters_that_peft_raises_to_float32_fold_in_float32(tmp_path):
    model = mixed(target_modules=["q", "k"])
    halves = {key: tensor.bfloat16() for key, tensor in get_peft_model_state_dict(model).items()}
    model.save_pretrained(tmp_path / "mixed")
    save_file(halves, tmp_path / "mixed" / "adapter_model.safetensors")
    expected = PeftModel.from_pretrained(base(), tmp_path / "mixed")(IDS)
    assert main([str(tmp_path / "mixed"), str(tmp_path / "exact"), "--dtype", "float32"]) == 0
    assert torch.equal(PeftModel.from_pretrained(base(), tmp_path / "exact")(IDS), expected)
    fold_adapter(tmp_path / "mixed", tmp_path / "rounded")
    rounded = load_file(tmp_path / "rounded" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in rounded.values()} == {torch.bfloat16}
    torch.testing.assert_close(
        PeftModel.from_pretrained(base(), tmp_path / "rounded")(IDS), expected, rtol=0.1, atol=0.1
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**31), st.booleans())
def test_the_fold_is_the_update_whatever_the_sizes(r, out, inp, seed, named):
    generator = torch.Generator().manual_seed(seed)
    A, B, M = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((r, inp), (out, r), (r, r)))
    name = ".default" if named else ""
    tensors = {f"x.lora_A{name}.weight": A, f"x.lora_B{name}.raw": B, f"x.lora_B{name}.mixer": M}
    folded = fold_state_dict(tensors)
    assert folded.keys() == {f"x.lora_A{name}.weight", f"x.lora_B{name}.weight"}
    delta = folded[f"x.lora_B{name}.weight"] @ folded[f"x.lora_A{name}.weight"]
    torch.testing.assert_close(delta, B @ M @ A, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mixer": "identity", "mixer_pattern": {"attn": "learned"}},
        {"mixer_pattern": {"attn": "identity"}},
    ],
    ids=["everywhere", "by_pattern", "none_by_pattern"],
)
def test_both_projections_of_multihead_attention_are_folded(tmp_path, settings):
    def attention():
        torch.manual_seed(0)
        return nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})

    model = get_peft_model(attention(), MoSLoraConfig(r=4, target_modules=["attn"], **settings))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_" in name:
                tensor.normal_()
    model.save_pretrained(tmp_path / "mixed")
    fold_adapter(tmp_path / "mixed", tmp_path / "folded")
    folded = PeftModel.from_pretrained(attention(), tmp_path / "folded")
    x = torch.randn(3, 2, 8)
    expected, _ = model.base_model.model["attn"](x, x, x)
    assert torch.equal(folded.base_model.model["attn"](x, x, x)[0], expected)


def test_a_state_dict_gathered_elsewhere_can_be_given():
    model = mixed()
    whole = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    expected = fold_to_lora(model)[1]
    given_dict = fold_to_lora(mixed(seed=5), state_dict=whole)[1]
    assert all(torch.equal(given_dict[key], expected[key]) for key in expected)


def test_one_adapter_of_several_is_folded():
    model = mixed(target_modules=["q"])
    model.add_adapter("other", MoSLoraConfig(r=2, target_modules=["k"]))
    assert {key.split(".")[2] for key in fold_to_lora(model, "other")[1]} == {"k"}
    assert {key.split(".")[2] for key in fold_to_lora(model)[1]} == {"q"}
    with pytest.raises(UserError, match=r"no adapter 'third'.*'default', 'other'"):
        fold_to_lora(model, "third")
    with pytest.raises(UserError, match="no adapter"):
        fold_to_lora(base())


def test_modules_of_the_model_named_mixer_are_left_alone():
    tensors = {"mixer": torch.ones(2), "block.mixer.weight": torch.ones(2), "block.raw": torch.ones(2)}
    assert fold_state_dict(tensors).keys() == tensors.keys()


def test_merging_a_folded_adapter_is_merging_the_mixed_one():
    model = mixed(target_modules=["q", "k", "conv"])
    config, tensors = fold_to_lora(model)
    folded = get_peft_model(base(), config)
    set_peft_model_state_dict(folded, tensors)
    left, right = model.merge_and_unload(), folded.merge_and_unload()
    assert all(torch.equal(p, q) for p, q in zip(left.parameters(), right.parameters(), strict=True))


# ------------------------------------------------------------------------------------------------------------- files


@pytest.fixture
def saved(tmp_path) -> Path:
    folder = tmp_path / "mixed"
    model = mixed(rank_pattern={"k": 2}, alpha_pattern={"k": 3}, modules_to_save=["head"])
    model.peft_config["default"].base_model_name_or_path = "some/base"
    model.save_pretrained(folder)
    return folder


def test_the_written_configuration_is_plain_lora(saved, tmp_path):
    (saved / "README.md").write_text("# card\n")
    out = fold_adapter(saved, tmp_path / "deep" / "folded")
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert (out / "README.md").read_text() == "# card\n"
    config = json.loads((out / "adapter_config.json").read_text())
    LoraConfig().save_pretrained(tmp_path / "reference")
    reference = json.loads((tmp_path / "reference" / "adapter_config.json").read_text())
    assert config.keys() == reference.keys()
    assert config["peft_type"] == "LORA" and config["inference_mode"] is True
    assert config["base_model_name_or_path"] == "some/base"
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({"k": 2}, {"k": 3})
    assert config["modules_to_save"] == ["head"]
    assert sorted(config["target_modules"]) == sorted(TARGETS)
    assert os.stat(out).st_mode == os.stat(tmp_path / "reference").st_mode


def test_settings_that_peft_does_not_know_are_left_out_with_a_warning(caplog):
    config = plain_config({"peft_type": "MOSLORA", "r": 3, "mixer": "learned", "from_the_future": 1})
    assert config.r == 3 and config.peft_type == "LORA"
    assert "from_the_future" in caplog.text and "mixer" not in caplog.text.replace("mixer's", "")


def test_a_process_without_this_package_loads_the_result(saved, tmp_path):
    out = fold_adapter(saved, tmp_path / "folded")
    model = PeftModel.from_pretrained(base(), saved).eval()
    save_file({"logits": model(IDS).detach()}, tmp_path / "expected.safetensors")
    save_file(base().state_dict(), tmp_path / "base.safetensors")
    # The class is given as source text, so that nothing of this repository is imported.
    script = f"""
        import sys, torch
        from torch import nn
        from peft import PeftModel
        from safetensors.torch import load_file
        {textwrap.indent(inspect.getsource(Net), " " * 8).strip()}
        net = Net()
        net.load_state_dict(load_file({str(tmp_path / "base.safetensors")!r}))
        ids = torch.arange(24).view(3, 8) % 13
        model = PeftModel.from_pretrained(net, {str(out)!r}).eval()
        assert torch.equal(model(ids), load_file({str(tmp_path / "expected.safetensors")!r})["logits"])
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


def test_the_command_needs_no_model_and_says_what_it_wrote(saved, tmp_path, capsys):
    assert main([str(saved), str(tmp_path / "folded")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'folded'}\n"
    assert (tmp_path / "folded" / "adapter_model.safetensors").is_file()


def test_the_command_as_a_process_ends_bad_input_in_one_line(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "moslora_core.fold", str(tmp_path / "absent"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == f"error: {tmp_path / 'absent'}: no such folder; expected a saved adapter"
    assert "Traceback" not in result.stderr and "RuntimeWarning" not in result.stderr and not result.stdout


def test_the_package_offers_the_functions_and_refuses_unknown_names():
    import moslora_core

    assert moslora_core.fold_to_lora is fold_to_lora and moslora_core.fold_into_init is fold_into_init
    assert all(hasattr(moslora_core, name) for name in moslora_core.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = moslora_core.no_such_name


def edit_config(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


Q = "base_model.model.q.lora_B."
DAMAGE = {
    "no config": (lambda f: (f / "adapter_config.json").unlink(), r"has no adapter_config\.json"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), r"adapter_model\.safetensors: no such file"),
    "only a pickle": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        r"holds adapter_model\.bin, a pickle",
    ),
    "config is no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "config.json is damaged: expected "),
    "config is binary": (
        lambda f: (f / "adapter_config.json").write_bytes(b"\xff\xfe\x00"),
        "config.json is damaged: expected ",
    ),
    "already LoRA": (lambda f: edit_config(f, peft_type="LORA"), "plain LoRA adapter already"),
    "another tuner": (lambda f: edit_config(f, peft_type="LOKR"), "peft_type is 'LOKR'; expected MOSLORA"),
    "no tuner": (lambda f: edit_config(f, peft_type=None), "peft_type is None; expected MOSLORA"),
    "unknown mixer": (lambda f: edit_config(f, mixer="blended"), "'blended'"),
    "a pattern of another kind": (lambda f: edit_config(f, alpha_pattern="q"), "alpha_pattern must be an object"),
    "a pattern of other numbers": (
        lambda f: edit_config(f, rank_pattern={"q": "2"}),
        "rank_pattern.q must be a whole",
    ),
    "a number too large": (lambda f: edit_config(f, lora_alpha=10**400), "lora_alpha must be of finite numbers"),
    "names that are none": (lambda f: edit_config(f, target_modules=["q", 1.5]), "target_modules.1 must be text"),
    "impossible setting": (lambda f: edit_config(f, task_type="COOKING"), "COOKING"),
    "truncated": (
        lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:-7]),
        "not a complete safetensors file",
    ),
    "empty": (lambda f: (f / "adapter_model.safetensors").write_bytes(b""), "not a complete safetensors file"),
    "another format": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(b"PK\x03\x04" * 64),
        "not a complete safetensors file",
    ),
    "foreign tensors": (
        lambda f: save_file({"transformer.weight": torch.ones(2)}, f / "adapter_model.safetensors"),
        "hold no lora_A",
    ),
    "a mixer missing": (lambda f: edit_weights(f, lambda t: t.pop(Q + "mixer")), r"q\.lora_B\.raw: its mixer"),
    "a matrix missing": (
        lambda f: edit_weights(f, lambda t: t.pop(Q + "raw")),
        r"q\.lora_A\.weight|without the matrix",
    ),
    "an A missing": (
        lambda f: edit_weights(f, lambda t: t.pop("base_model.model.q.lora_A.weight")),
        r"q\.lora_B\.raw: its other factor",
    ),
    "a wrong mixer": (
        lambda f: edit_weights(f, lambda t: t.update({Q + "mixer": torch.eye(3)})),
        r"q\.lora_B\.mixer: has shape \(3, 3\); expected \(4, 4\)",
    ),
    "a flat matrix": (
        lambda f: edit_weights(f, lambda t: t.update({Q + "raw": torch.ones(4)})),
        r"q\.lora_B\.raw: has shape \(4,\)",
    ),
    "unmixed weights": (
        lambda f: edit_weights(f, lambda t: (t.pop(Q + "mixer"), t.update({Q + "weight": t.pop(Q + "raw")}))),
        r"q\.lora_B\.weight: has no mixer, though the configuration says mixer=learned",
    ),
    "an embedding's mixer missing": (
        lambda f: edit_weights(f, lambda t: t.pop("base_model.model.embed.lora_mixer")),
        r"embed\.lora_embedding_B: its mixer",
    ),
    "a grouped convolution's mixer missing": (
        lambda f: edit_weights(f, lambda t: t.pop("base_model.model.grouped.lora_A.mixer")),
        r"grouped\.lora_A\.raw: its mixer",
    ),
}


def unmix(tensors: dict[str, torch.Tensor], module: str) -> None:
    host = f"base_model.model.{module}.lora_B."
    tensors[host + "weight"] = tensors.pop(host + "raw")
    del tensors[host + "mixer"]


EMBED = "base_model.model.embed.lora_mixer"
PLAIN_Q_AND_EMBED = {"mixer_pattern": {"q|embed": "identity"}}
DAMAGE |= {
    "a mixer that the pattern promises": (
        lambda f: (
            edit_config(f, **PLAIN_Q_AND_EMBED),
            edit_weights(f, lambda t: (unmix(t, "q"), unmix(t, "k"), t.pop(EMBED))),
        ),
        r"k\.lora_B\.weight: has no mixer, though the configuration says mixer=learned",
    ),
    "a mixer that the pattern denies": (
        lambda f: edit_config(f, **PLAIN_Q_AND_EMBED),
        r"(q\.lora_B\.raw|embed\.lora_embedding_B): has a mixer, though the configuration says mixer=identity",
    ),
    "an embedding's mixer that the pattern denies": (
        lambda f: (edit_config(f, **PLAIN_Q_AND_EMBED), edit_weights(f, lambda t: unmix(t, "q"))),
        r"embed\.lora_embedding_B: has a mixer, though the configuration says mixer=identity",
    ),
    "a grouped convolution's mixer that the pattern denies": (
        lambda f: edit_config(f, mixer_pattern={"grouped": "identity"}),
        r"grouped\.lora_B\.weight: has a mixer, though the configuration says mixer=identity",
    ),
    "an unknown mixer in the pattern": (lambda f: edit_config(f, mixer_pattern={"q": "blended"}), "'blended'"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_what_is_no_complete_adapter_is_refused_in_one_line(saved, tmp_path, capsys, damage, message):
    damage(saved)
    with pytest.raises(UserError, match=message) as caught:
        fold_adapter(saved, tmp_path / "out")
    assert len(str(caught.value).splitlines()) == 1
    assert str(saved) in str(caught.value)
    assert main([str(saved), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"error: {caught.value}\n"
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_is_refused(saved, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "keep").write_text("mine")
    with pytest.raises(UserError, match="exists and is not empty"):
        fold_adapter(saved, taken)
    assert [path.name for path in taken.iterdir()] == ["keep"]
    with pytest.raises(UserError, match="is a file"):
        fold_adapter(saved, taken / "keep")
    with pytest.raises(UserError, match="cannot be written"):
        fold_adapter(saved, taken / "keep" / "out")
    with pytest.raises(UserError, match="exists and is not empty"):
        fold_adapter(saved, saved)


def test_an_empty_folder_is_a_place_to_write(saved, tmp_path):
    (tmp_path / "out").mkdir()
    assert (fold_adapter(saved, tmp_path / "out") / "adapter_config.json").is_file()


def test_a_failure_while_writing_leaves_nothing_behind(saved, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moslora_core.adapter_files.save_file", full)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match="No space left on device"):
        fold_adapter(saved, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


# --------------------------------------------------------------------------------------------------------- diffusers


@pytest.fixture(scope="module")
def unet_class():
    return pytest.importorskip("diffusers").UNet2DConditionModel


def tiny_unet(unet_class) -> nn.Module:
    torch.manual_seed(0)
    return unet_class(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 6,
    ).eval()


@torch.no_grad()
def denoise(unet: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    sample, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 5, 12, generator=generator)
    extra = {"text_embeds": torch.zeros(1, 6), "time_ids": torch.zeros(1, 6)}
    return unet(sample, 3, text, added_cond_kwargs=extra).sample


@pytest.mark.parametrize("convolutions", [False, True], ids=["attention", "with_convolutions"])
def test_diffusers_pipelines_load_a_folded_unet_adapter(unet_class, tmp_path, convolutions):
    from diffusers import StableDiffusionXLPipeline

    targets = ["to_q", "to_k", "to_v", "to_out.0"] + (["conv1", "conv2"] if convolutions else [])
    unet = tiny_unet(unet_class)
    before = denoise(unet)
    # alpha is not r: the scaling survives through the metadata.
    unet.add_adapter(MoSLoraConfig(r=4, lora_alpha=12, target_modules=targets))
    with torch.no_grad():
        for name, tensor in unet.named_parameters():
            if "lora_" in name:
                tensor.normal_(std=0.2)
    expected = denoise(unet)
    assert not torch.allclose(expected, before, atol=1e-3)

    config, tensors = fold_to_lora(unet)
    StableDiffusionXLPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=tensors, unet_lora_adapter_metadata=config.to_dict()
    )
    pipeline = StableDiffusionXLPipeline(None, None, None, None, None, tiny_unet(unet_class), None)
    pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    assert torch.equal(denoise(pipeline.unet), expected)

    alone = tiny_unet(unet_class)
    alone.load_lora_adapter(tensors, prefix=None, metadata=config.to_dict())
    assert torch.equal(denoise(alone), expected)


# ------------------------------------------------------------------------------------------------------------- start


def start_pair(**settings) -> tuple[PeftModel, PeftModel, torch.Tensor, torch.Tensor]:
    """A MoSLoRA model and its folded start from the same seeds, and what each seed's generator draws next."""
    settings = {"r": 4, "target_modules": TARGETS} | settings
    net = base()
    torch.manual_seed(7)
    moslora = get_peft_model(net, MoSLoraConfig(**settings))
    after_moslora = torch.rand(3)
    net = base()
    torch.manual_seed(7)
    folded = fold_into_init(net, MoSLoraConfig(**settings))
    return moslora, folded, after_moslora, torch.rand(3)


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("init", ["kaiming_uniform", "orthogonal", "gaussian"])
def test_the_folded_start_is_m0_a0_of_the_same_seeds(seed, init):
    moslora, folded, after, after_folded = start_pair(mixer_init=init, mixer_seed=seed)
    mixed_start, start = get_peft_model_state_dict(moslora), get_peft_model_state_dict(folded)
    for module in ("q", "k", "conv"):
        key = f"base_model.model.{module}."
        M = mixed_start[key + "lora_B.mixer"]
        assert torch.equal(start[key + "lora_A.weight"], fold_into_a(mixed_start[key + "lora_A.weight"], M))
        assert torch.count_nonzero(start[key + "lora_B.weight"]) == 0
        assert not torch.equal(start[key + "lora_A.weight"], mixed_start[key + "lora_A.weight"])
    key = "base_model.model.grouped."
    raw, M = mixed_start[key + "lora_A.raw"], mixed_start[key + "lora_A.mixer"]
    assert torch.equal(start[key + "lora_A.weight"], fold_into_a(raw, M))
    assert torch.count_nonzero(start[key + "lora_B.weight"]) == 0
    # PEFT starts an embedding's A at zero and its B at random: the mixer is kept in the factor that is not zero.
    key = "base_model.model.embed."
    B, M = mixed_start[key + "lora_embedding_B"], mixed_start[key + "lora_mixer"]
    assert torch.equal(start[key + "lora_embedding_B"], fold_into_b(B, M))
    assert torch.count_nonzero(start[key + "lora_embedding_A"]) == 0
    assert torch.equal(after, after_folded), "what is drawn after attaching differs"


def test_the_folded_start_follows_the_mixer_pattern():
    moslora, folded, after, after_folded = start_pair(mixer_pattern={"q|grouped": "identity", "embed": "frozen"})
    mixed_start, start = get_peft_model_state_dict(moslora), get_peft_model_state_dict(folded)
    for module, mixes in (("q", False), ("grouped", False), ("k", True), ("conv", True)):
        key = f"base_model.model.{module}."
        A = mixed_start[key + "lora_A.weight"]
        assert (key + "lora_B.mixer" in mixed_start) == mixes
        expected = fold_into_a(A, mixed_start[key + "lora_B.mixer"]) if mixes else A
        assert torch.equal(start[key + "lora_A.weight"], expected)
    B, M = (mixed_start[f"base_model.model.embed.{part}"] for part in ("lora_embedding_B", "lora_mixer"))
    assert torch.equal(start["base_model.model.embed.lora_embedding_B"], fold_into_b(B, M))
    assert torch.equal(after, after_folded)


def test_the_folded_start_is_a_trainable_plain_lora_that_does_nothing_yet(tmp_path):
    moslora, folded, _, _ = start_pair(modules_to_save=["head"])
    assert type(folded.peft_config["default"]) is LoraConfig
    assert torch.equal(folded.eval()(IDS), base().eval()(IDS))
    trainable = {name for name, parameter in folded.named_parameters() if parameter.requires_grad}
    adapter = {name for name, _ in folded.named_parameters() if "lora_" in name or "modules_to_save" in name}
    assert trainable == adapter and len(adapter) == 2 * len(TARGETS) + 2
    assert not any("mixer" in name or "raw" in name for name in folded.state_dict())
    mixers = 4 * 4 * len(TARGETS)
    assert moslora.get_nb_trainable_parameters()[0] - folded.get_nb_trainable_parameters()[0] == mixers

    folded.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    left, right = get_peft_model_state_dict(loaded), get_peft_model_state_dict(folded)
    assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_the_first_step_is_moslora_s_and_the_second_is_not():
    # Proof A.1-A.3 in the authors' repository: at B = 0 neither A nor M moves, so that one SGD step agrees.
    x, y = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)), torch.ones(64, 12)
    moslora, folded, _, _ = start_pair(target_modules=["q"])
    losses = []
    for model in (moslora, folded):
        optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        track = []
        for _ in range(3):
            loss = (model.base_model.model.q(x) - y).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            track.append(loss.item())
        losses.append(track)
    assert losses[0][:2] == pytest.approx(losses[1][:2], rel=1e-5)
    assert losses[0][2] != pytest.approx(losses[1][2], rel=1e-5)


def test_patterns_names_and_configuration_survive_the_folded_start():
    config = MoSLoraConfig(r=4, target_modules=["q", "k"], rank_pattern={"k": 2}, alpha_pattern={"k": 5})
    model = fold_into_init(base(), config, "mine")
    layer = model.base_model.model.k
    assert (layer.r, layer.lora_alpha) == ({"mine": 2}, {"mine": 5})
    assert isinstance(config, MoSLoraConfig) and config.inference_mode is False
    with pytest.raises(UserError, match="expected MoSLoraConfig"):
        fold_into_init(base(), LoraConfig(target_modules=["q"]))

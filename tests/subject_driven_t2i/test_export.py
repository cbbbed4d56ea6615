"""Adapters for diffusers: stock ``load_lora_weights`` draws, bit for bit, what the folded adapter draws."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from peft import PeftModel
from safetensors import safe_open

from moslora_core.config import MoSLoraConfig
from moslora_core.errors import UserError
from moslora_core.fold import fold_adapter
from moslora_core.methods import METHODS, attach, peft_config
from subject_driven_t2i.config import Config
from subject_driven_t2i.export import export_diffusers, main, obstacle

from .tiny import build_pipeline

FILE = "pytorch_lora_weights.safetensors"
PLAIN = ("lora", "lora_scaled", "two_subspaces", "moslora", "moslora_frozen", "moslora_folded", "rslora", "lora_plus")


def trained(config: Config, folder: Path, method: str) -> Path:
    """A saved adapter whose factors all have left their start."""
    config = replace(config, method=METHODS[method])
    adapter = peft_config(config.method, config.adapter, seed=0, total_steps=20, task_type=None)
    torch.manual_seed(0)
    model = attach(build_pipeline().unet, config.method, adapter)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


def draw(pipeline: StableDiffusionXLPipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        ["a red sks dog", "a sks can on the beach"],
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
        num_inference_steps=3,
        width=16,
        height=16,
        output_type="np",
    ).images


def with_peft(adapter: Path) -> StableDiffusionXLPipeline:
    pipeline = build_pipeline()
    PeftModel.from_pretrained(pipeline.unet, str(adapter)).eval()
    return pipeline


@pytest.mark.parametrize("method", PLAIN)
def test_stock_diffusers_draws_what_the_run_draws(config, tmp_path, method):
    ours = trained(config, tmp_path / "adapter", method)
    folded = ours
    if method not in ("lora", "lora_scaled", "rslora", "lora_plus", "moslora_folded"):
        folded = fold_adapter(ours, tmp_path / "folded")
    exported = export_diffusers(ours, tmp_path / "exported")
    assert [path.name for path in exported.iterdir()] == [FILE]

    stock = build_pipeline()
    stock.load_lora_weights(exported)
    images = draw(stock)
    assert np.array_equal(images, draw(with_peft(folded)))
    np.testing.assert_allclose(images, draw(with_peft(ours)), atol=2e-5)
    assert np.abs(images - draw(build_pipeline())).max() > 1e-2, "the adapter does something"
    (adapter,) = stock.unet.peft_config.values()
    assert type(adapter).__name__ == "LoraConfig" and not isinstance(adapter, MoSLoraConfig)


def test_dora_goes_to_diffusers_too(config, tmp_path):
    ours = trained(config, tmp_path / "adapter", "dora")
    stock = build_pipeline()
    stock.load_lora_weights(export_diffusers(ours, tmp_path / "exported"))
    np.testing.assert_allclose(draw(stock), draw(with_peft(ours)), atol=2e-5)


def test_without_the_fold_diffusers_would_draw_something_else(config, tmp_path):
    """What the folded copy is for."""
    from safetensors.torch import load_file

    ours = trained(config, tmp_path / "adapter", "moslora")
    tensors = load_file(ours / "adapter_model.safetensors")
    bare = {
        "unet." + key.removeprefix("base_model.model.").replace("lora_B.raw", "lora_B.weight"): tensor
        for key, tensor in tensors.items()
        if not key.endswith(".mixer")
    }
    stock = build_pipeline()
    stock.load_lora_weights(bare)
    assert np.abs(draw(stock) - draw(with_peft(ours))).max() > 1e-3


def test_scale_and_rank_are_in_the_file(config, tmp_path):
    config.adapter = replace(config.adapter, r=2, lora_alpha=16)
    ours = trained(config, tmp_path / "adapter", "moslora")
    exported = export_diffusers(ours, tmp_path / "exported")
    stock = build_pipeline()
    stock.load_lora_weights(exported)
    (adapter,) = stock.unet.peft_config.values()
    assert (adapter.r, adapter.lora_alpha) == (2, 16)
    np.testing.assert_allclose(draw(stock), draw(with_peft(ours)), atol=5e-5)
    with safe_open(exported / FILE, "pt") as file:
        keys = list(file.keys())
        assert "mixer" not in file.metadata()["lora_adapter_metadata"]
    assert all(key.startswith("unet.") and key.endswith((".lora_A.weight", ".lora_B.weight")) for key in keys)


def test_what_diffusers_cannot_load_is_refused(config, tmp_path):
    kinds = {"adalora": "ADALORA", "loha": "LOHA", "lokr": "LOKR", "pissa": "init_lora_weights='pissa'"}
    for method, kind in kinds.items():
        ours = trained(config, tmp_path / method, method)
        assert kind in obstacle(ours)
        with pytest.raises(UserError, match=re.escape(obstacle(ours))):
            export_diffusers(ours, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_the_command(config, tmp_path, capsys):
    ours = trained(config, tmp_path / "adapter", "moslora")
    main([str(ours), str(tmp_path / "exported")])
    assert (tmp_path / "exported" / FILE).is_file()
    for arguments, message in (
        ([str(ours), str(tmp_path / "exported")], "is not empty"),
        ([str(tmp_path / "nowhere"), str(tmp_path / "other")], "no such folder"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        assert message in (found := capsys.readouterr().err.strip().splitlines())[-1] and len(found) == 1

"""Training both towers: record, resume, losses against an independent computation, several processes, refusals."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from peft import PeftModel
from transformers import AutoProcessor, LlavaForConditionalGeneration, Trainer

from moslora_core import launch
from moslora_core.errors import UserError
from moslora_core.methods import METHODS, attach, peft_config
from moslora_core.record import RunRecord
from moslora_core.running import TrainingConfig
from visual_instruction.chat import TEMPLATES
from visual_instruction.config import (
    CONF_MODULE,
    Config,
    DataConfig,
    ModelConfig,
    ScaleConfig,
    TowerConfig,
    TowersConfig,
    locate,
)
from visual_instruction.data import load_training
from visual_instruction.models import PROJECTOR, adapter_config, load_base
from visual_instruction.train import dry_run, main

from ..training_runs import Killed, adapter_of, assert_close, having, launched, losses_of, same

EXPERIMENT = "visual_instruction"
STEPS = 4
LLM = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VIT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


@pytest.fixture
def config(tiny_llava_dir, prepared_dir, tmp_path) -> Config:
    return Config(
        method=METHODS["moslora"],
        scale=ScaleConfig("tiny"),
        model=ModelConfig(name="tiny", path=str(tiny_llava_dir), template="llama3"),
        adapter=TowersConfig(TowerConfig(4, 8, True, LLM), TowerConfig(2, 1, True, VIT), lora_dropout=0.1),
        data=DataConfig(dir=str(prepared_dir), source="folder", benchmarks=["smoke_colour"], text_limit=96),
        training=TrainingConfig(
            learning_rate=1e-2,
            max_steps=STEPS,
            global_batch_size=3,
            per_device_batch_size=3,
            logging_steps=1,
            save_steps=2,
        ),
        runs_dir=str(tmp_path / "runs"),
    )


def refusal(config: Config) -> str:
    """The one line that refuses ``config``, before there is a run folder."""
    with pytest.raises(UserError) as caught:
        main(config)
    assert "\n" not in str(caught.value)
    assert not locate(config).path.exists()
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------------- towers


def test_a_run_trains_both_towers_and_the_projector(config, tiny_llava_dir):
    main(config)
    record = locate(config)
    assert record.path == Path(config.runs_dir) / "visual_instruction/tiny/moslora/default/seed-0"
    assert record.status().state == "finished" and [step for step, _ in losses_of(record)] == [1, 2, 3, 4]
    saved = adapter_of(record)
    modules = {re.sub(r"\.lora_[AB]\..*", "", key) for key in saved if ".lora_" in key}
    # Two layers of the language model; of the three vision layers the two that the features pass through.
    assert sum("language_model.layers" in name for name in modules) == 2 * len(LLM)
    vision = sorted(name for name in modules if "vision_tower" in name)
    assert len(vision) == 2 * len(VIT) and not any("layers.2." in name for name in vision)
    for key, tensor in saved.items():
        rank = 2 if "vision_tower" in key else 4
        if key.endswith("mixer"):
            assert tensor.shape == (rank, rank)
        assert ".lora_B." not in key or tensor.abs().max() > 0, f"{key} has not been trained"
    base = LlavaForConditionalGeneration.from_pretrained(tiny_llava_dir).state_dict()
    projector = {key: tensor for key, tensor in saved.items() if PROJECTOR in key}
    assert len(projector) == 4
    for key, tensor in projector.items():
        (original,) = [value for name, value in base.items() if name.endswith(key.split(f"{PROJECTOR}.")[1])]
        assert not torch.equal(tensor, original)
    training = record.results().training
    assert training.trainable_parameters == sum(tensor.numel() for tensor in saved.values())


@pytest.mark.parametrize(("llm", "vision"), [(True, False), (False, True), (False, False)])
def test_the_mixer_is_a_choice_of_each_tower(config, llm, vision):
    config = having(config, adapter__llm__mixer=llm, adapter__vision__mixer=vision)
    llava = load_base(config.model)
    adapter = adapter_config(config.adapter, llava.config)
    model = attach(llava, config.method, peft_config(config.method, adapter, seed=0, total_steps=4))
    mixers = [name for name, _ in model.named_parameters() if name.endswith(".mixer")]
    assert any("language_model" in name for name in mixers) == llm
    assert any("vision_tower" in name for name in mixers) == vision
    plain = attach(
        load_base(config.model), METHODS["lora"], peft_config(METHODS["lora"], adapter, seed=0, total_steps=4)
    )
    extra = 14 * 16 * llm + 12 * 4 * vision
    assert model.get_nb_trainable_parameters()[0] == plain.get_nb_trainable_parameters()[0] + extra


@pytest.mark.parametrize("tower", ["llm", "vision"])
def test_a_tower_of_rank_zero_is_left_as_it_is(config, tower):
    config = having(config, **{f"adapter__{tower}__r": 0})
    main(config)
    other = {"llm": "language_model", "vision": "vision_tower"}[tower]
    keys = [key for key in adapter_of(locate(config)) if ".lora_" in key]
    assert keys and not any(other in key for key in keys)


@pytest.mark.parametrize("method", ["lora", "two_subspaces", "moslora_folded", "dora", "lora_scaled"])
def test_every_kind_of_method_trains(config, method):
    config = having(config, method=METHODS[method], training__max_steps=1, training__save_steps=None)
    main(config)
    assert locate(config).is_trained()


def test_scales_of_the_towers_are_their_own(config):
    llava = load_base(config.model)
    adapter = adapter_config(config.adapter, llava.config)
    for name, factor in (("lora", 1.0), ("lora_scaled", 0.577)):
        method = METHODS[name]
        model = attach(load_base(config.model), method, peft_config(method, adapter, seed=0, total_steps=4))
        scales = {key: module.scaling["default"] for key, module in model.named_modules() if hasattr(module, "lora_A")}
        for key, scale in scales.items():
            expected = factor * (1 / 2 if "vision_tower" in key else 8 / 4)
            assert scale == pytest.approx(expected), key


# --------------------------------------------------------------------------------------------------------------- loss


def test_the_first_loss_is_that_of_the_base_on_the_words_of_the_assistant(config, tiny_llava_dir):
    """Against one item at a time, without padding; B starts at zero, so the model is the base."""
    config = having(
        config,
        adapter__lora_dropout=0.0,
        training__max_steps=1,
        training__global_batch_size=9,
        training__save_steps=None,
    )
    main(config)
    processor = AutoProcessor.from_pretrained(tiny_llava_dir)
    data = load_training(config.data, processor.tokenizer, processor, TEMPLATES["llama3"])
    assert len(data) == 9
    model = LlavaForConditionalGeneration.from_pretrained(tiny_llava_dir).eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for item in data:
            images = {"pixel_values": item["pixel_values"][None]} if "pixel_values" in item else {}
            logits = model(input_ids=torch.tensor([item["input_ids"]]), **images).logits[0, :-1]
            labels = torch.tensor(item["labels"][1:])
            scored = labels != -100
            total -= logits.log_softmax(-1)[scored].gather(1, labels[scored, None]).sum().item()
            count += int(scored.sum())
    assert losses_of(locate(config))[0][1] == pytest.approx(total / count, abs=2e-4)


def test_a_batch_of_text_leaves_the_vision_adapters_in_the_graph_and_their_values_alone(config, prepared_dir):
    """Its gradient there is zero, not missing, so that data-parallel processes agree on what they wait for."""
    items = json.loads((prepared_dir / "train.json").read_text())
    texts = [item for item in items if "image" not in item]
    (prepared_dir / "train.json").write_text(json.dumps(texts))
    seen = []

    class Watch(Trainer):
        pass

    original = Trainer.training_step

    def training_step(self, model, *args, **kwargs):
        loss = original(self, model, *args, **kwargs)
        seen.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "training_step", training_step)
        main(having(config, training__max_steps=1, training__save_steps=None))
    (gradients,) = seen
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert gradient.abs().max() == 0 or "language_model" in name, name
    assert any(gradient.abs().max() > 0 for gradient in gradients.values())


# ------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("grouped", [True, False])
def test_a_killed_run_resumes_to_the_same_adapter(config, tmp_path, kill_at, grouped):
    config = having(config, training__group_by_length=grouped)
    undisturbed = having(config, runs_dir=str(tmp_path / "undisturbed"))
    main(undisturbed)
    kill_at(3)
    with pytest.raises(Killed):
        main(config)
    assert not locate(config).adapter_path.exists()
    main(config)
    assert same(adapter_of(locate(config)), adapter_of(locate(undisturbed)))
    assert losses_of(locate(config)) == losses_of(locate(undisturbed))


def test_the_seed_decides_every_bit(config, tmp_path):
    runs = [config, having(config, runs_dir=str(tmp_path / "again")), having(config, seed=1)]
    for run in runs:
        main(run)
    first, again, other = [adapter_of(locate(run)) for run in runs]
    assert same(first, again) and not same(first, other)


def test_gradient_checkpointing_changes_nothing(config, tmp_path):
    config = having(config, adapter__lora_dropout=0.0, training__save_steps=None)
    saving = having(config, model__gradient_checkpointing=True, runs_dir=str(tmp_path / "checkpointed"))
    main(config)
    main(saving)
    assert_close(locate(saving), locate(config), STEPS)


def test_what_is_trained_on_a_base_of_16_bits_is_kept_in_32(config):
    config = having(config, model__dtype="bfloat16", training__precision="bf16", training__learning_rate=1e-5)
    main(config)
    saved = adapter_of(locate(config))
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    base = load_base(config.model).state_dict()
    # A step of 1e-5 is far below half a unit in the last place of bfloat16.
    for key, tensor in saved.items():
        if PROJECTOR in key:
            (original,) = [value for name, value in base.items() if name.endswith(key.split(f"{PROJECTOR}.")[1])]
            assert 0 < (tensor - original.float()).abs().max() < 1e-4


# -------------------------------------------------------------------------------------------------------------- qlora


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("method", ["lora", "moslora"])
def test_qlora_trains_on_a_language_model_in_nf4(config, method, tiny_llava_dir):
    config = having(config, method=METHODS[method], model__quantization="nf4")
    model = load_base(config.model)
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if hasattr(module, "weight")}
    quantised = {name for name, kind in kinds.items() if kind == "Linear4bit"}
    assert len(quantised) == 14 and all("language_model" in name for name in quantised)
    assert model.model.language_model.layers[0].mlp.up_proj.weight.quant_state.nested, "double quantisation"

    main(config)
    record = locate(config)
    assert record.is_trained()
    losses = [loss for _, loss in losses_of(record)]
    assert all(loss == loss for loss in losses)
    saved = adapter_of(record)
    assert any(PROJECTOR in key for key in saved)
    adapted = PeftModel.from_pretrained(load_base(config.model), str(record.adapter_path))
    moved = [p.abs().max() for name, p in adapted.named_parameters() if "lora_B" in name and p.ndim == 2]
    assert all(value > 0 for value in moved)


# --------------------------------------------------------------------------------------------------- several processes


@pytest.fixture
def deterministic(config) -> Config:
    """Without dropout, whose masks depend on how a batch is dealt to processes."""
    return having(
        config,
        adapter__lora_dropout=0.0,
        training__save_steps=None,
        training__global_batch_size=2,
        training__per_device_batch_size=1,
    )


@pytest.mark.slow
@pytest.mark.parametrize("stage", [None, "zero2", "zero3"])
def test_two_processes_train_as_one(deterministic, tmp_path, stage):
    """Plain data parallel, ZeRO-2 and ZeRO-3; both towers, mixers and projector trained, texts among the images."""
    if stage is not None and find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    main(deterministic)
    two = having(deterministic, runs_dir=str(tmp_path / "two"), training__deepspeed=stage, training__devices=2)
    launched(EXPERIMENT, two, tmp_path, processes=2, **({"DS_ACCELERATOR": "cpu"} if stage else {}))
    assert_close(locate(two), locate(deterministic), STEPS)


# ------------------------------------------------------------------------------------------------------------ dry run


def composed(*overrides: str) -> Config:
    launch.register(Config)
    with initialize_config_module(CONF_MODULE, version_base="1.3"):
        return launch.instantiate(Config, compose("config", overrides=list(overrides)))


def lora_size(shapes: list[tuple[int, int]], r: int, mixer: bool) -> int:
    return sum(r * (a + b) + (r * r if mixer else 0) for a, b in shapes)


@pytest.mark.parametrize(
    ("model", "r", "vision_mixer"),
    [("llama3_8b", 64, True), ("internlm2_7b", 512, False)],
    ids=["llama3", "internlm2"],
)
def test_dry_run_of_the_papers_models(model, r, vision_mixer):
    config = composed("scale=paper", f"model={model}", "method=moslora")
    found = dry_run(config)
    # Both are of LLaMA-3 8B's shape: 32 layers of 4096, 8 heads for keys and values, MLP 14336.
    llm = 32 * [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), *2 * [(4096, 14336)], (14336, 4096)]
    # 23 of CLIP ViT-L's 24 layers: features are those of the last but one.
    vit = 23 * [*4 * [(1024, 1024)], (1024, 4096), (4096, 1024)]
    projector = 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    expected = {"LLM": lora_size(llm, r, True), "ViT": lora_size(vit, 64, vision_mixer), "projector": projector}
    for part, size in expected.items():
        assert found.details[f"trainable in the {part}"].startswith(f"{size:,}"), part
    assert found.count.trainable == sum(expected.values())
    assert found.steps == -(-665_298 // 64)
    per_device, accumulated = (8, 2) if model == "llama3_8b" else (16, 1)
    assert found.details["batch arithmetic"] == f"64 = 4 devices x {per_device} x {accumulated} accumulated"
    plain = dry_run(composed("scale=paper", f"model={model}", "method=lora"))
    assert (
        found.count.trainable - plain.count.trainable == found.count.mixer == found.count.adapter - plain.count.adapter
    )
    # Under ZeRO-2 each of the four has a quarter of the optimiser's states and all of the weights.
    alone = dry_run(composed("scale=paper", f"model={model}", "method=moslora", "training.deepspeed=null")).memory
    assert found.memory.optimiser == pytest.approx(alone.optimiser / 4, rel=1e-6)
    assert found.memory.weights == alone.weights and found.memory.total < 80 * 2**30


@pytest.mark.parametrize("scale", ["smoke", "small"])
def test_shipped_scales_compose_and_count(scale):
    assert composed(f"scale={scale}").scale.name == scale


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training__global_batch_size": 4}, "global_batch_size 4 is not a multiple of per_device_batch_size 3"),
        ({"training__devices": 2}, "training.devices=2, but 1 process started"),
        ({"model__template": "vicuna"}, "model.template must be one of"),
        ({"model__path": "nowhere"}, "model.path=nowhere: "),
        ({"model__path": None}, "found neither"),
        ({"data__dir": "nowhere"}, "run python -m visual_instruction.prepare_data"),
        ({"data__text_limit": 0}, "data.text_limit must be at least 2"),
        ({"adapter__llm__r": 0, "adapter__vision__r": 0}, "one tower to adapt"),
        ({"adapter__vision__target_modules": []}, "adapter.vision.target_modules is empty"),
        ({"adapter__llm__target_modules": ["qkv"], "adapter__vision__r": 0}, "No modules were targeted"),
        ({"model__quantization": "nf5"}, "model.quantization must be none, nf4 or int8"),
        ({"training__learning_rate": 0.0}, "training.learning_rate must be positive"),
    ],
)
def test_bad_settings_are_refused_in_a_line(config, changes, message):
    assert message in refusal(having(config, **changes))


def test_a_template_of_another_model_is_refused(config, prepared_dir, tiny_llava_dir, tmp_path):
    processor = AutoProcessor.from_pretrained(tiny_llava_dir)
    folder = tmp_path / "other"
    load_base(config.model).save_pretrained(folder)
    tokenizer = processor.tokenizer
    tokenizer.add_tokens([])
    processor.save_pretrained(folder)
    # The same words without the marks of ChatML: they would be read as text.
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace("<|im_end|>", "<|im_stop|>"))
    message = refusal(having(config, model__path=str(folder), model__template="internlm2"))
    assert "<|im_end|>" in message and "template" in message


def test_a_corrupt_image_is_named_when_training_meets_it(config, prepared_dir):
    (prepared_dir / "images" / "train" / "0.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"0\.png cannot be read as an image"):
        main(having(config, training__max_steps=9))
    record: RunRecord = locate(config)
    assert record.status().state == "failed" and not record.is_trained()

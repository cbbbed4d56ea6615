"""Teaching a subject: the record, resuming bit by bit, the loss by hand, class images, images on the way, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from hydra import compose, initialize_config_module
from PIL import Image
from safetensors.torch import load_file
from torch.autograd.graph import saved_tensors_hooks

from moslora_core import launch
from moslora_core.count import count_parameters
from moslora_core.errors import UserError
from moslora_core.methods import METHODS, attach, peft_config
from subject_driven_t2i.config import CONF_MODULE, NOT_IN_LABEL, Config, locate
from subject_driven_t2i.draws import Draws
from subject_driven_t2i.models import architecture, load_unet, meta_unet
from subject_driven_t2i.train import dry_run, main, prepare

from ..training_runs import Killed, adapter_of, assert_close, having, launched, losses_of, same
from .tiny import build_pipeline

EXPERIMENT = "subject_driven_t2i"


def refusal(config: Config) -> str:
    """The one line that refuses ``config``, before there is a run folder."""
    with pytest.raises(UserError) as caught:
        main(config)
    assert "\n" not in str(caught.value)
    assert not locate(config).path.exists()
    return str(caught.value)


def elsewhere(config: Config, name: str, **changes) -> Config:
    """The same run in another folder."""
    return having(config, runs_dir=str(Path(config.runs_dir).parent / name), **changes)


# ------------------------------------------------------------------------------------------------------------- record


def test_a_run_leaves_its_record(config):
    main(config)
    record = locate(config)
    assert record.path == Path(config.runs_dir) / "subject_driven_t2i/tiny/moslora/default/seed-0"
    assert record.status().state == "finished" and not record.checkpoints_path.exists()
    assert [step for step, _ in losses_of(record)] == [1, 2, 3, 4]
    assert [row["samples"] for row in record.metrics()] == [4, 8, 12, 16] and "tokens" not in record.metrics()[0]
    saved = adapter_of(record)
    modules = {key.partition(".lora_")[0] for key in saved}
    blocks = 4  # one in the down block, one in the middle, two in the up block; two attentions each
    assert len(modules) == blocks * 2 * 4
    assert {module.rsplit(".", 1)[1] for module in modules} == {"to_q", "to_k", "to_v", "0"}
    assert sum(key.endswith(".mixer") for key in saved) == len(modules)
    for key, tensor in saved.items():
        assert tensor.dtype == torch.float32
        assert not key.endswith(".raw") or tensor.abs().max() > 0, f"{key} has not been trained"
    results = record.results().training
    assert results.steps == 4 and results.trainable_parameters == sum(tensor.numel() for tensor in saved.values())
    assert results.total_parameters - results.trainable_parameters == sum(
        parameter.numel() for parameter in build_pipeline().unet.parameters()
    )
    assert [path.name for path in (record.path / "adapter_diffusers").iterdir()] == [
        "pytorch_lora_weights.safetensors"
    ]
    assert not list(record.path.rglob("*.bin")) and not list(record.path.rglob("*.pt"))


def test_the_copy_for_diffusers_is_the_adapter(config):
    main(config)
    record = locate(config)
    copy = load_file(record.path / "adapter_diffusers" / "pytorch_lora_weights.safetensors")
    saved = adapter_of(record)
    for key, tensor in copy.items():
        name = "base_model.model." + key.removeprefix("unet.")
        if name.endswith("lora_A.weight"):
            assert torch.equal(tensor, saved[name])
        else:
            raw, mixer = (saved[name.replace("weight", leaf)] for leaf in ("raw", "mixer"))
            torch.testing.assert_close(tensor, raw @ mixer)


def test_a_finished_run_is_kept_unless_it_is_to_go(config):
    main(config)
    record = locate(config)
    before = adapter_of(record)
    with pytest.raises(UserError, match="is a finished run; on_finished=skip keeps it"):
        main(config)
    main(having(config, on_finished="skip"))
    assert same(adapter_of(record), before)
    (record.path / "images.jsonl").write_text("{}\n")
    main(having(config, on_finished="overwrite", training__learning_rate=1e-3))
    assert not same(adapter_of(record), before) and not (record.path / "images.jsonl").exists()
    assert (record.path / "adapter_diffusers").is_dir()


@pytest.mark.parametrize("method", ["lora", "two_subspaces", "moslora_folded", "dora", "pissa", "lora_plus", "loha"])
def test_every_kind_of_method_trains(config, method):
    config = having(config, method=METHODS[method], training__max_steps=1, training__save_steps=None)
    main(config)
    record = locate(config)
    assert record.is_trained()
    assert (record.path / "adapter_diffusers").exists() == (method not in ("pissa", "loha"))


def test_a_starts_gaussian_and_equal_in_all_methods(config, tmp_path):
    config = having(config, training__max_steps=1, training__save_steps=None, training__keep_steps=1)
    starts = {}
    for method in ("lora", "moslora", "moslora_frozen"):
        main(having(config, method=METHODS[method]))
        folder = locate(having(config, method=METHODS[method])).kept_adapter_path(0)
        starts[method] = load_file(folder / "adapter_model.safetensors")
    a = {key: tensor for key, tensor in starts["lora"].items() if "lora_A" in key}
    for method in ("moslora", "moslora_frozen"):
        assert all(torch.equal(starts[method][key], tensor) for key, tensor in a.items())
    values = torch.cat([tensor.flatten() for tensor in a.values()])
    assert values.std().item() == pytest.approx(1 / config.adapter.r, rel=0.1) and values.abs().max() > 2 / 4


# --------------------------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_first_loss_is_that_of_the_base(config, tmp_path, prediction):
    """By hand from the saved pipeline: its own encoders, its own schedule, its own way to call the UNet."""
    folder = tmp_path / prediction
    build_pipeline(prediction=prediction).save_pretrained(folder)
    config = having(config, model__path=str(folder), training__max_steps=1, training__save_steps=None)
    main(config)

    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    tokens, _, pooled, _ = pipeline.encode_prompt("a photo of sks dog", do_classifier_free_guidance=False)
    alphas = DDPMScheduler.from_pretrained(folder, subfolder="scheduler").alphas_cumprod
    draws = prepare(elsewhere(config, "again"), locate(elsewhere(config, "again"))).train_set
    losses = []
    for number in range(4):
        example = draws[number]
        noisy, timestep = example["noisy"], example["timestep"]
        alpha = alphas[timestep]
        image = draws.image_of(number)
        with torch.no_grad():
            predicted = pipeline.unet(
                noisy,
                timestep,
                encoder_hidden_states=tokens,
                # 20 pixels square, cropped at 0, shown at 16.
                added_cond_kwargs={"text_embeds": pooled, "time_ids": torch.tensor([[20.0, 20, 0, 0, 16, 16]])},
            ).sample
            pixels = np.array(Image.open(Path(config.data.dir) / f"subjects/rex/0{image}.png").resize((16, 16), 1))
            encoded = pipeline.vae.encode(torch.tensor(pixels / 127.5 - 1, dtype=torch.float32).permute(2, 0, 1)[None])
        mean = encoded.latent_dist.mean * pipeline.vae.config.scaling_factor
        std = encoded.latent_dist.std * pipeline.vae.config.scaling_factor
        noise = example["target"]
        if prediction == "v_prediction":  # v = sqrt(alpha) noise - sqrt(1 - alpha) x, noisy = sqrt(alpha) x + ...
            noise = alpha.sqrt() * example["target"] + (1 - alpha).sqrt() * noisy
        clean = (noisy - (1 - alpha).sqrt() * noise) / alpha.sqrt()
        if alpha > 0.2:  # at more noise, rounding hides the latents
            assert ((clean - mean).abs() < 5 * std + 1e-2).all(), "noise on the latents of another image"
        losses.append(((predicted - example["target"]) ** 2).mean().item())
    assert losses_of(locate(config))[0][1] == pytest.approx(np.mean(losses), rel=1e-4)


def test_accumulation_changes_nothing_but_rounding(config):
    whole = elsewhere(config, "whole", training__per_device_batch_size=4)
    main(config)
    main(whole)
    assert_close(locate(config), locate(whole), 4)


def test_the_methods_of_a_seed_see_the_same_examples(config):
    sets = []
    for method, seed in (("lora", 0), ("moslora", 0), ("lora", 1)):
        changed = having(config, method=METHODS[method], seed=seed)
        sets.append(prepare(changed, locate(changed)).train_set)
    assert all(isinstance(one, Draws) and len(one) == 16 for one in sets)
    assert torch.equal(sets[0][3]["noisy"], sets[1][3]["noisy"])
    assert not torch.equal(sets[0][3]["target"], sets[2][3]["target"])


def test_class_images_are_drawn_once_and_weigh_what_they_are_told(config, caplog):
    caplog.set_level("INFO")
    plain = elsewhere(config, "plain", training__max_steps=1, training__save_steps=None)
    config = having(plain, runs_dir=config.runs_dir, training__prior_weight=0.5, training__prior_images=3)
    double = elsewhere(config, "double", training__prior_weight=1.0)
    for run in (plain, config, double):
        main(run)
    assert caplog.text.count("drawing 3 images of the class, once: a photo of dog") == 1
    (cache,) = Path(config.model.cache_dir).glob("class-tiny-*")
    assert json.loads((cache / "config.json").read_text())["prompt"] == "a photo of dog"
    assert load_file(cache / "latents.safetensors")["mean"].shape == (3, 4, 8, 8)
    without, half, full = (losses_of(locate(run))[0][1] for run in (plain, config, double))
    assert half - without == pytest.approx(0.5 * (full - without), rel=1e-4) and full > half > without


# ------------------------------------------------------------------------------------------------------------- resume


def test_a_killed_run_resumes_to_the_same_adapter(config, kill_at):
    config = having(config, adapter__lora_dropout=0.2, training__lr_scheduler="cosine", training__prior_weight=0.5)
    config = having(config, training__prior_images=2, training__keep_steps=1)
    undisturbed = elsewhere(config, "undisturbed")
    main(undisturbed)
    kill_at(3)
    with pytest.raises(Killed):
        main(config)
    assert locate(config).status().state == "failed" and not locate(config).adapter_path.exists()
    changed = having(config, training__learning_rate=1e-3)
    with pytest.raises(UserError, match=r"another configuration: training\.learning_rate was 0\.01, is 0\.001"):
        main(changed)
    main(config)
    assert same(adapter_of(locate(config)), adapter_of(locate(undisturbed)))
    assert losses_of(locate(config)) == losses_of(locate(undisturbed))
    assert list(locate(config).kept_adapters()) == [0, 1, 2, 3, 4]


def test_the_seed_decides_every_bit_and_nothing_is_special_about_zero(config):
    runs = [config, elsewhere(config, "again"), having(config, seed=1)]
    for run in runs:
        torch.manual_seed(99)  # whatever happened in the process before
        torch.rand(len(run.runs_dir))
        main(run)
    first, again, other = [adapter_of(locate(run)) for run in runs]
    assert same(first, again) and not same(first, other)


def test_images_on_the_way_change_nothing(config):
    config = having(config, adapter__lora_dropout=0.2)
    drawing = elsewhere(config, "drawing", training__validation_steps=2, training__validation_prompts=[0, 2])
    main(config)
    main(drawing)
    assert same(adapter_of(locate(config)), adapter_of(locate(drawing)))
    folder = locate(drawing).path / "validation"
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    assert files == ["step-2/000.png", "step-2/002.png", "step-4/000.png", "step-4/002.png"]
    images = [np.array(Image.open(folder / file)) for file in files]
    assert images[0].shape == (16, 16, 3)
    assert not np.array_equal(images[0], images[2]) and not np.array_equal(images[0], images[1])


def test_gradient_checkpointing_changes_nothing_but_rounding(config):
    saving = elsewhere(config, "saving", model__gradient_checkpointing=True)
    main(config)
    main(saving)
    assert_close(locate(saving), locate(config), 4)


@pytest.mark.parametrize(("dtype", "precision"), [("bfloat16", "bf16"), ("float32", "bf16"), ("bfloat16", "fp32")])
def test_what_is_trained_on_a_base_of_16_bits_is_kept_in_32(config, dtype, precision):
    config = having(config, model__dtype=dtype, training__precision=precision, training__learning_rate=1e-5)
    main(config)
    saved = adapter_of(locate(config))
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    moved = torch.cat([tensor.flatten() for key, tensor in saved.items() if key.endswith(".raw")])
    assert 0 < moved.abs().max() < 1e-4  # steps that 16 bits would round to none beside a mixer of order 1
    assert all(np.isfinite(loss) for _, loss in losses_of(locate(config)))


def test_a_diverged_training_stops(config):
    config = having(config, training__learning_rate=1e30, training__max_grad_norm=1e30)
    with pytest.raises(UserError, match=r"training diverged at step \d"):
        main(config)
    record = locate(config)
    assert record.status().state == "failed" and "diverged" in record.status().reason and not record.is_trained()


def test_tensorboard_is_written_where_it_is_asked_for(config):
    pytest.importorskip("tensorboard")
    config = having(config, training__tensorboard=True, training__max_steps=1, training__save_steps=None)
    main(config)
    assert list((locate(config).path / "tensorboard").iterdir())


@pytest.mark.slow
def test_two_processes_train_as_one(config, tmp_path):
    config = having(config, training__per_device_batch_size=1, training__save_steps=None)
    main(config)
    two = elsewhere(config, "two", training__devices=2)
    launched(EXPERIMENT, two, tmp_path, processes=2)
    assert_close(locate(two), locate(config), 4)


# ------------------------------------------------------------------------------------------------------------ dry run


def composed(*overrides: str) -> Config:
    launch.register(Config)
    with initialize_config_module(CONF_MODULE, version_base="1.3"):
        return launch.instantiate(Config, compose("config", overrides=list(overrides)))


def test_dry_run_of_the_papers_model():
    config = composed("scale=paper", "method=moslora", "data.subject=dog")
    found = dry_run(config)
    # SDXL's UNet: 10 transformer blocks of width 640 and 60 of 1280, with attention to themselves and to text of 2048.
    r, modules, size = 4, 0, 0
    for blocks, width in ((10, 640), (60, 1280)):
        to_itself, to_text = 4 * [(width, width)], [(width, width), (2048, width), (2048, width), (width, width)]
        modules += blocks * 8
        size += blocks * sum(r * (a + b) for a, b in to_itself + to_text)
    assert found.count.base == 2_567_463_684, "as published"
    assert found.count.modules == modules == 560
    assert found.count.mixer == modules * r * r == 8_960
    assert found.count.trainable == size + found.count.mixer == 5_815_040
    lora = peft_config(METHODS["lora"], config.adapter, seed=0, total_steps=500, task_type=None)
    plain = count_parameters(meta_unet(architecture(config.model)), lora)
    assert plain.trainable == size == 5_806_080 and plain.mixer == 0
    assert (found.steps, found.global_batch, found.accumulation) == (500, 4, 4)
    assert found.memory.weights == 2 * found.count.base
    gib = 2**30
    assert 5 * gib < found.memory.activations < 12 * gib and 10 * gib < found.memory.total < 20 * gib
    assert (config.adapter.r, config.adapter.lora_alpha, config.adapter.lora_dropout) == (4, 4, 0.0)
    assert (config.training.learning_rate, config.training.lr_scheduler) == (1e-4, "constant")
    assert (config.training.resolution, config.training.weight_decay, config.model.dtype) == (1024, 1e-4, "float16")
    text = "\n".join(found.lines())
    assert "5,815,040" in text and "8,960" in text and "500" in text


def test_the_command_of_a_dry_run_writes_nothing(config, caplog):
    caplog.set_level("INFO")
    main(having(config, dry_run=True, data__dir="nowhere"))
    assert "optimiser steps" in caplog.text and not Path(config.runs_dir).exists()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_autograd_keeps(config, checkpointing):
    """The meta device's count against a real step on the CPU."""
    config = having(config, model__gradient_checkpointing=checkpointing, training__resolution=64)
    estimate = dry_run(config).memory.activations
    adapter = peft_config(config.method, config.adapter, seed=0, total_steps=10, task_type=None)
    unet = load_unet(config.model)
    model = attach(unet, config.method, adapter).train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model(
            torch.randn(2, 4, 8, 8),
            torch.tensor([1, 2]),
            encoder_hidden_states=torch.randn(2, 77, 20),
            added_cond_kwargs={"text_embeds": torch.randn(2, 12), "time_ids": torch.ones(2, 6)},
        ).sample.float().square().mean()
    found = sum(storage.nbytes() for storage in kept.values())
    if checkpointing:  # the estimate has the largest block's own beside it
        assert found < estimate < 3 * found
    else:
        assert estimate == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize("scale", ["smoke", "small", "paper"])
def test_shipped_scales_compose(scale):
    config = composed(f"scale={scale}")
    assert config.scale.name == scale and config.adapter.init_lora_weights == "gaussian"
    assert config.adapter.target_modules == ["to_q", "to_k", "to_v", "to_out.0"]
    assert config.data.subject is None, "a run's name says which subject it is of"


def test_keys_that_do_not_name_a_run_are_keys():
    config = composed("scale=smoke")
    for key in NOT_IN_LABEL:
        found = config
        for part in key.split("."):
            assert hasattr(found, part), key
            found = getattr(found, part)


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__subject": None}, "data.subject names no subject"),
        ({"data__subject": "fido"}, "data.subject=fido: no such subject"),
        ({"data__dir": "nowhere"}, "run python -m subject_driven_t2i.prepare_data"),
        ({"data__token": "zwx"}, "data.token=zwx"),
        ({"data__instance_prompt": "a {9}"}, "data.instance_prompt: 'a {9}' is no template"),
        ({"training__class_prompt": "a {x}"}, "training.class_prompt"),
        ({"model__path": "nowhere"}, "model.path=nowhere: "),
        ({"training__resolution": 20}, "training.resolution=20: expected a multiple of 8"),
        ({"training__global_batch_size": 3}, "global_batch_size 3 is not a multiple of per_device_batch_size 2"),
        ({"training__devices": 2}, "training.devices=2, but 1 process started"),
        ({"training__learning_rate": 0.0}, "training.learning_rate must be positive"),
        ({"training__prior_weight": -1.0}, "training.prior_weight must be at least 0"),
        ({"training__prior_images": 0}, "training.prior_images must be positive"),
        ({"training__validation_steps": 0}, "training.validation_steps must be positive"),
        ({"training__validation_steps": 1, "training__validation_prompts": [3]}, "validation_prompts: no prompt 3"),
        ({"training__eval_steps": 1}, "training.eval_steps: no validation loss here"),
        ({"training__precision": "fp16"}, "training.precision=fp16 needs a GPU"),
        ({"adapter__r": 0}, "adapter.r must be a positive rank"),
        ({"adapter__target_modules": ["q_proj"]}, "q_proj"),
        ({"method": METHODS["base"]}, "method=base is the untrained model"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_in_a_line(config, changes, message):
    assert message in refusal(having(config, **changes))


def test_a_damaged_image_is_named_before_anything_is_trained(config, prepared_dir):
    (prepared_dir / "subjects" / "rex" / "01.png").write_bytes(b"\x89PNG not quite")
    assert "01.png cannot be read as an image" in refusal(config)

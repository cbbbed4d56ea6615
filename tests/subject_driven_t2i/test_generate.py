"""Drawing a run's images: equal noise for every method, any batch, any interruption; and the manifest."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file

from moslora_core.drawn_images import read_drawn
from moslora_core.errors import UserError
from moslora_core.methods import METHODS
from moslora_core.record import Evaluation, Prediction, TaskResult
from subject_driven_t2i import drawing, generate
from subject_driven_t2i.config import Config, locate
from subject_driven_t2i.drawing import noise_seed, requests
from subject_driven_t2i.subjects import read_subjects
from subject_driven_t2i.train import main as train

from ..training_runs import Killed, having
from .test_models import saved_adapter

COUNT = 6  # three prompts, two images each


@pytest.fixture
def trained(config: Config) -> Config:
    """A configuration whose run has an adapter, as large as a long training would leave it."""
    place(config)
    return config


def place(config: Config) -> None:
    record = locate(config)
    record.path.mkdir(parents=True, exist_ok=True)
    saved_adapter(config, record.adapter_path, config.method.name)


def images_of(config: Config) -> dict[str, np.ndarray]:
    record = locate(config)
    return {image.file: np.array(Image.open(record.path / image.file)) for image in read_drawn(record)}


def stamps(config: Config) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (locate(config).path / "images").iterdir()}


# ------------------------------------------------------------------------------------------------------------ manifest


def test_a_run_draws_what_is_asked_for(trained):
    generate.main(trained)
    record = locate(trained)
    drawn = read_drawn(record)
    assert [image.key for image in drawn] == [(prompt, index) for prompt in range(3) for index in range(2)]
    assert record.status().state == "finished" and record.status().stage == "generate"
    for image in drawn:
        assert image.file == f"images/{image.prompt_index:03d}-{image.index:02d}.png"
        assert image.sha256 == hashlib.sha256((record.path / image.file).read_bytes()).hexdigest()
        assert image.noise_seed == noise_seed(0, "rex", image.prompt_index, image.index)
    assert (drawn[0].prompt, drawn[0].class_prompt) == ("a sks dog in the snow", "a dog in the snow")
    found = images_of(trained)
    assert {image.shape for image in found.values()} == {(16, 16, 3)}
    assert len({image.tobytes() for image in found.values()}) == COUNT, "every image is another"
    row = json.loads((record.path / "images.jsonl").read_text().splitlines()[0])
    assert list(row) == ["prompt_index", "index", "prompt", "class_prompt", "noise_seed", "file", "sha256"]
    facts = json.loads((record.path / "generation.json").read_text())
    assert facts["finished"] and facts["images"] == COUNT and facts["settings"]["guidance_scale"] == 5.0


def test_images_are_those_of_diffusers_own_pipeline(trained, tiny_dir):
    """The pipeline as its users call it, with the adapter through PEFT."""
    generate.main(trained)
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_dir)
    pipeline.set_progress_bar_config(disable=True)
    PeftModel.from_pretrained(pipeline.unet, str(locate(trained).adapter_path)).eval()
    for image in read_drawn(locate(trained))[:3]:
        (expected,) = pipeline(
            image.prompt,
            generator=torch.Generator().manual_seed(image.noise_seed),
            num_inference_steps=2,
            guidance_scale=5.0,
            width=16,
            height=16,
        ).images
        found = np.array(Image.open(locate(trained).path / image.file)).astype(int)
        assert np.abs(found - np.array(expected)).max() <= 1


# --------------------------------------------------------------------------------------------------------------- noise


def test_every_method_starts_from_the_same_noise(trained, monkeypatch):
    """What the UNet is first called with, for two methods, two seeds of the training, and the base."""
    starts: dict[str, list[torch.Tensor]] = {}
    original = drawing.sample

    def watched(pipeline, *arguments):
        seen = starts.setdefault(name, [])
        forward = pipeline.unet.forward

        def first(latents, *rest, **further):
            if len(seen) == 0 or watched.fresh:
                seen.append(latents.clone())
                watched.fresh = False
            return forward(latents, *rest, **further)

        watched.fresh = True
        pipeline.unet.forward = first
        try:
            return original(pipeline, *arguments)
        finally:
            pipeline.unet.forward = forward

    monkeypatch.setattr(drawing, "sample", watched)
    runs = {
        "moslora": trained,
        "lora": having(trained, method=METHODS["lora"]),
        "another seed": having(trained, seed=5),
        "base": having(trained, method=METHODS["base"]),
    }
    for name, run in runs.items():
        if name != "base":
            place(run)
        generate.main(run)
    for name in runs:
        assert len(starts[name]) == len(starts["moslora"]) == 2
        assert all(torch.equal(one, other) for one, other in zip(starts[name], starts["moslora"], strict=True))
    found = {name: images_of(run) for name, run in runs.items()}
    (file, *_) = found["base"]
    assert len({found[name][file].tobytes() for name in ("moslora", "lora", "base")}) == 3
    assert locate(runs["base"]).config_path.exists() and not locate(runs["base"]).is_trained()


def test_noise_depends_on_subject_prompt_image_and_seed(prepared_dir, config):
    seeds = {
        noise_seed(seed, subject, prompt, index)
        for seed in range(2)
        for subject in ("rex", "cola")
        for prompt in range(3)
        for index in range(2)
    }
    assert len(seeds) == 24 and all(0 <= seed < 2**53 for seed in seeds), "exact in JSON"
    subject = read_subjects(prepared_dir)["rex"]
    few = requests(subject, having(config, generation__prompts=[2]).generation)
    all_of_them = requests(subject, config.generation)
    assert few == [request for request in all_of_them if request.prompt_index == 2]


@pytest.mark.parametrize("batch_size", [1, 5])
def test_no_image_depends_on_its_batch(trained, batch_size):
    generate.main(trained)
    before = images_of(trained)
    generate.main(having(trained, on_finished="overwrite", generation__batch_size=batch_size))
    for file, image in images_of(trained).items():
        assert np.abs(image.astype(int) - before[file]).max() <= 1, file


# -------------------------------------------------------------------------------------------------------------- resume


def test_a_killed_generation_goes_on_with_the_rest(trained, monkeypatch):
    trained = having(trained, generation__batch_size=2)
    undisturbed = having(trained, runs_dir=str(Path(trained.runs_dir).parent / "undisturbed"))
    place(undisturbed)
    generate.main(undisturbed)
    calls = []
    original = generate.draw

    def dying(pipeline, wanted, *arguments):
        calls.append(len(wanted))
        if len(calls) == 2:
            raise Killed
        return original(pipeline, wanted, *arguments)

    monkeypatch.setattr(generate, "draw", dying)
    with pytest.raises(Killed):
        generate.main(trained)
    assert len(read_drawn(locate(trained))) == 2 and locate(trained).status().state == "failed"
    before = stamps(trained)
    (locate(trained).path / "images.jsonl").open("a").write('{"prompt_index": 1, "ind')  # torn by the kill
    generate.main(having(trained, generation__batch_size=3))  # another batch may be why it is started again
    assert calls[2:] == [3, 3], "whole batches, of the first one what is missing"
    assert {name: stamp for name, stamp in stamps(trained).items() if name in before} == before
    found, expected = images_of(trained), images_of(undisturbed)
    assert found.keys() == expected.keys() and len(found) == COUNT
    for file in expected:
        assert np.abs(found[file].astype(int) - expected[file]).max() <= 1


def test_a_generation_killed_inside_a_batch_draws_the_same_bits(trained, monkeypatch):
    trained = having(trained, generation__batch_size=4)
    undisturbed = having(trained, runs_dir=str(Path(trained.runs_dir).parent / "undisturbed"))
    place(undisturbed)
    generate.main(undisturbed)
    written, batches = [], []
    original_write, original_draw = generate._write_image, generate.draw

    def dying(record, request, image):
        if len(written) == 3:
            written.clear()
            raise Killed
        written.append(request)
        return original_write(record, request, image)

    def watched(pipeline, wanted, *arguments):
        batches.append(list(wanted))
        return original_draw(pipeline, wanted, *arguments)

    monkeypatch.setattr(generate, "_write_image", dying)
    with pytest.raises(Killed):
        generate.main(trained)
    before = stamps(trained)
    monkeypatch.setattr(generate, "_write_image", original_write)
    monkeypatch.setattr(generate, "draw", watched)
    generate.main(trained)
    assert [len(batch) for batch in batches] == [4, 2], "a batch of one would differ in its last bits"
    assert {name: stamp for name, stamp in stamps(trained).items() if name in before} == before
    files = [image.file for image in read_drawn(locate(undisturbed))]
    assert [image.file for image in read_drawn(locate(trained))] == files and len(files) == COUNT
    for file in files:
        assert (locate(trained).path / file).read_bytes() == (locate(undisturbed).path / file).read_bytes(), file


def test_finished_images_are_kept_unless_they_are_to_go(trained):
    generate.main(trained)
    before = stamps(trained)
    with pytest.raises(UserError, match="has its images already; on_finished=skip keeps them"):
        generate.main(trained)
    generate.main(having(trained, on_finished="skip", generation__batch_size=1))
    assert stamps(trained) == before
    other = having(trained, generation__guidance_scale=1.0)
    for on_finished in ("refuse", "skip"):
        with pytest.raises(UserError, match="other settings; on_finished=overwrite replaces them"):
            generate.main(having(other, on_finished=on_finished))
    generate.main(having(other, on_finished="overwrite"))
    assert all(stamp != before[name] for name, stamp in stamps(trained).items())


def test_an_image_that_is_lost_or_damaged_is_drawn_again(trained):
    generate.main(trained)
    before, expected = stamps(trained), images_of(trained)
    folder = locate(trained).path / "images"
    (folder / "000-01.png").unlink()
    (folder / "002-00.png").write_bytes(b"damaged")
    generate.main(having(trained, on_finished="skip"))
    assert [name for name, stamp in sorted(stamps(trained).items()) if stamp != before.get(name)] == [
        "000-01.png", "002-00.png",
    ]  # fmt: skip
    for file, image in images_of(trained).items():
        assert np.abs(image.astype(int) - expected[file]).max() <= 1


def test_images_that_are_replaced_lose_their_scores(trained):
    generate.main(trained)
    record = locate(trained)
    prediction = Prediction("oracle", "colour", "rex/0", "red", "red", True)
    task = TaskResult("accuracy", 1.0, 1)
    record.add_evaluation("oracle", Evaluation("oracle", {"colour": task}, 1.0), [prediction])
    (record.path / "scores.jsonl").write_text("{}\n")
    generate.main(having(trained, on_finished="skip"))
    assert record.results().evaluations and record.predictions()
    generate.main(having(trained, on_finished="overwrite", generation__seed=1))
    assert not record.results().evaluations and not record.predictions()
    assert not (record.path / "scores.jsonl").exists()


def test_a_new_adapter_wants_new_images(trained):
    generate.main(trained)
    saved_adapter(having(trained, method=METHODS["lora"]), locate(trained).adapter_path, "lora")
    with pytest.raises(UserError, match="images of another adapter"):
        generate.main(having(trained, on_finished="skip"))


def test_train_and_generate_take_the_same_arguments(config):
    config = having(config, training__max_steps=1, training__save_steps=None, generation__images_per_prompt=1)
    train(config)
    generate.main(config)
    assert len(read_drawn(locate(config))) == 3 and locate(config).is_trained()


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generation__prompts": [0, 3]}, "generation.prompts: no prompt 3; rex has those from 0 to 2"),
        ({"generation__prompts": [-1]}, "generation.prompts: no prompt -1"),
        ({"generation__images_per_prompt": 0}, "generation.images_per_prompt must be positive"),
        ({"generation__steps": 0}, "generation.steps must be positive"),
        ({"generation__batch_size": 0}, "generation.batch_size must be positive"),
        ({"data__subject": "fido"}, "data.subject=fido: no such subject"),
        ({"data__dir": "nowhere"}, "run python -m subject_driven_t2i.prepare_data"),
        ({"seed": 3}, "train it: python -m subject_driven_t2i.train scale=tiny method=moslora seed=3"),
        ({"on_finished": "ask"}, "on_finished must be refuse, skip or overwrite"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_in_a_line(trained, changes, message):
    changed = having(trained, **changes)
    with pytest.raises(UserError) as caught:
        generate.main(changed)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (locate(changed).path / "images.jsonl").exists()


def test_a_resolution_that_cannot_be_drawn_leaves_no_image(trained):
    with pytest.raises(UserError, match=r"generation\.resolution=20: expected a multiple of 8"):
        generate.main(having(trained, generation__resolution=20))
    assert locate(trained).status().state == "failed" and not read_drawn(locate(trained))
    generate.main(having(trained, generation__resolution=24))
    assert {image.shape for image in images_of(trained).values()} == {(24, 24, 3)}


def test_an_adapter_of_another_unet_is_refused(config):
    record = locate(config)
    record.path.mkdir(parents=True)
    saved_adapter(config, record.adapter_path, block_out_channels=(8, 24), attention_head_dim=(2, 6))
    with pytest.raises(UserError, match=r"is no adapter of model\.path=.*size mismatch"):
        generate.main(config)
    assert not read_drawn(record)


def test_an_image_that_is_no_image_is_refused(trained, monkeypatch):
    adapter = locate(trained).adapter_path / "adapter_model.safetensors"
    save_file({key: tensor * float("nan") for key, tensor in load_file(adapter).items()}, adapter, {"format": "pt"})
    with pytest.raises(UserError, match="prompt 0, image 0 is not finite"):
        generate.main(trained)
    assert not read_drawn(locate(trained))


def test_a_dry_run_draws_nothing(trained, caplog):
    caplog.set_level("INFO")
    generate.main(having(trained, dry_run=True))
    assert f"would draw {COUNT} images" in caplog.text and not (locate(trained).path / "images").exists()

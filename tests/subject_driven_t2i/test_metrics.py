"""DreamBooth's metrics: embeddings against the plain models, similarities against loops, mistakes of the user."""

from __future__ import annotations

import json
import math
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPModel, ViTModel

from moslora_core.errors import UserError
from subject_driven_t2i import metrics
from subject_driven_t2i.config import EncoderConfig, EvaluationConfig

from .metric_models import IMAGE_SIZE, TEXT_LENGTH, save_clip, save_dino


@pytest.fixture(scope="module")
def dino_dir(tmp_path_factory):
    return save_dino(tmp_path_factory.mktemp("dino"))


@pytest.fixture(scope="module")
def clip_dir(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


def encoder_config(path, resize=40, crop=IMAGE_SIZE) -> EncoderConfig:
    return EncoderConfig(str(path), None, resize, crop)


def pictures(count: int, width: int = 61, height: int = 47) -> list[Image.Image]:
    rng = np.random.default_rng(count)
    coarse = rng.integers(0, 256, (count, 6, 8, 3), dtype=np.uint8)
    return [Image.fromarray(image).resize((width, height)) for image in coarse]


def units(count: int, width: int = 5, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(count, width))
    return values / np.linalg.norm(values, axis=1, keepdims=True)


# --------------------------------------------------------------------------------------------------------- embeddings


def by_hand(image: Image.Image, resize: int, crop: int, mean, std) -> np.ndarray:
    """Resized, cut and normalised without transformers: (3, crop, crop)."""
    short = min(image.size)
    width, height = (int(resize * side / short) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - crop) // 2, (height - crop) // 2
    pixels = np.asarray(image.crop((left, top, left + crop, top + crop)), dtype=np.float64) / 255
    return ((pixels - np.array(mean)) / np.array(std)).transpose(2, 0, 1)


DINO_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP_STATISTICS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@pytest.mark.parametrize("size", [(61, 47), (40, 90)])
def test_images_are_resized_cut_and_normalised_as_each_model_was_evaluated(dino_dir, clip_dir, size):
    encoders = [metrics.load_dino(encoder_config(dino_dir)), metrics.load_clip(encoder_config(clip_dir))]
    image = pictures(1, *size)[0]
    for encoder, statistics in zip(encoders, (DINO_STATISTICS, CLIP_STATISTICS), strict=True):
        found = encoder.processor([image], return_tensors="np")["pixel_values"][0]
        assert found == pytest.approx(by_hand(image, 40, IMAGE_SIZE, *statistics), abs=1e-5)


def test_default_preprocessing_is_the_published_one():
    evaluation = EvaluationConfig(evaluations=["dreambooth"])
    dino, clip = evaluation.dino, evaluation.clip
    assert (dino.path, dino.resize, dino.crop) == ("facebook/dino-vits16", 256, 224)
    assert (clip.path, clip.resize, clip.crop) == ("openai/clip-vit-base-patch32", 224, 224)


def test_dino_embeds_by_the_class_token(dino_dir):
    encoder, images = metrics.load_dino(encoder_config(dino_dir)), pictures(3)
    pixels = np.stack([by_hand(image, 40, IMAGE_SIZE, *DINO_STATISTICS) for image in images])
    model = ViTModel.from_pretrained(dino_dir, add_pooling_layer=False).eval()
    with torch.no_grad():
        tokens = model(pixel_values=torch.tensor(pixels, dtype=torch.float32)).last_hidden_state[:, 0].numpy()
    expected = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
    assert metrics.embed_images(encoder, images, batch_size=2).numpy() == pytest.approx(expected, abs=1e-5)


def test_clip_embeds_as_its_own_forward_does(clip_dir):
    encoder, images = metrics.load_clip(encoder_config(clip_dir)), pictures(2)
    texts = ["a dog on the beach", "a toy"]
    pixels = np.stack([by_hand(image, 40, IMAGE_SIZE, *CLIP_STATISTICS) for image in images])
    tokens = AutoTokenizer.from_pretrained(clip_dir)(texts, padding=True, return_tensors="pt")
    model = CLIPModel.from_pretrained(clip_dir).eval()
    with torch.no_grad():
        output = model(pixel_values=torch.tensor(pixels, dtype=torch.float32), **tokens)
    assert metrics.embed_images(encoder, images, 8).numpy() == pytest.approx(output.image_embeds.numpy(), abs=1e-5)
    assert metrics.embed_texts(encoder, texts).numpy() == pytest.approx(output.text_embeds.numpy(), abs=1e-5)


def test_no_embedding_depends_on_its_batch(dino_dir, clip_dir):
    dino, clip, images = metrics.load_dino(encoder_config(dino_dir)), metrics.load_clip(encoder_config(clip_dir)), []
    images = pictures(5)
    for encoder in (dino, clip):
        assert torch.allclose(*(metrics.embed_images(encoder, images, size) for size in (1, 5)), atol=1e-6)
    texts = ["a toy", "a photo of a sks dog on the beach"]  # the shorter one is padded
    alone = torch.cat([metrics.embed_texts(clip, [text]) for text in texts])
    assert torch.allclose(metrics.embed_texts(clip, texts), alone, atol=1e-6)


def test_a_prompt_beyond_the_models_length_is_cut(clip_dir):
    encoder = metrics.load_clip(encoder_config(clip_dir))
    long, cut = (" ".join(["beach"] * count) for count in (40, TEXT_LENGTH - 2))
    assert torch.allclose(*(metrics.embed_texts(encoder, [text]) for text in (long, cut)))


# ------------------------------------------------------------------------------------------------------- similarities


def test_similarities_are_means_over_pairs():
    generated, real = units(4), units(3, seed=1)
    expected = [sum(float(g @ r) for r in real) / 3 for g in generated]
    assert metrics.to_real(torch.tensor(generated), torch.tensor(real)) == pytest.approx(expected)


def test_the_real_images_are_compared_with_each_other_but_not_with_themselves():
    real = units(4)
    pairs = [float(first @ second) for first, second in permutations(real, 2)]
    found = metrics.to_others(torch.tensor(real))
    assert len(found) == 4 and sum(found) / 4 == pytest.approx(sum(pairs) / len(pairs))
    same = torch.tensor(np.repeat(units(1), 3, axis=0))
    assert metrics.to_others(same) == pytest.approx([1, 1, 1])
    assert metrics.to_others(torch.tensor(units(1))) == []


def test_an_image_is_compared_with_its_own_prompt():
    images, prompts = units(3), units(3, seed=2)
    expected = [float(images[i] @ prompts[i]) for i in range(3)]
    assert metrics.to_prompts(torch.tensor(images), torch.tensor(prompts)) == pytest.approx(expected)


def test_rounding_never_leaves_the_range():
    vectors = torch.tensor(units(200, width=7, seed=3))
    vectors *= 1 + 1e-9
    both = torch.cat([vectors, -vectors])
    assert metrics.cosines(both, both).max() == 1.0 and metrics.cosines(both, both).min() == -1.0
    assert max(metrics.to_prompts(vectors, vectors)) == 1.0


# ----------------------------------------------------------------------------------------------------------- averages


def test_prompts_count_alike_however_many_images_they_have():
    value, error = metrics.over_prompts({0: [0.0, 1.0], 3: [1.0], 7: [0.25, 0.25, 0.25, 0.25]})
    means = [0.5, 1.0, 0.25]
    assert value == pytest.approx(np.mean(means))
    assert error == pytest.approx(np.std(means, ddof=1) / math.sqrt(3))
    assert metrics.over_prompts({0: [0.25, 0.75]}) == (0.5, None)


@given(st.lists(st.lists(st.floats(-1, 1), min_size=3, max_size=3), min_size=1, max_size=5))
def test_with_as_many_images_a_prompt_it_is_the_plain_mean(scores):
    value, _ = metrics.over_prompts(dict(enumerate(scores)))
    assert value == pytest.approx(np.mean(scores), abs=1e-9)


# ------------------------------------------------------------------------------------------------ mistakes of the user


def test_an_unknown_model_is_named_by_its_setting(tmp_path):
    for load, key in ((metrics.load_dino, "dino"), (metrics.load_clip, "clip")):
        with pytest.raises(UserError, match=rf"^evaluation\.{key}\.path=\S*nowhere: "):
            load(encoder_config(tmp_path / "nowhere"))
        with pytest.raises(
            UserError, match=r"^evaluation\.\w+\.path: no package|path=package:no_such_package: no pack"
        ):
            load(encoder_config("package:no_such_package"))


def test_a_model_of_another_kind_is_refused(dino_dir, clip_dir):
    with pytest.raises(UserError, match="expected model_type vit, found clip"):
        metrics.load_dino(encoder_config(clip_dir))
    with pytest.raises(UserError, match="expected model_type clip, found vit"):
        metrics.load_clip(encoder_config(dino_dir))


def test_missing_weights_are_not_drawn_at_random(tmp_path):
    folder = save_dino(tmp_path)
    weights = load_file(folder / "model.safetensors")
    dropped = sorted(weights)[0]
    save_file({key: value for key, value in weights.items() if key != dropped}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"1 weights are missing, .+ among them; expected all"):
        metrics.load_dino(encoder_config(folder))


def test_a_model_without_a_tokenizer_is_refused(tmp_path):
    folder = save_clip(tmp_path)
    for path in folder.glob("token*"):
        path.unlink()
    with pytest.raises(
        UserError, match=r"^evaluation\.clip\.path=\S+: its tokenizer has \d tokens; expected the model's"
    ):
        metrics.load_clip(encoder_config(folder))


def test_a_damaged_configuration_is_one_line(tmp_path):
    folder = save_dino(tmp_path)
    (folder / "config.json").write_text(json.dumps({"model_type": "vit", "hidden_size": "wide"}))
    with pytest.raises(UserError, match=r"^evaluation\.dino\.path="):
        metrics.load_dino(encoder_config(folder))


@pytest.mark.parametrize(
    ("resize", "crop", "message"),
    [(256, 224, "crop=224, but .+ reads images of 32 x 32"), (24, 32, "resize=24 is below evaluation.dino.crop=32")],
)
def test_an_input_size_that_cannot_work_is_refused(dino_dir, resize, crop, message):
    with pytest.raises(UserError, match=message):
        metrics.load_dino(encoder_config(dino_dir, resize, crop))

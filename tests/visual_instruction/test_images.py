"""Opening images with every damage told in a line, square padding, and what the vision tower reads."""

from __future__ import annotations

import base64
import io
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from moslora_core.errors import UserError
from visual_instruction import images
from visual_instruction.images import image_token_count, mean_colour, open_image, pad_to_square, pixel_values

SHARED = Path(__file__).parents[3] / "shared" / "data" / "llava"


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    random_pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(random_pixels)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def processor(tiny_llava_dir):
    return AutoProcessor.from_pretrained(tiny_llava_dir)


def refusal(source, name=None) -> str:
    with pytest.raises(UserError) as caught:
        open_image(source, name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------------ opening


def test_a_file_and_its_base64_are_the_same_image(tmp_path):
    image = noise(7, 5)
    path = tmp_path / "a.png"
    path.write_bytes(encoded(image))
    for source in (path, str(path), base64.b64encode(path.read_bytes()), base64.b64encode(path.read_bytes()) + b"\n"):
        opened = open_image(source)
        assert opened.mode == "RGB" and opened.tobytes() == image.tobytes()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / "a.tiff"
    noise(6, 4).convert(mode).save(path)
    opened = open_image(path)
    assert opened.mode == "RGB" and opened.size == (6, 4)


def test_the_exif_orientation_is_followed(tmp_path):
    upright = noise(6, 4)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    path = tmp_path / "a.png"
    path.write_bytes(encoded(upright, exif=exif))
    assert np.array_equal(np.asarray(open_image(path)), np.rot90(np.asarray(upright), k=-1))


def test_damaged_files_are_named(tmp_path):
    whole = encoded(noise(40, 40), "JPEG")
    cases = {
        "empty.jpg": b"",
        "text.jpg": b"<html>404 Not Found</html>",
        "cut.jpg": whole[: len(whole) // 2],
        "cut.png": encoded(noise(40, 40))[:900],
        "head.jpg": whole[:30],
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        assert f"{tmp_path / name} cannot be read as an image: " in refusal(tmp_path / name)
    assert refusal(tmp_path / "absent.png") == f"no image {tmp_path / 'absent.png'}"
    assert "cannot be read as an image" in refusal(tmp_path)  # a folder


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow tells what it makes of damage
def test_random_damage_never_escapes_as_another_error(tmp_path):
    """Whatever bytes are overwritten, there is an image or a UserError."""
    dice = random.Random(0)
    path = tmp_path / "a"
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"):
        whole = bytearray(encoded(noise(16, 16), kind))
        for _ in range(40):
            damaged = bytearray(whole)
            for _ in range(3):
                damaged[dice.randrange(len(damaged))] = dice.randrange(256)
            path.write_bytes(damaged)
            try:
                assert open_image(path).mode == "RGB"
            except UserError as error:
                assert str(path) in str(error) and "\n" not in str(error)


def test_damaged_base64_is_named():
    good = base64.b64encode(encoded(noise(4, 4)))
    assert refusal(b"!" + good, "row 7").startswith("row 7 is damaged: expected base64")
    assert refusal(good[:100], "row 7").startswith("row 7 cannot be read as an image")
    assert refusal(b"", "row 7").startswith("row 7 cannot be read as an image")


def test_an_image_that_unpacks_to_too_much_is_not_decoded(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    path.write_bytes(encoded(Image.new("1", (300, 200))))
    monkeypatch.setattr(images, "MAX_PIXELS", 59_999)
    assert refusal(path) == f"{path}: an image of 300 x 200 pixels; expected at most 59999 in all"
    monkeypatch.setattr(images, "MAX_PIXELS", 60_000)
    assert open_image(path).size == (300, 200)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow's own limit, far beyond ours
    assert "expected a smaller one" in refusal(path)


# -------------------------------------------------------------------------------------------------------------- square


@given(width=st.integers(1, 12), height=st.integers(1, 12), seed=st.integers(0, 99))
def test_padding_centres_the_image_on_a_square(width, height, seed):
    image, colour = noise(width, height, seed), (1, 2, 3)
    square = np.asarray(pad_to_square(image, colour))
    side = max(width, height)
    expected = np.empty((side, side, 3), dtype=np.uint8)
    expected[:] = colour
    top, left = (side - height) // 2, (side - width) // 2
    expected[top : top + height, left : left + width] = np.asarray(image)
    assert np.array_equal(square, expected)


def test_the_padding_is_the_processors_mean(processor):
    assert mean_colour(processor) == (122, 116, 104)  # CLIP's mean times 255, rounded down as LLaVA does
    values = pixel_values([noise(28, 14)], processor)
    assert values.shape == (1, 3, 28, 28)
    assert values[0, :, :7].abs().max() < 0.02 and values[0, :, 21:].abs().max() < 0.02
    assert values[0, :, 7:21].abs().max() > 1


def test_square_padding_keeps_what_the_crop_would_lose(processor):
    wide = noise(56, 28)
    padded, cropped = pixel_values([wide], processor), pixel_values([wide], processor, square=False)
    middle = pixel_values([wide.crop((14, 0, 42, 28))], processor)
    assert torch.equal(cropped, middle) and not torch.equal(padded, cropped)
    assert torch.equal(
        pixel_values([middle_image := noise(28, 28)], processor), pixel_values([middle_image], processor, False)
    )


def test_images_of_several_sizes_make_one_batch(processor):
    sizes = [noise(20, 30), noise(30, 20), noise(28, 28)]
    together = pixel_values(sizes, processor)
    assert together.shape == (3, 3, 28, 28)
    assert torch.equal(together, torch.cat([pixel_values([image], processor) for image in sizes]))


def test_the_number_of_image_tokens_is_the_processors_and_the_models(processor, tiny_llava_dir):
    count = image_token_count(processor)
    assert count == (28 // 14) ** 2
    by_processor = processor(images=[noise(28, 28)], text=["<image>"], return_tensors="pt")
    assert (by_processor["input_ids"] == processor.image_token_id).sum() == count
    model = LlavaForConditionalGeneration.from_pretrained(tiny_llava_dir)
    (features,) = model.get_image_features(pixel_values([noise(28, 28)], processor)).pooler_output
    assert len(features) == count


def test_a_strategy_that_keeps_the_class_token_counts_it(tiny_llava_dir):
    processor = AutoProcessor.from_pretrained(tiny_llava_dir)
    processor.vision_feature_select_strategy = "full"
    assert image_token_count(processor) == 5
    processor.patch_size = None
    with pytest.raises(UserError, match="lacks crop_size or patch_size"):
        image_token_count(processor)


# ---------------------------------------------------------------------------------------------------------- real data


@pytest.mark.shared_data
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no photographs at {SHARED}")
def test_photographs_are_read(processor):
    photographs = sorted(SHARED.glob("*.jpg"))
    assert len(photographs) == 2
    opened = [open_image(path) for path in photographs]
    assert all(image.mode == "RGB" and min(image.size) > 100 for image in opened)
    values = pixel_values(opened, processor)
    assert values.shape == (2, 3, 28, 28) and values.isfinite().all() and not torch.equal(values[0], values[1])

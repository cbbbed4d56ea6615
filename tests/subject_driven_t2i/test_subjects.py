"""Subjects and prompts: DreamBooth's folder read with every damage told in a line, and what is prepared read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moslora_core.errors import UserError
from subject_driven_t2i.config import DataConfig
from subject_driven_t2i.subjects import (
    PROMPTS_FILE,
    Prompt,
    check_template,
    open_image,
    prompt_texts,
    read_dreambooth,
    read_prompt_file,
    read_subjects,
    subject_of,
)

from .tiny import PROMPTS, TOKEN, new_subjects, write_dreambooth

DREAMBOOTH = Path(__file__).parents[3] / "shared" / "data" / "dreambooth"


def data(**changes) -> DataConfig:
    return DataConfig(**{"dir": "unused", "source": "folder", "min_size": 8, **changes})


def refusal(call, *arguments, **keywords) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------------ prompts


def test_a_prompt_has_a_text_with_the_token_and_one_without():
    prompt = Prompt("a {0} {1} on the beach")
    assert prompt.text("sks", "dog") == "a sks dog on the beach"
    assert prompt.text_without("dog") == "a dog on the beach"
    assert Prompt("{0} {1}").text_without("stuffed animal") == "stuffed animal"


@pytest.mark.parametrize(
    "text", ["a {2}", "a {name}", "a {0.__class__}", "a {0[0]}", "a {0!r}", "a {0:>9}", "a {", "{}"]
)
def test_what_is_no_template_is_refused(text):
    assert "prompts line 3" in refusal(check_template, text, "prompts line 3")


@pytest.mark.parametrize("text", ["a {0} {1} in the snow", "no field at all", "{{braces}} {1}"])
def test_templates_pass(text):
    assert check_template(text, "here") == text


def test_prompts_are_drawn_with_the_subjects_token_or_another(prepared_dir):
    subject = read_subjects(prepared_dir)["rex"]
    assert prompt_texts(subject)[0] == "a sks dog in the snow"
    assert prompt_texts(subject, "zwx")[2] == "a red zwx dog"


# --------------------------------------------------------------------------------------------------------- prompt file


def test_the_prompt_file_is_read_without_being_executed(tmp_path):
    write_dreambooth(tmp_path)
    found = read_prompt_file(tmp_path / PROMPTS_FILE)
    assert found.classes == {"rex": "dog", "cola": "can", "bear": "stuffed animal"}
    assert found.object_prompts == ("a {0} {1} in the snow", "a {0} {1} on top of a child's rug")
    assert found.live_prompts == ("a {0} {1} in the snow", "a {0} {1} wearing a red hat")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rex,dog", "rex,dog,cat", "line 4: expected a class"),
        (".format(unique_token, class_token)", ".format(open('x'))", "expected a class such as dog6,dog or a prompt"),
        ("in the snow", "in the {2}", "is no template"),
        ("Object Prompts", "Some Prompts", "line 10"),
        ("Classes", "", "line 4"),
    ],
)
def test_a_line_that_is_not_understood_is_named(tmp_path, old, new, message):
    write_dreambooth(tmp_path)
    file = tmp_path / PROMPTS_FILE
    file.write_text(file.read_text().replace(old, new, 1))
    assert message in refusal(read_prompt_file, file)


def test_a_prompt_file_without_a_part_or_without_text_is_refused(tmp_path):
    file = tmp_path / PROMPTS_FILE
    assert "cannot read" in refusal(read_prompt_file, file)
    file.write_text("Classes\n\nsubject_name,class\nrex,dog\n")
    assert "no Object Prompts found" in refusal(read_prompt_file, file)
    file.write_bytes(b"\xff\xfe\x00")
    assert "cannot read" in refusal(read_prompt_file, file)


# -------------------------------------------------------------------------------------------------------------- images


def test_an_image_is_turned_as_its_orientation_says(tmp_path):
    pixels = np.zeros((6, 10, 3), np.uint8)
    pixels[:, :5] = (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter: the camera was held upright
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    found = open_image(tmp_path / "turned.png")
    assert found.size == (6, 10) and found.mode == "RGB"
    assert np.array_equal(np.array(found), np.rot90(pixels, -1))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_are_white(tmp_path, mode):
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:2] = (10, 10, 10, 255)  # the lower half is transparent black
    image = Image.fromarray(pixels)
    image = image.quantize() if mode == "P" else image.convert(mode)
    image.save(tmp_path / "alpha.png")
    with Image.open(tmp_path / "alpha.png") as saved:
        assert saved.mode == mode
    found = np.array(open_image(tmp_path / "alpha.png"))
    assert (found[:2] == 10).all() and (found[2:] == 255).all()


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "RGB"])
def test_other_modes_become_rgb(tmp_path, mode):
    Image.new(mode, (4, 4)).save(tmp_path / "image.tiff")
    assert open_image(tmp_path / "image.tiff").mode == "RGB"


def test_damage_is_told_in_a_line(tmp_path, monkeypatch):
    path, deep = tmp_path / "image.png", tmp_path / "deep.png"
    assert f"{path}: No such file" in refusal(open_image, path)
    path.write_bytes(b"not an image")
    assert f"{path} cannot be read as an image" in refusal(open_image, path)
    noise = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert f"{path} cannot be read as an image" in refusal(open_image, path)
    path.write_bytes(whole)
    assert "30 x 40 pixels; expected at least 31 x 31" in refusal(open_image, path, 31)
    assert open_image(path, 30).size == (30, 40)
    Image.fromarray(noise[:, :, 0].astype(np.uint16) * 200).save(deep)
    assert "8 bits" in refusal(open_image, deep)
    monkeypatch.setattr("subject_driven_t2i.subjects.MAX_PIXELS", 1000)
    assert "more than 1000 pixels" in refusal(open_image, path)


# -------------------------------------------------------------------------------------------------------------- folder


def test_live_subjects_have_prompts_of_their_own(tmp_path):
    write_dreambooth(tmp_path)
    rex, cola = sorted(read_dreambooth(tmp_path, data()), key=lambda subject: not subject.live)
    assert (rex.name, rex.class_name, rex.live) == ("rex", "dog", True)
    assert (cola.name, cola.class_name, cola.live) == ("cola", "can", False)
    assert rex.prompts[1] == "a {0} {1} wearing a red hat"
    assert cola.prompts[1] == "a {0} {1} on top of a child's rug"
    assert len(rex.images) == 3 and len(cola.images) == 2
    others = read_dreambooth(tmp_path, data(live_classes=["can"]))
    assert {subject.name: subject.live for subject in others} == {"rex": False, "cola": True}


def test_subjects_can_be_chosen(tmp_path):
    write_dreambooth(tmp_path)
    assert [subject.name for subject in read_dreambooth(tmp_path, data(subjects=["rex"]))] == ["rex"]


def test_a_folder_that_is_not_dreambooths_is_refused(tmp_path):
    def read(**changes) -> str:
        return refusal(lambda: list(read_dreambooth(tmp_path / "db", data(**changes))))

    assert "no such folder" in read()
    (tmp_path / "db").mkdir()
    assert PROMPTS_FILE in read()
    write_dreambooth(tmp_path / "db")
    assert "no folder 'fido'" in read(subjects=["fido"])
    assert "no folder of a subject" in read(subjects=[])
    assert "pixels; expected at least 21 x 21" in read(min_size=21)
    (tmp_path / "db" / "fido").mkdir()
    assert "no class for the subject 'fido'; expected a line fido,<class>" in read()
    (tmp_path / "db" / "bear").mkdir()
    (tmp_path / "db" / "bear" / "notes.txt").write_text("no image")
    assert "bear: no images of the subject" in read(subjects=["bear"])


# ------------------------------------------------------------------------------------------------------------ prepared


def test_what_was_written_is_read_back(prepared_dir):
    subjects = read_subjects(prepared_dir)
    assert list(subjects) == ["rex", "cola"]
    for new in new_subjects():
        subject = subjects[new.name]
        assert (subject.class_name, subject.live, subject.token) == (new.class_name, new.live, TOKEN)
        assert subject.prompts == tuple(map(Prompt, new.prompts))
        for path, image in zip(subject.images, new.images, strict=True):
            assert np.array_equal(np.array(open_image(path)), np.array(image))


def test_the_subject_of_a_run_is_named_and_prepared(prepared_dir):
    def settings(**changes) -> DataConfig:
        return data(**{"dir": str(prepared_dir), "subject": "rex", "token": TOKEN, **changes})

    assert subject_of(settings()).prompts == tuple(map(Prompt, PROMPTS))
    assert "data.subject names no subject" in refusal(subject_of, settings(subject=None))
    message = refusal(subject_of, settings(subject="fido"))
    assert "data.subject=fido: no such subject in" in message and "it has rex, cola" in message
    assert "was prepared with sks" in refusal(subject_of, settings(token="zwx"))
    assert "run python -m subject_driven_t2i.prepare_data" in refusal(subject_of, settings(dir="nowhere"))


# --------------------------------------------------------------------------------------------------------------- real


@pytest.mark.shared_data
@pytest.mark.skipif(not DREAMBOOTH.is_dir(), reason=f"no real subjects at {DREAMBOOTH}")
def test_dreambooths_own_subjects():
    found = {subject.name: subject for subject in read_dreambooth(DREAMBOOTH, data(min_size=512))}
    assert {name: len(subject.images) for name, subject in found.items()} == {
        "can": 6, "dog": 5, "teapot": 5, "vase": 6,
    }  # fmt: skip
    assert [name for name, subject in found.items() if subject.live] == ["dog"]
    assert all(len(subject.prompts) == 25 for subject in found.values())
    assert "a {0} {1} wearing a santa hat" in found["dog"].prompts
    assert "a {0} {1} floating in an ocean of milk" in found["can"].prompts
    assert len(read_prompt_file(DREAMBOOTH / PROMPTS_FILE).classes) == 30
    assert found["dog"].images[0].size == (780, 780)

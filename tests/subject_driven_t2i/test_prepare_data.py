"""prepare_data: every source, whole or not at all, and one line for what is wrong."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moslora_core.errors import UserError
from subject_driven_t2i import smoke_world
from subject_driven_t2i.config import DataConfig
from subject_driven_t2i.prepare_data import main, prepare
from subject_driven_t2i.subjects import PROMPTS_FILE, open_image, prompt_texts, read_subjects

from .tiny import write_dreambooth


@pytest.fixture
def data(tmp_path) -> DataConfig:
    write_dreambooth(tmp_path / "dreambooth")
    return DataConfig(dir=str(tmp_path / "prepared"), source="folder", path=str(tmp_path / "dreambooth"), min_size=8)


def refusal(data: DataConfig) -> str:
    """The one line that refuses, with nothing left behind."""
    with pytest.raises(UserError) as caught:
        prepare(data)
    folder = Path(data.dir)
    assert "\n" not in str(caught.value) and not folder.exists()
    assert not list(folder.parent.glob(".prepared.*"))
    return str(caught.value)


def test_a_folder_is_prepared(data, tmp_path):
    manifest = prepare(data)
    subjects = read_subjects(data.dir)
    assert list(subjects) == ["cola", "rex"]
    assert prompt_texts(subjects["rex"]) == ["a sks dog in the snow", "a sks dog wearing a red hat"]
    for name, subject in subjects.items():
        sources = sorted((tmp_path / "dreambooth" / name).iterdir())
        for prepared, source in zip(subject.images, sources, strict=True):
            assert prepared.suffix == ".png"
            assert np.array_equal(np.array(open_image(prepared)), np.array(Image.open(source)))
    assert manifest["subjects"]["rex"] == {"class": "dog", "live": True, "images": 3, "prompts": 2}
    assert (
        manifest["sources"][PROMPTS_FILE]
        == hashlib.sha256((tmp_path / "dreambooth" / PROMPTS_FILE).read_bytes()).hexdigest()
    )
    written = Path(data.dir) / "subjects.json"
    assert manifest["files"]["subjects.json"] == hashlib.sha256(written.read_bytes()).hexdigest()
    assert manifest["files"].keys() == {"subjects.json", "subjects/"}
    assert json.loads((Path(data.dir) / "manifest.json").read_text()) == manifest


def test_the_same_folder_gives_the_same_manifest(data, tmp_path):
    assert prepare(data) == prepare(replace(data, dir=str(tmp_path / "again")))


def test_a_clone_of_dreambooths_repository_has_it_one_folder_below(data, tmp_path):
    (tmp_path / "clone").mkdir()
    Path(data.path).rename(tmp_path / "clone" / "dataset")
    prepare(replace(data, path=str(tmp_path / "clone")))
    assert list(read_subjects(data.dir)) == ["cola", "rex"]


def test_a_repository_of_the_hub_is_downloaded(data, monkeypatch):
    asked = {}

    def snapshot_download(name, **arguments):
        asked.update({"name": name, **arguments})
        return data.path

    monkeypatch.setattr("subject_driven_t2i.prepare_data.snapshot_download", snapshot_download)
    prepare(replace(data, source="hub", path="google/dreambooth", revision="main"))
    assert asked == {"name": "google/dreambooth", "repo_type": "dataset", "revision": "main"}
    assert list(read_subjects(data.dir)) == ["cola", "rex"]


def test_the_smoke_world_is_prepared(data):
    prepare(replace(data, source="smoke", path=None))
    subjects = read_subjects(data.dir)
    assert list(subjects) == [subject.name for subject in smoke_world.subjects()]
    for painted in smoke_world.subjects():
        subject = subjects[painted.name]
        assert [prompt.template for prompt in subject.prompts] == list(painted.prompts)
        for path, image in zip(subject.images, painted.images, strict=True):
            assert np.array_equal(np.array(open_image(path)), np.array(image))
    (name, *_) = subjects
    prepare(replace(data, source="smoke", subjects=[name]))
    assert list(read_subjects(data.dir)) == [name]


def test_a_failure_leaves_what_was_prepared_before(data):
    before = prepare(data)
    image = Path(data.path) / "rex" / "01.jpg"
    image.write_bytes(image.read_bytes()[:200])
    with pytest.raises(UserError, match=r"01\.jpg cannot be read as an image"):
        prepare(data)
    assert json.loads((Path(data.dir) / "manifest.json").read_text()) == before
    assert len(read_subjects(data.dir)["rex"].images) == 3


def test_the_command_tells_what_it_prepared(config, data, caplog):
    caplog.set_level("INFO")
    main(replace(config, data=data))
    assert "rex: dog (a living thing), 3 images, 2 prompts" in caplog.text
    assert "cola: can (an object), 2 images, 2 prompts" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "disk"}, "data.source must be one of smoke, folder, hub, found 'disk'"),
        ({"path": None}, "data.source=folder needs data.path"),
        ({"path": "nowhere"}, "data.path=nowhere: no such folder"),
        ({"source": "hub", "path": "no/such-repository"}, "data.path=no/such-repository: "),
        ({"subjects": ["fido"]}, "no folder 'fido'"),
        ({"source": "smoke", "subjects": ["fido"]}, "no subject 'fido' in the smoke world"),
        ({"min_size": 0}, "data.min_size must be positive"),
        ({"min_size": 300}, "20 x 20 pixels; expected at least 300 x 300"),
        ({"token": "two words"}, "data.token must be one word"),
        ({"token": " "}, "data.token must be one word"),
        ({"instance_prompt": "a {2}"}, "data.instance_prompt: 'a {2}' is no template"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(data, changes, message):
    assert message in refusal(replace(data, **changes))


def test_an_empty_folder_of_a_subject_is_named(data):
    for path in (Path(data.path) / "cola").iterdir():
        path.unlink()
    assert "cola: no images of the subject" in refusal(data)

"""Evaluation: the oracle's numbers against what was painted, similarities against loops, resuming, mistakes."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from analysis import t2i_table
from analysis.load import load_runs
from analysis.paper import load_paper_numbers
from moslora_core.drawn_images import FACTS, MANIFEST, read_scores, references
from moslora_core.errors import UserError
from moslora_core.methods import METHODS
from moslora_core.prepared import write_manifest
from moslora_core.record import RunRecord, append_jsonl, write_json
from subject_driven_t2i import evaluate, generate, metrics, smoke_world
from subject_driven_t2i.config import (
    Config,
    DataConfig,
    EncoderConfig,
    EvaluationConfig,
    GenerationConfig,
    ModelConfig,
    ScaleConfig,
    locate,
)
from subject_driven_t2i.subjects import NewSubject, Subject, subject_of, write_subjects

from .metric_models import IMAGE_SIZE, save_clip, save_dino

IMAGES_PER_PROMPT = 2


@pytest.fixture(scope="module")
def world_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    subjects = [
        NewSubject(subject.name, subject.class_name, False, subject.images, subject.prompts[:4])
        for subject in smoke_world.subjects()[:2]
    ]
    write_subjects(folder, subjects, smoke_world.TOKEN)
    write_manifest(folder, {})
    return folder


@pytest.fixture(scope="module")
def encoder_dirs(tmp_path_factory) -> tuple[Path, Path]:
    return save_dino(tmp_path_factory.mktemp("dino")), save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def make_config(tmp_path, world_dir, encoder_dirs):
    """The configuration of a run with two images a prompt, and of tiny encoders."""

    def make(method: str = "moslora", evaluations=("oracle",), subject: str = "toy", **given) -> Config:
        dino, clip = (EncoderConfig(str(path), None, IMAGE_SIZE, IMAGE_SIZE) for path in encoder_dirs)
        return Config(
            method=METHODS[method],
            scale=ScaleConfig("smoke"),
            model=ModelConfig("tiny", "nowhere"),
            data=DataConfig(dir=str(world_dir), source="smoke", subject=subject, min_size=1),
            generation=GenerationConfig(images_per_prompt=IMAGES_PER_PROMPT),
            evaluation=EvaluationConfig(list(evaluations), dino, clip, batch_size=3, chunk=3),
            runs_dir=str(tmp_path / "runs"),
            run_name=f"data.subject={subject}",
            seed=1,
            **given,
        )

    return make


def painted(subject: Subject, prompt: int, **changed: str) -> Image.Image:
    """What the smoke world wants to see for a prompt, but for the attributes that are ``changed``."""
    wanted = replace(smoke_world.expected(subject.name, subject.prompts[prompt].template), **changed)
    sprite = smoke_world.Sprite(wanted.shape, wanted.foreground, wanted.core)
    return smoke_world.paint(sprite, wanted.background, dx=1)


def draw(config: Config, images: dict[tuple[int, int], Image.Image] | None = None) -> RunRecord:
    """Writes images and their manifest as generate does; by default what the prompts ask for."""
    subject, record = subject_of(config.data), locate(config)
    keys = [(prompt, index) for prompt in range(len(subject.prompts)) for index in range(IMAGES_PER_PROMPT)]
    images = {key: painted(subject, key[0]) for key in keys} if images is None else images
    (record.path / "images").mkdir(parents=True, exist_ok=True)
    (record.path / MANIFEST).unlink(missing_ok=True)
    for (prompt, index), image in images.items():
        file = f"images/{prompt:03d}-{index:02d}.png"
        image.save(record.path / file)
        row = {
            "prompt_index": prompt,
            "index": index,
            "prompt": subject.prompts[prompt].text(subject.token, subject.class_name),
            "class_prompt": subject.prompts[prompt].text_without(subject.class_name),
            "noise_seed": 7 * prompt + index,
            "file": file,
            "sha256": hashlib.sha256((record.path / file).read_bytes()).hexdigest(),
        }
        append_jsonl(record.path / MANIFEST, [row])
    write_json(record.path / FACTS, {"finished": True, "settings": {"steps": 25}})
    return record


def rewrite(path: Path, change) -> None:
    """Changes the rows of a JSONL file."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in change(rows)))


# ------------------------------------------------------------------------------------------------------------- oracle


def test_the_oracle_counts_what_was_painted_wrong(make_config):
    config = make_config()
    subject, rng = subject_of(config.data), random.Random(1)
    wrong = {"subject_shape": 0, "subject_colour": 0, "subject_core": 0, "background": 0}
    others = {"shape": "square", "foreground": "green", "core": "purple", "background": "white"}
    images, expected = {}, {}
    for prompt in range(4):
        for index in range(IMAGES_PER_PROMPT):
            attributes = {name: other for name, other in others.items() if rng.random() < 0.5}
            images[prompt, index] = painted(subject, prompt, **attributes)
            expected[prompt, index] = {
                task: int(attribute not in attributes) for task, attribute in evaluate.ORACLE_TASKS.items()
            }
            for task, attribute in evaluate.ORACLE_TASKS.items():
                wrong[task] += attribute in attributes
    assert all(0 < count < 8 for count in wrong.values())
    record = draw(config, images)
    evaluate.main(config)
    found = record.results().evaluations["oracle"]
    assert found.protocol == "oracle" and list(found.tasks) == list(wrong)
    for task, count in wrong.items():
        result = found.tasks[task]
        assert (result.metric, result.n, result.value) == ("accuracy", 8, pytest.approx(1 - count / 8))
        assert result.stderr == pytest.approx(np.std([1] * (8 - count) + [0] * count, ddof=1) / 8**0.5)
    scores = {(row["prompt_index"], row["index"]): row for row in read_scores(record)}
    assert {key: {task: row[task] for task in wrong} for key, row in scores.items()} == expected
    assert {row["evaluation"] for row in scores.values()} == {"oracle"}


def test_the_oracles_answers_can_be_paired_image_by_image(make_config):
    runs = {}
    for method in ("lora", "moslora"):
        config = make_config(method)
        subject = subject_of(config.data)
        record = draw(config)
        if method == "lora":
            painted(subject, 2, shape="circle").save(record.path / "images/002-01.png")
            digest = hashlib.sha256((record.path / "images/002-01.png").read_bytes()).hexdigest()
            rewrite(record.path / MANIFEST, lambda rows, new=digest: [*rows[:5], rows[5] | {"sha256": new}, *rows[6:]])
        evaluate.main(config)
        runs[method] = {(row["task"], row["id"]): row for row in record.predictions()}
    assert runs["lora"].keys() == runs["moslora"].keys() and len(runs["lora"]) == 4 * 8
    differing = [key for key, row in runs["lora"].items() if row["correct"] != runs["moslora"][key]["correct"]]
    assert differing == [("subject_shape", "toy/002-01")]
    assert all(row["gold"] == runs["moslora"][key]["gold"] for key, row in runs["lora"].items())
    assert runs["lora"]["subject_shape", "toy/002-01"]["prediction"] == "circle"


def test_what_cannot_be_read_is_wrong(make_config):
    config = make_config()
    noise = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    keys = [(prompt, index) for prompt in range(4) for index in range(2)]
    record = draw(config, {key: Image.fromarray(pixels) for key, pixels in zip(keys, noise, strict=True)})
    evaluate.main(config)
    assert {result.value for result in record.results().evaluations["oracle"].tasks.values()} == {0.0}
    assert {row["prediction"] for row in record.predictions()} == {None}


def test_the_real_images_are_read_too_but_for_the_background(make_config):
    config = make_config(subject="badge")
    record = draw(config)
    evaluate.main(config)
    tasks = record.results().evaluations["oracle"].tasks
    for task in ("subject_shape", "subject_colour", "subject_core"):
        assert (tasks[task].breakdown["real_images"].value, tasks[task].breakdown["real_images"].n) == (1.0, 5)
    assert tasks["background"].breakdown is None


# --------------------------------------------------------------------------------------------------------- dreambooth


def random_images(seed: int) -> dict[tuple[int, int], Image.Image]:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 4, 4, 3), dtype=np.uint8)
    keys = [(prompt, index) for prompt in range(4) for index in range(2)]
    return {
        key: Image.fromarray(image).resize((40, 48), Image.Resampling.NEAREST)
        for key, image in zip(keys, pixels, strict=True)
    }


def test_similarities_are_averaged_over_pairs_images_and_prompts(make_config):
    config = make_config(evaluations=["dreambooth"])
    subject, images = subject_of(config.data), random_images(0)
    record = draw(config, images)
    evaluate.main(config)
    found = record.results().evaluations["dreambooth"].tasks

    dino, clip = metrics.load_dino(config.evaluation.dino), metrics.load_clip(config.evaluation.clip)
    real = [Image.open(path).convert("RGB") for path in subject.images]
    vectors = {
        "dino": [metrics.embed_images(dino, [image], 1)[0].numpy() for image in (*real, *images.values())],
        "clip_i": [metrics.embed_images(clip, [image], 1)[0].numpy() for image in (*real, *images.values())],
    }
    scores = {(row["prompt_index"], row["index"]): row for row in read_scores(record)}
    assert scores.keys() == images.keys()
    for task, embedded in vectors.items():
        of_real, of_drawn = embedded[:5], dict(zip(images, embedded[5:], strict=True))
        for key, vector in of_drawn.items():
            assert scores[key][task] == pytest.approx(np.mean([vector @ other for other in of_real]), abs=1e-6)
        by_prompt = [np.mean([scores[prompt, index][task] for index in range(2)]) for prompt in range(4)]
        result = found[task]
        assert (result.value, result.n) == (pytest.approx(np.mean(by_prompt)), 8)
        assert result.stderr == pytest.approx(np.std(by_prompt, ddof=1) / 2)
        pairs = [of_real[i] @ of_real[j] for i in range(5) for j in range(5) if i != j]
        of_real = result.breakdown["real_images"]
        assert (of_real.value, of_real.n) == (pytest.approx(np.mean(pairs), abs=1e-6), 5)
    for (prompt, index), image in images.items():
        text = subject.prompts[prompt].template.format("", "toy").replace("  ", " ")
        assert "sks" not in text
        vector = metrics.embed_texts(clip, [text])[0].numpy()
        expected = metrics.embed_images(clip, [image], 1)[0].numpy() @ vector
        assert scores[prompt, index]["clip_t"] == pytest.approx(expected, abs=1e-6)
    assert found["clip_t"].breakdown is None
    assert {task: result.metric for task, result in found.items()} == {
        "dino": "cosine similarity to the real images, DINO",
        "clip_i": "cosine similarity to the real images, CLIP",
        "clip_t": "cosine similarity to the prompt, CLIP",
    }
    assert record.predictions() == []


def test_a_subject_of_one_image_has_no_row_of_real_images(make_config, tmp_path):
    one = tmp_path / "one"
    one.mkdir()
    world = smoke_world.subjects()[0]
    write_subjects(one, [NewSubject("toy", "toy", False, world.images[:1], world.prompts[:4])], smoke_world.TOKEN)
    write_manifest(one, {})
    config = make_config(evaluations=["dreambooth"])
    config.data.dir = str(one)
    record = draw(config)
    evaluate.main(config)
    assert all(task.breakdown is None for task in record.results().evaluations["dreambooth"].tasks.values())


class Killed(BaseException):
    """Ends a process as a signal would."""


def test_a_stopped_evaluation_goes_on_where_it_stopped(make_config, monkeypatch):
    config = make_config(evaluations=["dreambooth"])
    record = draw(config, random_images(1))
    embedded, original = [], metrics.embed_images

    def embed_images(encoder, images, batch_size):
        if len(images) != 5 and len(embedded) == 2:
            raise Killed
        embedded.extend([len(images)] if encoder.tokenizer and len(images) != 5 else [])  # the real images are five
        return original(encoder, images, batch_size)

    monkeypatch.setattr(metrics, "embed_images", embed_images)
    with pytest.raises(Killed):
        evaluate.main(config)
    assert record.results().evaluations == {} and read_scores(record) == []
    assert embedded == [3, 3]
    embedded[:] = [None] * 3  # never at two again
    evaluate.main(config)
    assert sum(count for count in embedded if count) == 5  # the first chunk of three was saved, the second was not
    resumed = record.results().evaluations["dreambooth"]
    monkeypatch.undo()
    whole = make_config(evaluations=["dreambooth"], on_finished="overwrite")
    evaluate.main(whole)
    again = record.results().evaluations["dreambooth"]
    assert {task: result.value for task, result in resumed.tasks.items()} == pytest.approx(
        {task: result.value for task, result in again.tasks.items()}
    )
    assert not list(record.path.glob("*partial*"))


def test_nothing_is_kept_of_a_stopped_evaluation_of_other_images(make_config, monkeypatch, caplog):
    config = make_config(evaluations=["dreambooth"])
    record = draw(config, random_images(1))
    original = metrics.to_prompts
    calls = iter(range(100))

    def to_prompts(*arguments):
        if next(calls) == 1:
            raise Killed
        return original(*arguments)

    monkeypatch.setattr(metrics, "to_prompts", to_prompts)
    with pytest.raises(Killed):
        evaluate.main(config)
    draw(config, random_images(2))
    with caplog.at_level(logging.WARNING):
        evaluate.main(config)
    assert "starting afresh" in caplog.text
    resumed = [row["dino"] for row in read_scores(record)]
    evaluate.main(make_config(evaluations=["dreambooth"], on_finished="overwrite"))
    assert [row["dino"] for row in read_scores(record)] == pytest.approx(resumed)


# ------------------------------------------------------------------------------------------------------------ command


def test_both_evaluations_stand_side_by_side(make_config):
    record = draw(make_config())
    evaluate.main(make_config(evaluations=["oracle", "dreambooth"]))
    assert list(record.results().evaluations) == ["oracle", "dreambooth"]
    assert [row["evaluation"] for row in read_scores(record)] == ["oracle"] * 8 + ["dreambooth"] * 8
    evaluate.main(make_config(on_finished="overwrite"))  # the oracle's again
    assert [row["evaluation"] for row in read_scores(record)] == ["dreambooth"] * 8 + ["oracle"] * 8
    assert len(record.predictions()) == 4 * 8
    assert record.status().state == "finished" and record.status().stage == "evaluate"


def test_a_finished_evaluation_is_never_silently_replaced(make_config, monkeypatch):
    record = draw(make_config())
    evaluate.main(make_config())
    with pytest.raises(UserError, match="has the evaluation oracle already; on_finished=skip keeps it"):
        evaluate.main(make_config())
    monkeypatch.setattr(smoke_world, "read", lambda image: pytest.fail("read again"))
    evaluate.main(make_config(on_finished="skip"))
    evaluate.main(make_config(on_finished="skip", evaluations=["dreambooth", "oracle"]))
    assert set(record.results().evaluations) == {"oracle", "dreambooth"}


def test_the_untrained_base_records_its_configuration(make_config):
    config = make_config("base")
    record = draw(config)
    evaluate.main(config)
    assert "subject: toy" in record.config_path.read_text()
    settings = record.results().evaluations["oracle"].settings
    assert (settings["subject"], settings["drawing"]) == ("toy", {"steps": 25})


def test_the_record_keeps_small_copies_of_the_real_images(make_config, tmp_path):
    large = tmp_path / "large"
    large.mkdir()
    world = smoke_world.subjects()[0]
    images = [image.resize((1200, 800)) for image in world.images[:2]]
    write_subjects(large, [NewSubject("toy", "toy", False, images, world.prompts[:4])], smoke_world.TOKEN)
    write_manifest(large, {})
    config = make_config(evaluations=["dreambooth"])
    config.data.dir = str(large)
    record = draw(config)
    evaluate.main(config)
    assert [Image.open(path).size for path in references(record)] == [(384, 256)] * 2
    shown = draw(make_config(subject="badge"))
    evaluate.main(make_config(subject="badge"))
    original = subject_of(make_config(subject="badge").data).images
    assert [np.asarray(Image.open(path)).tobytes() for path in references(shown)] == [
        np.asarray(Image.open(path)).tobytes() for path in original
    ]


def test_what_generate_draws_is_scored_and_tabled(config, encoder_dirs):
    """The untrained tiny pipeline from its noise to the report: every part reads what the one before wrote."""
    dino, clip = (EncoderConfig(str(path), None, IMAGE_SIZE, IMAGE_SIZE) for path in encoder_dirs)
    config.method = METHODS["base"]
    config.evaluation = EvaluationConfig(["dreambooth"], dino, clip)
    generate.main(config)
    evaluate.main(config)
    settings = locate(config).results().evaluations["dreambooth"].settings
    assert (settings["drawing"]["steps"], settings["drawing"]["seed"]) == (2, 0)
    runs, left_out = load_runs(Path(config.runs_dir), "subject_driven_t2i")
    assert [run.method for run in runs] == ["base"] and not left_out
    (document,) = t2i_table.build(runs, left_out, load_paper_numbers())
    assert "| base (no adapter) |  1† |        1 |" in document.markdown
    assert "Subjects: rex; images of each: 6." in document.markdown


def test_a_dry_run_touches_nothing(make_config, caplog):
    config = make_config(evaluations=["dreambooth"], dry_run=True)
    with caplog.at_level(logging.INFO):
        evaluate.main(config)
    assert "would evaluate" in caplog.text and not locate(config).path.exists()


# ------------------------------------------------------------------------------------------------ mistakes of the user


def no_images(config, record):
    (record.path / MANIFEST).unlink()


def not_finished(config, record):
    write_json(record.path / FACTS, {"finished": False})


def damaged_settings(config, record):
    write_json(record.path / FACTS, {"finished": True, "settings": 25})


def one_file_missing(config, record):
    (record.path / "images/001-00.png").unlink()


def one_file_changed(config, record):
    painted(subject_of(config.data), 0, background="pink").save(record.path / "images/003-01.png")


def one_image_not_drawn(config, record):
    rewrite(record.path / MANIFEST, lambda rows: rows[:-1])


def one_image_twice(config, record):
    rewrite(record.path / MANIFEST, lambda rows: [*rows, rows[0]])


def fewer_asked_for(config, record):
    config.generation.images_per_prompt = 1


def another_prompt(config, record):
    rewrite(record.path / MANIFEST, lambda rows: [rows[0] | {"class_prompt": "a toy at sea"}, *rows[1:]])


def a_file_elsewhere(config, record):
    rewrite(record.path / MANIFEST, lambda rows: [rows[0] | {"file": "../../secret.png"}, *rows[1:]])


def a_damaged_row(config, record):
    rewrite(record.path / MANIFEST, lambda rows: [rows[0] | {"noise_seed": "7"}, *rows[1:]])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (no_images, r"no images in \S+; run python -m subject_driven_t2i.generate with the same arguments first"),
        (not_finished, r"moslora/data.subject=toy/seed-1: its images are not finished; run python -m .*generate"),
        (damaged_settings, r"generation.json is damaged: settings must be an object"),
        (one_file_missing, r"images/001-00.png: No such file.*; run python -m subject_driven_t2i.generate"),
        (
            one_file_changed,
            r"images/003-01.png has sha256 \w{12}\.\.\., expected \w{12}\.\.\. .*on_finished=overwrite",
        ),
        (one_image_not_drawn, r"1 of 8 images are missing, number 1 of prompt 3 first; run python -m .*generate"),
        (one_image_twice, r"image 0 of prompt 0 is there twice"),
        (fewer_asked_for, r"has 4 images that generation.prompts and generation.images_per_prompt do not ask for"),
        (another_prompt, r"was drawn for 'a toy at sea', but prompt 0 of toy is 'a toy on a \w+ background'"),
        (a_file_elsewhere, r"images.jsonl line 1: file must lie in .*, found '../../secret.png'"),
        (a_damaged_row, r"images.jsonl line 1: noise_seed must be a whole number, found '7'"),
    ],
)
def test_images_that_are_not_those_of_the_manifest_are_refused(make_config, harm, message):
    config = make_config()
    record = draw(config)
    harm(config, record)
    with pytest.raises(UserError, match=message):
        evaluate.main(config)
    assert not (record.path / "results.json").exists() and not (record.path / "scores.jsonl").exists()


def test_an_unknown_encoder_leaves_nothing_behind(make_config):
    config = make_config(evaluations=["dreambooth"])
    config.evaluation.dino.path = "no/such-model"
    record = draw(config)
    with pytest.raises(UserError, match=r"^evaluation\.dino\.path=no/such-model: "):
        evaluate.main(config)
    assert not (record.path / "results.json").exists() and not (record.path / "scores.jsonl").exists()
    assert record.status().state == "failed"


def test_an_image_of_another_size_is_not_of_the_smoke_world(make_config):
    config = make_config()
    draw(config, {key: image.resize((64, 64)) for key, image in random_images(0).items()})
    with pytest.raises(UserError, match=r"images/000-00.png: image: 64 x 64 pixels; expected 32 x 32"):
        evaluate.main(config)


def test_a_subject_that_the_oracle_does_not_know_is_refused(make_config, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    world = smoke_world.subjects()[0]
    write_subjects(other, [NewSubject("dog", "dog", True, world.images, world.prompts[:4])], smoke_world.TOKEN)
    write_manifest(other, {})
    config = make_config(subject="dog")
    config.data.dir = str(other)
    images = {(prompt, index): world.images[0] for prompt in range(4) for index in range(2)}
    draw(config, images)
    with pytest.raises(UserError, match="'dog' is none of the smoke world's"):
        evaluate.main(config)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("evaluations", ["fid"], "evaluation.evaluations: unknown evaluation 'fid'; .* oracle, dreambooth"),
        ("evaluations", [], "evaluation.evaluations names no evaluation"),
        ("batch_size", 0, "evaluation.batch_size must be positive, found 0"),
        ("chunk", -1, "evaluation.chunk must be positive, found -1"),
    ],
)
def test_settings_out_of_range_are_refused(make_config, key, value, message):
    config = make_config()
    setattr(config.evaluation, key, value)
    with pytest.raises(UserError, match=message):
        evaluate.main(config)

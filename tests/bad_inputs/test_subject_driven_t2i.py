"""Bad inputs of subject-driven generation: subjects, pipelines, class images, drawn images, the human study."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from moslora_core.drawn_images import FACTS, MANIFEST
from moslora_core.evaluations import digest
from moslora_core.record import RunRecord
from subject_driven_t2i import generate, prior
from subject_driven_t2i.config import Config, DataConfig, DreamBoothConfig, GenerationConfig, ModelConfig
from subject_driven_t2i.human_study.export import export
from subject_driven_t2i.human_study.runs import find_arms
from subject_driven_t2i.human_study.store import VOTES_FILE, add_rater, open_store, vote
from subject_driven_t2i.human_study.study import read_study
from subject_driven_t2i.models import load_pipeline
from subject_driven_t2i.prepare_data import prepare
from subject_driven_t2i.subjects import PROMPTS_FILE, read_subjects

from ..subject_driven_t2i.study_runs import place_study
from ..subject_driven_t2i.tiny import RESOLUTION, build_pipeline, write_dreambooth, write_prepared
from .files import NOT_IMAGES, instead, once, put, unreadable
from .row import BadInput, check_refused

Write = Callable[[Path], object]


def changed(file: str, before: Write, change: Callable[[Any], Any]) -> Write:
    """Writes what ``before`` does, and what ``change`` makes of the content of a JSON file: in place, or another."""

    def write(folder: Path) -> None:
        before(folder)
        content = json.loads((folder / file).read_text(encoding="utf-8"))
        other = change(content)
        put(folder / file, json.dumps(content if other is None else other))

    return write


def without(key: str | int, part: Callable[[Any], Any] = lambda content: content) -> Callable[[Any], None]:
    """Takes ``key`` out of a part of the content."""

    def change(content: Any) -> None:
        part(content).pop(key)

    return change


# ------------------------------------------------------------------------------------------------------------ subjects

SUBJECTS = "prepared/subjects.json"
PHOTO = "dreambooth/rex/00.jpg"
PROMPT_FILE = f"dreambooth/{PROMPTS_FILE}"
write_source = once(lambda folder: write_dreambooth(folder / "dreambooth"))
write_subjects = once(lambda folder: write_prepared(folder / "prepared"))


def read_source(folder: Path, **changes: Any) -> None:
    settings = {"source": "folder", "path": str(folder / "dreambooth"), "subjects": ["rex", "cola"], "min_size": 8}
    prepare(DataConfig(str(folder / "data"), **settings | changes))


def read_prepared(folder: Path) -> None:
    read_subjects(folder / "prepared")


def prompts(old: str, new: str) -> Write:
    def write(folder: Path) -> None:
        write_source(folder)
        path = folder / PROMPT_FILE
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")

    return write


def subjects(change: Callable[[Any], Any]) -> Write:
    return changed(SUBJECTS, write_subjects, change)


def deep_photo(folder: Path) -> None:
    write_source(folder)
    Image.new("I;16", (20, 20)).save(folder / "dreambooth/rex/00.png")


def folder_for_a_photo(folder: Path) -> None:
    write_source(folder)
    (folder / "dreambooth/rex/photo.png").mkdir()


def subject_rows() -> list[BadInput]:
    beach = "'a {0} {1} in the snow'.format(unique_token, class_token),\n\"a"
    lists: dict[str, tuple[Write, tuple[str, ...]]] = {
        "is empty": (instead(PROMPT_FILE, write_source, b""), ("Classes",)),
        "is not UTF-8": (instead(PROMPT_FILE, write_source, b"\xff"), ()),
        "is UTF-16": (instead(PROMPT_FILE, write_source, "Classes\n".encode("utf-16")), ()),
        "has no classes": (prompts("Classes", "Names"), ("line 1",)),
        "has no object prompts": (prompts("Object Prompts", "Live Subject Prompts"), ("Object Prompts",)),
        "has no class for a subject": (prompts("cola,can", "coke,can"), ("'cola'",)),
        "has a class of no name": (prompts("cola,can", "cola,"), ("line 5",)),
        "has a subject of no name": (prompts("cola,can", ",can"), ("line 5",)),
        "has a subject twice": (prompts("bear,stuffed animal", "rex,bear"), ("line 6", "rex")),
        "has quotes that are not closed": (prompts("cola,can", '"cola,can'), ("'cola'",)),
        "has a third column": (prompts("cola,can", "cola,can,red"), ("line 5", "red")),
        "has a field that is none of the two": (prompts("{1} wearing", "{2} wearing"), ("{2}", "line")),
        "reads an attribute": (prompts("{1} wearing", "{1.__class__} wearing"), ("__class__", "line")),
        "has a brace that is not closed": (prompts("{1} wearing", "{1 wearing"), ("{1 wearing", "line")),
        "has other Python": (prompts(beach, "__import__('os')\n" + beach), ("__import__", "line")),
    }
    rows: dict[str, tuple[Callable[[Any], Any], tuple[str, ...]]] = {
        "is an object": (lambda s: {"rex": s[0]}, ("list",)),
        "is null": (lambda s: "null", ()),
        "is an empty list": (lambda s: s.clear(), ()),
        "has text for a subject": (lambda s: s.append("rex"), ()),
        **{f"has no {key}": (without(key, lambda s: s[0]), (key,)) for key in ("name", "token", "prompts")},
        "has an unknown key": (lambda s: s[0].update(colour="red"), ("colour",)),
        "has a number for a name": (lambda s: s[0].update(name=3), ("name",)),
        "has a list for a class": (lambda s: s[0].update(class_name=["dog"]), ("class_name",)),
        "has text for live": (lambda s: s[0].update(live="no"), ("live", "'no'")),
        "has null for a token": (lambda s: s[0].update(token=None), ("token",)),
        "has text for its images": (lambda s: s[0].update(images="subjects/rex/00.png"), ("images",)),
        "has no images": (lambda s: s[0].update(images=[]), ("images",)),
        "has a number for an image": (lambda s: s[0].update(images=[0]), ("images",)),
        "has an image above its folder": (lambda s: s[0].update(images=["../secret.png"]), ("'../secret.png'",)),
        "has an absolute image": (lambda s: s[0].update(images=["/secret.png"]), ("'/secret.png'",)),
        "has an image that is not there": (lambda s: s[0].update(images=["subjects/rex/09.png"]), ("09.png",)),
        "has an image of an endless name": (lambda s: s[0].update(images=["a" * 5000]), ("aaa...",)),
        "has an image of a NUL byte": (lambda s: s[0].update(images=["a\0.png"]), ()),
        "has text for its prompts": (lambda s: s[0].update(prompts="a {0} {1}"), ("prompts",)),
        "has a number for a prompt": (lambda s: s[0].update(prompts=[1]), ("prompts",)),
        "has no prompts": (lambda s: s[0].update(prompts=[]), ("prompts",)),
        "has a prompt with another field": (lambda s: s[0].update(prompts=["a {name}"]), ("{name}",)),
        "has a subject twice": (lambda s: s.append(s[0]), ("rex",)),
        "has half a character": (lambda s: s[0].update(class_name="\ud800"), ()),
    }
    return [
        BadInput(
            "the list of prompts is absent",
            once(lambda folder: put(folder / PHOTO, b"")),
            read_source,
            (PROMPTS_FILE,),
        ),
        *(
            BadInput(f"the list of prompts {wrong}", write, read_source, (PROMPTS_FILE, *names))
            for wrong, (write, names) in lists.items()
        ),
        *(
            BadInput(f"a photograph {wrong}", instead(PHOTO, write_source, content), read_source, ("00.jpg",))
            for wrong, content in NOT_IMAGES.items()
        ),
        BadInput("a photograph has 16 bits a channel", deep_photo, read_source, ("00.png", "I;16")),
        BadInput("a photograph is a folder", folder_for_a_photo, read_source, ("photo.png",)),
        BadInput(
            "the photographs are too small",
            write_source,
            lambda f: read_source(f, min_size=99),
            ("00.jpg", "min_size"),
        ),
        BadInput(
            "a subject is asked for that is not there",
            write_source,
            lambda folder: read_source(folder, subjects=["rex", "dog9"]),
            ("data.subjects", "'dog9'", "rex"),
        ),
        BadInput(
            "a subject is asked for above the folder",
            write_source,
            lambda folder: read_source(folder, subjects=["../rex"]),
            ("data.subjects", "'../rex'"),
        ),
        *unreadable("the list of subjects", SUBJECTS, write_subjects, read_prepared),
        *unreadable("the manifest", "prepared/manifest.json", write_subjects, read_prepared, names=("prepared",)),
        *(
            BadInput(f"the list of subjects {wrong}", subjects(change), read_prepared, names)
            for wrong, (change, names) in rows.items()
        ),
    ]


# ----------------------------------------------------------------------------------------------------------- pipelines

write_pipeline = once(lambda folder: build_pipeline().save_pretrained(folder / "sdxl"))


def read_pipeline(folder: Path) -> None:
    load_pipeline(ModelConfig("tiny", str(folder / "sdxl")))


def part(file: str, **values: Any) -> Write:
    return changed(f"sdxl/{file}", write_pipeline, lambda content: content.update(values))


def pipeline_rows() -> list[BadInput]:
    faults: dict[str, tuple[Write, tuple[str, ...]]] = {
        "has weights of no bytes": (
            instead("sdxl/unet/diffusion_pytorch_model.safetensors", write_pipeline, b""),
            (),
        ),
        "has a list for an index": (changed("sdxl/model_index.json", write_pipeline, lambda _: []), ()),
        "has a number for a part": (part("model_index.json", unet=3), ()),
        "has a part of an unknown class": (part("model_index.json", unet=["diffusers", "UNet9"]), ("UNet9",)),
        "has text for its channels": (part("unet/config.json", block_out_channels="wide"), ()),
        "has channels of 0": (part("unet/config.json", block_out_channels=[0, 0]), ()),
        "has channels below 0": (part("unet/config.json", block_out_channels=[-8, -16]), ()),
        "has groups of 0": (part("unet/config.json", norm_num_groups=0), ()),
        "has an unknown block": (part("unet/config.json", down_block_types=["Block", "Block"]), ("Block",)),
        "has null for its conditions": (part("unet/config.json", addition_embed_type=None), ("text_time",)),
        "has text for the factor of its latents": (part("vae/config.json", scaling_factor="big"), ("scaling_factor",)),
        "has NaN for the factor of its latents": (
            part("vae/config.json", scaling_factor=math.nan),
            ("scaling_factor",),
        ),
        "has an unknown prediction": (part("scheduler/scheduler_config.json", prediction_type="x"), ("'x'",)),
        "has text for its steps": (part("scheduler/scheduler_config.json", num_train_timesteps="all"), ()),
        "has -1 steps": (part("scheduler/scheduler_config.json", num_train_timesteps=-1), ()),
    }
    return [
        *unreadable("the pipeline's index", "sdxl/model_index.json", write_pipeline, read_pipeline, names=("sdxl",)),
        *unreadable("the UNet's config", "sdxl/unet/config.json", write_pipeline, read_pipeline, names=("sdxl",)),
        *unreadable(
            "the scheduler's config",
            "sdxl/scheduler/scheduler_config.json",
            write_pipeline,
            read_pipeline,
            names=("sdxl",),
        ),
        *unreadable("the tokenizer", "sdxl/tokenizer/tokenizer.json", write_pipeline, read_pipeline, names=("sdxl",)),
        *(
            BadInput(f"the pipeline {wrong}", write, read_pipeline, ("sdxl", *names))
            for wrong, (write, names) in faults.items()
        ),
    ]


# -------------------------------------------------------------------------------------------------------- class images


def prior_config(folder: Path) -> Config:
    return Config(
        model=ModelConfig("tiny", "sdxl", cache_dir=str(folder / "models")),
        training=DreamBoothConfig(resolution=RESOLUTION, prior_images=2),
        generation=GenerationConfig(),
    )


def class_images(tensors: dict[str, torch.Tensor] | bytes | None) -> Write:
    def write(folder: Path) -> None:
        facts = prior._facts(prior_config(folder), "a dog")
        target = folder / "models" / f"class-tiny-{digest(facts)[:12]}"
        put(target / prior.FACTS_FILE, json.dumps(facts))
        put(folder / "models" / f".{target.name}.lock", b"")
        if isinstance(tensors, bytes):
            put(target / prior.LATENTS_FILE, tensors)
        elif tensors is not None:
            save_file(tensors, target / prior.LATENTS_FILE)

    return write


def class_image_rows() -> list[BadInput]:
    latents = torch.zeros(2, 4, RESOLUTION // 2, RESOLUTION // 2)
    faults = {
        "are absent": None,
        "are empty": b"",
        "are no tensors": b"not safetensors at all",
        "are under another name": {"latents": latents},
        "are too few": {"mean": latents[:1]},
        "are a vector": {"mean": latents.flatten()},
        "are not finite": {"mean": latents * math.nan},
    }
    return [
        BadInput(
            f"the class images {wrong}",
            class_images(tensors),
            lambda folder: prior.class_latents(prior_config(folder), None, "a dog"),
            (prior.LATENTS_FILE,),
        )
        for wrong, tensors in faults.items()
    ]


# ------------------------------------------------------------------------------------------- drawn images, human study

write_study = once(lambda folder: place_study(folder, ["rex", "fizz"]))
RUN = "runs/subject_driven_t2i/smoke/moslora/data.subject=rex/seed-1"
STUDY = "runs/subject_driven_t2i/smoke/human_study/test"


def write_votes(folder: Path) -> None:
    write_study(folder)
    study = read_study(folder / STUDY)
    open_store(folder / STUDY)
    add_rater(folder / STUDY, study)
    vote(folder / STUDY, 1, study.pairs[0].id, study.questions[0], "left")


def in_votes(statement: str) -> Write:
    """Changes the votes behind the back of the study."""

    def write(folder: Path) -> None:
        write_votes(folder)
        with sqlite3.connect(folder / STUDY / VOTES_FILE) as connection:
            connection.execute("PRAGMA ignore_check_constraints = ON")
            connection.execute(statement)
        connection.close()

    return write


def find(folder: Path) -> None:
    find_arms(["method=moslora"], ["method=lora"], folder / "runs", "smoke", ["rex"], seed=1)


def read_facts(folder: Path) -> None:
    generate._is_done(RunRecord(folder / RUN), "fingerprint", [], "skip")


def drawn(change: Callable[[dict], Any]) -> Write:
    def write(folder: Path) -> None:
        write_study(folder)
        path = folder / RUN / MANIFEST
        first, *others = path.read_text(encoding="utf-8").splitlines()
        row = json.loads(first)
        other = change(row)
        put(path, "\n".join([json.dumps(row if other is None else other), *others]) + "\n")

    return write


def study(change: Callable[[Any], Any]) -> Write:
    return changed(f"{STUDY}/study.json", write_study, change)


def drawn_rows() -> list[BadInput]:
    manifest: dict[str, tuple[Callable[[dict], Any], tuple[str, ...]]] = {
        "has a list for a line": (lambda row: [row], ("line 1",)),
        "has no sha256": (without("sha256"), ("line 1", "sha256")),
        "has text for a number": (lambda row: row.update(index="0"), ("line 1", "index")),
        "has true for a number": (lambda row: row.update(index=True), ("line 1", "index")),
        "has NaN for a seed": (lambda row: row.update(noise_seed=math.nan), ("line 1", "noise_seed")),
        "has a prompt below 0": (lambda row: row.update(prompt_index=-1), ("line 1", "prompt_index")),
        "has a list for a prompt": (lambda row: row.update(prompt=["a"]), ("line 1", "prompt")),
        "has an image twice": (lambda row: row.update(index=1), ("twice",)),
        "has a file above the run": (lambda row: row.update(file="../../x.png"), (MANIFEST, "'../../x.png'")),
        "has an absolute file": (lambda row: row.update(file="/x.png"), (MANIFEST, "'/x.png'")),
        "has a file that is not there": (lambda row: row.update(file="images/x.png"), ("rex",)),
        "has a file of an endless name": (lambda row: row.update(file="a" * 5000), ()),
    }
    facts: dict[str, Any] = {
        "are a list": [],
        "have a list of settings": {"finished": True, "settings": []},
        "have text for finished": {"finished": "yes", "settings": {}},
    }
    return [
        *(
            BadInput(f"the manifest of drawn images {wrong}", drawn(change), find, names)
            for wrong, (change, names) in manifest.items()
        ),
        *(
            BadInput(
                f"the facts of drawn images {wrong}",
                instead(f"{RUN}/{FACTS}", write_study, json.dumps(content).encode()),
                read,
                (FACTS,),
            )
            for wrong, content in facts.items()
            for read in (find, read_facts)
        ),
        *unreadable("the facts of drawn images", f"{RUN}/{FACTS}", write_study, find),
    ]


def study_rows() -> list[BadInput]:
    faults: dict[str, tuple[Callable[[Any], Any], tuple[str, ...]]] = {
        "is a list": (lambda s: [s], ()),
        "is of another schema": (lambda s: s.update(schema_version=2), ("schema_version", "2")),
        **{f"has no {key}": (without(key), (key,)) for key in ("seed", "first", "pairs")},
        "has an unknown key": (lambda s: s.update(colour="red"), ("colour",)),
        "has text for a seed": (lambda s: s.update(seed="0"), ("seed", "'0'")),
        "has a list for a method": (lambda s: s.update(first=["moslora"]), ("first",)),
        "has a method of no name": (without("name", lambda s: s["first"]), ("first", "name")),
        "has an object of pairs": (lambda s: s.update(pairs={"001": s["pairs"][0]}), ("pairs",)),
        "has no pairs": (lambda s: s.update(pairs=[]), ("pairs",)),
        "has a pair twice": (lambda s: s["pairs"].append(s["pairs"][0]), ("pairs", "001")),
        "has a pair of one image": (without(0, lambda s: s["pairs"][0]["images"]), ("pairs.0.images",)),
        "has a pair of three images": (lambda s: s["pairs"][0]["images"].append("x.png"), ("pairs.0.images",)),
        "has text for images": (lambda s: s["pairs"][0].update(images="ab"), ("pairs.0.images",)),
        "has a pair of an unknown kind": (lambda s: s["pairs"][0].update(kind="odd"), ("kind", "'odd'")),
        "has a pair of an unknown subject": (lambda s: s["pairs"][0].update(subject="dog9"), ("subject", "'dog9'")),
        "expects what is no answer": (lambda s: s["pairs"][0].update(expected={"x": "y"}), ("expected",)),
        "has a size of one number": (lambda s: s.update(size=[48]), ("size",)),
        "has a size of 0": (lambda s: s.update(size=[0, 0]), ("size",)),
        "has no questions": (lambda s: s.update(questions=[]), ("questions",)),
        "has an unknown question": (lambda s: s.update(questions=["beauty"]), ("questions", "'beauty'")),
        "has NaN for a share": (lambda s: s.update(max_wrong=math.nan), ("max_wrong",)),
        "has a share above 1": (lambda s: s.update(max_wrong=25), ("max_wrong", "25")),
        "has an image above its folder": (lambda s: s["pairs"][0].update(images=["../x", "../x"]), ("'../x'",)),
        "has an absolute image": (lambda s: s["pairs"][0].update(images=["/x", "/x"]), ("'/x'",)),
        "has an image that is not there": (lambda s: s["pairs"][0].update(images=["x", "x"]), ("x",)),
        "has an image of an endless name": (lambda s: s["pairs"][0].update(images=["a" * 5000] * 2), ()),
    }
    votes: dict[str, tuple[Write, tuple[str, ...]]] = {
        "are absent": (write_study, ()),
        "are a text": (instead(f"{STUDY}/{VOTES_FILE}", write_study, b"rater,pair,choice\n" * 99), ()),
        "are cut off": (instead(f"{STUDY}/{VOTES_FILE}", write_study, b"SQLite format 3\0" + b"\0" * 600), ()),
        "have other tables": (in_votes("ALTER TABLE votes RENAME COLUMN choice TO answer"), ("choice",)),
        "are on an unknown pair": (in_votes("UPDATE votes SET pair = '999'"), ()),
        "are on an unknown question": (in_votes("UPDATE votes SET question = 'beauty'"), ("beauty",)),
        "have an unknown choice": (in_votes("UPDATE votes SET choice = 'both'"), ()),
        "have a screen of another pair": (in_votes("UPDATE screens SET pair = '9' || pair"), ()),
    }
    return [
        *unreadable("the study", f"{STUDY}/study.json", write_study, lambda f: read_study(f / STUDY), names=("test",)),
        *(
            BadInput(f"the study {wrong}", study(change), lambda folder: read_study(folder / STUDY), names)
            for wrong, (change, names) in faults.items()
        ),
        *(
            BadInput(f"the votes {wrong}", write, lambda folder: export(folder / STUDY), (VOTES_FILE, *names))
            for wrong, (write, names) in votes.items()
        ),
    ]


ROWS = [*subject_rows(), *pipeline_rows(), *class_image_rows(), *drawn_rows(), *study_rows()]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_bad_inputs_are_refused(row, tmp_path):
    check_refused(row, tmp_path)

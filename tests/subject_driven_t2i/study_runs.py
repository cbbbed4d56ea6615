"""Finished runs for the human study, with images that a test can tell apart by their colour."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import yaml
from PIL import Image, PngImagePlugin

from moslora_core.prepared import sha256, write_manifest
from moslora_core.record import RunRecord, append_jsonl, override_label, write_atomic, write_json
from subject_driven_t2i.config import EXPERIMENT
from subject_driven_t2i.human_study.design import draw_study, write_study
from subject_driven_t2i.human_study.runs import find_arms

SIZE = (48, 48)
TEMPLATES = [f"a {{0}} {{1}} in place {number}" for number in range(12)]
# The red of an image says its method, the green its subject, the blue its prompt.
RED = {"lora": 40, "moslora": 200}
SUBJECTS = {"rex": "dog", "fizz": "can", "tom": "cat", "sid": "sloth plushie"}


def colour(method: str, subject: str, prompt: int, index: int = 0) -> tuple[int, int, int]:
    return RED[method], 10 + 40 * list(SUBJECTS).index(subject), 10 * prompt + index


def place_data(folder: Path, subjects: Mapping[str, str] = SUBJECTS) -> Path:
    """A prepared folder, as prepare_data writes it; photographs have no red."""
    rows = []
    for number, (name, class_name) in enumerate(subjects.items()):
        files = []
        for photo in range(3):
            file = f"subjects/{name}/{photo:02d}.png"
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (60, 40), (0, 10 + 40 * number, photo)).save(folder / file)
            files.append(file)
        row = {"name": name, "class_name": class_name, "live": class_name in ("dog", "cat"), "token": "sks"}
        rows.append(row | {"images": files, "prompts": TEMPLATES})
    (folder / "subjects.json").write_text(json.dumps(rows), encoding="utf-8")
    write_manifest(folder, {})
    return folder


def place_run(
    root: Path,
    method: str,
    subject: str,
    *,
    overrides: Iterable[str] = (),
    seed: int = 1,
    prompts: int = 10,
    images: int = 2,
    size: tuple[int, int] = SIZE,
    drawing: Mapping[str, object] | None = None,
) -> RunRecord:
    """A run as generate leaves it, below ``root/runs``; its data lies in ``root/data``."""
    overrides = [*overrides]
    label = override_label([*overrides, f"data.subject={subject}"])
    record = RunRecord.locate(root / "runs", EXPERIMENT, "smoke", method, label, seed)
    config = {
        "method": {"name": method, **dict(entry.removeprefix("method.").split("=") for entry in overrides)},
        "scale": {"name": "smoke"},
        "data": {"dir": str(root / "data"), "subject": subject},
        "seed": seed,
    }
    write_atomic(record.config_path, yaml.safe_dump(config))
    (record.path / "images").mkdir()
    notes = PngImagePlugin.PngInfo()
    notes.add_text("Software", f"drawn with {method}")
    rows = []
    for prompt in range(prompts):
        for index in range(images):
            file = f"images/{prompt:03d}-{index:02d}.png"
            image = Image.new("RGB", size, colour(method, subject, prompt, index))
            image.save(record.path / file, pnginfo=notes, icc_profile=f"profile of {method}".encode())
            class_prompt = TEMPLATES[prompt].format("", SUBJECTS[subject]).replace("  ", " ")
            rows.append(
                {
                    "prompt_index": prompt,
                    "index": index,
                    "prompt": TEMPLATES[prompt].format("sks", SUBJECTS[subject]),
                    "class_prompt": class_prompt,
                    "noise_seed": 1000 * prompt + index,
                    "file": file,
                    "sha256": sha256(record.path / file),
                }
            )
    append_jsonl(record.path / "images.jsonl", rows)
    settings = {"subject": subject, "steps": 4, "images_per_prompt": images, **(drawing or {})}
    write_json(record.path / "generation.json", {"finished": True, "settings": settings})
    record.set_status("finished", "generate")
    return record


def rewrite_manifest(record: RunRecord, change) -> None:
    """Applies ``change`` to the list of rows of a run's manifest."""
    path = record.path / "images.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    change(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def place_runs(root: Path, subjects: Iterable[str] = SUBJECTS) -> Path:
    """Both methods' runs of every subject and their data; returns the folder of runs."""
    place_data(root / "data")
    for subject in subjects:
        for method in RED:
            place_run(root, method, subject)
    return root / "runs"


def place_study(root: Path, subjects: Iterable[str] = ("rex", "fizz"), **settings: int) -> Path:
    """A study of moslora (first) against lora (second); returns its folder."""
    subjects = [*subjects]
    runs = place_runs(root, subjects)
    arms = find_arms(["method=moslora"], ["method=lora"], runs, "smoke", subjects, seed=1)
    folder = runs / EXPERIMENT / "smoke" / "human_study" / "test"
    write_study(folder, draw_study(*arms, **{"name": "test", "prompts": 2, "checks": 2, **settings}))
    return folder

"""Bad inputs of run records: what the stages wrote, as resuming, evaluating and reporting read it."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from moslora_core.checkpoints import damage, seal
from moslora_core.drawn_images import DrawnImage, drawing_settings, read_drawn, verified
from moslora_core.errors import UserError
from moslora_core.evaluations import in_chunks
from moslora_core.launch import differences
from moslora_core.prepared import read_manifest, sha256
from moslora_core.record import (
    Evaluation,
    KnockOut,
    KnockOutPoint,
    Prediction,
    RunRecord,
    TaskResult,
    Training,
    append_jsonl,
    write_json,
)
from moslora_core.running import TrainingConfig, resume_point, zero_stage

from .files import NOT_JSON, edited, instead, once, put, unreadable
from .row import BadInput, check_refused

RESULTS, STATUS, ENVIRONMENT = "results.json", "status.json", "environment.json"
METRICS, PREDICTIONS, ZIPPED = "metrics.jsonl", "predictions.jsonl", "predictions.jsonl.gz"
CURVE, IMAGES, FACTS = "knock_out/exact+pairs.json", "images.jsonl", "generation.json"
PARTIAL, CONFIG, MANIFEST, SEAL = "predictions.exact.partial.jsonl", "config.yaml", "manifest.json", "seal.json"

NOT_JSONL = {
    "is no JSON": b"{torn\n",
    "is a list": b"[1]\n",
    "is null": b"null\n",
    "is not UTF-8": b'{"a": "\xff"}\n',
    "is UTF-16": '{"a": 1}\n'.encode("utf-16"),
    "has a NUL byte": b'{"a": "\x00"}\n',
    "has an empty line": b"\n",
    "nests too deep": b"[" * 100_000 + b"\n",
    "has 5000 digits": b'{"a": ' + b"9" * 5000 + b"}\n",
    "has half a character": rb'{"a": "\ud800"}' + b"\n",
    "has half a character in bytes": b'{"a": "\xed\xa0\x80"}\n',
}
NOT_GZIP = {"is plain": b"{}\n", "is empty": b"", "is cut off": gzip.compress(b"{}\n")[:-9]}
NOT_YAML = {
    "is torn": b"a: [",
    "is not UTF-8": b"a: \xff",
    "has a NUL byte": b"a: \x00",
    "is a list": b"- a\n",
    "is a number": b"3\n",
    "nests too deep": b"[" * 2000,
    "has 5000 digits": b"a: " + b"9" * 5000,
    "has a wrong tag": b"a: !!int x",
    "asks for code": b"a: !!python/object/apply:os.getcwd []",
}


@dataclass
class Settings:
    seed: int = 0


def record(folder: Path) -> RunRecord:
    return RunRecord(folder)


@once
def write(folder: Path) -> None:
    """A record of everything, and what stands beside it."""
    run = record(folder)
    run.set_training(Training(1.0, 4, 8, "rss", 2, 4, final_loss=0.5))
    tasks = {"boolq": TaskResult("accuracy", 0.5, 2, breakdown={"part": TaskResult("accuracy", 0.5, 1)})}
    rows = [Prediction("exact", "boolq", f"boolq/{number}", "true", None, False) for number in range(2)]
    run.add_evaluation("exact", Evaluation("exact", tasks, 1.0, {"beams": 1}), rows)
    run.set_status("finished", "evaluate")
    write_json(folder / ENVIRONMENT, {"train": {"git_commit": "0123"}})
    append_jsonl(run.metrics_path, [{"step": 1, "loss": 0.5, "seconds": 0.1}])
    point = KnockOutPoint("weakest", 0, 0.5, 1, {"boolq": 0.5})
    run.write_knock_out("exact+pairs", KnockOut("exact", "pairs", 2, {"boolq": 2}, [point], 1.0, {}, "f"))
    append_jsonl(folder / PARTIAL, [{"fingerprint": "f"}])
    put(folder / CONFIG, "seed: 0\n")
    put(folder / "images" / "000-00.png", b"")
    empty = sha256(folder / "images" / "000-00.png")
    append_jsonl(folder / IMAGES, [asdict(DrawnImage(0, 0, "a sks can", "a can", 1, "images/000-00.png", empty))])
    write_json(folder / FACTS, {"settings": {"steps": 4}, "finished": True, "fingerprint": "f"})
    write_json(folder / MANIFEST, {"subset": {"train_items": None}, "files": {}})
    put(folder / "checkpoint-4" / "trainer_state.json", "{}")
    seal(folder / "checkpoint-4", processes=1)
    put(folder / ".lock", "")
    put(folder / "zero.json", '{"zero_optimization": {"stage": 2}}')


def zipped(folder: Path) -> None:
    write(folder)
    put(folder / ZIPPED, gzip.compress((folder / PREDICTIONS).read_bytes()))
    (folder / PREDICTIONS).unlink()


def results(folder: Path) -> None:
    record(folder).results()


def evaluate(folder: Path) -> None:
    record(folder).add_evaluation("other", Evaluation("other", {}, 1.0), [])


def status(folder: Path) -> None:
    record(folder).status()


def start(folder: Path) -> None:
    with record(folder).stage("train"):
        pass


def metrics(folder: Path) -> None:
    resume_point(record(folder))


def curves(folder: Path) -> None:
    record(folder).knock_outs()


def images(folder: Path) -> None:
    [verified(record(folder), image) for image in read_drawn(record(folder))]


def settings(folder: Path) -> None:
    drawing_settings(record(folder))


def manifest(folder: Path) -> None:
    read_manifest(folder, "prepare_data")


def recorded(folder: Path) -> None:
    differences(Settings(), folder / CONFIG)


def zero(folder: Path) -> None:
    zero_stage(TrainingConfig(deepspeed=str(folder / "zero.json")))


def sealed(folder: Path) -> None:
    """A damaged checkpoint is passed over, with what this says in a warning."""
    if (wrong := damage(folder / "checkpoint-4")) is not None:
        raise UserError(wrong)


def resumed(folder: Path) -> None:
    list(in_chunks(folder / PARTIAL, "f", {"boolq": 1}, 1, lambda: None, lambda *_: []))


def at(file: str, read: Callable[[Path], object], keys: str, value: Any, *names: str) -> BadInput:
    """A value of another kind under keys that are joined by dots."""

    def change(raw: Any) -> None:
        *path, last = (int(key) if key.isdigit() else key for key in keys.split("."))
        for key in path:
            raw = raw[key]
        raw[last] = value

    wrong = f"{file}: {keys} is {json.dumps(value)}"
    return BadInput(wrong, edited(file, write, change), read, (Path(file).name, *(names or (keys,))))


def without(file: str, read: Callable[[Path], object], keys: str) -> BadInput:
    def change(raw: Any) -> None:
        *path, last = keys.split(".")
        for key in path:
            raw = raw[int(key) if key.isdigit() else key]
        del raw[last]

    return BadInput(f"{file} lacks {keys}", edited(file, write, change), read, (Path(file).name, keys.split(".")[-1]))


def twice(file: str, before: Callable[[Path], object] = write) -> Callable[[Path], None]:
    def double(folder: Path) -> None:
        before(folder)
        put(folder / file, (folder / file).read_bytes() * 2)

    return double


def files(
    file: str, read: Callable[[Path], object], contents: Mapping[str, bytes], absent: bool = False
) -> list[BadInput]:
    """Rows of a file that is something else; of its absence only where that is a fault."""
    rows = unreadable(file, file, write, read, dict(contents))
    return rows if absent else rows[1:]


def tops(file: str, read: Callable[[Path], object]) -> list[BadInput]:
    wrong = {"a list": b"[]", "null": b"null", "a number": b"3", "text": b'"a"'}
    return [BadInput(f"{file} is {what}", instead(file, write, text), read, (file,)) for what, text in wrong.items()]


TASK = "evaluations.exact.tasks.boolq"

ROWS = [
    *files(RESULTS, results, NOT_JSON),
    *files(STATUS, status, NOT_JSON),
    *files(ENVIRONMENT, start, NOT_JSON),
    *files(CURVE, curves, {name: NOT_JSON[name] for name in ("is empty", "nests too deep")}),
    *files(FACTS, settings, NOT_JSON),
    *files(MANIFEST, manifest, NOT_JSON),
    *files("zero.json", zero, NOT_JSON, absent=True),
    *files(METRICS, metrics, NOT_JSONL),
    *files(PREDICTIONS, evaluate, NOT_JSONL),
    *files(PARTIAL, resumed, NOT_JSONL),
    *files(IMAGES, images, NOT_JSONL),
    *files(CONFIG, recorded, NOT_YAML, absent=True),
    *(
        BadInput(f"{ZIPPED} {wrong}", instead(ZIPPED, zipped, bad), evaluate, (ZIPPED,))
        for wrong, bad in NOT_GZIP.items()
    ),
    *tops(RESULTS, results),
    *tops(STATUS, status),
    *tops(ENVIRONMENT, start),
    *tops(FACTS, settings),
    *tops(MANIFEST, manifest),
    *tops("zero.json", zero),
    # results.json
    at(RESULTS, results, "schema_version", 2),
    at(RESULTS, results, "schema_version", True),
    at(RESULTS, results, "schema_version", "1"),
    at(RESULTS, results, "speed", 1),
    at(RESULTS, results, "training", [], "training must be"),
    at(RESULTS, results, "training.seconds", math.nan),
    at(RESULTS, results, "training.seconds", -1),
    at(RESULTS, results, "training.steps", "4"),
    at(RESULTS, results, "training.steps", 4.5),
    at(RESULTS, results, "training.peak_memory_bytes", True),
    at(RESULTS, results, "training.peak_memory_kind", None),
    at(RESULTS, results, "training.final_loss", math.inf),
    at(RESULTS, results, "training.final_loss", "<1e400>"),
    at(RESULTS, results, "training.total_parameters", "<huge>", "digits"),
    at(RESULTS, results, "training.total_parameters", 10**400),
    without(RESULTS, results, "training.steps"),
    at(RESULTS, results, "evaluations", [], "evaluations must be"),
    at(RESULTS, results, "evaluations.exact", None),
    at(RESULTS, results, "evaluations.exact.protocol", 3),
    at(RESULTS, results, "evaluations.exact.protocol", "<half>", "surrogates"),
    at(RESULTS, results, "evaluations.exact.seconds", None),
    at(RESULTS, results, "evaluations.exact.settings", "beams"),
    at(RESULTS, results, "evaluations.exact.settings.beams", math.nan),
    at(RESULTS, results, "evaluations.exact.tasks", 1),
    at(RESULTS, results, TASK, 0.5),
    at(RESULTS, results, f"{TASK}.metric", ["accuracy"]),
    at(RESULTS, results, f"{TASK}.value", "0.5"),
    at(RESULTS, results, f"{TASK}.value", None),
    at(RESULTS, results, f"{TASK}.n", -1),
    at(RESULTS, results, f"{TASK}.n", 1.5),
    at(RESULTS, results, f"{TASK}.stderr", {}),
    at(RESULTS, results, f"{TASK}.lenient", "<1e400>"),
    at(RESULTS, results, f"{TASK}.breakdown", []),
    at(RESULTS, results, f"{TASK}.breakdown.part", 0.5),
    at(RESULTS, results, f"{TASK}.breakdown.part.breakdown", {}, "breakdown.part has a breakdown"),
    at(RESULTS, results, f"{TASK}.accuracy\nof", 1, "unknown key"),
    without(RESULTS, results, f"{TASK}.n"),
    # status.json and environment.json
    at(STATUS, status, "state", "asleep"),
    at(STATUS, status, "state", None),
    at(STATUS, status, "stage", 3),
    at(STATUS, status, "reason", ["out of memory"]),
    at(STATUS, status, "mood", "good"),
    without(STATUS, status, "stage"),
    at(ENVIRONMENT, start, "train", [], "stages"),
    # knock_out/*.json
    at(CURVE, curves, "schema_version", None),
    at(CURVE, curves, "points", {}),
    at(CURVE, curves, "points.0", None),
    at(CURVE, curves, "points.0.share", 1.5),
    at(CURVE, curves, "points.0.removed", -1),
    at(CURVE, curves, "points.0.order", 3),
    at(CURVE, curves, "points.0.tasks", ["boolq"]),
    at(CURVE, curves, "points.0.tasks", {"piqa": 0.5}, "['boolq']", "['piqa']"),
    at(CURVE, curves, "points.0.tasks.boolq", math.nan),
    at(CURVE, curves, "points.0.unparsed", "some"),
    at(CURVE, curves, "items", ["boolq"]),
    at(CURVE, curves, "items.boolq", "2"),
    at(CURVE, curves, "subspaces", None),
    at(CURVE, curves, "fingerprint", 3),
    without(CURVE, curves, "points"),
    # metrics.jsonl
    at(METRICS, metrics, "step", "1"),
    at(METRICS, metrics, "seconds", "long"),
    at(METRICS, metrics, "seconds", None),
    at(METRICS, metrics, "loss", math.nan),
    at(METRICS, metrics, "loss", [0.5]),
    without(METRICS, metrics, "step"),
    without(METRICS, metrics, "seconds"),
    # predictions.jsonl; a chunk of a stopped evaluation that is no longer what it was is evaluated again
    at(PREDICTIONS, evaluate, "evaluation", None),
    at(PREDICTIONS, evaluate, "task", 3),
    at(PREDICTIONS, evaluate, "id", 3),
    at(PREDICTIONS, evaluate, "gold", ["true"]),
    at(PREDICTIONS, evaluate, "correct", 1),
    at(PREDICTIONS, evaluate, "correct", "yes"),
    at(PREDICTIONS, evaluate, "response", {}),
    at(PREDICTIONS, evaluate, "mood", "good"),
    without(PREDICTIONS, evaluate, "correct"),
    # images.jsonl and generation.json
    at(IMAGES, images, "index", None),
    at(IMAGES, images, "index", -1),
    at(IMAGES, images, "prompt_index", "0"),
    at(IMAGES, images, "noise_seed", 0.5),
    at(IMAGES, images, "prompt", None),
    at(IMAGES, images, "file", "/etc/hostname", "file must lie in"),
    at(IMAGES, images, "file", "../000-00.png", "file must lie in"),
    at(IMAGES, images, "file", "images/\x00.png", "file must lie in"),
    at(IMAGES, images, "file", "images", "images"),
    at(IMAGES, images, "file", "i" * 5000, "iii"),
    at(IMAGES, images, "sha256", "0" * 64, "sha256"),
    at(IMAGES, images, "sha256", None),
    at(IMAGES, images, "mood", "good"),
    without(IMAGES, images, "class_prompt"),
    BadInput(f"{IMAGES} has an image twice", twice(IMAGES), images, (IMAGES, "twice")),
    at(FACTS, settings, "settings", [], "damaged"),
    # what is beside records
    at(MANIFEST, manifest, "subset", [], "damaged"),
    at("zero.json", zero, "zero_optimization", []),
    at("zero.json", zero, "zero_optimization.stage", "two"),
    at("zero.json", zero, "zero_optimization.stage", None),
    at("checkpoint-4/seal.json", sealed, "processes", "1"),
    at("checkpoint-4/seal.json", sealed, "files", []),
    at("checkpoint-4/seal.json", sealed, "files", {"trainer_state.json": None}),
    at("checkpoint-4/seal.json", sealed, "mood", 1),
    without("checkpoint-4/seal.json", sealed, "processes"),
    BadInput(
        "checkpoint-4 has no seal",
        lambda folder: (write(folder), (folder / "checkpoint-4" / SEAL).unlink()),
        sealed,
        (SEAL,),
    ),
    BadInput(
        "trainer_state.json is changed",
        instead("checkpoint-4/trainer_state.json", write, b"{ }"),
        sealed,
        ("trainer_state.json", "damaged"),
    ),
    BadInput(
        "trainer_state.json is absent",
        lambda folder: (write(folder), (folder / "checkpoint-4" / "trainer_state.json").unlink()),
        sealed,
        ("trainer_state.json", "missing"),
    ),
]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_bad_inputs_are_refused(row, tmp_path):
    check_refused(row, tmp_path)

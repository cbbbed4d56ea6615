"""Preparing the visual data: what is read, counted, written and refused."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from moslora_core.errors import UserError
from visual_instruction.benchmarks.registry import BENCHMARKS
from visual_instruction.benchmarks.tsv import load_image, read_tsv
from visual_instruction.config import DataConfig
from visual_instruction.conversations import Faults, read_instructions
from visual_instruction.prepare_data import main, prepare


def conversation(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


TRAIN = [
    {"id": 7, "image": "coco/0.png", "conversations": conversation("<image>\nQ", "A"), "model": "x"},
    {"id": "7", "image": "coco/0.png", "conversations": conversation("<image>\nQ", "A", "Q", "A")},
    {"id": "text", "conversations": conversation("Q", "A")},
    {"id": "1", "image": "coco/1.png", "conversations": conversation("Q\n<image>", "A")},
]


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (5, 3), (shade, shade, shade)).save(buffer, "PNG")
    return buffer.getvalue()


def read_rows(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)


def choices(count: int = 6) -> list[dict[str, str]]:
    """Rows of a multiple choice file, with the line breaks and quotes that such files have."""
    return [
        {
            "index": str(i),
            "image": base64.b64encode(png(i)).decode(),
            "question": f'Which "one",\nof {i}?',
            "A": "this\tone",
            "B": "that",
            "answer": "AB"[i % 2],
            "category": "c",
            "l2-category": "l2",
        }
        for i in range(count)
    ]


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "source"
    (folder / "images" / "coco").mkdir(parents=True)
    for number in range(2):
        (folder / "images" / "coco" / f"{number}.png").write_bytes(png(number))
    (folder / "mix.json").write_text(json.dumps(TRAIN))
    (folder / "tsv").mkdir()
    write_rows(folder / "tsv" / "AI2D_TEST.tsv", choices())
    return folder


@pytest.fixture
def data(source, tmp_path) -> DataConfig:
    return DataConfig(
        dir=str(tmp_path / "out" / "data"),
        source="folder",
        path=str(source / "mix.json"),
        image_root=str(source / "images"),
        benchmark_root=str(source / "tsv"),
        benchmarks=["ai2d"],
    )


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def refusal(data: DataConfig) -> str:
    before = tree(Path(data.dir).parent)
    with pytest.raises(UserError) as caught:
        prepare(data)
    assert "\n" not in str(caught.value)
    assert tree(Path(data.dir).parent) == before, "nothing is written, nothing temporary stays"
    return str(caught.value)


# -------------------------------------------------------------------------------------------------------------- folder


def test_a_folder_is_read_counted_and_written(data, source):
    manifest = prepare(data)
    out = Path(data.dir)
    assert json.loads((out / "train.json").read_text()) == [
        {
            "id": str(row["id"]),
            **({"image": row["image"]} if "image" in row else {}),
            "conversations": row["conversations"],
        }
        for row in TRAIN
    ]
    assert manifest == json.loads((out / "manifest.json").read_text())
    assert manifest["train"] == {"items": 4, "with_image": 3, "images": 2, "turns": 5, "rows": 4, "faults": {}}
    assert manifest["benchmarks"] == {"ai2d": {"items": 6, "questions": 6}} and manifest["validation"] == {}
    assert manifest["image_root"] == str(source / "images")
    assert manifest["sources"] == {
        "mix.json": sha256(source / "mix.json"),
        "AI2D_TEST.tsv": sha256(source / "tsv" / "AI2D_TEST.tsv"),
    }
    names = ("train.json", "benchmarks/ai2d.tsv")
    assert manifest["files"] == {name: sha256(out / name) for name in names}
    assert set(tree(out)) == {*names, "manifest.json"}, "images stay where they are"
    assert (out / "benchmarks/ai2d.tsv").read_bytes() == (source / "tsv" / "AI2D_TEST.tsv").read_bytes()
    assert [path.name for path in out.parent.iterdir()] == ["data"], "no temporary folder stays"


def test_a_subset_is_drawn_by_its_seed(data, source):
    rows = [TRAIN[2] | {"id": str(i)} for i in range(30)]
    (source / "mix.json").write_text(json.dumps(rows))

    def drawn(seed: int, count: int | None) -> list[str]:
        prepare(replace(data, subset_seed=seed, train_items=count))
        return [row["id"] for row in json.loads(Path(data.dir, "train.json").read_text())]

    first = drawn(0, 5)
    assert first == drawn(0, 5) and len(set(first)) == 5
    assert drawn(1, 5) != first
    assert drawn(0, None) == [str(i) for i in range(30)]


def test_a_subset_is_full_whatever_is_skipped(data, source):
    rows = [TRAIN[0] | {"id": str(i), "image": f"coco/{i % 3}.png"} for i in range(30)]  # each third has no image
    rows[0] = TRAIN[0] | {"conversations": conversation("Q")}
    (source / "mix.json").write_text(json.dumps(rows))
    manifest = prepare(replace(data, train_items=15, on_fault="skip"))
    assert manifest["train"]["items"] == 15
    assert manifest["train"]["faults"]["unanswered"] == 1 and manifest["train"]["faults"]["image_missing"] > 0
    message = refusal(replace(data, train_items=20, on_fault="skip"))
    assert "data.train_items=20" in message and "holds 19 items without fault only" in message
    assert "holds 29 items without fault only" in refusal(replace(data, train_items=30, on_fault="skip"))


def test_faults_are_refused_or_skipped_and_counted(data, source):
    (source / "images" / "coco" / "1.png").write_bytes(png(1)[:45])
    rows = [*TRAIN, TRAIN[2] | {"conversations": conversation("Q")}, TRAIN[0] | {"image": "coco/2.png"}]
    (source / "mix.json").write_text(json.dumps(rows))
    message = refusal(data)
    counts = "3 of 6 rows (image_missing 1, image_unreadable 1, unanswered 1) are faulty"
    assert counts in message and f"{source / 'mix.json'}[4]: unanswered" in message
    assert f"[3]: image_unreadable: found {source / 'images' / 'coco' / '1.png'} cannot be read" in message
    manifest = prepare(replace(data, on_fault="skip"))
    assert manifest["train"] == {
        "items": 3,
        "with_image": 2,
        "images": 1,
        "turns": 4,
        "rows": 6,
        "faults": {"image_missing": 1, "image_unreadable": 1, "unanswered": 1},
    }
    looked = prepare(replace(data, on_fault="skip", check_images="exists"))
    assert looked["train"]["faults"] == {"image_missing": 1, "unanswered": 1}
    assert prepare(replace(data, on_fault="skip", check_images="none"))["train"]["faults"] == {"unanswered": 1}


# ---------------------------------------------------------------------------------------------------------- benchmarks


def test_the_first_questions_are_kept_with_their_bytes(data, source):
    manifest = prepare(replace(data, test_items=2))
    assert manifest["benchmarks"] == {"ai2d": {"items": 2, "questions": 2}}
    assert read_rows(Path(data.dir) / "benchmarks" / "ai2d.tsv") == choices()[:2]


def test_rotations_stay_with_their_question_and_borrow_its_image(data, source):
    """MMBench's layout: a rotation's image is the index of the row that has it."""
    rows = choices(3)
    rows += [row | {"index": str(10**6 + i), "image": str(i), "answer": "BA"[i % 2]} for i, row in enumerate(rows)]
    write_rows(source / "tsv" / "MMBench_DEV_EN.tsv", rows)
    manifest = prepare(replace(data, benchmarks=["mmbench_en"], test_items=2))
    assert manifest["benchmarks"] == {"mmbench_en": {"items": 4, "questions": 2}}
    written = read_rows(Path(data.dir) / "benchmarks" / "mmbench_en.tsv")
    assert written == [rows[0], rows[1], rows[3], rows[4]]


def test_an_image_of_a_row_that_is_left_out_is_copied(data, source):
    rows = choices(4)
    rows[0]["image"] = "3"
    write_rows(source / "tsv" / "AI2D_TEST.tsv", rows)
    prepare(replace(data, test_items=1))
    path = Path(data.dir) / "benchmarks" / "ai2d.tsv"
    assert read_rows(path) == [rows[0] | {"image": rows[3]["image"]}]
    (item,) = read_tsv(path, BENCHMARKS["ai2d"])
    assert load_image(item).getpixel((0, 0)) == (3, 3, 3)


@pytest.mark.parametrize("column", ["kept", "absent"])
def test_images_of_files_are_put_inside(data, source, column):
    rows = [row | {"image_path": f"{i}.png"} for i, row in enumerate(choices(3))]
    for i, row in enumerate(rows):
        (source / "tsv" / f"{i}.png").write_bytes(png(100 + i))
        row["image"] = ""
        if column == "absent":
            del row["image"]
    write_rows(source / "tsv" / "AI2D_TEST.tsv", rows)
    prepare(data)
    shutil.rmtree(source / "tsv")
    items = read_tsv(Path(data.dir) / "benchmarks" / "ai2d.tsv", BENCHMARKS["ai2d"])
    assert [load_image(item).getpixel((0, 0))[0] for item in items] == [100, 101, 102]


def test_bad_benchmark_files_are_named(data, source):
    path = source / "tsv" / "AI2D_TEST.tsv"
    rows = choices(3)
    write_rows(path, [{k: v for k, v in row.items() if k != "answer"} for row in rows])
    assert f"{path}: has no column 'answer'" in refusal(data)
    rows[1]["image"] = base64.b64encode(png(1)[:45]).decode() + "A" * 60
    write_rows(path, rows)
    assert "ai2d/1" in refusal(data)
    prepare(replace(data, check_images="exists"))


# --------------------------------------------------------------------------------------------------------- smoke world


@pytest.fixture
def world(monkeypatch) -> list[dict]:
    """In place of the generated world, one of two items and three benchmarks; the list takes how it was called."""
    calls = []

    def generate(out: Path, **arguments) -> None:
        calls.append(arguments)
        (out / "images" / "train").mkdir(parents=True)
        (out / "images" / "train" / "0.png").write_bytes(png(0))
        rows = [TRAIN[0] | {"id": "train/0", "image": "train/0.png"}, TRAIN[2]]
        (out / "train.json").write_text(json.dumps(rows))
        for part in ("benchmarks", "validation"):
            (out / part).mkdir()
            for name in ("smoke_shape", "smoke_colour", "smoke_count"):
                short = [{k: row[k] for k in ("index", "image", "question", "answer")} for row in choices(2)]
                write_rows(out / part / f"{name}.tsv", short)

    monkeypatch.setattr("visual_instruction.smoke_world.generate", generate)
    return calls


@pytest.fixture
def smoke(tmp_path) -> DataConfig:
    return DataConfig(
        dir=str(tmp_path / "out" / "smoke"),
        source="smoke",
        benchmarks=["smoke_shape", "smoke_colour"],
        train_items=2,
        test_items=2,
        validation_items=1,
        subset_seed=3,
    )


def test_the_generated_world_is_checked_and_described(smoke, world):
    manifest = prepare(smoke)
    assert world == [{"seed": 3, "train_items": 2, "test_items": 2, "validation_items": 1}]
    names = [f"{part}/{name}.tsv" for part in ("benchmarks", "validation") for name in smoke.benchmarks]
    assert set(tree(Path(smoke.dir))) == {"train.json", "manifest.json", "images/train/0.png", *names}
    assert set(manifest["files"]) == {"train.json", "images/", *names}
    assert manifest["image_root"] is None and manifest["sources"] == {"generated": "smoke world, seed 3"}
    assert manifest["subset"] == {"train_items": 2, "test_items": 2, "validation_items": 1, "seed": 3}
    assert manifest["train"]["items"] == 2 and manifest["train"]["images"] == 1
    assert (
        manifest["benchmarks"]
        == manifest["validation"]
        == dict.fromkeys(smoke.benchmarks, manifest["benchmarks"]["smoke_shape"])
    )


@pytest.mark.parametrize("name", ["train_items", "test_items", "validation_items"])
def test_the_generated_world_needs_its_sizes(smoke, world, name):
    assert f"data.source=smoke needs data.{name}" in refusal(replace(smoke, **{name: None}))


def test_a_benchmark_that_is_not_generated_is_named(smoke, world):
    message = refusal(replace(smoke, benchmarks=["smoke_shape", "mme"]))
    assert (
        "'mme' is no benchmark of the smoke world; expected some of smoke_colour, smoke_count, smoke_shape" in message
    )


def test_the_shipped_world_is_prepared(smoke):
    names = [name for name in BENCHMARKS if name.startswith("smoke_")]
    data = replace(smoke, benchmarks=names, train_items=30, test_items=4, validation_items=3)
    manifest = prepare(data)
    faults = Faults("train.json")
    assert len(read_instructions(Path(data.dir) / "train.json", faults)) == 30 and not faults.counts
    assert {name: entry["items"] for name, entry in manifest["benchmarks"].items()} == dict.fromkeys(names, 4)
    assert {name: entry["items"] for name, entry in manifest["validation"].items()} == dict.fromkeys(names, 3)
    assert prepare(replace(data, dir=f"{data.dir}-again"))["files"] == manifest["files"]


# ------------------------------------------------------------------------------------------------ settings and writing


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"source": "hub"}, "data.source must be one of smoke, folder, found 'hub'"),
        ({"on_fault": "ignore"}, "data.on_fault must be one of refuse, skip, found 'ignore'"),
        ({"check_images": "all"}, "data.check_images must be one of none, exists, decode, found 'all'"),
        ({"benchmarks": ["ai2d", "pope"]}, "data.benchmarks: unknown benchmark 'pope'"),
        ({"benchmarks": ["mme"]}, "no file MME.tsv there"),
        ({"path": None}, "data.source=folder needs data.path"),
        ({"path": "nowhere.json"}, "data.path=nowhere.json: no such file"),
        ({"image_root": None}, "data.source=folder needs data.image_root"),
        ({"image_root": "nowhere"}, "data.image_root=nowhere: no such folder"),
        ({"benchmark_root": None}, "data.source=folder needs data.benchmark_root"),
        ({"train_items": 0}, "data.train_items must be positive or null, found 0"),
        ({"train_items": 5}, "data.train_items=5"),
        ({"test_items": -1}, "data.test_items must be positive or null, found -1"),
    ],
    ids=str,
)
def test_bad_settings_are_named(data, changes, expected):
    Path(data.dir).parent.mkdir()
    assert expected in refusal(replace(data, **changes))
    assert not Path(data.dir).exists()


def test_text_alone_needs_no_images_and_no_benchmarks(data, source):
    (source / "mix.json").write_text(json.dumps([TRAIN[2]]))
    manifest = prepare(replace(data, image_root=str(source / "absent"), benchmarks=[], benchmark_root=None))
    assert manifest["train"]["items"] == 1 and manifest["benchmarks"] == {}


def test_a_failed_preparation_leaves_the_earlier_data(data, source):
    prepare(data)
    (source / "images" / "coco" / "0.png").unlink()
    assert "image_missing" in refusal(data)
    assert json.loads(Path(data.dir, "manifest.json").read_text())["train"]["items"] == 4


def test_a_folder_of_something_else_is_left_alone(data):
    other = Path(data.dir)
    other.mkdir(parents=True)
    (other / "thesis.tex").write_text("the only copy")
    assert "holds something else" in refusal(data)


def test_the_command_says_what_it_wrote(data, caplog):
    with caplog.at_level("INFO"):
        main(SimpleNamespace(data=data))
    assert "train: 4 items, 3 with one of 2 images" in caplog.text
    assert "benchmarks/ai2d: 6 questions in 6 rows" in caplog.text and f"written to {data.dir}" in caplog.text


def test_the_command_ends_in_a_line_on_a_mistake(tmp_path):
    command = [sys.executable, "-m", "visual_instruction.prepare_data", "scale=paper", f"data.dir={tmp_path / 'out'}"]
    failed = subprocess.run([*command, "data.path=absent.json"], capture_output=True, text=True)
    assert failed.returncode == 2 and not (tmp_path / "out").exists()
    message = failed.stderr.strip().splitlines()[-1]
    assert message == "error: data.source=folder needs data.image_root: the folder of its images"

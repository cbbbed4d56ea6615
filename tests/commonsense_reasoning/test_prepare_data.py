"""Preparing the items: what is read, counted, written and refused."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import datasets
import pytest

from commonsense_reasoning import smoke_world
from commonsense_reasoning.config import DataConfig
from commonsense_reasoning.prepare_data import prepare
from commonsense_reasoning.tasks import TASKS
from moslora_core import prepared
from moslora_core.errors import UserError

SHARED = Path(__file__).parents[3] / "shared" / "data" / "commonsense"


def item(question: str, answer: str = "true", **changes) -> dict:
    instruction = f"{question}\n\nAnswer format: true/false"
    return {"instruction": instruction, "input": "", "output": f"the correct answer is {answer}", "answer": answer} | (
        changes
    )


TRAIN = [item("is one?"), item("is two?", "false"), item("Is  ONE?"), item("is three?"), item("is two?", "false")]
TEST = [item("is four?", "false"), item("is  three?"), item("is two?", "false"), item("is four?", "false")]


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "source"
    (folder / "boolq").mkdir(parents=True)
    (folder / "train.json").write_text(json.dumps(TRAIN))
    (folder / "boolq" / "test.json").write_text(json.dumps(TEST))
    return folder


@pytest.fixture
def data(source, tmp_path) -> DataConfig:
    return DataConfig(
        dir=str(tmp_path / "out" / "data"),
        source="folder",
        path=str(source),
        train_files=["train.json"],
        tasks=["boolq"],
    )


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(data: DataConfig) -> str:
    with pytest.raises(UserError) as caught:
        prepare(data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ------------------------------------------------------------------------------------------------------------ sources


def test_a_folder_is_read_counted_and_written(data, source):
    manifest = prepare(data)
    out = Path(data.dir)
    assert json.loads((out / "train.json").read_text()) == [{"id": f"train/{i}", **row} for i, row in enumerate(TRAIN)]
    assert json.loads((out / "test/boolq.json").read_text()) == [
        {"id": f"boolq/{i}", **row} for i, row in enumerate(TEST)
    ]
    assert manifest == json.loads((out / "manifest.json").read_text())
    # Counted by hand from TRAIN and TEST above: repeats in other case or white space are repeats.
    assert manifest["train"] == {"items": 5, "labels": {"false": 2, "true": 3}, "duplicates": 2}
    assert manifest["test"]["boolq"] == {
        "items": 4,
        "labels": {"false": 3, "true": 1},
        "duplicates": 1,
        "also_in_train": 2,
    }
    assert manifest["sources"] == {name: sha256(source / name) for name in ("train.json", "boolq/test.json")}
    assert manifest["files"] == {name: sha256(out / name) for name in ("train.json", "test/boolq.json")}
    assert [path.name for path in out.parent.iterdir()] == ["data"], "no temporary folder stays"


def test_validation_files_are_read_limited_and_counted(data, source):
    (source / "boolq" / "validation.json").write_text(json.dumps(TEST))
    data.validation_file, data.validation_file_items = "{task}/validation.json", 3
    manifest = prepare(data)
    rows = json.loads(Path(data.dir, "validation/boolq.json").read_text())
    assert rows == [{"id": f"validation/boolq/{i}", **row} for i, row in enumerate(TEST[:3])]
    assert manifest["validation"]["boolq"]["items"] == 3
    assert manifest["sources"]["boolq/validation.json"] == sha256(source / "boolq/validation.json")
    assert manifest["files"]["validation/boolq.json"] == sha256(Path(data.dir, "validation/boolq.json"))


def test_files_of_one_name_keep_their_ids_apart(data, source):
    for task in ("piqa", "boolq"):
        (source / task).mkdir(exist_ok=True)
        (source / task / "train.json").write_text(json.dumps(TRAIN[:2]))
    data.train_files = ["piqa/train.json", "boolq/train.json"]
    prepare(data)
    rows = json.loads(Path(data.dir, "train.json").read_text())
    assert [row["id"] for row in rows] == ["piqa/train/0", "piqa/train/1", "boolq/train/0", "boolq/train/1"]


def test_the_hub_gives_what_a_folder_gives(data, source, monkeypatch, tmp_path):
    asked = []

    def load_dataset(repository, *, data_files, split):
        asked.append((repository, data_files, split))
        return datasets.Dataset.from_list(json.loads((source / data_files).read_text()))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    prepare(data)
    hub = DataConfig(**vars(data) | {"source": "hub", "path": "someone/items", "dir": str(tmp_path / "hub")})
    manifest = prepare(hub)
    assert asked == [("someone/items", name, "train") for name in ("train.json", "boolq/test.json")]
    assert manifest["sources"] == {"hub": "someone/items"}
    for name in ("train.json", "test/boolq.json"):
        assert Path(hub.dir, name).read_bytes() == Path(data.dir, name).read_bytes()


def test_an_unreachable_hub_is_told_in_a_line(data, monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub\nwith many\nmore lines")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data.source, data.path = "hub", "someone/items"
    assert refusal(data) == ("data.path=someone/items: cannot load train.json from the hub: Couldn't reach the Hub")


def test_the_smoke_world_is_written_as_generated(tmp_path):
    data = DataConfig(
        dir=str(tmp_path / "smoke"),
        source="smoke",
        train_items=40,
        test_items=5,
        validation_file_items=4,
        tasks=["piqa", "boolq"],
    )
    manifest = prepare(data)
    world = smoke_world.generate(0, 40, 5)
    train = json.loads((tmp_path / "smoke" / "train.json").read_text())
    assert [{k: v for k, v in row.items() if k != "id"} for row in train] == world["train"]
    assert sorted(path.stem for path in (tmp_path / "smoke" / "test").iterdir()) == ["boolq", "piqa"]
    assert manifest["train"]["items"] == 40 and manifest["test"]["piqa"]["items"] == 5
    assert manifest["train"]["labels"] == Counter(row["answer"] for row in world["train"])
    assert manifest["test"]["boolq"]["also_in_train"] == 0
    assert len({row["id"] for row in train}) == 40
    validation = json.loads((tmp_path / "smoke" / "validation" / "piqa.json").read_text())
    expected = smoke_world.generate_validation(0, 4)["piqa"]
    assert validation == [{"id": f"validation/piqa/{i}", **item} for i, item in enumerate(expected)]


def test_a_subset_is_drawn_by_its_seed(data):
    def drawn(seed: int, count: int | None) -> list[str]:
        data.subset_seed, data.train_items = seed, count
        prepare(data)
        return [row["id"] for row in json.loads(Path(data.dir, "train.json").read_text())]

    first = drawn(0, 3)
    assert first == drawn(0, 3)
    assert len(set(first)) == 3 and set(first) < {f"train/{i}" for i in range(5)}
    assert len({tuple(drawn(seed, 3)) for seed in range(5)}) > 1
    assert drawn(0, None) == [f"train/{i}" for i in range(5)]


def test_test_items_are_the_first(data):
    data.test_items = 2
    manifest = prepare(data)
    assert [row["id"] for row in json.loads(Path(data.dir, "test/boolq.json").read_text())] == ["boolq/0", "boolq/1"]
    assert manifest["test"]["boolq"]["items"] == 2
    assert manifest["subset"] == {"train_items": None, "test_items": 2, "seed": 0}


# ------------------------------------------------------------------------------------------------------ bad settings


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"source": "ftp"}, "data.source must be one of smoke, folder, hub, found 'ftp'"),
        ({"tasks": ["boolq", "glue"]}, "data.tasks: unknown task 'glue'"),
        ({"tasks": []}, "data.tasks is empty"),
        ({"tasks": ["piqa"]}, "no data file"),
        ({"path": None}, "needs data.path"),
        ({"path": None, "source": "hub"}, "needs data.path"),
        ({"path": "nowhere"}, "data.path=nowhere: no such folder"),
        ({"train_files": []}, "data.train_files is empty"),
        ({"train_files": ["absent.json"]}, "absent.json"),
        ({"test_file": "{name}.json"}, "data.test_file={name}.json: the only placeholder is {task}"),
        ({"validation_file": "{0}.json"}, "data.validation_file={0}.json: the only placeholder is {task}"),
        ({"train_items": 6}, "data.train_items=6: the training files hold 5 items only"),
        ({"train_items": 0}, "data.train_items must be positive or null, found 0"),
        ({"test_items": -1}, "data.test_items must be positive or null, found -1"),
        ({"published_sizes": True}, "boolq: 4 test items, expected the published 3270"),
        ({"source": "smoke"}, "data.source=smoke needs data.train_items and data.test_items"),
    ],
    ids=str,
)
def test_bad_settings_are_named(data, changes, expected):
    assert expected in refusal(DataConfig(**vars(data) | changes))
    assert not Path(data.dir).exists()


# ------------------------------------------------------------------------------------------------------------ writing


def test_a_failed_preparation_leaves_the_earlier_data(data, source, monkeypatch):
    prepare(data)
    before = tree(Path(data.dir))
    (source / "boolq" / "test.json").write_text("[")
    refusal(data)
    assert tree(Path(data.dir)) == before

    (source / "boolq" / "test.json").write_text(json.dumps(TEST[:1]))
    with monkeypatch.context() as patch:

        def full(path: Path) -> str:
            raise OSError(28, "No space left on device")

        patch.setattr(prepared, "sha256", full)
        assert "No space left on device" in refusal(data)
    assert tree(Path(data.dir)) == before
    assert [path.name for path in Path(data.dir).parent.iterdir()] == ["data"]

    prepare(data)
    assert len(json.loads(Path(data.dir, "test/boolq.json").read_text())) == 1


def test_a_folder_of_something_else_is_left_alone(data):
    other = Path(data.dir)
    other.mkdir(parents=True)
    (other / "thesis.tex").write_text("the only copy")
    assert "holds something else" in refusal(data)
    assert tree(other) == {"thesis.tex": b"the only copy"}
    assert [path.name for path in other.parent.iterdir()] == ["data"]


def test_an_empty_folder_is_filled(data):
    Path(data.dir).mkdir(parents=True)
    prepare(data)
    assert Path(data.dir, "manifest.json").exists()


def test_a_folder_that_cannot_be_made_is_named(data, tmp_path):
    (tmp_path / "file").write_text("")
    data.dir = str(tmp_path / "file" / "data")
    assert f"cannot write data.dir={data.dir}: " in refusal(data)


# ---------------------------------------------------------------------------------------------------------- real data


@pytest.mark.shared_data
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real items at {SHARED}")
def test_real_items_are_accepted_and_counted(tmp_path):
    tasks = [name for name in TASKS if (SHARED / f"{name}-test.json").exists()]
    trains = sorted(path.name for path in SHARED.glob("*-train.json"))
    assert tasks and trains
    data = DataConfig(
        dir=str(tmp_path / "real"),
        source="folder",
        path=str(SHARED),
        train_files=trains,
        test_file="{task}-test.json",
        tasks=tasks,
    )
    manifest = prepare(data)
    raw = [row for name in trains for row in json.loads((SHARED / name).read_text())]
    assert manifest["train"]["items"] == len(raw)
    assert manifest["train"]["labels"] == Counter(row["answer"] for row in raw)
    seen = {" ".join(row["instruction"].split()).lower() for row in raw}
    assert manifest["train"]["duplicates"] == len(raw) - len(seen)
    for name in tasks:
        rows = json.loads((SHARED / f"{name}-test.json").read_text())
        keys = [" ".join(row["instruction"].split()).lower() for row in rows]
        assert manifest["test"][name] == {
            "items": len(rows),
            "labels": Counter(row["answer"] for row in rows),
            "duplicates": len(keys) - len(set(keys)),
            "also_in_train": sum(key in seen for key in keys),
        }

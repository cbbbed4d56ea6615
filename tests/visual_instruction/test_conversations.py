"""LLaVA's files: what is accepted, and how every fault is named and counted."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from moslora_core.errors import UserError
from visual_instruction.conversations import (
    Faults,
    check_image,
    check_item,
    read_instructions,
    read_questions,
    sound_items,
)

SHARED = Path(__file__).parents[3] / "shared" / "data" / "llava"


def turns(*texts: str, speakers: tuple[str, ...] = ("human", "gpt")) -> list[dict[str, str]]:
    return [{"from": speakers[i % len(speakers)], "value": text} for i, text in enumerate(texts)]


def item(*texts: str, **changes) -> dict:
    return {"id": "1", "conversations": turns(*(texts or ("Q", "A")))} | changes


def settled(faults: Faults, on_fault: str = "refuse") -> str:
    with pytest.raises(UserError) as caught:
        faults.settle(on_fault)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize(
    "row",
    [
        item("Q", "A"),
        item("Q", "A", "Q", "A"),
        item("<image>\nQ", "A", image="coco/train2017/1.jpg"),
        item("Q\n<image>", "A", "Q", "A", image="1.jpg"),
        item("Q", "A", "<image>\nQ", "A", image="a..b/1.jpg"),
        item("Q", "A", id=7, model="gpt-4"),
        item("Q", "A", image=None),
    ],
)
def test_sound_rows_have_no_fault(row):
    assert check_item(row) is None


@pytest.mark.parametrize(
    ("row", "kind", "found"),
    [
        ("text", "layout", "'text'"),
        ({"conversations": turns("Q", "A")}, "layout", "{'conversations'"),
        (item(conversations=None), "layout", "conversations None"),
        (item(conversations=[]), "empty", "no turns"),
        (item(conversations=["Q", "A"]), "layout", "turn 0 'Q'"),
        (item(conversations=[{"from": "human", "value": None}]), "layout", "turn 0"),
        (item(conversations=turns("Q", "A", speakers=("user", "gpt"))), "unknown_speaker", "turn 0 from 'user'"),
        (item(conversations=turns("Q", "A", speakers=("human", ["gpt"]))), "unknown_speaker", "turn 1 from ['gpt']"),
        (item(conversations=turns("A", "Q", speakers=("gpt", "human"))), "starts_with_answer", "turn 0 from 'gpt'"),
        (item(conversations=turns("Q", "Q", speakers=("human",))), "not_alternating", "turn 1 from 'human'"),
        (
            item(conversations=turns("Q", "A", "A", speakers=("human", "gpt", "gpt"))),
            "not_alternating",
            "turn 2 from 'gpt'",
        ),
        (item("Q", "A", "Q"), "unanswered", "a last turn from 'human'"),
        (item("Q", " \n"), "empty", "turn 1 without text"),
        (item("", "A"), "empty", "turn 0 without text"),
        (item("Q", "A", image="1.jpg"), "image_tokens", "0 <image> in the questions"),
        (item("<image><image>", "A", image="1.jpg"), "image_tokens", "2 <image> in the questions"),
        (item("<image>", "A", "<image>", "A", image="1.jpg"), "image_tokens", "2 <image> in the questions"),
        (item("<image>\nQ", "A"), "image_tokens", "1 <image> in the questions"),
        (item("Q", "<image>", image="1.jpg"), "image_tokens", "1 <image> in questions and answers"),
        (item("<image>\nQ", "A", image=""), "layout", "image ''"),
        (item("<image>\nQ", "A", image=["1.jpg"]), "layout", "image ['1.jpg']"),
        (item("<image>\nQ", "A", image="../1.jpg"), "image_outside", "'../1.jpg'"),
        (item("<image>\nQ", "A", image="a/../../1.jpg"), "image_outside", "'a/../../1.jpg'"),
        (item("<image>\nQ", "A", image="/etc/passwd"), "image_outside", "'/etc/passwd'"),
        (item("<image>\nQ", "A", image="C:\\1.jpg"), "image_outside", "'C:"),
        (item("<image>\nQ", "A", image="a\\..\\..\\1.jpg"), "image_outside", "'a"),
    ],
)
def test_every_fault_is_named(row, kind, found):
    fault = check_item(row)
    assert fault.kind == kind and fault.found.startswith(found) and fault.expected
    assert len(str(fault)) < 250


# -------------------------------------------------------------------------------------------------------------- images


@pytest.fixture
def root(tmp_path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(folder / name)
    (folder / "torn.png").write_bytes((folder / "a.png").read_bytes()[:45])
    return folder


@pytest.mark.parametrize(
    ("image", "how", "kind"),
    [
        ("a.png", "decode", None),
        ("absent.png", "none", None),
        ("absent.png", "exists", "image_missing"),
        ("absent.png", "decode", "image_missing"),
        ("torn.png", "exists", None),
        ("torn.png", "decode", "image_unreadable"),
        (".", "exists", "image_missing"),
    ],
)
def test_images_are_looked_at_as_far_as_asked(root, image, how, kind):
    fault = check_image(item("<image>", "A", image=image), root, how)
    assert (fault and fault.kind) == kind
    if fault is not None:
        assert str(root / image) in str(fault)
    assert check_image(item(), root, how) is None


def test_faulty_images_are_collected_by_row_and_sound_items_kept_in_order(root):
    images = ["a.png", "absent.png", "b.png", "torn.png", None, "a.png"]
    rows = {10 + i: item(id=str(i)) | ({"image": image} if image else {}) for i, image in enumerate(images)}
    faults = Faults("file", rows=len(rows))
    sound = list(sound_items(rows.items(), root, "decode", faults))
    assert [row["id"] for row in sound] == ["0", "2", "4", "5"]
    assert faults.counts == {"image_missing": 1, "image_unreadable": 1}
    assert [row for row, _ in faults.first] == [11, 13]


def test_no_more_images_are_looked_at_than_needed(root):
    rows = [(0, item(image="a.png")), (1, item(image="absent.png")), (2, item(image="b.png"))]
    faults = Faults("file", rows=3)
    assert [row["image"] for row in sound_items(rows, root, "decode", faults, count=1)] == ["a.png"]
    assert not faults.counts
    assert [row["image"] for row in sound_items(rows, root, "decode", faults, count=2)] == ["a.png", "b.png"]
    assert faults.counts == {"image_missing": 1}


# --------------------------------------------------------------------------------------------------------------- files


def test_an_instruction_file_is_read_by_row(tmp_path):
    rows = [item("<image>\nQ", "A", image="1.jpg", id=3, model="x"), item("Q"), item("Q", "A", id="z", image=None)]
    path = tmp_path / "mix.json"
    path.write_text(json.dumps(rows))
    faults = Faults(str(path))
    assert read_instructions(path, faults) == {
        0: {"id": "3", "image": "1.jpg", "conversations": turns("<image>\nQ", "A")},
        2: {"id": "z", "conversations": turns("Q", "A")},
    }
    assert faults.rows == 3 and faults.counts == {"unanswered": 1}


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, "no instruction file"), ("[", "is damaged"), ("{}", "found dict"), ("[]", "found none")],
)
def test_a_file_of_another_kind_is_named(tmp_path, content, expected):
    path = tmp_path / "mix.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=expected) as caught:
        read_instructions(path, Faults("x"))
    assert str(path) in str(caught.value)


def test_faults_are_refused_in_a_line_that_counts_them(tmp_path, caplog):
    path = tmp_path / "mix.json"
    path.write_text(json.dumps([item(), item("Q"), item("Q"), "x", item("Q"), item("", "A"), item()]))
    faults = Faults(str(path))
    read_instructions(path, faults)
    message = settled(faults)
    assert message.startswith(f"{path}[1]: unanswered: found a last turn from 'human', expected an answer at the end")
    assert f"{path}[2]: unanswered" in message and f"{path}[3]: layout: found 'x'" in message
    assert f"{path}[4]" not in message  # only the first are named
    assert "5 of 7 rows (empty 1, layout 1, unanswered 3) are faulty; data.on_fault=skip leaves them out" in message
    faults.settle("skip")
    assert "5 of 7 rows (empty 1, layout 1, unanswered 3) are faulty and skipped" in caplog.text


def test_nothing_left_is_refused_whatever_the_setting(tmp_path):
    path = tmp_path / "mix.json"
    path.write_text(json.dumps([item("Q"), item("Q")]))
    faults = Faults(str(path))
    read_instructions(path, faults)
    assert "2 of 2 rows (unanswered 2) are faulty, nothing is left" in settled(faults, "skip")


def test_without_a_fault_nothing_is_said(caplog):
    Faults("x", rows=3).settle("refuse")
    assert not caplog.records


# ---------------------------------------------------------------------------------------------------------- questions

QUESTION = {"question_id": 0, "image": "1.jpg", "text": "What?", "category": "conv"}


def write_lines(path: Path, *rows) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def test_questions_are_read_without_other_keys(tmp_path):
    other = QUESTION | {"question_id": "b", "text": "Who?", "image": "2.jpg"}
    assert read_questions(write_lines(tmp_path / "q.jsonl", QUESTION | {"more": 1}, other)) == [QUESTION, other]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], "expected lines with question_id, image, text, category, found none"),
        ([QUESTION, "{"], "line 2 is damaged: expected a JSON object"),
        (["[]"], "line 1: expected an object with question_id, image, text, category, found list"),
        ([{k: v for k, v in QUESTION.items() if k != "image"}], "line 1: field 'image' is missing"),
        ([QUESTION | {"image": 3}], "line 1: image must be str, found 3"),
        ([QUESTION | {"question_id": 1.5}], "line 1: question_id must be int | str, found 1.5"),
        ([QUESTION | {"question_id": True}], "line 1: question_id must be int | str, found True"),
        ([QUESTION | {"text": " "}], "line 1: text is empty"),
        ([QUESTION | {"image": "../1.jpg"}], "line 1: image_outside"),
        ([QUESTION, QUESTION], "question_id 0 comes more than once"),
    ],
)
def test_bad_questions_are_named_by_line(tmp_path, rows, expected):
    path = write_lines(tmp_path / "q.jsonl", *rows)
    with pytest.raises(UserError) as caught:
        read_questions(path)
    assert str(path) in str(caught.value) and expected in str(caught.value)


def test_a_missing_question_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*q\.jsonl: No such file"):
        read_questions(tmp_path / "q.jsonl")
    (tmp_path / "q.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"cannot read .*q\.jsonl"):
        read_questions(tmp_path / "q.jsonl")


@pytest.mark.shared_data
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no question files at {SHARED}")
def test_real_questions_are_read():
    questions = read_questions(SHARED / "qa90_questions.jsonl")
    raw = [json.loads(line) for line in (SHARED / "qa90_questions.jsonl").read_text().splitlines()]
    assert questions == raw and len(questions) == 90
    assert Counter(question["category"] for question in questions) == {"conv": 30, "detail": 30, "complex": 30}
    fault = check_image({"id": "0", "image": raw[0]["image"]}, SHARED, "exists")  # the COCO images are not there
    assert fault.kind == "image_missing" and raw[0]["image"] in fault.found
    photographs = [{"id": path.stem, "image": path.name} for path in sorted(SHARED.glob("*.jpg"))]
    assert len(photographs) == 2
    assert all(check_image(entry, SHARED, "decode") is None for entry in photographs)

"""Benchmark files in VLMEvalKit's layout: what is read, what is refused, images, and the question that is asked."""

from __future__ import annotations

import base64
import csv
import io
import random
from pathlib import Path

import pytest
from PIL import Image

from moslora_core.errors import UserError
from visual_instruction.benchmarks.questions import question_text, turn
from visual_instruction.benchmarks.registry import BENCHMARKS, MME_PARTS, find
from visual_instruction.benchmarks.tsv import digest, first_questions, load_image, read_tsv

QUESTION = {"question": "What colour?", "A": "red", "B": "blue"}


def png(colour: str = "red", size: tuple[int, int] = (6, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format="PNG")
    return buffer.getvalue()


def embedded(colour: str = "red") -> str:
    return base64.b64encode(png(colour)).decode()


def write(path: Path, rows: list[dict], **settings) -> Path:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t", lineterminator="\n", restval="", **settings)
        writer.writeheader()
        writer.writerows(rows)
    return path


def choice(index: int | str = 0, **changes: str) -> dict[str, str]:
    return {"index": str(index), "image": embedded(), **QUESTION, "answer": "A", **changes}


def read(tmp_path: Path, rows: list[dict], name: str = "ai2d", images: Path | None = None):
    return read_tsv(write(tmp_path / "file.tsv", rows), find(name), images)


# ---------------------------------------------------------------------------------------------------------------- read


def test_a_row_becomes_an_item(tmp_path):
    row = choice(
        7,
        hint="Look.",
        C="",
        D="nan",
        category="color",
        split="dev",
        comment="None",
        **{"l2-category": "attribute_reasoning"},
    )
    (item,) = read(tmp_path, [row])
    assert item.id == "ai2d/7" and item.kind == "multiple_choice"
    assert item.options == {"A": "red", "B": "blue"} and item.answers == ("A",)
    assert (item.hint, item.category, item.l2_category) == ("Look.", "color", "attribute_reasoning")
    assert item.columns == {**{name: value for name, value in row.items() if name != "image"}, "D": ""}
    assert load_image(item).size == (6, 4) and load_image(item).getpixel((0, 0)) == (255, 0, 0)


def test_text_of_any_kind_comes_through(tmp_path):
    question = "Tab\there, \"quoted\", 'single'\nand a second line\r\nand ünïcödé 图中"
    items = read(tmp_path, [choice(0, question=question), choice(1, question='"only quoted"')])
    assert [item.question for item in items] == [question, '"only quoted"']
    assert all(load_image(item).size == (6, 4) for item in items), "rows are found again behind lines inside a field"


def test_a_byte_order_mark_and_carriage_returns_do_no_harm(tmp_path):
    path = write(tmp_path / "file.tsv", [choice(0), choice(1, image=embedded("blue"))])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    items = read_tsv(path, find("ai2d"))
    assert [item.id for item in items] == ["ai2d/0", "ai2d/1"]
    assert load_image(items[1]).getpixel((0, 0)) == (0, 0, 255)


def test_images_beyond_csvs_limit_of_a_field(tmp_path):
    noise = Image.frombytes("RGB", (300, 300), random.Random(0).randbytes(270_000))
    buffer = io.BytesIO()
    noise.save(buffer, format="PNG")
    large = base64.b64encode(buffer.getvalue()).decode()
    limit = csv.field_size_limit()
    assert len(large) > limit
    items = read(tmp_path, [choice(0, image=large), choice(1)])
    assert load_image(items[0]).tobytes() == noise.tobytes()
    assert load_image(items[1]).size == (6, 4)
    assert csv.field_size_limit() == limit, "the limit is csv's own again"


def test_a_row_may_use_the_image_of_another_before_or_behind_it(tmp_path):
    rows = [choice(3, image="12"), choice(12, image=embedded("blue")), choice(4, image="12"), choice(5)]
    items = read(tmp_path, rows)
    assert [load_image(item).getpixel((0, 0)) for item in items] == [(0, 0, 255)] * 3 + [(255, 0, 0)]


def test_images_as_files(tmp_path):
    (tmp_path / "images" / "deep").mkdir(parents=True)
    (tmp_path / "images" / "deep" / "one.png").write_bytes(png("blue"))
    row = {name: value for name, value in choice().items() if name != "image"}
    (item,) = read(tmp_path, [row | {"image_path": "deep/one.png"}], images=tmp_path / "images")
    assert load_image(item).getpixel((0, 0)) == (0, 0, 255)
    with pytest.raises(UserError, match=r"index 0: no image at .*images/deep/two\.png"):
        read(tmp_path, [row | {"image_path": "deep/two.png"}], images=tmp_path / "images")
    for outside in ("../images/deep/one.png", str(tmp_path / "images" / "deep" / "one.png"), "deep/../../x.png"):
        with pytest.raises(UserError, match=r"image_path .*expected a file below .*images"):
            read(tmp_path, [row | {"image_path": outside}], images=tmp_path / "images")


def test_an_image_in_the_row_counts_before_a_file(tmp_path):
    (item,) = read(tmp_path, [choice(image_path="nowhere.png")])
    assert load_image(item).size == (6, 4)


def test_rows_without_an_image_are_left_out_and_counted(tmp_path, caplog):
    items = read(tmp_path, [choice(0), choice(1, image=""), choice(2, image="nan")])
    assert [item.id for item in items] == ["ai2d/0"] and "2 of 3 rows have no image" in caplog.text
    with pytest.raises(UserError, match="no row has an image"):
        read(tmp_path, [choice(0, image="")])


def test_textvqa_has_a_list_of_answers(tmp_path):
    row = {"index": "0", "image": embedded(), "question": "What does it say?", "answer": "['stop', \"don't\", 'stop']"}
    (item,) = read(tmp_path, [row], "textvqa")
    assert item.kind == "short_answer" and item.answers == ("stop", "don't", "stop")
    (item,) = read(tmp_path, [row | {"answer": '["stop", "go"]'}], "textvqa")
    assert item.answers == ("stop", "go")
    (item,) = read(tmp_path, [row | {"answer": "stop"}], "smoke_shape")
    assert item.answers == ("stop",)
    for faulty in ("['stop'", "[]", "[1, 2]", "[__import__('os').getcwd()]", "[" * 400):
        with pytest.raises(UserError, match=r"index 0: answer .*expected a list of strings"):
            read(tmp_path, [row | {"answer": faulty}], "textvqa")


def test_a_smoke_file_with_options_is_multiple_choice(tmp_path):
    (item,) = read(tmp_path, [choice()], "smoke_colour")
    assert item.kind == "multiple_choice" and item.options
    row = {"index": "0", "image": embedded(), "question": "How many?", "answer": "two"}
    (item,) = read(tmp_path, [row], "smoke_colour")
    assert item.kind == "short_answer" and not item.options


def test_what_is_judged_keeps_every_column(tmp_path):
    row = {"index": "v1_0", "image": embedded(), "question": "Why?", "capability": "ocr,math", "choices": "['a', 'b']"}
    (item,) = read(tmp_path, [row | {"A": "not an option"}], "mathvista")
    assert item.kind == "judged" and not item.options
    assert item.columns == {"A": "not an option", **{name: value for name, value in row.items() if name != "image"}}


# ----------------------------------------------------------------------------------------------------- groups of items


def test_rotations_belong_to_their_question(tmp_path):
    rows = [choice(241), choice(5), choice(1000241), choice(2000241), choice(1000005)]
    items = read(tmp_path, rows, "mmbench_en")
    assert [(item.group, item.rotated) for item in items] == [
        ("241", False),
        ("5", False),
        ("241", True),
        ("241", True),
        ("5", True),
    ]
    assert [item.id for item in first_questions(items, 1)] == [f"mmbench_en/{i}" for i in (241, 1000241, 2000241)]
    assert first_questions(items, None) == items and first_questions(items, 9) == items
    assert not any(item.rotated for item in read(tmp_path, rows, "seed_bench")), "indices mean nothing elsewhere"


def test_a_column_may_name_the_group(tmp_path):
    items = read(tmp_path, [choice(7, g_index="7"), choice(8, g_index="7")], "mmbench_cn")
    assert [(item.group, item.rotated) for item in items] == [("7", False), ("7", True)]


def mme(index: int, picture: str, answer: str = "Yes", **changes: str) -> dict[str, str]:
    question = "Is it red? Please answer yes or no."
    row = {"index": str(index), "image": embedded(), "image_path": picture, "question": question, "answer": answer}
    return row | {"category": "color"} | changes


def test_both_questions_about_a_picture_stay_together(tmp_path):
    rows = [mme(0, "a.png"), mme(1, "a.png", "No"), mme(2, "b.png"), mme(3, "b.png")]
    rows += [mme(i, "a.png", category="OCR") for i in (4, 5)]
    items = read(tmp_path, rows, "mme")
    assert len({item.group for item in items}) == 3, "pictures are told apart by their category too"
    assert [item.id for item in first_questions(items, 3)] == ["mme/0", "mme/1", "mme/2", "mme/3"]


def test_mme_without_paths_pairs_rows_that_share_an_image(tmp_path):
    rows = [mme(0, ""), mme(1, "", image="0"), mme(2, ""), mme(3, "", image="2")]
    items = read(tmp_path, rows, "mme")
    assert items[0].group == items[1].group != items[2].group == items[3].group


def test_the_registry():
    assert [name for name in BENCHMARKS if not name.startswith("smoke_")] == [
        *("mmbench_en", "mmbench_cn", "seed_bench", "ai2d", "sciqa", "textvqa", "mathvista", "mmvet", "mme")
    ]
    assert len([name for name in BENCHMARKS if name.startswith("smoke_")]) == 6
    assert {part: len(categories) for part, categories in MME_PARTS.items()} == {"perception": 10, "cognition": 4}
    assert len({benchmark.file for benchmark in BENCHMARKS.values()}) == len(BENCHMARKS)
    with pytest.raises(UserError, match=r"no benchmark 'mmmu'; expected one of mmbench_en, .*smoke_background"):
        find("mmmu")


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize("column", ["index", "question", "answer", "image", "A", "B"])
def test_a_missing_column_is_named_with_what_is_there(column, tmp_path):
    row = {name: value for name, value in choice().items() if name != column}
    with pytest.raises(UserError, match=rf"file\.tsv: has no column '{column}'.*; found .*") as raised:
        read(tmp_path, [row])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "rows, name, complaint",
    [
        ([choice(3), choice(4), choice(3)], "ai2d", "index 3 appears twice"),
        ([choice(answer="C")], "ai2d", "index 0: answer 'C' is none of the offered letters A, B"),
        ([choice(B="", answer="B")], "ai2d", "answer 'B' is none of the offered letters A"),
        ([choice(answer="")], "ai2d", "answer '' is none"),
        ([choice(question="")], "ai2d", "index 0: has no question"),
        ([choice(image="17")], "ai2d", "image refers to '17', which is no row with an image"),
        ([choice(1, image="2"), choice(2, image="1")], "ai2d", "image refers to '2', which is no row with an image"),
        ([choice(image=str([embedded(), embedded()]))], "ai2d", "line 2: holds several images"),
        ([choice("x1")], "mmbench_en", "index x1: expected an integer"),
        ([mme(0, "a.png", "yes"), mme(1, "a.png")], "mme", "index 0: answer 'yes'; expected Yes or No"),
        ([mme(0, "a.png"), mme(1, "b.png")], "mme", "mme/0: 1 questions about its picture; expected 2"),
        ([mme(0, "a.png", category="colour")] * 1, "mme", "category 'colour'; expected one of existence, count"),
    ],
)
def test_a_faulty_file_is_told_in_a_line(rows, name, complaint, tmp_path):
    with pytest.raises(UserError, match=complaint) as raised:
        read(tmp_path, rows, name)
    assert "\n" not in str(raised.value) and str(tmp_path) in str(raised.value)


@pytest.mark.parametrize(
    "content, complaint",
    [
        (b"", "holds no items"),
        (b"index\tquestion\timage\tanswer\tA\tB\n", "holds no items"),
        (b"index\tindex\n1\t2\n", "column 'index' appears twice"),
        (b"index\tquestion\n0\twhat\textra\n", "line 2: 3 columns; its first line names 2"),
        (b'index\tquestion\n0\t"never closed\n', "damaged or no TSV file"),
        (b"index\tquestion\n0\t\xff\xfe\n", "damaged or no TSV file"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "damaged or no TSV file"),
    ],
)
def test_a_file_of_another_kind_is_told_in_a_line(content, complaint, tmp_path):
    path = tmp_path / "file.tsv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=complaint) as raised:
        read_tsv(path, find("ai2d"))
    assert "\n" not in str(raised.value)


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*none\.tsv: No such file"):
        read_tsv(tmp_path / "none.tsv", find("ai2d"))
    with pytest.raises(UserError, match="cannot read"):
        read_tsv(tmp_path, find("ai2d"))


@pytest.mark.parametrize("content", [png(size=(64, 64))[:100], b"no image" * 20, None])
def test_an_unreadable_image_names_its_item(content, tmp_path):
    text = "*" * 100 if content is None else base64.b64encode(content).decode()
    items = read(tmp_path, [choice(5, image=text)])
    with pytest.raises(UserError, match=r"ai2d/5") as raised:
        load_image(items[0])
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300


def test_the_digest_sees_text_and_image_files(tmp_path):
    picture = tmp_path / "one.png"
    picture.write_bytes(png())
    row = {name: value for name, value in choice(image_path="one.png").items() if name != "image"}
    path = write(tmp_path / "file.tsv", [row])
    before = digest(path, read_tsv(path, find("ai2d")))
    assert digest(path, read_tsv(path, find("ai2d"))) == before
    picture.write_bytes(png("blue"))
    after = digest(path, read_tsv(path, find("ai2d")))
    write(path, [row | {"B": "green"}])
    assert len({before, after, digest(path, read_tsv(path, find("ai2d")))}) == 3


# ----------------------------------------------------------------------------------------------------------- questions


def asked(tmp_path, row: dict, name: str) -> str:
    return question_text(read(tmp_path, [row], name)[0])


def test_questions_are_worded_as_xtuners_wrapper_words_them(tmp_path):
    row = choice(C="green", hint="Look up.")
    assert asked(tmp_path, row, "sciqa") == (
        "Look up.\nWhat colour?\nA. red\nB. blue\nC. green\n"
        "Answer with the option's letter from the given choices directly."
    )
    chinese = choice(question="图中是什么颜色?", A="红", B="蓝")
    assert asked(tmp_path, chinese, "mmbench_cn") == "图中是什么颜色?\nA. 红\nB. 蓝\n请直接回答选项字母。"
    assert asked(tmp_path, choice(A="红"), "mmbench_cn").endswith("请直接回答选项字母。"), "by the text, not the file"
    assert asked(tmp_path, choice(), "mmbench_cn").endswith("directly.")
    text = {"index": "0", "image": embedded(), "question": "What is written?", "answer": "['a', 'b']"}
    assert asked(tmp_path, text, "textvqa") == ("What is written?\nAnswer the question using a single word or phrase.")
    assert asked(tmp_path, text, "mmvet") == "What is written?"
    pair = [mme(0, "a.png"), mme(1, "a.png")]
    assert question_text(read(tmp_path, pair, "mme")[0]) == "Is it red? Please answer yes or no."


def test_the_image_comes_first_and_once(tmp_path):
    (item,) = read(tmp_path, [choice(question="Is <image> red?")])
    said = turn(item)
    assert said["from"] == "human" and said["value"].startswith("<image>\nIs  red?\nA. red")
    assert said["value"].count("<image>") == 1

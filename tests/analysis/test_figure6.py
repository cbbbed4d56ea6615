"""Figure 6: which images stand where, what is said of missing ones, and the files themselves."""

from __future__ import annotations

import hashlib
import io
import re
import subprocess
import sys
from unittest.mock import patch
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from analysis.contact_sheet import COLOURS, PIXELS, SheetRow, compose, shrink
from analysis.figure6 import build
from analysis.load import load_runs
from analysis.paper import load_paper_numbers
from analysis.style import TEXT, publication
from moslora_core.drawn_images import MANIFEST, REFERENCES
from moslora_core.record import append_jsonl

from . import subject_runs

NUMBERS = load_paper_numbers()
ORTHOGONAL = "method.mixer_init=orthogonal"
METHODS = {"lora": 10, "moslora": 20, ORTHOGONAL: 30}  # red of their images


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    return folder


def add(root, method, subject="dog", overrides="", seed=1, prompts=range(3), real=2, noise=100, **given):
    """A run whose images have its own red, the prompt's green, and the image's number as blue."""
    record = subject_runs.add(root, method, subject, {"dino": 0.5}, seed, overrides, **given)
    (record.path / "images").mkdir()
    for prompt in prompts:
        for index in range(2):
            file = f"images/{prompt:03d}-{index:02d}.png"
            colour = (METHODS.get(overrides, METHODS.get(method, 90)), prompt, index)
            Image.new("RGB", (8, 8), colour).save(record.path / file)
            row = {
                "prompt_index": prompt,
                "index": index,
                "prompt": f"a sks {subject} number {prompt}",
                "class_prompt": f"a {subject} number {prompt}",
                "noise_seed": noise + 10 * prompt + index,
                "file": file,
                "sha256": hashlib.sha256((record.path / file).read_bytes()).hexdigest(),
            }
            append_jsonl(record.path / MANIFEST, [row])
    for number in range(real):
        (record.path / REFERENCES).mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (200, number, 0)).save(record.path / REFERENCES / f"{number:02d}.png")
    return record


def add_all(root, **given):
    return [add(root, *arm, **given) for arm in (("lora",), ("moslora",), ("moslora", "dog", ORTHOGONAL))]


def figures(root, **options):
    """The sheets, with an empty file for a picture: drawing one takes longer than all the rest."""
    with patch("analysis.figure6.draw", return_value={"png": b""}):
        found = build(root, *load_runs(root, "subject_driven_t2i"), NUMBERS, **options)
    return {f"{figure.folder}/{figure.name}": figure for figure in found}


def figure_of(root, **options):
    (figure,) = figures(root, **options).values()
    return figure


def drawn_figure_of(root):
    (figure,) = build(root, *load_runs(root, "subject_driven_t2i"), NUMBERS)
    return figure


def csv_of(figure):
    return pd.read_csv(io.StringIO(figure.csv), keep_default_na=False, na_values=[""])


def shown(root, **options) -> tuple[list[str], list[list[tuple[int, ...] | None]]]:
    """The columns of the only sheet, and the colour of every image in it, row by row."""
    with patch("analysis.figure6.draw", return_value={"png": b""}) as draw:
        build(root, *load_runs(root, "subject_driven_t2i"), NUMBERS, **options)
    draw.assert_called_once()
    columns, rows = draw.call_args.args
    return list(columns), [[image and image.getpixel((0, 0)) for image in row.images] for row in rows]


# ------------------------------------------------------------------------------------------------------ what is shown


def test_every_image_stands_in_its_row_and_column(root):
    add_all(root)
    add(root, "base")
    columns, colours = shown(root)
    assert columns == ["Real image", "LoRA", "MoSLoRA", "MoSLoRA (orthogonal)"]
    assert colours == [
        [(200, prompt % 2, 0), *((red, prompt, 0) for red in METHODS.values())]  # two real images, in turn
        for prompt in range(3)
    ]


def test_the_data_name_every_image(root):
    records = add_all(root)
    lines = csv_of(figure_of(root))
    assert len(lines) == 3 * 4 and lines.missing.isna().all()
    drawn = lines[lines.column != "Real image"]
    for line in drawn.itertuples():
        content = (root / line.file).read_bytes()
        assert hashlib.sha256(content).hexdigest() == line.sha256
        assert Image.open(io.BytesIO(content)).getpixel((0, 0)) == (
            METHODS[ORTHOGONAL if line.label == ORTHOGONAL else line.method],
            line.prompt_index,
            0,
        )
        assert line.noise_seed == 100 + 10 * line.prompt_index and line.seed == 1
        assert line.prompt == f"a sks dog number {line.prompt_index}"
    assert set(lines[lines.column == "Real image"].file) == {
        f"{records[0].path.relative_to(root)}/references/{number:02d}.png" for number in (0, 1)
    }


def test_a_few_of_many_prompts_are_shown_evenly(root):
    for method in ("lora", "moslora"):
        add(root, method, prompts=range(25))
    figure = figure_of(root)
    assert csv_of(figure).prompt_index.unique().tolist() == [0, 5, 10, 14, 19, 24]
    assert "6 of 25 prompts, the first image of each." in figure.markdown
    chosen = figure_of(root, prompts=[23, 13])
    assert csv_of(chosen).prompt_index.unique().tolist() == [23, 13]


def test_other_settings_and_methods_are_named_but_not_shown(root):
    add_all(root)
    for method, overrides in (("dora", ""), ("lora", "adapter.r=8"), ("base", "")):
        add(root, method, overrides=overrides)
    assert "Not shown: lora (adapter.r=8), dora." in figure_of(root).markdown
    assert len(shown(root)[0]) == 4


def test_there_is_room_for_four_methods(root):
    add(root, "lora")
    for init in ("gaussian", "identity", "kaiming_uniform", "orthogonal"):
        add(root, "moslora", overrides=f"method.mixer_init={init}")
    assert "Not shown: moslora (orthogonal)." in figure_of(root).markdown
    assert shown(root)[0][1:] == [
        "LoRA",
        *(f"MoSLoRA ({init})" for init in ("gaussian", "identity", "kaiming_uniform")),
    ]


def test_the_first_seed_that_all_have_is_shown(root):
    for method, seeds in (("lora", (0, 1, 2)), ("moslora", (1, 2))):
        for seed in seeds:
            add(root, method, seed=seed)
    figure = figure_of(root)
    assert set(csv_of(figure).seed.dropna()) == {1} and "Runs of seed 1." in figure.markdown


def test_different_seeds_are_a_warning(root):
    add(root, "lora", seed=1)
    add(root, "moslora", seed=2)
    assert "Warning: runs of different seeds: LoRA 1, MoSLoRA 2." in figure_of(root).markdown


def test_different_noise_is_a_warning(root):
    add(root, "lora")
    add(root, "moslora", noise=500)
    markdown = figure_of(root).markdown
    assert "Warning: the images of prompts 0, 1, 2 start from different noise" in markdown
    assert "start from the same noise" not in markdown


def test_every_scale_and_subject_has_a_sheet_of_its_own(root):
    for subject in ("dog", "grey sloth"):
        for scale in ("smoke", "paper"):
            add(root, "lora", subject, scale=scale)
            add(root, "moslora", subject, scale=scale)
    names = list(figures(root))
    assert [name.split("~")[0] for name in names] == [
        *("paper/samples/figure6-dog", "paper/samples/figure6-grey_sloth"),
        *("smoke/samples/figure6-dog", "smoke/samples/figure6-grey_sloth"),
    ]
    assert all(" " not in name for name in names)


def test_without_lora_and_moslora_there_is_no_sheet(root):
    add(root, "base")
    add(root, "dora")
    assert figures(root) == {}


def test_the_papers_claim_stands_below(root):
    add_all(root)
    text = figure_of(root).markdown
    assert "### Paper, SDXL (Figure 6" in text and "the words wet and floating better than LoRA. ˢ" in text


# ----------------------------------------------------------------------------------------------------- what is missing

RUN = "scale=smoke method=moslora data.subject=dog seed=1"


def no_manifest(record):
    (record.path / MANIFEST).unlink()


def one_file(record):
    (record.path / "images/001-00.png").unlink()


def another_image(record):
    Image.new("RGB", (8, 8)).save(record.path / "images/002-00.png")


def two_files(record):
    one_file(record)
    another_image(record)


def no_image(record):
    path = record.path / "images/000-00.png"
    path.write_bytes(b"no image")
    digest = hashlib.sha256(b"no image").hexdigest()
    lines = (record.path / MANIFEST).read_text().splitlines()
    lines[0] = re.sub(r'"sha256": "\w+"', f'"sha256": "{digest}"', lines[0])
    (record.path / MANIFEST).write_text("\n".join(lines) + "\n")


def damaged_manifest(record):
    (record.path / MANIFEST).write_text('{"prompt_index": 0}\n')


@pytest.mark.parametrize(
    ("harm", "message", "missing"),
    [
        (no_manifest, rf"its images are not there. To make it: python -m subject_driven_t2i.generate {RUN}", 3),
        (one_file, rf"images/001-00.png: No such file .*generate {RUN} on_finished=overwrite", 1),
        (another_image, rf"images/002-00.png has sha256 \w+\.\.\., .*generate {RUN} on_finished=overwrite", 1),
        (two_files, r"images/001-00.png: No such file or directory; .* and 1 more. To make it:", 2),
        (no_image, r"000-00.png is no image. To make it: ", 1),
        (damaged_manifest, r"images.jsonl line 1: index is missing; expected prompt_index.*. To make it: ", 3),
    ],
)
def test_missing_images_are_named_with_the_command_that_makes_them(root, harm, message, missing):
    add(root, "lora")
    harm(add(root, "moslora"))
    figure = figure_of(root)
    assert re.search(rf"Missing, subject_driven_t2i/smoke/moslora/data.subject=dog/seed-1: {message}", figure.markdown)
    lines = csv_of(figure)
    assert lines.missing.notna().sum() == missing and set(lines[lines.missing.notna()].column) == {"MoSLoRA"}
    assert figure.pictures


def test_a_missing_run_is_named_with_the_commands_that_make_it(root):
    add(root, "lora", "dog", seed=3)
    add(root, "lora", "can")
    add(root, "moslora", "can", ORTHOGONAL)
    dog = figures(root)["smoke/samples/figure6-dog"]
    arguments = f"scale=smoke method=moslora {ORTHOGONAL} data.subject=dog seed=3"
    stages = " && ".join(
        f"python -m subject_driven_t2i.{stage} {arguments}" for stage in ("train", "generate", "evaluate")
    )
    assert f"Missing: MoSLoRA (orthogonal) of dog. To make it: {stages}" in dog.markdown.replace("\\_", "_")
    assert csv_of(dog).query("column == 'MoSLoRA (orthogonal)'").missing.tolist() == ["no run"] * 3


def test_a_method_that_nobody_ran_has_an_empty_column(root):
    add(root, "moslora")
    columns, colours = shown(root)
    assert columns == ["Real image", "LoRA", "MoSLoRA"]
    assert [row[1] for row in colours] == [None] * 3
    assert "python -m subject_driven_t2i.train scale=smoke method=lora data.subject=dog seed=1" in (
        figure_of(root).markdown
    )


def test_real_images_that_the_record_lacks_are_named(root):
    for method in ("lora", "moslora"):
        add(root, method, real=0)
    assert [row[0] for row in shown(root)[1]] == [None] * 3
    assert re.search(
        r"Missing: the real images of dog. To copy them into the record: "
        r"python -m subject_driven_t2i.evaluate scale=smoke method=lora data.subject=dog seed=1 on_finished=overwrite",
        figure_of(root).markdown,
    )


def test_a_sheet_without_any_image_is_not_drawn(root):
    no_manifest(add(root, "lora"))
    no_manifest(add(root, "moslora"))
    figure = figure_of(root)
    assert "Not drawn: no image is there." in figure.markdown
    assert figure.pictures == {} and set(figure.files()) == {"md", "csv"} and "![" not in figure.section("x")


# --------------------------------------------------------------------------------------------------------- the picture


def photograph(width: int, height: int) -> Image.Image:
    return Image.effect_noise((width, height), 80).convert("RGB").resize((width, height))


def test_small_images_keep_their_pixels():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8))
    assert np.array_equal(np.asarray(shrink(image)), np.asarray(image)[:, 2:14])


def test_large_images_are_cut_to_the_centre_reduced_and_indexed():
    image = Image.new("RGB", (1200, 800), (255, 0, 0))
    image.paste(photograph(800, 800), (200, 0))
    found = shrink(image)
    assert found.size == (PIXELS, PIXELS) and found.mode == "RGB"
    assert len(found.getcolors(PIXELS**2)) <= COLOURS
    assert not (np.asarray(found)[:, (0, -1)] == (255, 0, 0)).all(axis=-1).any()  # the sides are gone
    plain = np.asarray(image.crop((200, 0, 1000, 800)).resize((PIXELS, PIXELS), Image.Resampling.LANCZOS))
    assert np.abs(np.asarray(found, dtype=int) - plain).mean() < 12


LONG = "a sks stuffed animal on top of green grass with sunflowers around it"
SHEETS = {
    "three columns": (["Real image", "LoRA", "MoSLoRA"], ["a sks dog in the snow"] * 6),
    "five columns": (
        ["Real image", "LoRA", *(f"MoSLoRA ({init})" for init in ("kaiming_uniform", "orthogonal"))],
        [LONG] * 4,
    ),
    "most columns": (["Real image", "LoRA", *["MoSLoRA (kaiming_uniform)"] * 3], [LONG] * 6),
}


@pytest.mark.parametrize("sheet", SHEETS)
def test_no_text_leaves_the_page_or_covers_another(sheet):
    columns, labels = SHEETS[sheet]
    rows = [SheetRow(label, [Image.new("RGB", (4, 4))] * len(columns)) for label in labels]
    with publication():
        figure = compose(columns, rows)
        figure.draw_without_rendering()
        boxes = [text.get_window_extent() for text in figure.texts]
        images = [axes.get_window_extent() for axes in figure.axes]
    assert len(boxes) == len(columns) + len(labels) and len(images) == len(columns) * len(labels)
    for number, box in enumerate(boxes):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height
        assert not any(box.overlaps(other) for other in boxes[:number])
        assert not any(box.overlaps(image) for image in images)
    for number, image in enumerate(images):
        assert image.width == pytest.approx(image.height)
        assert image.x1 <= figure.bbox.width and image.y0 >= 0
        assert not any(image.overlaps(other) for other in images[:number])
    assert figure.get_figwidth() <= TEXT + 1e-9 and figure.get_figheight() < 9


def test_what_is_missing_is_written_in_its_place():
    with publication():
        figure = compose(["Real image", "LoRA"], [SheetRow("a dog", [Image.new("RGB", (4, 4)), None])])
    first, second = figure.axes
    assert len(first.images) == 1 and [text.get_text() for text in second.texts] == ["missing"]


def test_files_are_for_print_and_small(root):
    add_all(root)
    for path in root.rglob("images/*.png"):
        photograph(300, 300).save(path)
    for manifest in root.rglob(MANIFEST):
        lines = manifest.read_text().splitlines()
        for number, line in enumerate(lines):
            file = re.search(r'"file": "([^"]+)"', line).group(1)
            digest = hashlib.sha256((manifest.parent / file).read_bytes()).hexdigest()
            lines[number] = re.sub(r'"sha256": "\w+"', f'"sha256": "{digest}"', line)
        manifest.write_text("\n".join(lines) + "\n")
    pictures = drawn_figure_of(root).pictures
    pdf = pictures["pdf"]
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf
    assert b"CreationDate" not in pdf and b"atplotlib" not in pdf
    assert pdf.count(b"/Indexed") == 9 + 3  # three of them are real images, of one colour
    assert len(pdf) < 9 * PIXELS**2 + 2**17  # a byte a pixel at most
    assert ElementTree.fromstring(pictures["svg"]).tag.endswith("svg") and b"<dc:date" not in pictures["svg"]
    png = Image.open(io.BytesIO(pictures["png"]))
    assert png.info["dpi"] == pytest.approx((300, 300), abs=0.1) and "Software" not in png.info


def test_another_process_writes_the_same_bytes(root, tmp_path):
    add_all(root)
    (tmp_path / "matplotlibrc").write_text("font.size: 20\nimage.interpolation: bilinear\npdf.fonttype: 3\n")
    code = """
import sys
from pathlib import Path
from analysis.figure6 import build
from analysis.load import load_runs
from analysis.paper import load_paper_numbers
root = Path(sys.argv[1])
(figure,) = build(root, *load_runs(root, "subject_driven_t2i"), load_paper_numbers())
for suffix, content in figure.files().items():
    Path(sys.argv[2], suffix).write_bytes(content if isinstance(content, bytes) else content.encode())
"""
    process = subprocess.run(
        [sys.executable, "-c", code, str(root), str(tmp_path)], cwd=tmp_path, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    for suffix, content in drawn_figure_of(root).files().items():
        content = content if isinstance(content, bytes) else content.encode()
        assert (tmp_path / suffix).read_bytes() == content, suffix

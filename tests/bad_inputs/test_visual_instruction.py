"""Bad inputs of visual instruction tuning: LLaVA's files, images, benchmarks, results of toolkits, checkpoints."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from moslora_core.base_models import resolve_path
from visual_instruction.benchmarks.registry import find
from visual_instruction.benchmarks.toolkits import read_lmms_eval, read_vlmevalkit
from visual_instruction.benchmarks.tsv import load_image, read_tsv
from visual_instruction.config import DataConfig, ModelConfig
from visual_instruction.conversations import read_questions
from visual_instruction.convert.assemble import assemble
from visual_instruction.convert.internlm2 import convert_internlm2
from visual_instruction.convert.llava_hf import convert_llava_hf
from visual_instruction.convert.projector import convert_projector
from visual_instruction.models import load_processor
from visual_instruction.prepare_data import prepare

from ..visual_instruction.convert_parts import save_clip, save_llm, save_projector
from .files import NOT_IMAGES, instead, png, put, unreadable
from .row import BadInput, check_refused

Write = Callable[[Path], object]


# -------------------------------------------------------------------------------------------------------- instructions

TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cup."}]
INSTRUCTION = {"id": "1", "image": "coco/1.png", "conversations": TURNS}
INSTRUCTIONS, PICTURE = "llava.json", "images/coco/1.png"


def write_instructions(folder: Path) -> None:
    put(folder / INSTRUCTIONS, json.dumps([INSTRUCTION]))
    put(folder / PICTURE, png())


def prepare_instructions(folder: Path) -> None:
    data = DataConfig(str(folder / "data"), "folder", str(folder / INSTRUCTIONS), str(folder / "images"))
    data.benchmarks = []
    prepare(data)


def turns(*changes: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{**turn, **change} for turn, change in zip(TURNS, changes, strict=True)]


def instruction_rows() -> list[BadInput]:
    faults: dict[str, tuple[Any, tuple[str, ...]]] = {
        "is an object": ({"data": [INSTRUCTION]}, ("list",)),
        "is an empty list": ([], ("none",)),
        "has null for an instruction": ([INSTRUCTION, None], ("[1]", "None")),
        "has no id": ([{"image": "coco/1.png", "conversations": TURNS}], ("[0]", "id")),
        "has a list for an id": ([INSTRUCTION | {"id": [1]}], ("[0]",)),
        "has true for an id": ([INSTRUCTION | {"id": True}], ("[0]",)),
        "has an object for conversations": ([INSTRUCTION | {"conversations": TURNS[0]}], ("[0]", "conversations")),
        "has no turns": ([INSTRUCTION | {"conversations": []}], ("[0]", "empty")),
        "has a number for a text": ([INSTRUCTION | {"conversations": turns({}, {"value": 3})}], ("[0]", "turn 1")),
        "has NaN for a text": ([INSTRUCTION | {"conversations": turns({}, {"value": math.nan})}], ("[0]", "turn 1")),
        "has an empty answer": ([INSTRUCTION | {"conversations": turns({}, {"value": " "})}], ("[0]", "turn 1")),
        "has half a character": ([INSTRUCTION | {"conversations": turns({}, {"value": "\udc00"})}], ()),
        "has a list for a speaker": ([INSTRUCTION | {"conversations": turns({}, {"from": ["gpt"]})}], ("turn 1",)),
        "has an unknown speaker": ([INSTRUCTION | {"conversations": turns({"from": "user"}, {})}], ("[0]", "'user'")),
        "begins with an answer": ([INSTRUCTION | {"conversations": TURNS[::-1]}], ("[0]", "'gpt'")),
        "ends with a question": ([INSTRUCTION | {"conversations": TURNS[:1]}], ("[0]", "unanswered")),
        "has an image in an answer": (
            [INSTRUCTION | {"conversations": turns({}, {"value": "<image>"})}],
            ("[0]", "image_tokens"),
        ),
        "has no place for its image": (
            [INSTRUCTION | {"conversations": turns({"value": "What?"}, {})}],
            ("[0]", "image_tokens"),
        ),
        "has a list of images": ([INSTRUCTION | {"image": ["coco/1.png"]}], ("[0]", "image")),
        "has an image of no name": ([INSTRUCTION | {"image": ""}], ("[0]", "image")),
        "has an image above its folder": ([INSTRUCTION | {"image": "../../etc/passwd"}], ("[0]", "image_outside")),
        "has an absolute image": ([INSTRUCTION | {"image": "/etc/passwd"}], ("[0]", "image_outside")),
        "has an image on a drive": ([INSTRUCTION | {"image": "C:\\1.png"}], ("[0]", "image_outside")),
        "has an image that is not there": ([INSTRUCTION | {"image": "coco/2.png"}], ("[0]", "image_missing", "2.png")),
        "has a folder for an image": ([INSTRUCTION | {"image": "coco"}], ("[0]", "image_missing")),
        "has an image of a NUL byte": ([INSTRUCTION | {"image": "a\0.png"}], ("[0]",)),
        "has an image of an endless name": ([INSTRUCTION | {"image": "a" * 5000}], ("[0]",)),
    }
    return [
        BadInput(
            f"the instruction file {wrong}",
            instead(INSTRUCTIONS, write_instructions, json.dumps(rows).encode()),
            prepare_instructions,
            (INSTRUCTIONS, *names),
        )
        for wrong, (rows, names) in faults.items()
    ]


# ---------------------------------------------------------------------------------------------------------- questions

QUESTION = {"question_id": 1, "image": "1.png", "text": "What is it?", "category": "conv"}


def question_rows() -> list[BadInput]:
    line = json.dumps(QUESTION)

    def changed(**values: Any) -> str:
        return f"{line}\n{json.dumps(QUESTION | {'question_id': 2} | values)}\n"

    faults = {
        "is empty": ("", ("none",)),
        "has an empty object": ("{}\n", ("line 1", "question_id")),
        "is a JSON list": (f"[{line}]\n", ("line 1", "list")),
        "is cut off": (f"{line}\n{line[:20]}", ("line 2",)),
        "nests too deep": ("[" * 100_000 + "\n", ("line 1",)),
        "has half a character": (changed(text="\ud800"), ("line 2",)),
        "has a question_id twice": (f"{line}\n{line}\n", ("question_id 1",)),
        "has null for a question_id": (changed(question_id=None), ("line 2", "question_id")),
        "has true for a question_id": (changed(question_id=True), ("line 2", "question_id")),
        "has NaN for a question_id": (changed(question_id=math.nan), ("line 2", "question_id")),
        "has a number for a text": (changed(text=3), ("line 2", "text")),
        "has an empty text": (changed(text="\n"), ("line 2", "text")),
        "has an image above its folder": (changed(image="../1.png"), ("line 2", "image_outside")),
        "has an absolute image": (changed(image="/1.png"), ("line 2", "image_outside")),
    }
    contents = {wrong: text.encode() for wrong, (text, _) in faults.items()} | {"is not UTF-8": b"\xff\n"}
    return [
        BadInput(
            f"the question file {wrong}",
            lambda folder, content=content: put(folder / "q.jsonl", content),
            lambda folder: read_questions(folder / "q.jsonl"),
            ("q.jsonl", *faults.get(wrong, ("", ()))[1]),
        )
        for wrong, content in contents.items()
    ] + [
        BadInput(
            "the question file is a folder",
            lambda folder: (folder / "q.jsonl").mkdir(),
            lambda folder: read_questions(folder / "q.jsonl"),
            ("q.jsonl",),
        )
    ]


# --------------------------------------------------------------------------------------------------------- benchmarks

TSV = "file.tsv"
CHOICE = {
    "index": "0",
    "image": base64.b64encode(png((32, 32))).decode(),
    "question": "What colour?",
    "A": "red",
    "B": "blue",
    "answer": "A",
}


def table(rows: Sequence[Mapping[str, str]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter="\t", lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def read_benchmark(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> None:
        for item in read_tsv(folder / TSV, find(name)):
            load_image(item)

    return read


def benchmark_rows() -> list[BadInput]:
    header, line = table([CHOICE]).split(b"\n")[:2]
    path = {name: value for name, value in CHOICE.items() if name != "image"} | {"image_path": "1.png"}
    faults: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
        "is empty": ("ai2d", b"", ()),
        "has a header alone": ("ai2d", header + b"\n", ()),
        "has a column twice": ("ai2d", b"index\tindex\n0\t0\n", ("'index'",)),
        "has a ragged row": ("ai2d", b"\n".join([header, line, line + b"\textra"]), ("line 3",)),
        "has a short row": ("ai2d", b"\n".join([header, line, b"1\tAAAA"]), ("line 3",)),
        "ends within quotes": ("ai2d", header + b'\n0\t"AAAA', ()),
        "is not UTF-8": ("ai2d", header + b"\n\xff" + line, ()),
        "is UTF-16": ("ai2d", table([CHOICE]).decode().encode("utf-16"), ()),
        "has a NUL byte": ("ai2d", header + b"\n0\0" + line[1:], ()),
        "has commas for tabs": ("ai2d", table([CHOICE]).replace(b"\t", b","), ("index",)),
        **{
            f"has no column {name}": ("ai2d", table([{k: v for k, v in CHOICE.items() if k != name}]), (f"'{name}'",))
            for name in CHOICE
        },
        "has an index twice": ("ai2d", table([CHOICE, CHOICE]), ("index 0",)),
        "has an empty index": ("ai2d", table([CHOICE | {"index": ""}]), ("index",)),
        "has NaN for an index": ("ai2d", table([CHOICE | {"index": "nan"}]), ("index",)),
        "has an empty question": ("ai2d", table([CHOICE | {"question": ""}]), ("index 0", "question")),
        "has an answer that is not offered": ("ai2d", table([CHOICE | {"answer": "C"}]), ("index 0", "'C'", "A, B")),
        "has a small letter for an answer": ("ai2d", table([CHOICE | {"answer": "a"}]), ("index 0", "'a'")),
        "has no options": ("ai2d", table([CHOICE | {"A": "", "B": "nan"}]), ("index 0", "'A'")),
        "refers to no image": ("ai2d", table([CHOICE | {"image": "7"}]), ("index 0", "'7'")),
        "refers to itself": ("ai2d", table([CHOICE | {"image": "0"}]), ("index 0", "'0'")),
        "has a text for an image": ("ai2d", table([CHOICE | {"image": "no base64 " * 9}]), ("ai2d/0",)),
        "has several images in a row": ("ai2d", table([CHOICE | {"image": f"['{CHOICE['image']}']"}]), ("line 2",)),
        "has no image at all": ("ai2d", table([CHOICE | {"image": ""}]), ("image",)),
        "names an image above its folder": ("ai2d", table([path | {"image_path": "../1.png"}]), ("'../1.png'",)),
        "names an absolute image": ("ai2d", table([path | {"image_path": "/1.png"}]), ("'/1.png'",)),
        "names an image that is not there": ("ai2d", table([path]), ("index 0", "1.png")),
        "names an image by an endless name": ("ai2d", table([path | {"image_path": "a" * 5000}]), ("index 0",)),
        "names an image by a NUL byte": ("ai2d", table([path | {"image_path": "a\0"}]), ()),
        "has a letter for the index of a rotation": ("mmbench_en", table([CHOICE | {"index": "x"}]), ("index x",)),
        "has a negative index of a rotation": ("mmbench_en", table([CHOICE | {"index": "-1"}]), ("index -1",)),
        "has an index of a thousand digits": ("mmbench_en", table([CHOICE | {"index": "9" * 5000}]), ("index",)),
        "answers neither yes nor no": ("mme", table([CHOICE | {"answer": "A", "category": "color"}]), ("'A'", "Yes")),
        "has one question about a picture": (
            "mme",
            table([CHOICE | {"answer": "Yes", "category": "color"}]),
            ("mme/0", "2"),
        ),
        "has an unknown category": ("mme", table([CHOICE | {"answer": "No", "category": "hue"}]), ("'hue'", "color")),
        "has a list that is not closed": (
            "textvqa",
            table([{k: v for k, v in CHOICE.items() if len(k) > 1} | {"answer": "['a'"}]),
            ("index 0", "list"),
        ),
        "has a list of numbers": (
            "textvqa",
            table([{k: v for k, v in CHOICE.items() if len(k) > 1} | {"answer": "[1]"}]),
            ("index 0", "list"),
        ),
        "has a list that nests too deep": (
            "textvqa",
            table([{k: v for k, v in CHOICE.items() if len(k) > 1} | {"answer": "[" * 100_000}]),
            ("index 0", "list"),
        ),
        **{
            f"has an image that {wrong}": (
                "ai2d",
                table([CHOICE | {"image": (base64.b64encode(content) + b" " * 80).decode()}]),
                ("ai2d/0",),
            )
            for wrong, content in NOT_IMAGES.items()
        },
    }
    return [
        BadInput(
            f"the benchmark {wrong}",
            lambda folder, content=content: put(folder / TSV, content),
            read_benchmark(name),
            (TSV, *names),
        )
        for wrong, (name, content, names) in faults.items()
    ] + [
        BadInput("the benchmark is absent", lambda folder: None, read_benchmark("ai2d"), (TSV,)),
        BadInput("the benchmark is a folder", lambda folder: (folder / TSV).mkdir(), read_benchmark("ai2d"), (TSV,)),
    ]


# ------------------------------------------------------------------------------------------------- results of toolkits

LMMS, ACCURACY = "1_results.json", "m_AI2D_TEST_acc.csv"


def write_lmms(folder: Path) -> None:
    put(folder / LMMS, json.dumps({"results": {"ai2d": {"exact_match,none": 0.5}}}))


def lmms(content: Any) -> Write:
    return lambda folder: put(folder / LMMS, json.dumps(content))


def result_rows() -> list[BadInput]:
    def ai2d(values: Any, **more: Any) -> dict[str, Any]:
        return {"results": {"ai2d": values}, **more}

    samples = {"ai2d": {"original": 10}}
    share = {"exact_match,none": 0.5}
    of_lmms: dict[str, tuple[Any, tuple[str, ...]]] = {
        "is a list": ([1], ()),
        "has a list of results": ({"results": [share]}, ()),
        "has null for a task": (ai2d(None), ("ai2d", "exact_match")),
        "has text for a share": (ai2d({"exact_match,none": "high"}), ("ai2d", "'high'")),
        "has a share above 1": (ai2d({"exact_match,none": 50}), ("ai2d", "50")),
        "has a negative share": (ai2d({"exact_match,none": -0.5}), ("ai2d", "-0.5")),
        "has NaN for a share": (ai2d({"exact_match,none": math.nan}), ("ai2d", "nan")),
        "has a share of a thousand digits": (ai2d({"exact_match,none": 10**1000}), ("ai2d",)),
        "has two filters": (ai2d({"exact_match,a": 0.5, "exact_match,b": 0.5}), ("ai2d", "found 2")),
        "counts -1 questions": (
            ai2d(share, **{"n-samples": {"ai2d": {"original": 10, "effective": -1}}}),
            ("ai2d", "n-samples"),
        ),
        "counts infinitely many questions": (
            ai2d(share, **{"n-samples": {"ai2d": {"original": 10, "effective": math.inf}}}),
            ("ai2d", "n-samples"),
        ),
        "counts half a question": (
            ai2d(share, **{"n-samples": {"ai2d": {"original": 10, "effective": 9.5}}}),
            ("ai2d", "n-samples"),
        ),
        "does not count its questions": (ai2d(share, **{"n-samples": samples}), ("ai2d", "n-samples")),
        "counts by text": (
            ai2d(share, **{"n-samples": {"ai2d": {"original": 10, "effective": "all"}}}),
            ("ai2d", "n-samples"),
        ),
    }
    of_vlmevalkit: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
        "is empty": (ACCURACY, b"", ("rows",)),
        "has a header alone": (ACCURACY, b"split,Overall\n", ("0 rows",)),
        "has no column Overall": (ACCURACY, b"split\nnone\n", ("Overall",)),
        "has two rows": (ACCURACY, b"split,Overall\nnone,0.5\nnone,0.5\n", ("2 rows",)),
        "has a ragged row": (ACCURACY, b"split,Overall\nnone,0.5,0.7\n", ("row 1",)),
        "has a short row": (ACCURACY, b"split,Overall\nnone\n", ("row 1",)),
        "has text for a share": (ACCURACY, b"split,Overall\nnone,high\n", ("Overall", "'high'")),
        "has NaN for a share": (ACCURACY, b"split,Overall\nnone,nan\n", ("Overall", "'nan'")),
        "has a share in percent": (ACCURACY, b"split,Overall\nnone,50\n", ("Overall", "'50'")),
        "is not UTF-8": (ACCURACY, b"split,Overall\nnone,\xff\n", ()),
        "has a NUL byte": (ACCURACY, b"split,Overall\nnone,0.5\0\n", ()),
        "ends within quotes": (ACCURACY, b'split,Overall\n"none,0.5\n', ()),
        "has no points": ("m_MME_score.csv", b"perception\n100\n", ("reasoning",)),
        "has negative points": ("m_MME_score.csv", b"perception,reasoning\n-1,100\n", ("perception", "'-1'")),
        "has no row Overall": ("m_MMVet_gpt_score.csv", b"Category,tot,acc\nrec,10,50\n", ("Overall",)),
        "counts no question": ("m_MMVet_gpt_score.csv", b"Category,tot,acc\nOverall,0,50\n", ("tot", "'0'")),
        "counts infinitely many questions": ("m_MMVet_gpt_score.csv", b"Category,tot,acc\nOverall,inf,50\n", ("tot",)),
        "has a category twice": (
            "m_MMVet_gpt_score.csv",
            b"Category,tot,acc\nOverall,10,50\nOverall,10,60\n",
            ("Overall",),
        ),
    }
    return [
        *(
            BadInput(f"lmms-eval's file {wrong}", lmms(content), read_lmms_eval, names)
            for wrong, (content, names) in of_lmms.items()
        ),
        *(
            BadInput(
                f"VLMEvalKit's {file.removesuffix('.csv').split('_')[1]} {wrong}",
                lambda folder, file=file, content=content: put(folder / file, content),
                read_vlmevalkit,
                (file, *names),
            )
            for wrong, (file, content, names) in of_vlmevalkit.items()
        ),
        BadInput(
            "VLMEvalKit's file is a folder", lambda folder: (folder / ACCURACY).mkdir(), read_vlmevalkit, (ACCURACY,)
        ),
        BadInput(
            "VLMEvalKit's folder is absent", lambda _: None, lambda folder: read_vlmevalkit(folder / "x"), ("x",)
        ),
    ]


# -------------------------------------------------------------------------------------------------------- checkpoints

INTERNLM2 = {
    "model_type": "internlm2",
    "vocab_size": 384,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
INDEX = "model.safetensors.index.json"


def write_internlm2(**changes: Any) -> Write:
    def write(folder: Path) -> None:
        put(folder / "source" / "config.json", json.dumps(INTERNLM2 | changes))
        put(folder / "source" / INDEX, json.dumps({"weight_map": {}}))

    return write


def internlm2_index(content: Any) -> Write:
    return instead(f"source/{INDEX}", write_internlm2(), json.dumps(content).encode())


def read_internlm2(folder: Path) -> None:
    convert_internlm2(folder / "source", folder / "out")


def write_llava(folder: Path) -> None:
    shutil.copytree(resolve_path("package:visual_instruction/smoke_base"), folder / "source")


def llava_json(file: str, change: Callable[[dict], object]) -> Write:
    def write(folder: Path) -> None:
        write_llava(folder)
        path = folder / "source" / file
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return write


def llava_weights(change: Callable[[dict], object]) -> Write:
    def write(folder: Path) -> None:
        write_llava(folder)
        path = folder / "source" / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return write


def cut_llava(folder: Path) -> None:
    write_llava(folder)
    path = folder / "source" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def read_llava(folder: Path) -> None:
    convert_llava_hf(folder / "source", folder / "out")


def write_parts(folder: Path) -> None:
    save_llm(folder / "llm")
    save_clip(folder / "vision")
    save_projector(folder / "projector")


def parts_json(file: str, change: Callable[[dict], object]) -> Write:
    def write(folder: Path) -> None:
        write_parts(folder)
        path = folder / file
        content = json.loads(path.read_text()) if path.exists() else {}
        change(content)
        path.write_text(json.dumps(content))

    return write


def read_parts(folder: Path) -> None:
    assemble(folder / "llm", folder / "vision", folder / "projector", folder / "out")


def read_projector(folder: Path) -> None:
    convert_projector(folder / "projector", folder / "out")


def checkpoint_rows() -> list[BadInput]:
    configs: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
        "is of another model": ({"model_type": "llama"}, ("model_type", "'llama'")),
        "has a list for a model_type": ({"model_type": ["internlm2"]}, ("model_type",)),
        "has text for a width": ({"hidden_size": "48"}, ("hidden_size", "'48'")),
        "has true for a width": ({"hidden_size": True}, ("hidden_size", "True")),
        "has half a head": ({"num_attention_heads": 6.5}, ("num_attention_heads", "6.5")),
        "has no heads": ({"num_attention_heads": 0}, ("num_attention_heads", "0")),
        "has -6 heads": ({"num_attention_heads": -6}, ("num_attention_heads", "-6")),
        "has -1 layers": ({"num_hidden_layers": -1}, ("num_hidden_layers", "-1")),
        "has a vocabulary of 0": ({"vocab_size": 0}, ("vocab_size", "0")),
        "has text for its groups": ({"num_key_value_heads": "2"}, ("num_key_value_heads", "'2'")),
        "has heads that do not divide": ({"num_attention_heads": 5}, ("num_attention_heads 5",)),
        "has a list of scalings": ({"rope_scaling": [2]}, ("rope_scaling",)),
        "has a scaling of NaN": ({"rope_scaling": {"type": "dynamic", "factor": math.nan}}, ("rope_scaling",)),
        "has an unknown scaling": ({"rope_scaling": {"type": "yarn", "factor": 2}}, ("rope_scaling", "yarn")),
        "has text for theta": ({"rope_theta": "big"}, ("rope_theta", "'big'")),
    }
    indices: dict[str, Any] = {
        "is a list": [],
        "has no weight_map": {},
        "has a list for a weight_map": {"weight_map": ["x"]},
        "has a number for a file": {"weight_map": {"output.weight": 1}},
        "names a file above its folder": {"weight_map": {"output.weight": "../other/model.safetensors"}},
        "names an absolute file": {"weight_map": {"output.weight": "/model.safetensors"}},
        "names a file that is not there": {"weight_map": {"output.weight": "other.safetensors"}},
    }
    llava: dict[str, tuple[Write, tuple[str, ...]]] = {
        "config is of another model": (llava_json("config.json", lambda c: c.update(model_type="blip")), ("'blip'",)),
        "config has no vision_config": (llava_json("config.json", lambda c: c.pop("vision_config")), ()),
        "config has a list of text_config": (llava_json("config.json", lambda c: c.update(text_config=[1])), ()),
        "config has an unknown tower": (
            llava_json("config.json", lambda c: c["vision_config"].update(model_type="siglip_vision_model")),
            ("siglip",),
        ),
        "config has text for a width": (
            llava_json("config.json", lambda c: c["text_config"].update(hidden_size="wide")),
            ("hidden_size",),
        ),
        "config has no heads": (
            llava_json("config.json", lambda c: c["text_config"].update(num_attention_heads=0)),
            ("config.json",),
        ),
        "config has patches of no size": (
            llava_json("config.json", lambda c: c["vision_config"].update(patch_size=0)),
            ("config.json",),
        ),
        "config has -1 layers": (
            llava_json("config.json", lambda c: c["text_config"].update(num_hidden_layers=-1)),
            ("source",),
        ),
        "image token is of another number": (
            llava_json("config.json", lambda c: c.update(image_token_index=3)),
            ("image_token_index=3",),
        ),
        "image token is out of range": (
            llava_json("config.json", lambda c: c.update(image_token_index=10**9)),
            ("image_token_index",),
        ),
        "processor crops to another size": (
            llava_json("processor_config.json", lambda c: c["image_processor"]["crop_size"].update(height=5)),
            ("(5, ",),
        ),
        "processor has no image processor": (llava_json("processor_config.json", lambda c: c.clear()), ()),
        "processor crops to text": (
            llava_json("processor_config.json", lambda c: c["image_processor"].update(crop_size="small")),
            (),
        ),
        "weights are cut off": (cut_llava, ("model.safetensors",)),
        "weights lack a tensor": (llava_weights(lambda t: t.pop(min(t))), ("has no tensor",)),
        "weights have another shape": (llava_weights(lambda t: t.update({min(t): t[min(t)][:1]})), ("shape",)),
        "weights have a tensor too many": (llava_weights(lambda t: t.update(extra=t[min(t)].clone())), ("extra",)),
    }
    parts: dict[str, tuple[Write, tuple[str, ...]]] = {
        "language model is an InternLM2": (
            parts_json("llm/config.json", lambda c: c.update(model_type="internlm2")),
            ("convert internlm2",),
        ),
        "language model has text for a width": (
            parts_json("llm/config.json", lambda c: c.update(hidden_size="48")),
            ("hidden_size",),
        ),
        "language model has no heads": (
            parts_json("llm/config.json", lambda c: c.update(num_attention_heads=0)),
            ("config.json",),
        ),
        "language model has another width": (
            parts_json("llm/config.json", lambda c: c.update(hidden_size=96)),
            ("shape",),
        ),
        "tower is of another model": (
            parts_json("vision/config.json", lambda c: c.update(model_type="vit")),
            ("'vit'",),
        ),
        "tower has a list of settings": (
            parts_json("vision/config.json", lambda c: c.update(model_type="clip", vision_config=[1])),
            ("config.json",),
        ),
        "projector is of another depth": (
            parts_json("projector/config.json", lambda c: c.update(model_type="projector", depth=3)),
            ("depth=3",),
        ),
        "projector is of another kind": (
            parts_json("projector/config.json", lambda c: c.update(mm_projector_type="linear")),
            ("'linear'",),
        ),
        "projector has a list for an activation": (
            parts_json("projector/config.json", lambda c: c.update(model_type="projector", hidden_act=["gelu"])),
            ("hidden_act",),
        ),
        "projector has an unknown activation": (
            parts_json("projector/config.json", lambda c: c.update(model_type="projector", hidden_act="bump")),
            ("hidden_act", "bump"),
        ),
    }
    return [
        *unreadable("InternLM2's config", "source/config.json", write_internlm2(), read_internlm2),
        *unreadable("InternLM2's index", f"source/{INDEX}", write_internlm2(), read_internlm2, names=("source",)),
        *(
            BadInput(
                f"InternLM2's config {wrong}", write_internlm2(**changed), read_internlm2, ("config.json", *names)
            )
            for wrong, (changed, names) in configs.items()
        ),
        *(
            BadInput(f"InternLM2's index {wrong}", internlm2_index(content), read_internlm2, ("source",))
            for wrong, content in indices.items()
        ),
        *unreadable("LLaVA's tokenizer.json", "source/tokenizer.json", write_llava, read_llava, names=("source",)),
        *(BadInput(f"LLaVA's {wrong}", write, read_llava, names) for wrong, (write, names) in llava.items()),
        *(BadInput(f"the part {wrong}", write, read_parts, names) for wrong, (write, names) in parts.items()),
        *unreadable(
            "the projector's config",
            "projector/config.json",
            parts_json("projector/config.json", lambda c: c.update(model_type="projector")),
            read_projector,
        )[1:],
    ]


# ---------------------------------------------------------------------------------------------------------------- base


def processor(folder: Path) -> None:
    load_processor(ModelConfig("test", str(folder / "source"), template="smoke"))


ROWS = [
    *unreadable("the instruction file", INSTRUCTIONS, write_instructions, prepare_instructions),
    *instruction_rows(),
    *(
        BadInput(
            f"the image of an instruction {wrong}",
            instead(PICTURE, write_instructions, content),
            prepare_instructions,
            (INSTRUCTIONS, "[0]", "image_unreadable"),
        )
        for wrong, content in NOT_IMAGES.items()
    ),
    *question_rows(),
    *benchmark_rows(),
    *unreadable("lmms-eval's file", LMMS, write_lmms, read_lmms_eval, names=()),
    *result_rows(),
    *checkpoint_rows(),
    *unreadable("the base's config.json", "source/config.json", write_llava, processor, names=("source",)),
    *unreadable("the base's tokenizer.json", "source/tokenizer.json", write_llava, processor, names=("source",)),
    *unreadable(
        "the base's processor_config.json", "source/processor_config.json", write_llava, processor, names=("source",)
    ),
]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_bad_inputs_are_refused(row, tmp_path):
    check_refused(row, tmp_path)

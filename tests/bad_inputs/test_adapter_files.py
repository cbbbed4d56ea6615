"""Bad inputs of the adapter: saved folders as fold and knock_out read them, the authors' own, values of the mixer."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moslora_core import MoSLoraConfig
from moslora_core.adapter_files import write_adapter
from moslora_core.fold import fold_adapter
from moslora_core.knock_out import knock_out_adapter
from moslora_core.official import convert_folder
from moslora_core.subspaces import adapter_factors

from .files import NOT_JSON, edited, instead, once, put, unreadable
from .row import BadInput, check_refused

CONFIG = {"peft_type": "MOSLORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], "mixer": "learned"}
A, B, M = (f"base_model.model.q.{leaf}" for leaf in ("lora_A.weight", "lora_B.raw", "lora_B.mixer"))
AB = "base_model.model.q.lora_AB.weight"
JSON, WEIGHTS = "adapter/adapter_config.json", "adapter/adapter_model.safetensors"
NO_WEIGHTS = {
    "is empty": b"",
    "is text": b"not tensors at all",
    "has a header without an end": b"\xff" * 8 + b"{}",
    "has a header that is no JSON": (5).to_bytes(8, "little") + b"{torn",
    "has a tensor beyond its end": (61).to_bytes(8, "little")
    + b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,800000000]}}',
    "has an unknown dtype": (54).to_bytes(8, "little") + b'{"a":{"dtype":"F7","shape":[1],"data_offsets":[0,4]}}   ',
}


@once
def write(folder: Path) -> None:
    tensors = {A: torch.ones(2, 4), B: torch.ones(3, 2), M: torch.eye(2)}
    write_adapter(folder / "adapter", CONFIG, tensors)


@once
def write_theirs(folder: Path) -> None:
    tensors = {A: torch.ones(2, 4), AB: torch.eye(2), B.replace("raw", "weight"): torch.ones(3, 2)}
    write_adapter(folder / "adapter", {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}, tensors)


def fold(folder: Path) -> None:
    fold_adapter(folder / "adapter", folder / "out")


def knock_out(folder: Path) -> None:
    knock_out_adapter(folder / "adapter", folder / "out", zero_pairs=1)


def convert(folder: Path) -> None:
    convert_folder(folder / "adapter", folder / "out")


def factors(folder: Path) -> None:
    adapter_factors(folder / "adapter")


def setting(wrong: str, read: Callable[[Path], object], *names: str, **changes: Any) -> BadInput:
    before = write_theirs if read is convert else write
    return BadInput(f"{wrong}, {read.__name__}", edited(JSON, before, lambda raw: raw.update(changes)), read, names)


def weights(wrong: str, read: Callable[[Path], object], *names: str, **changes: torch.Tensor | None) -> BadInput:
    """Tensors under other shapes or names; None removes one."""
    keys = {"A": A, "B": B, "M": M, "AB": AB, "B_theirs": B.replace("raw", "weight")}

    def damage(folder: Path) -> None:
        (write_theirs if read is convert else write)(folder)
        tensors = load_file(folder / WEIGHTS) | {keys.get(name, name): tensor for name, tensor in changes.items()}
        save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, folder / WEIGHTS)

    return BadInput(f"{wrong}, {read.__name__}", damage, read, names)


def cut_weights(folder: Path) -> None:
    write(folder)
    put(folder / WEIGHTS, (folder / WEIGHTS).read_bytes()[:-8])


def only_a_pickle(folder: Path) -> None:
    write(folder)
    (folder / WEIGHTS).rename(folder / "adapter" / "adapter_model.bin")


def value(wrong: str, *names: str, **settings: Any) -> BadInput:
    return BadInput(wrong, lambda folder: None, lambda folder: MoSLoraConfig(**settings), names)


ROWS = [
    *unreadable("the configuration", JSON, write, fold, names=("adapter",)),
    *unreadable("the weights", WEIGHTS, write, fold, NO_WEIGHTS),
    BadInput("the adapter is absent", lambda folder: None, fold, ("adapter", "no such folder")),
    BadInput("the adapter is a file", lambda folder: put(folder / "adapter", b""), fold, ("adapter",)),
    *(
        BadInput(f"the configuration is {wrong}", instead(JSON, write, text), fold, ("adapter_config.json", "object"))
        for wrong, text in {"a list": b"[]", "null": b"null", "a number": b"3", "text": b'"r"'}.items()
    ),
    BadInput("the weights are cut off", cut_weights, fold, (WEIGHTS, "complete")),
    BadInput("the weights are a pickle", only_a_pickle, fold, ("adapter_model.bin", "pickle")),
    *(
        row
        for read in (fold, convert, factors)
        for row in (
            setting("the rank is text", read, "adapter_config.json", "r must", "'2'", r="2"),
            setting("the rank is 0", read, "adapter_config.json", "r must", "found 0", r=0),
            setting("the rank is negative", read, "adapter_config.json", "r must", "-2", r=-2),
            setting("the rank is true", read, "adapter_config.json", "r must", "True", r=True),
            setting("the rank is no whole number", read, "adapter_config.json", "r must", "2.5", r=2.5),
            setting("the rank has 5000 digits", read, "adapter_config.json", "digits", r="<huge>"),
            setting("alpha is text", read, "adapter_config.json", "lora_alpha", "'4'", lora_alpha="4"),
            setting("alpha is null", read, "adapter_config.json", "lora_alpha", "None", lora_alpha=None),
            setting("alpha is NaN", read, "adapter_config.json", "lora_alpha", "nan", lora_alpha=math.nan),
            setting("alpha is 1e400", read, "adapter_config.json", "lora_alpha", "inf", lora_alpha="<1e400>"),
            setting("the ranks are a list", read, "adapter_config.json", "rank_pattern", "[]", rank_pattern=[]),
            setting("a rank is null", read, "rank_pattern.q", "None", rank_pattern={"q": None}),
            setting("an alpha is a list", read, "alpha_pattern.q", "[4]", alpha_pattern={"q": [4]}),
            setting("a pattern is no pattern", read, "rank_pattern", "'('", rank_pattern={"(": 2}),
            setting("rslora is text", read, "use_rslora", "'no'", use_rslora="no"),
            setting("the type is a list", read, "peft_type", "['LORA']", peft_type=["LORA"]),
            setting("the type is another", read, "peft_type", "LOKR", peft_type="LOKR"),
        )
    ),
    setting("the targets are a number", fold, "target_modules", "3", target_modules=3),
    setting("a target is null", fold, "target_modules", "None", target_modules=["q", None]),
    setting("a target has half a character", fold, "adapter_config.json", "ud800", target_modules=["<half>"]),
    setting("the mixer is unknown", fold, "mixer", "'blended'", mixer="blended"),
    setting("the mixer is null", fold, "mixer", "None", mixer=None),
    setting("the mixer is a list", fold, "mixer", "['learned']", mixer=["learned"]),
    setting("the mixer's start is an object", fold, "mixer_init", "{}", mixer_init={}),
    setting("the mixer's seed is text", fold, "mixer_seed", "'1'", mixer_seed="1"),
    setting("the mixers are a list", fold, "mixer_pattern", "[]", mixer_pattern=[]),
    setting("a mixer is unknown", fold, "mixer_pattern", "3", mixer_pattern={"q": 3}),
    setting("a mixer's pattern is no pattern", fold, "mixer_pattern", "'('", mixer_pattern={"(": "learned"}),
    setting("no mixer is promised", fold, "lora_B", "mixer=identity", mixer="identity"),
    setting("a rank is another than the weights'", fold, "lora_A", "(2, 4)", "rank 4", r=4),
    setting("a rank is another than the weights'", convert, "lora_A", "rank 2", "4", r=4),
    weights("the mixer is absent", fold, M, M=None),
    weights("the mixer is alone", fold, "lora_B", A=None, B=None),
    weights("a factor is absent", fold, "lora_A", A=None),
    weights("the mixer has another size", fold, M, "(3, 3)", "(2, 2)", M=torch.ones(3, 3)),
    weights("the mixer is a number", fold, M, "()", M=torch.tensor(1.0)),
    weights("a factor is a vector", fold, B, "(3,)", B=torch.ones(3)),
    weights("A has another rank", fold, "lora_A", "(3, 4)", "rank 2", A=torch.ones(3, 4)),
    weights("nothing is of an adapter", fold, "lora_A", A=None, B=None, M=None, other=torch.ones(2)),
    weights("the mixer has another size", knock_out, "adapter", "(3, 3)", M=torch.ones(3, 3)),
    weights("A holds NaN", knock_out, "adapter", "NaN", A=torch.full((2, 4), math.nan)),
    weights("B is absent", knock_out, "lora_B", B=None),
    weights("A is a number", knock_out, "adapter", "()", A=torch.tensor(1.0)),
    weights("B is a vector", knock_out, "adapter", "(3,)", B=torch.ones(3)),
    weights("the mixer has another size", convert, "lora_AB", "(3, 3)", AB=torch.ones(3, 3)),
    weights("there is no mixer", convert, "lora_AB", AB=None),
    weights("B is absent", convert, "lora_B", B_theirs=None),
    weights("A is a vector", convert, "lora_A", "(2,)", A=torch.ones(2)),
    weights(
        "a second adapter is there", convert, "second", **{A.replace("weight", "second.weight"): torch.ones(2, 4)}
    ),
    *(
        BadInput(
            f"the authors' pickle {wrong}", instead("adapter/adapter_model.bin", no_weights, text), convert, names
        )
        for no_weights in [lambda folder: (write_theirs(folder), (folder / WEIGHTS).unlink())]
        for names in [("adapter_model.bin",)]
        for wrong, text in {"is empty": b"", "is text": b"import os", "is cut off": b"PK\x03\x04"}.items()
    ),
    *(
        BadInput(f"the authors' configuration {wrong}", instead(JSON, write_theirs, text), convert, ("adapter",))
        for wrong, text in NOT_JSON.items()
    ),
    value("mixer=None", "mixer=None", mixer=None),
    value("mixer=['learned']", "mixer=['learned']", mixer=["learned"]),
    value("mixer_init=1", "mixer_init=1", mixer_init=1),
    value("mixer_init={}", "mixer_init={}", mixer_init={}),
    value("mixer_seed=True", "mixer_seed", "True", mixer_seed=True),
    value("mixer_seed=-1", "mixer_seed", "-1", mixer_seed=-1),
    value("mixer_seed=1.5", "mixer_seed", "1.5", mixer_seed=1.5),
    value("mixer_pattern=None", "mixer_pattern", "None", mixer_pattern=None),
    value("mixer_pattern={3: 'learned'}", "mixer_pattern", "3", mixer_pattern={3: "learned"}),
    value("mixer_pattern={'q': None}", "mixer_pattern['q']", "None", mixer_pattern={"q": None}),
    value("mixer_pattern={'q': ['learned']}", "mixer_pattern['q']", mixer_pattern={"q": ["learned"]}),
    value("an odd rank of two subspaces", "r must be even", "3", mixer="two_subspaces", r=3),
    value("a rank of two subspaces that is text", "r", "'4'", mixer="two_subspaces", r="4"),
    value("a pattern of ranks with text", "rank_pattern", mixer="two_subspaces", r=4, rank_pattern={"q": "4"}),
    value("ranks in a list", "rank_pattern", "[4]", mixer="two_subspaces", r=4, rank_pattern=[4]),
]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_bad_inputs_are_refused(row, tmp_path):
    check_refused(row, tmp_path)

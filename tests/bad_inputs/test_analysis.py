"""Bad inputs of the analysis: studies, what it keeps beside records, votes, the paper's numbers, and its options."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from analysis import human_study, report, results, study, subspace_files
from analysis.items import Reader
from analysis.load import load_runs
from analysis.paper import PAPER_NUMBERS, load_paper_numbers
from analysis.study_plan import read_study
from moslora_core.errors import UserError
from moslora_core.record import RunRecord

from ..analysis.conftest import Runs
from .files import edited, instead, once, put, unreadable
from .row import BadInput, check_refused
from .test_run_records import NOT_GZIP, NOT_JSONL, NOT_YAML

STUDY = {
    "name": "toy",
    "question": "Does it run?",
    "experiment": "commonsense_reasoning",
    "settings": {"scale": "smoke"},
    "seeds": [0, 1],
    "evaluation": "exact",
    "rates": {"key": "rate", "values": ["1e-3", 0.002, 0.004], "seeds": [10], "choose_by": "exact-validation"},
    "arms": {"lora": {"method": "lora"}},
    "variants": {"half": {"arms": ["lora"], "overrides": {"items": 8}}},
    "references": ["base"],
}
VOTES = "subject_driven_t2i/smoke/human_study/main/votes.csv"
DESIGN = "subject_driven_t2i/smoke/human_study/main/study.json"
RUN = "commonsense_reasoning/smoke/moslora/default/seed-1"
SUBSPACES = f"{RUN}/subspaces.json"
ANGLES = "commonsense_reasoning/smoke/subspace-angles.json"


def text(file: str, content: str | bytes, before: Callable[[Path], object] = lambda folder: None):
    return instead(file, before, content if isinstance(content, bytes) else content.encode())


# ------------------------------------------------------------------------------------------------------------- studies


def study_of(wrong: str, *names: str, **changes: Any) -> BadInput:
    """A definition with some values changed; None removes one."""
    given = {key: value for key, value in (STUDY | changes).items() if value is not None}
    return BadInput(
        f"a study's {wrong}",
        text("toy.yaml", yaml.safe_dump(given, sort_keys=False)),
        lambda folder: read_study(folder / "toy.yaml"),
        ("toy.yaml", *names),
    )


def rates(wrong: str, *names: str, **changes: Any) -> BadInput:
    return study_of(wrong, *names, rates=STUDY["rates"] | changes)


# ------------------------------------------------------------------------------------------------------- human studies


def write_votes(folder: Path) -> None:
    methods = {"first": {"method": "moslora", "label": "default"}, "second": {"method": "lora", "label": "default"}}
    pairs = [{"id": "1", "kind": "pair", "subject": "toy"}, {"id": "2", "kind": "same", "subject": "toy"}]
    design = {"schema_version": 1, **methods, "pairs": pairs, "questions": ["like"], "max_wrong": 0.25}
    put(folder / DESIGN, json.dumps(design | {"subjects": {"toy": {}}}))
    put(folder / VOTES, "rater,pair,question,choice,winner,expected\n1,1,like,left,first,\n1,2,like,tie,tie,tie\n")


def read_votes(folder: Path) -> None:
    human_study.read_study((folder / DESIGN).parent, folder)


def design(wrong: str, *names: str, **changes: Any) -> BadInput:
    return BadInput(
        f"study.json: {wrong}",
        edited(DESIGN, write_votes, lambda raw: raw.update(changes)),
        read_votes,
        ("study.json", *names),
    )


def vote(wrong: str, line: str, *names: str) -> BadInput:
    content = f"rater,pair,question,choice,winner,expected\n1,1,like,left,first,\n{line}\n"
    return BadInput(f"votes.csv: {wrong}", text(VOTES, content, write_votes), read_votes, ("votes.csv", *names))


# -------------------------------------------------------------------------------------------------- beside the records


@once
def write_run(folder: Path) -> None:
    record = Runs(folder).add(right={"boolq": [True, False]}, parameters=4)
    numbers = {name: [0.5] for name in subspace_files._SCALARS}
    lists = {name: [[1.0, 0.5]] for name in subspace_files._SPECTRA}
    raw = {"schema_version": 1, "adapter": "a", "kept": {"0": "b"}, "modules": ["q"]}
    raw |= {"r": [2], "out": [3], "in": [4], "rank": [2], "steps": {"0": numbers, "50": numbers}}
    raw |= {"spectra": {"0": lists, "50": lists}, "start": [[[1, 0], [0, 1]]], "end": [[[1, 0], [0, 1]]]}
    put(record.subspaces_path, json.dumps(raw))
    put(folder / ANGLES, json.dumps({"schema_version": 1, "adapters": {"p": "a"}, "angles": [["p", "p", 1, 2]]}))


def loaded(folder: Path) -> None:
    """A record that cannot be used is left out of a report, with what this says as the reason."""
    _, left_out = load_runs(folder, "commonsense_reasoning")
    for entry in left_out:
        raise UserError(f"{entry.path}: {entry.reason}")


def items(folder: Path) -> None:
    (run,), _ = load_runs(folder, "commonsense_reasoning")
    for fault in Reader(folder).items(run, "corrected").faults:
        raise UserError(fault)


def trace(folder: Path) -> None:
    (run,), _ = load_runs(folder, "commonsense_reasoning")
    subspace_files.load_trace(run, RunRecord(folder / RUN))


def angles(folder: Path) -> None:
    subspace_files.read_angles(folder / ANGLES)


def at(file: str, read: Callable[[Path], object], keys: str, value: Any, *names: str) -> BadInput:
    def change(raw: Any) -> None:
        *path, last = (int(key) if isinstance(raw, list) else key for key in keys.split("/"))
        for key in path:
            raw = raw[int(key) if isinstance(raw, list) else key]
        raw[int(last) if isinstance(raw, list) else last] = value

    name = Path(file).name
    return BadInput(f"{name}: {keys} is {json.dumps(value)}", edited(file, write_run, change), read, (name, *names))


def zipped(folder: Path) -> None:
    write_run(folder)
    (folder / RUN / "predictions.jsonl").unlink()


# --------------------------------------------------------------------------------------------------- paper and options


def paper(wrong: str, old: str, new: str) -> BadInput:
    """The paper's file with its first ``old`` replaced."""
    content = PAPER_NUMBERS.read_text(encoding="utf-8")
    assert old in content
    return BadInput(
        f"the paper's numbers: {wrong}",
        text("paper.yaml", content.replace(old, new, 1)),
        lambda folder: load_paper_numbers(folder / "paper.yaml"),
        ("paper.yaml",),
    )


def command(main: Callable[[list[str]], int], wrong: str, arguments: str, *names: str, write=write_run) -> BadInput:
    """A command line; ``{}`` in it is the folder."""

    def read(folder: Path) -> None:
        parts = [argument.replace("{}", str(folder)) for argument in arguments.split()]
        with pytest.MonkeyPatch.context() as patch:
            said: list[str] = []
            patch.setattr("sys.stderr.write", said.append)
            assert main(parts) == 2
        (line,) = said
        assert line.startswith("error: ") and line.endswith("\n")
        raise UserError(line.removeprefix("error: ").removesuffix("\n"))

    return BadInput(f"{main.__module__} {wrong}", write, read, names)


toy = partial(text, "toy.yaml")

ROWS = [
    *unreadable("the study", "toy.yaml", toy(yaml.safe_dump(STUDY)), lambda f: read_study(f / "toy.yaml"), NOT_YAML),
    study_of("name is absent", "name is missing", name=None),
    study_of("name is empty", "name is empty", name=""),
    study_of("name is a number", "name must be", name=3),
    study_of("name is a list", "name must be", name=["toy"]),
    study_of("name leaves the folder", "name", "../toy", name="../toy"),
    study_of("name is a path", "name", "/toy", name="/toy"),
    study_of("experiment leaves the folder", "experiment", "..", experiment=".."),
    study_of("scale is a path", "scale", "a/b", settings={"scale": "a/b"}),
    study_of("key is unknown", "unknown key 'arm'", arm={}),
    study_of("settings are a list", "settings must be", settings=["scale"]),
    study_of("settings have no scale", "settings has no scale", settings={"data.dir": "x"}),
    study_of("setting is a list", "settings.data", settings={"scale": "smoke", "data": ["x"]}),
    study_of("seeds are a number", "seeds must be", seeds=3),
    study_of("seeds are empty", "seeds is empty", seeds=[]),
    study_of("seed is text", "seeds.1 must be", seeds=[0, "1"]),
    study_of("seed is negative", "seeds.0", "-1", seeds=[-1]),
    study_of("seed is true", "seeds.0", "True", seeds=[True]),
    study_of("seed is there twice", "twice", seeds=[1, 1]),
    study_of("seed is of the trials", "10", seeds=[10]),
    study_of("arms are a list", "arms must be", arms=["lora"]),
    study_of("arms are empty", "arms is empty", arms={}, variants={}),
    study_of("arm is text", "arms.lora must be", arms={"lora": "lora"}),
    study_of("arm has no method", "arms.lora: method", arms={"lora": {"r": 8}}),
    study_of("arm has a number for a name", "a key of arms", arms={3: {"method": "lora"}}, variants={}),
    study_of("arm leaves the folder", "arms", "../lora", arms={"../lora": {"method": "lora"}}, variants={}),
    study_of("method is a path", "method", "../lora", arms={"lora": {"method": "../lora"}}),
    study_of("method is a list", "arms.lora.method", arms={"lora": {"method": ["lora"]}}),
    study_of("variants are a list", "variants must be", variants=["half"]),
    study_of("variant is null", "variants.half must be", variants={"half": None}),
    study_of("variant has no overrides", "variants.half.overrides", variants={"half": {"arms": ["lora"]}}),
    study_of("variant is of no arm", "'dora' is no arm", variants={"half": {"arms": ["dora"], "overrides": {}}}),
    study_of("variant is of arms in text", "arms must be", variants={"half": {"arms": "lora", "overrides": {}}}),
    study_of("references are text", "references must be", references="base"),
    study_of("reference is a number", "references.0 must be", references=[3]),
    study_of("evaluation is null in a list", "evaluation must be", evaluation=[None]),
    study_of("rates are a list", "rates must be", rates=[1, 2, 4]),
    rates("rates' key is a number", "rates.key must be", key=3),
    rates("rates have an unknown key", "unknown key 'chosen'", chosen=1),
    rates("rates are two", "rates.values", values=[1, 2]),
    rates("rates are no grid", "rates.values", values=[1, 2, 8]),
    rates("rate is text", "rates.values", "'fast'", values=["fast", 1, 2]),
    rates("rate is NaN", "rates.values", "nan", values=[math.nan, 1, 2]),
    rates("rate is infinite", "rates.values", "inf", values=[1, 2, math.inf]),
    rates("rate is 1e400", "rates.values", "1e400", values=[1, 2, "1e400"]),
    rates("rate is 0", "rates.values", "0", values=[0, 1, 2]),
    rates("rate is a list", "rates.values", values=[[1], 1, 2]),
    rates("rates extend by text", "rates.extend", extend="2"),
    rates("rates extend below 0", "rates.extend", "-1", extend=-1),
    rates("rate is fixed for nobody", "rates.fixed", "nobody", fixed={"nobody": 1}),
    rates("rate is fixed by a list", "rates.fixed.lora", fixed={"lora": [1]}),
    BadInput(
        "a study's settings hold themselves",
        toy(yaml.safe_dump({**STUDY, "settings": None}).replace("settings: null", "settings: &a {scale: *a}")),
        lambda folder: read_study(folder / "toy.yaml"),
        ("toy.yaml",),
    ),
    # votes
    *unreadable("the design", DESIGN, write_votes, read_votes),
    *unreadable("the votes", VOTES, write_votes, read_votes, {"are not UTF-8": b"\xff", "are empty": b""}, ("votes",)),
    design("schema_version is 2", "schema_version 2", schema_version=2),
    design("schema_version is null", "schema_version None", schema_version=None),
    design("pairs are an object", "pairs must be", pairs={}),
    design("a pair is null", "pairs.0", pairs=[None]),
    design("a pair has a number for an id", "pairs.0.id", pairs=[{"id": 1, "kind": "pair", "subject": "toy"}]),
    design("a pair has no kind", "pairs.0.kind", pairs=[{"id": "1", "subject": "toy"}]),
    design("a pair is there twice", "twice", "'1'", pairs=[{"id": "1", "kind": "pair", "subject": "toy"}] * 2),
    design("a method is text", "first must be", first="moslora"),
    design("a label is null", "first.label", first={"method": "moslora", "label": None}),
    design("questions are text", "questions must be", questions="like"),
    design("a question is null", "questions.0", questions=[None]),
    design("subjects are a list", "subjects must be", subjects=["toy"]),
    design("max_wrong is text", "max_wrong", "'0.25'", max_wrong="0.25"),
    design("max_wrong is NaN", "max_wrong", "nan", max_wrong=math.nan),
    design("max_wrong is above 1", "max_wrong", "25", max_wrong=25),
    vote("a pair of another study", "1,9,like,left,first,", "line 3", "'9'"),
    vote("an unknown winner", "1,2,like,left,third,tie", "line 3", "'third'"),
    vote("an unknown question", "1,2,nice,tie,tie,tie", "line 3", "'nice'"),
    vote("an unknown choice", "1,2,like,up,tie,tie", "line 3", "'up'"),
    vote("a second vote", "1,1,like,left,first,", "line 3", "second vote"),
    vote("a line without its end", "1,2", "line 3"),
    vote("a line with more", "1,2,like,tie,tie,tie,more,and more", "line 3"),
    vote("a NUL byte", "1,2,like,tie\x00,tie,tie", "line 3"),
    vote("an answer that is none", "1,2,like,tie,tie,perhaps", "line 3", "'perhaps'"),
    vote("no rater", ",2,like,tie,tie,tie", "line 3", "rater"),
    # records
    *unreadable("the record's environment", f"{RUN}/environment.json", write_run, loaded)[1:],
    *unreadable("the record's status", f"{RUN}/status.json", write_run, loaded),
    *unreadable("the record's results", f"{RUN}/results.json", write_run, loaded),
    *unreadable("the record's predictions", f"{RUN}/predictions.jsonl", write_run, items, NOT_JSONL),
    *(
        BadInput(
            f"predictions.jsonl.gz {wrong}", text(f"{RUN}/predictions.jsonl.gz", bad, zipped), items, ("jsonl.gz",)
        )
        for wrong, bad in NOT_GZIP.items()
    ),
    at(f"{RUN}/environment.json", loaded, "train", []),
    at(f"{RUN}/environment.json", loaded, "train/git_commit", 3),
    at(f"{RUN}/results.json", loaded, "evaluations/corrected/protocol", "../up", "'../up'"),
    at(f"{RUN}/results.json", loaded, "evaluations/corrected/tasks/boolq/value", 50, "share"),
    at(f"{RUN}/predictions.jsonl", items, "id", 3, "id"),
    at(f"{RUN}/predictions.jsonl", items, "id", "boolq/0", "twice"),
    at(f"{RUN}/predictions.jsonl", items, "correct", 1, "correct"),
    at(f"{RUN}/predictions.jsonl", items, "task", None, "task"),
    # subspaces
    *unreadable("the subspaces", SUBSPACES, write_run, trace)[1:],
    *unreadable("the angles", ANGLES, write_run, angles)[1:],
    at(SUBSPACES, trace, "schema_version", "1", "schema_version"),
    at(SUBSPACES, trace, "modules", "q"),
    at(SUBSPACES, trace, "modules", [["q"]]),
    at(SUBSPACES, trace, "modules", ["q", "q"], "twice"),
    at(SUBSPACES, trace, "adapter", None, "adapter"),
    at(SUBSPACES, trace, "kept", ["b"], "kept"),
    at(SUBSPACES, trace, "kept", {"zero": "b"}, "zero"),
    at(SUBSPACES, trace, "r", ["2"]),
    at(SUBSPACES, trace, "r", [-2]),
    at(SUBSPACES, trace, "out", [3, 3]),
    at(SUBSPACES, trace, "steps", {}),
    at(SUBSPACES, trace, "steps", []),
    at(SUBSPACES, trace, "steps/50", []),
    at(SUBSPACES, trace, "steps/50/rank", []),
    at(SUBSPACES, trace, "steps/50/rank", ["2"], "'2'"),
    at(SUBSPACES, trace, "steps/50/rank", [[2]]),
    at(SUBSPACES, trace, "steps/50/rank", ["<1e400>"], "inf"),
    at(SUBSPACES, trace, "steps/50/rank", [10**400]),
    at(SUBSPACES, trace, "spectra/50/mixer_values", [1.0]),
    at(SUBSPACES, trace, "start", {}),
    at(SUBSPACES, trace, "end", [[1, 2]]),
    at(SUBSPACES, trace, "end", [[[1, 2], [3]]], "square"),
    at(SUBSPACES, trace, "end", [[[1, None], [0, 1]]]),
    at(ANGLES, angles, "adapters", []),
    at(ANGLES, angles, "angles", {}),
    at(ANGLES, angles, "angles", [["p", "p", 1]]),
    at(ANGLES, angles, "angles", [["p", "x", 1, 2]], "'x'"),
    at(ANGLES, angles, "angles", [["p", "p", "1", 2]]),
    at(ANGLES, angles, "angles", [["p", ["p"], 1, 2]]),
    # the paper's numbers
    *unreadable(
        "the paper", "paper.yaml", text("paper.yaml", ""), lambda f: load_paper_numbers(f / "paper.yaml"), NOT_YAML
    ),
    paper("a value is text", "value: ", "value: x"),
    paper("a value is NaN", "value: ", "value: .nan #"),
    paper("a value is infinite", "value: ", "value: .inf #"),
    paper("a value is true", "value: ", "value: true #"),
    paper("a value is a list", "value: ", "value: [1] #"),
    paper("a value has 400 digits", "value: ", f"value: 1{'0' * 400} #"),
    paper("a provenance is unknown", "provenance: PAPER", "provenance: HEARSAY"),
    paper("a provenance is null", "provenance: PAPER", "provenance: null"),
    paper("tables are absent", "tables:", "table:"),
    paper("sources are absent", "sources:", "source:"),
    # options
    command(report.main, "of no folder", "--runs {}/none", "none"),
    command(report.main, "of a file", f"--runs {{}}/{RUN}/results.json", "results.json"),
    command(report.main, "of an unknown experiment", "--runs {} --experiment none", "--experiment"),
    command(report.main, "of an unknown option", "--rums {}", "--rums"),
    command(report.main, "without a value", "--runs", "--runs"),
    command(report.main, "of figures and none", "--no-figures --subspaces", "--subspaces"),
    command(report.main, "of no such scale", "--runs {} --scale paper", "paper"),
    command(report.main, "of a scale that is a path", "--runs {} --scale ../smoke", "../smoke"),
    command(report.main, "of a study that is a folder", "--runs {} --study {}", "cannot read"),
    command(
        report.main,
        "into a file",
        f"--runs {{}} --no-figures --no-comparisons --out {{}}/{SUBSPACES}",
        "subspaces.json",
    ),
    command(study.main, "without a study", "", "study"),
    command(study.main, "of no such file", "{}/none.yaml", "none.yaml"),
    command(study.main, "of 0 jobs", "{}/none.yaml --jobs 0", "--jobs"),
    command(study.main, "of half a job", "{}/none.yaml --jobs 0.5", "--jobs"),
    command(study.main, "of 5000 digits of jobs", "{}/none.yaml --jobs " + "9" * 5000, "--jobs"),
    command(results.main, "of no such file", "{}/none.yaml", "none.yaml"),
    command(
        results.main,
        "of a study without runs",
        "{}/toy.yaml --runs {}/none",
        "missing",
        write=toy(yaml.safe_dump(STUDY)),
    ),
    command(subspace_files.main, "of no folder", "--runs {}/none", "none"),
    command(subspace_files.main, "of a damaged study", "--runs {} --study {}/toy.yaml", "toy.yaml", write=toy("- a")),
]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_bad_inputs_are_refused(row, tmp_path):
    check_refused(row, tmp_path)

"""Knock-out curves: each point is the copy that knock_out_adapter writes, stopped ones resume, results stay apart."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from moslora_core.errors import UserError
from moslora_core.evaluations import Scoring
from moslora_core.knock_out import knock_out_adapter
from moslora_core.knock_out_curve import KnockOutConfig, knock_out_command, points_of
from moslora_core.record import Evaluation, Prediction, Results, RunRecord, TaskResult

from .kinds import LINEAR, scramble

R = 4
ITEMS = {"first": 3, "second": 2}


@dataclass
class Config:
    """What the command reads of an experiment's configuration."""

    unit: str = "pairs"
    orders: tuple[str, ...] = ("weakest", "strongest", "random")
    steps: int = 4
    draws: int = 1
    limit: int | None = None
    on_finished: str = "refuse"
    tuner: str = "lora"
    dry_run: bool = False
    run_name: str = "default"
    seed: int = 0

    @property
    def scale(self):
        return SimpleNamespace(name="tiny")

    @property
    def method(self):
        return SimpleNamespace(name="moslora", tuner=self.tuner)

    @property
    def evaluation(self):
        knock_out = KnockOutConfig(self.unit, list(self.orders), self.steps, self.draws)
        return SimpleNamespace(knock_out=knock_out, limit=self.limit, chunk=2)


class Stop(Exception):
    """Stands for a kill between two chunks."""


def scoring(adapter: Path, calls: list | None = None, allowed: int = 10**6, digest: str = "items") -> Scoring:
    """The "answer" to an item is a number that depends on the whole adapter; its worth is that number."""
    calls = [] if calls is None else calls

    def load():
        return SimpleNamespace(model=PeftModel.from_pretrained(LINEAR.base(), adapter).eval())

    def answer(box, task, indices):
        if len(calls) == allowed:
            raise Stop
        calls.append(task)
        x = torch.stack([torch.linspace(-1, 1 + index, 6) * (2 + len(task)) for index in indices])
        with torch.no_grad():
            found = box.model(x).double().abs().mean(dim=1).sigmoid().tolist()
        return [Prediction("exact", task, str(i), "", repr(x), True) for i, x in zip(indices, found, strict=True)]

    def result(task, predictions):
        worth = float(np.mean([float(p.prediction) for p in predictions]))
        return TaskResult("worth", worth, len(predictions), unparsed=len(predictions) / 10)

    return Scoring("exact", {"limit": None}, dict.fromkeys(ITEMS, digest), ITEMS, load, answer, result)


def worth(adapter: Path) -> dict[str, float]:
    found = scoring(adapter)
    box = found.load()
    return {task: found.result(task, found.answer(box, task, list(range(n)))).value for task, n in ITEMS.items()}


def place(record: RunRecord, mixed: bool = True) -> Path:
    """Puts an adapter where a training would have left it."""
    plain = LoraConfig(r=R, lora_alpha=8, target_modules=["layer"])
    model = LINEAR.model() if mixed else get_peft_model(LINEAR.base(), plain)
    scramble(model, std=1.0).save_pretrained(record.adapter_path)
    return record.adapter_path


@pytest.fixture
def record(tmp_path) -> RunRecord:
    return RunRecord(tmp_path / "run")


def command(record: RunRecord, config: Config | None = None, **given) -> None:
    knock_out_command(config or Config(), "experiment", record, "exact", lambda adapter: scoring(adapter, **given))


def curve(record: RunRecord, name: str = "exact+pairs"):
    return record.knock_outs()[name]


# -------------------------------------------------------------------------------------------------------------- points


@pytest.mark.parametrize("unit", ["pairs", "ranks"])
@pytest.mark.parametrize("mixed", [True, False])
def test_every_point_is_the_copy_of_that_order_and_number(record, tmp_path, unit, mixed):
    adapter = place(record, mixed)
    command(record, Config(unit=unit, draws=2))
    found = curve(record, f"exact+{unit}")
    total = R**2 if mixed and unit == "pairs" else R
    assert (found.evaluation, found.unit, found.subspaces, found.items) == ("exact", unit, total, ITEMS)
    numbers = {point.share: point.removed for point in found.points if point.order not in ("diagonal", "mixed")}
    assert numbers == {share: share * total for share in (0, 0.25, 0.5, 0.75, 1)}
    seen = set()
    for point in found.points:
        if point.order in ("diagonal", "mixed"):
            continue
        given = {"zero_pairs": point.removed} if unit == "pairs" else {"keep": R - point.removed}
        order = "weakest" if point.order in ("none", "all") else point.order
        copy = knock_out_adapter(adapter, tmp_path / f"{len(seen)}", **given, order=order, seed=point.draw)
        assert point.tasks == pytest.approx(worth(copy), rel=1e-6), point
        assert point.unparsed == pytest.approx((3 * 0.3 + 2 * 0.2) / 5)
        seen.add((point.order, point.draw, point.share))
    interior = {("weakest", 0), ("strongest", 0), ("random", 0), ("random", 1)}
    assert seen == {(*o, s) for o in interior for s in (0.25, 0.5, 0.75)} | {("none", 0, 0.0), ("all", 0, 1.0)}
    distinct = {round(value, 6) for point in found.points for value in point.tasks.values()}
    assert len(distinct) > len(found.points)  # the points would be told apart if they were mistaken


def test_the_parts_are_what_is_left_without_the_other(record):
    place(record)
    command(record)
    parts = {point.order: point for point in curve(record).points if point.order in ("diagonal", "mixed")}
    assert {name: (point.removed, point.share) for name, point in parts.items()} == {
        "diagonal": (R, R / R**2),
        "mixed": (R**2 - R, 1 - R / R**2),
    }
    model = PeftModel.from_pretrained(LINEAR.base(), record.adapter_path).eval()
    mixer = model.base_model.model.layer.lora_B["default"].mixer
    for part, left in (("diagonal", mixer * (1 - torch.eye(R))), ("mixed", mixer * torch.eye(R))):
        before = mixer.detach().clone()
        with torch.no_grad():
            mixer.copy_(left)
        found = scoring(record.adapter_path)
        box = SimpleNamespace(model=model)
        for task, n in ITEMS.items():
            expected = found.result(task, found.answer(box, task, list(range(n)))).value
            assert parts[part].tasks[task] == pytest.approx(expected, rel=1e-6)
        with torch.no_grad():
            mixer.copy_(before)


def test_plain_lora_and_ranks_have_no_parts(record):
    place(record, mixed=False)
    command(record)
    assert {point.order for point in curve(record).points} == {"none", "weakest", "strongest", "random", "all"}
    assert {point.order for point in points_of(KnockOutConfig("ranks"), mixed=True)} == {
        *("none", "weakest", "strongest", "random", "all")
    }


# --------------------------------------------------------------------------------------------------------- the record


def test_a_curve_stands_beside_the_results_not_in_them(record):
    place(record)
    results = Results(None, {"exact": Evaluation("exact", {"first": TaskResult("worth", 0.5, 3)}, 1.0)})
    record.write_results(results)
    command(record)
    command(record, Config(limit=3))
    command(record, Config(unit="ranks"))
    assert record.results() == results and record.predictions() == []
    assert sorted(record.knock_outs()) == ["exact+pairs", "exact+pairs+limit=3", "exact+ranks"]
    assert {path.name for path in record.path.iterdir()} == {
        *("adapter", "knock_out", "results.json", "status.json", "environment.json", ".lock")
    }
    assert record.status().stage == "knock_out" and record.status().state == "finished"


def test_a_finished_curve_is_refused_kept_or_replaced(record):
    place(record)
    command(record)
    before = record.knock_out_path("exact+pairs").read_bytes()
    with pytest.raises(UserError, match=r"exact\+pairs\.json is there already; on_finished=skip"):
        command(record)
    calls = []
    command(record, Config(on_finished="skip"), calls=calls)
    assert calls == [] and record.knock_out_path("exact+pairs").read_bytes() == before
    command(record, Config(on_finished="overwrite", steps=2), calls=calls)
    assert calls and len(curve(record).points) == 1 + 3 + 1 + 2


@pytest.mark.parametrize("allowed", [0, 1, 7])
def test_a_stopped_curve_goes_on_to_the_undisturbed_one(record, tmp_path, allowed):
    other = RunRecord(tmp_path / "other")
    for each in (record, other):
        place(each)
    calls = []
    command(other, calls=calls)
    with pytest.raises(Stop):
        command(record, allowed=allowed)
    assert record.status().state == "failed" and record.knock_outs() == {}
    again = []
    command(record, calls=again)
    assert len(again) == len(calls) - allowed
    first, second = curve(record), curve(other)
    first.seconds = second.seconds = 0.0
    assert first == second and not list(record.path.glob("*.partial.jsonl"))


@pytest.mark.parametrize("change", ["adapter", "items"])
def test_what_belongs_to_other_conditions_is_not_kept(record, change):
    adapter = place(record)
    with pytest.raises(Stop):
        command(record, allowed=5)
    if change == "adapter":
        scramble(PeftModel.from_pretrained(LINEAR.base(), adapter), seed=9).save_pretrained(adapter)
    calls = []
    command(record, calls=calls, digest="other" if change == "items" else "items")
    assert len(calls) == (2 + 1) * len(curve(record).points)


@pytest.mark.parametrize(
    ("harm", "complaint"),
    [
        (lambda raw: raw.update(schema_version=0), "schema_version 0, expected 1"),
        (lambda raw: raw.update(more=1), "unknown key 'more'"),
        (lambda raw: raw.pop("points"), "points is missing"),
        (lambda raw: raw.update(points={}), "points must be a list"),
        (lambda raw: raw["points"][2].update(share=float("nan")), "points.2.share must be a finite number, found nan"),
        (lambda raw: raw["points"][1]["tasks"].pop("first"), r"points.1: expected the tasks \['first', 'second'\]"),
        (
            lambda raw: raw["points"][0]["tasks"].update(first=1.5),
            r"points.0.tasks.first must be a finite number in \[0, 1\]",
        ),
        (lambda raw: raw["points"].append(3), "points.* must be an object"),
    ],
)
def test_a_damaged_file_is_named(record, harm, complaint):
    place(record)
    command(record)
    path = record.knock_out_path("exact+pairs")
    raw = json.loads(path.read_text())
    harm(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(UserError, match=complaint) as caught:
        record.knock_outs()
    assert str(path) in str(caught.value)


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"unit": "layers"}, r"evaluation\.knock_out\.unit must be one of pairs, ranks, found 'layers'"),
        ({"orders": ("largest",)}, r"evaluation\.knock_out\.orders must be one of weakest, strongest, random"),
        ({"orders": ()}, r"evaluation\.knock_out\.orders names no order"),
        ({"steps": 0}, r"evaluation\.knock_out\.steps must be positive, found 0"),
        ({"draws": -1}, r"evaluation\.knock_out\.draws must be positive, found -1"),
        ({"tuner": "none"}, "untrained model: there is no adapter"),
        ({"on_finished": "ask"}, "on_finished must be"),
    ],
)
def test_a_wrong_setting_is_told_before_anything_is_written(record, settings, complaint):
    with pytest.raises(UserError, match=complaint):
        command(record, Config(**settings))
    assert not record.path.exists()


def test_an_untrained_run_and_an_adapter_of_another_kind_are_told(record):
    with pytest.raises(UserError, match=r"train it: python -m experiment\.train scale=tiny method=moslora seed=0"):
        command(record)
    path = place(record) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_type": "LOKR"}))
    with pytest.raises(UserError, match="peft_type is LOKR; expected LORA or MOSLORA"):
        command(record)


def test_a_dry_run_writes_nothing(record, caplog):
    with caplog.at_level("INFO"):
        command(record, Config(dry_run=True))
    assert "would evaluate 13 points" in caplog.text and not record.path.exists()

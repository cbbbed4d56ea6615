"""Run records written through the record's own writer, with chosen numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from moslora_core.record import (
    Evaluation,
    Prediction,
    Results,
    RunRecord,
    TaskResult,
    Training,
    append_jsonl,
    write_atomic,
    write_json,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Runs:
    """A folder of runs. ``add`` writes one finished run; ``accuracies`` maps tasks, or gives all of them one value.

    ``breakdown`` maps tasks to values of their parts. ``right`` maps tasks to whether each item was answered right,
    which makes the accuracies and is written as predictions, with ``golds`` in turn as the right answers. ``config``
    is the text of config.yaml.
    """

    tasks = ("ARC-Easy", "openbookqa", "social_i_qa", "ARC-Challenge", "winogrande", "piqa", "boolq", "hellaswag")
    titles = ("ARC-e", "OBQA", "SIQA", "ARC-c", "WinoG", "PIQA", "BoolQ", "HellaS")
    commit = COMMIT

    def __init__(self, root: Path):
        self.root = root

    def add(
        self,
        method: str = "moslora",
        seed: int | str = 1,
        label: str = "default",
        *,
        accuracies: dict[str, float] | float = 0.5,
        protocol: str | tuple[str, ...] = "corrected",
        scale: str = "smoke",
        experiment: str = "commonsense_reasoning",
        items: dict[str, int] | int = 100,
        unparsed: float | None = None,
        metric: str = "accuracy",
        settings: dict | None = None,
        training: Training | str | None = "default",
        seconds: float = 10.0,
        parameters: int = 12_288,
        memory: tuple[int, str] = (2**29, "rss"),
        commit: str | None = COMMIT,
        breakdown: dict[str, dict[str, float]] | None = None,
        right: Mapping[str, Sequence[bool]] | None = None,
        golds: Sequence[str] = ("a", "b"),
        config: str | None = None,
    ) -> RunRecord:
        if right is not None:
            accuracies = {task: float(np.mean(answers)) for task, answers in right.items()}
            items = {task: len(answers) for task, answers in right.items()}
        record = RunRecord.locate(self.root, experiment, scale, method, label, seed)
        if not isinstance(accuracies, dict):
            accuracies = dict.fromkeys(self.tasks, accuracies)
        count = items if isinstance(items, dict) else dict.fromkeys(accuracies, items)
        tasks = {
            task: TaskResult(metric, value, count[task], stderr=0.01, unparsed=unparsed)
            for task, value in accuracies.items()
        }
        for task, parts in (breakdown or {}).items():
            tasks[task].breakdown = {part: TaskResult(metric, value, 10) for part, value in parts.items()}
        if training == "default":
            training = Training(seconds, 50, *memory, parameters, 1_000_000, final_loss=1.0)
        protocols = (protocol,) if isinstance(protocol, str) else protocol
        evaluations = {name: Evaluation(name, tasks, 3.0, settings or {}) for name in protocols}
        record.write_results(Results(training, evaluations))
        if config is not None:
            write_atomic(record.config_path, config)
        if commit:
            write_json(record.path / "environment.json", {"train": {"git_commit": commit}})
        if right is not None:
            rows = [
                asdict(Prediction(name, task, f"{task}/{i}", golds[i % len(golds)], None, bool(correct)))
                for name in protocols
                for task, answers in right.items()
                for i, correct in enumerate(answers)
            ]
            append_jsonl(record.predictions_path, rows)
        record.set_status("finished", "evaluate")
        return record


class VisualRuns(Runs):
    """Runs of visual instruction tuning, at the smoke scale unless told otherwise."""

    tasks = tuple(f"smoke_{kind}" for kind in ("colour", "shape", "count", "existence", "position", "background"))
    titles = ("Colour", "Shape", "Count", "Existence", "Position", "Background")

    def add(
        self,
        method: str = "moslora",
        seed: int | str = 1,
        label: str = "default",
        *,
        base: str = "smoke",
        quantization: str = "none",
        settings: dict | None = None,
        **given,
    ) -> RunRecord:
        given = {"protocol": "exact", "experiment": "visual_instruction", **given}
        settings = {"base": base, "quantization": quantization, **(settings or {})}
        return super().add(method, seed, label, settings=settings, **given)


@pytest.fixture
def visual(tmp_path: Path) -> VisualRuns:
    return VisualRuns(tmp_path / "runs")


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path / "runs")

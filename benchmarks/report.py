"""How long ``python -m analysis.report`` takes on 1,000 run records: ``python benchmarks/report.py``.

The records are made up: methods with settings and seeds of the two experiments that have tables of methods, as the
smoke scale evaluates them, with every answer. They are written to a temporary folder by the record's own writer, and
the command runs in a process of its own, so that its imports count.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from common import run, seconds

from moslora_core.arguments import Parser
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

SEEDS = 10
METHODS = ("lora", "lora_scaled", "two_subspaces", "moslora", "moslora_frozen", "moslora_folded", "dora", "rslora")
INITS = ("orthogonal", "gaussian", "identity", "zero")
RATES = (0.0005, 0.001, 0.002, 0.004)
SHARES = (300, 600, 1200, 1800)
TASKS = {
    "commonsense_reasoning": (
        *("ARC-Easy", "openbookqa", "social_i_qa", "ARC-Challenge"),
        *("winogrande", "piqa", "boolq", "hellaswag"),
    ),
    "visual_instruction": tuple(
        f"smoke_{kind}" for kind in ("colour", "shape", "count", "existence", "position", "background")
    ),
}
ITEMS = {"commonsense_reasoning": 100, "visual_instruction": 120}
PROTOCOL = {"commonsense_reasoning": "generate-corrected", "visual_instruction": "exact"}


def arms() -> Iterator[tuple[str, str, str, dict[str, str]]]:
    """(experiment, method, overrides, settings of its evaluation) of every row of the tables, seeds apart."""
    for rate in (None, *RATES):
        chosen = [] if rate is None else [f"training.learning_rate={rate}"]
        for method in METHODS:
            yield "commonsense_reasoning", method, _label(chosen), {}
            yield "commonsense_reasoning", method, _label(["adapter.r=16", *chosen]), {}
    for init in INITS:
        yield "commonsense_reasoning", "moslora", _label([f"method.mixer_init={init}"]), {}
    for items in SHARES:
        for method in ("lora", "moslora"):
            yield "commonsense_reasoning", method, _label([f"data.train_items={items}"]), {}
    for quantization in ("none", "nf4"):
        override = [] if quantization == "none" else [f"model.quantization={quantization}"]
        for method, more in (("lora", []), ("moslora", []), ("moslora", ["method.mixer_init=orthogonal"])):
            settings = {"base": "smoke", "quantization": quantization}
            yield "visual_instruction", method, _label([*more, *override]), settings
            yield "visual_instruction", method, _label(["training.max_steps=600", *more, *override]), settings


def _label(overrides: Iterable[str]) -> str:
    return ",".join(sorted(overrides)) or "default"


def write_runs(root: Path, runs: int) -> int:
    """Writes that many run records, or all there are, and returns their number."""
    rng = np.random.default_rng(0)
    keys = [(*arm, seed) for seed in range(SEEDS) for arm in arms()][:runs]
    for key in keys:
        _write_run(root, *key, rng)
    return len(keys)


def _write_run(
    root: Path,
    experiment: str,
    method: str,
    label: str,
    settings: dict[str, str],
    seed: int,
    rng: np.random.Generator,
) -> None:
    record = RunRecord.locate(root, experiment, "smoke", method, label, seed)
    protocol, items = PROTOCOL[experiment], ITEMS[experiment]
    right = {task: rng.random(items) < rng.uniform(0.5, 0.9) for task in TASKS[experiment]}
    tasks = {task: TaskResult("accuracy", float(found.mean()), items, 0.04, 0.0) for task, found in right.items()}
    training = Training(40.0, 330, 2**29, "rss", 40_960, 500_000, 0.1)
    record.write_results(Results(training, {protocol: Evaluation(protocol, tasks, 3.0, settings)}))
    rows = [
        asdict(
            Prediction(protocol, task, f"{task}/{i}", f"answer{i % 2 + 1}", f"answer{1 + i % 3}", bool(answer), "a")
        )
        for task, found in right.items()
        for i, answer in enumerate(found)
    ]
    append_jsonl(record.predictions_path, rows)
    write_json(record.path / "environment.json", {"train": {"git_commit": f"{0:040x}"}})
    write_atomic(record.config_path, "adapter:\n  r: 8\ndata:\n  train_items: 2400\n")
    record.set_status("finished", "evaluate")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python benchmarks/report.py", description=__doc__.split(":")[0])
    parser.add_argument("--runs", type=int, default=1000, help="number of run records (default: 1000)")
    parser.add_argument("--keep", type=Path, help="write the records here and keep them (default: a temporary folder)")
    parser.add_argument("options", nargs="*", help="options of analysis.report, after --")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        root = arguments.keep or Path(temporary) / "runs"
        runs = write_runs(root, arguments.runs) if not root.exists() else sum(1 for _ in root.glob("*/*/*/*/seed-*"))
        command = [sys.executable, "-m", "analysis.report", "--runs", str(root), "--out", str(Path(temporary) / "out")]
        command += arguments.options
        taken = seconds(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))
        sys.stdout.write(f"{runs} run records: {taken:.1f} s\n")
    return 0


if __name__ == "__main__":
    run(main)

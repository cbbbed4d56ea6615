"""Building the small base models of the smoke scales: schedule, gate, report and command line.

Each experiment has a script that pretrains its base from nothing. What a base must be able to do is measured by a
gate, and one that fails is not written.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

from . import launch
from .errors import UserError

REPORT = "build.json"


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Rate of a step from 0: warm-up over a twentieth of the steps, then cosine to a twentieth of ``peak``."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def check_gate(measures: Mapping[str, float], gate: Mapping[str, float]) -> None:
    """Refuses a base below any threshold of ``gate``.

    Raises:
        UserError: names each measure that is below.
    """
    below = [f"{name} {measures[name]:.3f} < {least}" for name, least in gate.items() if measures[name] < least]
    if below:
        raise UserError(f"the base failed its gate and is not written: {', '.join(below)}")


def report_of(
    command: str, build: Any, measures: Mapping[str, float], gate: Mapping[str, float], seconds: float, **facts: Any
) -> dict[str, Any]:
    """What is kept beside a base: how it was built, what it was measured to do, and with which versions.

    Args:
        build: the dataclass of the build's settings.
        measures: of the gate, and others.
        facts: further entries.
    """
    report = {
        "command": command,
        "build": asdict(build),
        **facts,
        "gate": {name: {"measured": round(measures[name], 4), "at_least": least} for name, least in gate.items()},
    }
    if others := {name: round(value, 4) for name, value in measures.items() if name not in gate}:
        report["also_measured"] = others
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }
    return report | {"seconds": round(seconds), "versions": versions}


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def command(
    description: str, settings: type, out: Path, build: Callable[[Any, Path], object], argv: Sequence[str] | None
) -> None:
    """Command line of a build: an option for each field of the dataclass ``settings``, and ``--out``.

    Ends with status 2 after one line on stderr for a base that failed its gate.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=out, help="folder of the checkpoint")
    for name, default in asdict(settings()).items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"default {default}")
    values = vars(parser.parse_args(argv))
    target = values.pop("out")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        build(settings(**values), target)
    except UserError as error:
        launch.fail(error)

"""Kills at random moments, and what is left of them: ``python benchmarks/kill_and_resume.py``.

Every command is run once undisturbed, at the smoke scale with few steps. Then it is killed (SIGKILL) at random moments
and started again until it has ended, as often as it takes for the number of kills. What it wrote is compared byte by
byte: the adapter and the logged losses of a training, predictions and images of an evaluation.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common import out_argument, report, run

from moslora_core.arguments import Parser
from moslora_core.record import find_runs

ROOT = Path(__file__).parents[1]
# A kill may come between the end of the work and the end of the process.
SMOKE = ("scale=smoke", "method=moslora", "runs_dir=runs", "on_finished=skip")
SHORT = ("training.max_steps=60", "training.save_steps=10", "training.logging_steps=1")


@dataclass(frozen=True)
class Command:
    """A command line that is killed, and the file names (globs in the run's folder) that it has to get right."""

    module: str
    overrides: tuple[str, ...]
    files: tuple[str, ...]

    @property
    def line(self) -> list[str]:
        return [sys.executable, "-m", self.module, *SMOKE, *self.overrides]

    @property
    def experiment(self) -> str:
        return self.module.split(".")[0]


COMMONSENSE = (*SHORT, "evaluation.chunk=100", "evaluation.batch_size=50")
VISUAL = (*SHORT, "evaluation.chunk=100", "evaluation.batch_size=50")
IMAGES = (*SHORT, "data.subject=toy", "generation.batch_size=4")
ADAPTER = ("adapter/adapter_model.safetensors",)
COMMANDS = (
    Command("commonsense_reasoning.train", COMMONSENSE, ADAPTER),
    Command("commonsense_reasoning.evaluate", COMMONSENSE, ("predictions.jsonl",)),
    Command("visual_instruction.train", VISUAL, ADAPTER),
    Command("visual_instruction.evaluate", VISUAL, ("predictions.jsonl",)),
    Command("subject_driven_t2i.train", IMAGES, ADAPTER),
    Command("subject_driven_t2i.generate", IMAGES, ("images/*.png",)),
)


class Folder:
    """A working folder: prepared data, and runs."""

    def __init__(self, path: Path):
        self.path = path
        self.environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def run(self, line: Sequence[str], seconds: float | None = None) -> bool:
        """Whether the command ended by itself within so many seconds; else it was killed.

        Raises:
            RuntimeError: it failed.
        """
        with open(self.path / "log.txt", "ab") as log:
            process = subprocess.Popen(line, cwd=self.path, env=self.environment, stdout=log, stderr=log)
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                return False
        if process.returncode:
            raise RuntimeError(f"{' '.join(line)} failed; see {self.path / 'log.txt'}")
        return True

    def digest(self, command: Command) -> str:
        """Of the contents of the command's files and, for a training, its logged losses."""
        (record,) = find_runs(self.path / "runs", command.experiment)
        found = hashlib.sha256()
        for pattern in command.files:
            paths = sorted(record.path.glob(pattern))
            if not paths:
                raise RuntimeError(f"{record.path}: no {pattern}")
            for path in paths:
                found.update(path.name.encode() + path.read_bytes())
        if command.module.endswith(".train"):
            found.update(json.dumps([(row["step"], row.get("loss")) for row in record.metrics()]).encode())
        return found.hexdigest()


def killed(command: Command, kills: int, take: Callable[[], Folder], seconds: float, rng: random.Random) -> dict:
    """Kills a command so many times, in as many runs as that takes.

    Args:
        take: gives a folder in which the command was not run yet.
        seconds: that an undisturbed run took.
    """
    digests, moments = [], []
    while len(moments) < kills:
        folder = take()
        while True:
            # Not among the imports alone, which are a good part of a short run.
            moment = rng.uniform(0.4, 1.0) * seconds if len(moments) < kills else None
            if folder.run(command.line, moment):
                break
            moments.append(moment)
        digests.append(folder.digest(command))
        shutil.rmtree(folder.path)
    return {"digests": digests, "kill_seconds": moments}


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python benchmarks/kill_and_resume.py", description=__doc__.split(":")[0])
    parser.add_argument("--kills", type=int, default=4, help="of each command (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    out_argument(parser, "kill_and_resume")
    arguments = parser.parse_args(argv)
    rows, numbers, rng = [], {}, random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as temporary:
        home = Folder(Path(temporary) / "undisturbed")
        home.path.mkdir()
        for command in COMMANDS:
            if command.module.endswith(".train"):
                home.run([sys.executable, "-m", f"{command.experiment}.prepare_data", "scale=smoke"])
            before = Path(temporary) / "before"
            shutil.copytree(home.path, before)
            begin = time.monotonic()
            home.run(command.line)
            seconds, expected = time.monotonic() - begin, home.digest(command)

            def take() -> Folder:
                path = Path(tempfile.mkdtemp(dir=temporary))
                shutil.copytree(before, path, dirs_exist_ok=True)  # noqa: B023
                return Folder(path)

            found = killed(command, arguments.kills, take, seconds, rng)
            shutil.rmtree(before)
            same = sum(digest == expected for digest in found["digests"])
            numbers[command.module] = found | {"undisturbed_seconds": seconds, "expected": expected, "same": same}
            of = len(found["digests"])
            rows.append([f"`{command.module}`", f"{seconds:.0f}", len(found["kill_seconds"]), f"{same} of {of}"])
            sys.stderr.write(f"{rows[-1]}\n")
    report(
        "kill_and_resume", ["Command", "Undisturbed (s)", "Kills", "Bit-identical runs"], rows, numbers, arguments.out
    )
    return 0 if all(entry["same"] == len(entry["digests"]) for entry in numbers.values()) else 1


if __name__ == "__main__":
    run(main)

"""Kills at random moments, and what is left of them: ``python benchmarks/kill_and_resume.py``.

Every command is run once undisturbed, at the smoke scale with few steps. Then it is killed (SIGKILL) at random moments
and started again until it has ended, as often as it takes for the number of kills; every other kill waits for the next
write. What its runs hold is compared byte by byte: adapters and logged losses, predictions, scores, images and the
numbers of the evaluations. A study's runner is killed with all that it has started, and alone.

Commands are forked from this process, which has the libraries loaded: no kill is spent on their import. What a study
starts are processes of its own.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.synchronize import Event
from pathlib import Path

import torch
import yaml
from common import out_argument, report, run

from moslora_core.arguments import Parser
from moslora_core.checkpoints import SEAL
from moslora_core.errors import UserError
from moslora_core.record import files_below, find_runs

ROOT = Path(__file__).parents[1]
FORK = multiprocessing.get_context("fork")
# A kill may come between the end of the work and the end of the process.
SMOKE = ("scale=smoke", "method=moslora", "on_finished=skip")
# A checkpoint after every step: many kills come while one is written.
SHORT = {"training.max_steps": 30, "training.save_steps": 1, "training.logging_steps": 2}
STUDY = {
    "name": "killed",
    "question": "Is what a killed study leaves what an undisturbed one does?",
    "experiment": "commonsense_reasoning",
    "settings": {"scale": "smoke", "data.dir": "data/commonsense_reasoning/smoke"},
    "seeds": [0, 1],
    "evaluation": "generate-corrected",
    "rates": {
        "key": "training.learning_rate",
        "values": [1e-3, 2e-3, 4e-3],
        "seeds": [2],
        "choose_by": "generate-corrected",
        "fixed": {"moslora": 2e-3},
    },
    "arms": {"moslora": {"method": "moslora", **SHORT, "training.max_steps": 12}},
}


@dataclass(frozen=True)
class Command:
    """A command line that is killed.

    Attributes:
        group: kill what it has started too.
    """

    module: str
    arguments: tuple[str, ...]
    group: bool = True

    @property
    def name(self) -> str:
        return f"`{self.module}`" + ("" if self.group else ", the runner alone")

    @property
    def folder(self) -> str:
        """Where its runs are; a study makes its own."""
        return "studied" if self.module == "analysis.study" else "runs"


def _words(settings: dict[str, object]) -> tuple[str, ...]:
    return tuple(f"{key}={value}" for key, value in settings.items())


ANSWERS = (*SMOKE, *_words(SHORT), "evaluation.chunk=20", "evaluation.batch_size=20")
IMAGES = (*SMOKE, *_words(SHORT), "data.subject=toy", "generation.batch_size=4", "evaluation.chunk=4")
STUDIED = ("study.yaml", "--runs", "studied", "--out", "reports")
COMMANDS = (
    Command("commonsense_reasoning.train", ANSWERS),
    Command("commonsense_reasoning.evaluate", ANSWERS),
    Command("visual_instruction.train", ANSWERS),
    Command("visual_instruction.evaluate", ANSWERS),
    Command("subject_driven_t2i.train", IMAGES),
    Command("subject_driven_t2i.generate", IMAGES),
    Command("subject_driven_t2i.evaluate", IMAGES),
    Command("analysis.study", STUDIED),
    Command("analysis.study", STUDIED, group=False),
)


def _begin(command: Command, folder: Path, begun: Event) -> None:
    """The forked process: becomes the command."""
    os.setsid()
    os.chdir(folder)
    with open("log.txt", "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    begun.set()
    torch.set_num_threads(1)
    os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    sys.argv = [command.module, *command.arguments]
    runpy.run_module(command.module, run_name="__main__", alter_sys=True)


class Folder:
    """A working folder: prepared data, and runs."""

    def __init__(self, path: Path):
        self.path = path

    def run(self, command: Command, seconds: float | None = None, aimed: bool = False) -> bool:
        """Whether the command ended by itself within so many seconds; else it was killed.

        Args:
            aimed: kill it when it next writes, if that is within a third of the seconds.

        Raises:
            UserError: it failed.
        """
        begun, before = FORK.Event(), self.unfinished(command.folder)
        process = FORK.Process(target=_begin, args=(command, self.path, begun))
        process.start()
        begun.wait()
        process.join(seconds)
        latest = time.monotonic() + (seconds / 3 if aimed and seconds else 0)
        while process.exitcode is None and time.monotonic() < latest and self.unfinished(command.folder) <= before:
            process.join(0.001)
        if killed := process.exitcode is None:
            os.killpg(process.pid, signal.SIGKILL) if command.group else process.kill()
            process.join()
        elif process.exitcode:
            log = (self.path / "log.txt").read_text(errors="replace").splitlines()
            raise UserError(f"{command.module} {' '.join(command.arguments)} failed: {' / '.join(log[-5:])}")
        return not killed

    def digest(self, runs: str) -> str:
        """Of all that runs hold but times: contents of files, logged losses, numbers of the evaluations."""
        found = hashlib.sha256()
        for record in find_runs(self.path / runs):
            paths = [record.adapter_path / "adapter_model.safetensors", record.predictions_path]
            paths += [record.path / "scores.jsonl", *sorted(record.path.glob("images/*.png"))]
            for path in filter(Path.exists, paths):
                found.update(path.relative_to(self.path).as_posix().encode() + path.read_bytes())
            results = record.results()
            numbers = {name: [asdict(one) for one in of.tasks.values()] for name, of in results.evaluations.items()}
            losses = [(row["step"], row.get("loss")) for row in record.metrics()]
            found.update(json.dumps([numbers, losses, record.status().state]).encode())
        return found.hexdigest()

    def unfinished(self, runs: str) -> set[tuple[str, int]]:
        """What is being written, or was when its process was killed: names, and when they last changed."""
        found = set()
        with suppress(FileNotFoundError):  # something is finished, or removed, while this looks
            for path in files_below(self.path / runs):
                checkpoint = next((above for above in path.parents if above.name.startswith("checkpoint-")), None)
                temporary = path.name.startswith(".") and path.name != ".lock"
                if checkpoint is not None and not (checkpoint / SEAL).exists():
                    found.add((f"{checkpoint.name} without its seal", checkpoint.stat().st_ctime_ns))
                elif temporary or path.parent.name == ".adapter.partial":
                    found.add((f"{path.parent.name}/{path.name}", path.stat().st_ctime_ns))
                elif path.suffix == ".jsonl" and (content := path.read_bytes()) and not content.endswith(b"\n"):
                    found.add((f"{path.name} within a line", path.stat().st_ctime_ns))
        return found

    def lines(self, runs: str) -> int:
        """In the logs of its runs: logged steps, chunks of answers, images."""
        return sum(path.read_bytes().count(b"\n") for path in (self.path / runs).rglob("*.jsonl"))


def killed(command: Command, kills: int, take: Callable[[], Folder], seconds: float, rng: random.Random) -> dict:
    """Kills a command so many times, in as many runs as that takes.

    Args:
        take: gives a folder in which the command was not run yet.
        seconds: that an undisturbed run took.

    Returns:
        The digests of the runs, and of every kill the seconds since the command's start, the lines in the logs
        (logged steps, chunks of answers, images), and what was left unfinished.
    """
    digests, found = [], []
    while len(found) < kills:
        folder = take()
        while True:
            moment = rng.uniform(0.05, 0.95) * seconds if len(found) < kills else None
            before, begin = folder.unfinished(command.folder), time.monotonic()
            if folder.run(command, moment, aimed=command.group and len(found) % 2 == 1):
                break
            # What a runner that is killed alone has started writes on.
            left = sorted({name for name, _ in folder.unfinished(command.folder) - before}) if command.group else []
            spent = round(time.monotonic() - begin, 2)
            found.append({"seconds": spent, "lines": folder.lines(command.folder), "unfinished": left})
        digests.append(folder.digest(command.folder))
        shutil.rmtree(folder.path)
    return {"digests": digests, "kills": found}


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python benchmarks/kill_and_resume.py", description=__doc__.split(":")[0])
    parser.add_argument("--kills", type=int, default=4, help="of each command (default: 4)")
    parser.add_argument("--only", nargs="+", default=[""], help="packages whose commands are killed (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    out_argument(parser, "kill_and_resume")
    arguments = parser.parse_args(argv)
    commands = [command for command in COMMANDS if command.module.startswith(tuple(arguments.only))]
    for command in COMMANDS:
        importlib.import_module(command.module)
    rows, numbers, rng = [], {}, random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as temporary:
        home = Folder(Path(temporary) / "undisturbed")
        home.path.mkdir()
        (home.path / "study.yaml").write_text(yaml.safe_dump(STUDY))
        for experiment in ("commonsense_reasoning", "visual_instruction", "subject_driven_t2i"):
            home.run(Command(f"{experiment}.prepare_data", ("scale=smoke",)))
        for command in commands:
            shutil.rmtree(home.path / "studied", ignore_errors=True)
            if command.module.endswith(".train"):  # each experiment has its runs to itself
                shutil.rmtree(home.path / "runs", ignore_errors=True)
            before = Path(temporary) / "before"
            shutil.copytree(home.path, before)
            begin = time.monotonic()
            home.run(command)
            seconds, expected = time.monotonic() - begin, home.digest(command.folder)

            def take() -> Folder:
                path = Path(tempfile.mkdtemp(dir=temporary))
                shutil.copytree(before, path, dirs_exist_ok=True)  # noqa: B023
                return Folder(path)

            found = killed(command, arguments.kills, take, seconds, rng)
            shutil.rmtree(before)
            same = sum(digest == expected for digest in found["digests"])
            numbers[command.name] = found | {"undisturbed_seconds": seconds, "expected": expected, "same": same}
            inside = sum(bool(kill["unfinished"]) for kill in found["kills"])
            of = len(found["digests"])
            rows.append([command.name, f"{seconds:.0f}", len(found["kills"]), inside, f"{same} of {of}"])
            sys.stderr.write(f"{rows[-1]} {found['kills']}\n")
    headers = ["Command", "Undisturbed (s)", "Kills", "Inside a write", "Bit-identical runs"]
    report("kill_and_resume", headers, rows, numbers, arguments.out)
    return 0 if all(entry["same"] == len(entry["digests"]) for entry in numbers.values()) else 1


if __name__ == "__main__":
    run(main)

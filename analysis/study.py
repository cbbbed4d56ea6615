"""Runs a study and reports it: ``python -m analysis.study analysis/studies/commonsense_smoke.yaml``.

Lists what of the study is there and what is missing, runs the missing part through the experiment's own commands, and
writes the report. A stopped study goes on where it stopped when it is started again: finished runs are kept, stopped
ones resume from their checkpoints, and what a killed runner has left at work is waited for. ``--list`` only lists,
``--background`` runs on after the terminal is closed.

On a cluster the experiment's sweeps go through Hydra's launcher, one job of the cluster a run:

    python -m analysis.study STUDY --jobs 8 --launch hydra/launcher=submitit_slurm \\
        --launch hydra.launcher.gpus_per_node=1
"""

from __future__ import annotations

import argparse
import fcntl
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from tqdm import tqdm

from moslora_core.arguments import Parser
from moslora_core.errors import UserError

from .report import write_report
from .study_plan import (
    COMPARISON,
    DONE,
    FAILED,
    GRID,
    MISSING,
    Progress,
    Settings,
    Study,
    Wanted,
    read_study,
    state_of,
)
from .tables import Grid, markdown_table

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0


# ------------------------------------------------------------------------------------------------------------ the work


@dataclass(frozen=True)
class Job:
    """Runs of one arm that one sweep makes: the same overrides but for rates and seeds, in every combination."""

    runs: tuple[Wanted, ...]

    @property
    def name(self) -> str:
        first = self.runs[0]
        return f"{first.arm.name}, {first.part}"

    def commands(self, runs_dir: Path, launch: Sequence[str]) -> list[list[str]]:
        """The training, if there is one to do, and the evaluation."""
        first = self.runs[0]
        evaluate = self._command("evaluate", first.evaluate, runs_dir, ())
        return [self._command("train", first.train, runs_dir, launch), evaluate] if first.trained else [evaluate]

    def _command(self, stage: str, settings: Settings, runs_dir: Path, launch: Sequence[str]) -> list[str]:
        first, key = self.runs[0], self.runs[0].study.rates.key
        named = dict(first.overrides)
        if key in named:
            named[key] = ",".join(dict.fromkeys(dict(run.overrides)[key] for run in self.runs))
        seeds = ",".join(map(str, dict.fromkeys(run.seed for run in self.runs)))
        arguments = {"method": first.arm.method} | named | {"seed": seeds} | dict(first.settings) | dict(settings)
        return _python(
            first.study.experiment,
            stage,
            "-m",
            *_words(arguments),
            f"runs_dir={runs_dir}",
            "on_finished=skip",
            *launch,
        )


def _python(experiment: str, stage: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"{experiment}.{stage}", *arguments]


def _words(arguments: dict[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in arguments.items()]


def jobs_of(missing: Iterable[Wanted]) -> list[Job]:
    """Sweeps that make the missing runs: the rates of an arm that lack the same seeds go into one."""
    seeds: dict[tuple, dict[tuple, list[Wanted]]] = defaultdict(lambda: defaultdict(list))
    for run in missing:
        key = run.study.rates.key
        others = tuple(item for item in run.overrides if item[0] != key)
        group = (run.part, run.arm, others, run.settings, run.evaluate)
        seeds[group][dict(run.overrides).get(key)].append(run)
    found = []
    for by_rate in seeds.values():
        alike: dict[tuple[int, ...], list[Wanted]] = defaultdict(list)
        for runs in by_rate.values():
            alike[tuple(run.seed for run in runs)] += runs
        found += [Job(tuple(runs)) for runs in alike.values()]
    return found


def unprepared(runs: Iterable[Wanted]) -> list[list[str]]:
    """Commands that prepare the data folders that the runs name and that are not there."""
    commands = {}
    for run in runs:
        folder = dict(run.settings).get("data.dir")
        if folder is None or (Path(folder) / "manifest.json").is_file():
            continue
        arguments = dict(run.settings) | {k: v for k, v in run.overrides if k.startswith("data.")}
        commands[folder] = _python(run.study.experiment, "prepare_data", *_words(arguments))
    return list(commands.values())


@dataclass
class _Running:
    job: Job
    commands: list[list[str]]
    log: Path
    process: subprocess.Popen | None = None


@dataclass
class Runner:
    """Runs what a study lacks, several sweeps at a time.

    Attributes:
        jobs: how many at a time; each gets its share of the cores.
        launch: further arguments of the trainings, such as Hydra's launcher.
    """

    study: Study
    runs_dir: Path
    jobs: int = 1
    launch: Sequence[str] = ()
    _held: IO | None = None
    _running: list[_Running] = field(default_factory=list)
    _tried: dict[Wanted, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Logs, and the locks that keep a second runner out."""
        return self.runs_dir / "studies" / self.study.name

    def run(self) -> dict[Wanted, str]:
        """Runs all that is missing; returns the runs that could not be made, with the reasons.

        Raises:
            UserError: another process runs the study; data that cannot be prepared; a folder that cannot be written.
        """
        with _lock(self.folder / "lock"), _left_behind(self.folder / "commands.lock") as self._held:
            bar = tqdm(desc=self.study.name, unit="run", disable=None)
            try:
                while self._step(bar):
                    time.sleep(POLL_SECONDS)
            finally:
                bar.close()
                for running in self._running:  # they resume where they stop
                    running.process.terminate()
                for running in self._running:
                    running.process.wait()
        return self._tried

    def _step(self, bar: tqdm) -> bool:
        """Starts what can be started; whether anything runs or is left to run."""
        ended = [running for running in self._running if running.process.poll() is not None]
        for running in ended:
            self._running.remove(running)
            self._after(running)
        if ended or not self._running:
            self._fill(bar)
        return bool(self._running)

    def _fill(self, bar: tqdm) -> None:
        """Starts as many jobs as may run at a time."""
        progress = Progress(self.study, self.runs_dir)
        missing = progress.of_state(MISSING)
        bar.total, bar.n = len(progress.runs), len(progress.runs) - len(missing)
        bar.refresh()
        for job in jobs_of(run for run in missing if run not in self._tried):
            if len(self._running) >= self.jobs:
                return
            if self._records(job) & {path for running in self._running for path in self._records(running.job)}:
                continue  # two evaluations of one run are two jobs
            for command in unprepared(job.runs):
                _finish(command, self.folder / "prepare_data.log", self._held)
            self._launch(job)

    def _records(self, job: Job) -> set[Path]:
        return {run.record(self.runs_dir).path for run in job.runs}

    def _launch(self, job: Job) -> None:
        first = job.runs[0]
        log = self.folder / f"{first.arm.name}-{first.part.replace(' ', '_').replace('%', 'percent')}.log"
        self._next(_Running(job, job.commands(self.runs_dir, self.launch), log))

    def _next(self, running: _Running) -> None:
        command = running.commands.pop(0)
        logger.info("%s: %s", running.job.name, shlex.join(command[1:]))
        running.process = _start(command, running.log, self._held, threads=max(1, (os.cpu_count() or 1) // self.jobs))
        self._running.append(running)

    def _after(self, running: _Running) -> None:
        """Goes on to the evaluation; notes the runs that a command ended without."""
        failed = running.process.returncode != 0
        if running.commands and not failed:
            self._next(running)
            return
        left = [run for run in running.job.runs if state_of(run, self.runs_dir).state == MISSING]
        if not left:
            return
        # A sweep ends at its first failure. The run that failed says so in its record; the others are tried again.
        trained = Job(tuple(run for run in left if run.record(self.runs_dir).is_trained()))
        if running.commands and trained.runs:
            self._next(_Running(trained, trained.commands(self.runs_dir, ())[-1:], running.log))
        elif len(left) == len(running.job.runs):
            code = running.process.returncode
            reason = f"killed by signal {-code}" if code < 0 else _last_line(running.log)
            logger.error("%s: %s (%s)", running.job.name, reason, running.log)
            self._tried |= dict.fromkeys(left, reason)


def _appending(path: Path) -> IO[bytes]:
    """Opens a file in the study's folder to add to it.

    Raises:
        UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "a+b")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; expected a writable folder") from None


def _start(command: Sequence[str], log: Path, held: IO, threads: int) -> subprocess.Popen:
    with _appending(log) as file:
        file.write(f"$ {shlex.join(command)}\n".encode())
        file.flush()
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={"OMP_NUM_THREADS": str(threads)} | os.environ,
            pass_fds=[held.fileno()],
        )


def _finish(command: Sequence[str], log: Path, held: IO) -> None:
    logger.info(shlex.join(command[1:]))
    if _start(command, log, held, threads=1).wait():
        raise UserError(f"{_last_line(log)} (from: {shlex.join(command[1:])})")


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or [line for line in lines if line.strip()] or ["it said nothing"])[-1]


@contextmanager
def _lock(path: Path) -> Iterator[IO]:
    """Keeps a second runner of the study out; a killed one holds nothing."""
    with _appending(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise UserError(f"process {file.read().decode().strip()} is running this study ({path})") from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n".encode())
        file.flush()
        yield file


@contextmanager
def _left_behind(path: Path) -> Iterator[IO]:
    """Waits for commands that a killed runner has left behind: they run on, and hold the folders of their runs.

    Gives a locked file that the commands are to inherit; it stays locked until the last of them has ended.
    """
    with _appending(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning(
                "what a killed runner of this study had started is still at work; waiting for its end (fuser %s has "
                "the processes)",
                path,
            )
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file


# ----------------------------------------------------------------------------------------------------------- the list


def listing(progress: Progress) -> str:
    """What of a study is there, arm by arm, as a Markdown table."""
    study = progress.study
    parts = [GRID, COMPARISON, *(variant.name for variant in study.variants)]
    counts: dict[tuple[str, str], list[str]] = defaultdict(list)
    for run, found in progress.runs.items():
        counts[run.arm.name, run.part].append(found.state)
    rows = []
    for arm in study.arms:
        choice = progress.choices[arm.name]
        at_end = choice.tried and choice.best is not None and not choice.inside
        rate = "not chosen" if choice.best is None else f"{choice.best:g}" + (" (at the grid's end)" if at_end else "")
        cells = [_counted(counts.get((arm.name, part))) for part in parts]
        rows.append([arm.name, rate, *cells])
    return markdown_table(Grid(["Arm", study.rates.key, *parts], rows, left=2))


def _counted(states: Sequence[str] | None) -> str:
    if states is None:
        return ""
    failed = states.count(FAILED)
    return f"{states.count(DONE)} of {len(states)}" + (f", {failed} failed" if failed else "")


# ------------------------------------------------------------------------------------------------------------ command


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m analysis.study", description="Run a study and report it.", allow_abbrev=False)
    parser.add_argument("study", type=Path, help="definition, such as analysis/studies/commonsense_smoke.yaml")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of run records (default: runs)")
    parser.add_argument("--out", type=Path, default=Path("reports"), help="folder of the report (default: reports)")
    parser.add_argument("--list", action="store_true", help="only list what is there and what is missing")
    parser.add_argument("--jobs", type=int, default=1, help="sweeps at a time (default: 1)")
    parser.add_argument("--launch", action="append", default=[], help="further argument of the trainings; repeatable")
    parser.add_argument("--background", action="store_true", help="run on without this terminal")
    return parser.parse_args(argv)


def _detach(study: Study, arguments: argparse.Namespace, argv: Sequence[str]) -> None:
    log = Runner(study, arguments.runs).folder / "study.log"
    command = [sys.executable, "-m", "analysis.study", *(word for word in argv if word != "--background")]
    with _appending(log) as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    sys.stdout.write(f"process {process.pid} runs the study; its log: {log}; what is there: add --list\n")


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    try:
        arguments = _arguments(argv)
        if arguments.jobs < 1:
            raise UserError(f"--jobs must be positive, found {arguments.jobs}")
        study = read_study(arguments.study)
        if arguments.background:
            _detach(study, arguments, argv)
            return 0
        progress = Progress(study, arguments.runs)
        sys.stdout.write(f"{study.question}\n\n{listing(progress)}\n")
        if arguments.list:
            return 0
        given_up = Runner(study, arguments.runs, arguments.jobs, arguments.launch).run()
        path, text = write_report(
            arguments.runs, arguments.out, (study.experiment,), study.scale, subspaces=True, studies=[study]
        )
        sys.stdout.write(f"{text}\nreport: {os.fspath(path)}\n")
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("stopped; the same command goes on from here\n")
        return 130
    for run, reason in given_up.items():
        sys.stderr.write(f"error: {run.record(arguments.runs).path}: {reason}\n")
    return 1 if given_up else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` stops what it has started, as Ctrl-C does
    raise SystemExit(main())

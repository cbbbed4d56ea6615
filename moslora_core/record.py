"""The run record: one folder a run, the only contract between the experiments and the analysis.

    runs/<experiment>/<scale>/<method>/<overrides>/seed-<n>/
        config.yaml         resolved configuration, complete: rerunning it repeats the run
        environment.json    per stage: package versions, git commit, hardware, command line, start and end
        metrics.jsonl       one object a logged step: step, loss, learning_rate, tokens or samples, seconds, memory
        adapter/            PEFT format, safetensors
        adapters/step-<n>/  copies of the adapter along the training, step-0 the start, if training.keep_steps is set
        results.json        training summary, and per evaluation {task: {metric, value, n, stderr, breakdown}}
        predictions.jsonl   one object an evaluated item: evaluation, task, id, gold, prediction, correct
                            (predictions.jsonl.gz in a record that is kept without its adapter)
        knock_out/<evaluation>.json   the same tasks without some subspaces of the adapter; never part of results.json
        subspaces.json      what the analysis reads out of adapter/ and adapters/, for records without them
        images/ and more    of runs that draw images, see drawn_images.py
        status.json         running | finished | failed, with stage and reason

Every file but the growing ``*.jsonl`` logs is written to a temporary file and renamed, so that a reader (or a resumed
run) never meets half of one. A line torn by a kill is recognised and dropped; damage anywhere else is an error.

Damage that leaves a file readable is found in the adapter, whose sha256 is in results.json, in checkpoints and in the
chunks of an unfinished evaluation. The JSON of a finished run has no digest: there, a flipped bit is found only where
it breaks syntax, a type or a bound. Copies below results/ have a manifest with the sha256 of every file.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from .errors import UserError
from .typed import Count, Seconds, Share, build, shown

logger = logging.getLogger(__name__)

T = TypeVar("T")

SCHEMA_VERSION = 1
STATES = ("running", "finished", "failed")
INTERRUPTED = "interrupted"
_TEMPORARY = ".tmp"
_KEPT = re.compile(r"step-(\d+)")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_PACKAGES = (
    "torch",
    "peft",
    "transformers",
    "accelerate",
    "datasets",
    "diffusers",
    "deepspeed",
    "bitsandbytes",
    "lm_eval",
    "safetensors",
    "tokenizers",
    "numpy",
    "moslora",
)


# ---------------------------------------------------------------------------------------------------------- contents


@dataclass
class TaskResult:
    """One number of a table: ``value`` of ``metric`` over ``n`` items, with the standard error over the items.

    ``breakdown`` holds the same over named parts of the items (MMBench's abilities, MME's perception and cognition);
    a part has no parts of its own.
    """

    metric: str
    value: float
    n: Count
    stderr: float | None = None
    unparsed: float | None = None  # share of responses in which no answer was found, where the protocol parses one
    lenient: float | None = None  # the same metric under a more forgiving reading of the responses
    breakdown: dict[str, TaskResult] | None = None


SIMILARITY = "cosine similarity"  # how the names of metrics begin whose values may be negative


def bounds(metric: str) -> tuple[int, int]:
    """Least and largest value that a metric can have: all are shares but cosine similarities."""
    return (-1, 1) if metric.startswith(SIMILARITY) else (0, 1)


@dataclass
class Evaluation:
    """All tasks of one evaluation protocol. ``protocol`` names what may share a table column: never mix two."""

    protocol: str
    tasks: dict[str, TaskResult]
    seconds: Seconds
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Plain mean over the tasks, as the paper's "Avg." (not weighted by their sizes)."""
        return sum(task.value for task in self.tasks.values()) / len(self.tasks)


@dataclass
class Training:
    """What a training cost and gave.

    Attributes:
        peak_memory_kind: cuda (allocated on the device) | rss (whole process).
        adapter_sha256: of the files in ``adapter/``, by name; None in older records.
    """

    seconds: Seconds
    steps: Count
    peak_memory_bytes: Count
    peak_memory_kind: str
    trainable_parameters: Count
    total_parameters: Count
    final_loss: float | None = None
    validation_loss: float | None = None
    adapter_sha256: dict[str, str] | None = None


@dataclass
class Results:
    training: Training | None = None
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION


@dataclass
class KnockOutPoint:
    """The tasks as an adapter answers them without some of its subspaces.

    Attributes:
        order: which are gone: the weakest | strongest | random ones; ``diagonal`` and ``mixed`` are all terms of that
            part of the update; ``none`` the whole adapter, ``all`` an adapter without any.
        draw: which of several random orders.
        share: of every module's subspaces that are gone, as asked for; of the parts as it is over all modules.
        removed: number of subspaces that are gone, over all modules.
        tasks: task -> value of its metric.
        unparsed: share of all responses in which no answer was found, where the protocol parses one.
    """

    order: str
    draw: Count
    share: Share
    removed: Count
    tasks: dict[str, Share]
    unparsed: Share | None = None


@dataclass
class KnockOut:
    """One evaluation of one adapter, repeated without some subspaces.

    Attributes:
        evaluation: name of the evaluation, as in the results.
        unit: pairs (the terms m_ij B_i A_j) | ranks.
        subspaces: how many the adapter has, over all modules.
        items: task -> number of its items.
        fingerprint: digest of adapter, settings and items.
    """

    evaluation: str
    unit: str
    subspaces: Count
    items: dict[str, Count]
    points: list[KnockOutPoint]
    seconds: Seconds
    settings: dict[str, Any]
    fingerprint: str
    schema_version: int = SCHEMA_VERSION


@dataclass
class Prediction:
    """One evaluated item. ``id`` is stable across methods and seeds, so that runs can be paired item by item."""

    evaluation: str
    task: str
    id: str
    gold: str
    prediction: str | None
    correct: bool
    response: str | None = None


@dataclass
class _Logged:
    """What every line of the log has beside its numbers."""

    step: Count
    seconds: Seconds


@dataclass
class Status:
    state: str
    stage: str
    reason: str | None = None
    updated: str = ""

    @property
    def interrupted(self) -> bool:
        """Whether the stage was stopped by hand: nothing is wrong with it, and it goes on when it is started again."""
        return self.state == "failed" and self.reason == INTERRUPTED


# ------------------------------------------------------------------------------------------------------------- files


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes ``content``, text as UTF-8, to ``path`` through a temporary sibling and a rename.

    Raises:
        UserError: if the folder cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_TEMPORARY)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; expected a writable folder") from None
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes private files; a record is for sharing
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    finally:
        Path(temporary).unlink(missing_ok=True)


def files_below(folder: Path) -> list[Path]:
    """All files in ``folder`` and its subfolders, in the order of their paths."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def sync(folder: Path) -> None:
    """Writes the files below ``folder`` out to the disk, those that libraries wrote without doing so.

    Raises:
        UserError: one that cannot be written.
    """
    for path in files_below(folder):
        try:
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None


def _json(path: Path, value: Any, indent: int | None = None) -> str:
    """``value`` as JSON and a newline; NaN and infinities, which JSON lacks, are refused by their key."""
    try:
        return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError:
        key, number = next(_non_finite(value), ("", "a value that JSON lacks"))
        raise UserError(f"cannot write {path}: {key or 'it'} is {number}; expected finite numbers only") from None


def _non_finite(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, float) and not math.isfinite(value):
        yield key, value
    elif isinstance(value, dict | list | tuple):
        for name, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _non_finite(entry, f"{key}.{name}" if key else str(name))


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, _json(path, value, indent=2))


def read_text(path: Path) -> str:
    """The text of a file of the user's or of a run.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: expected UTF-8, found {error}") from None


def parse_json(text: str) -> Any:
    """JSON as ``json.loads`` reads it; whatever else is wrong with a text comes out as a ValueError too."""
    try:
        value = json.loads(text)
        if _SURROGATE.search(text):  # half a character, which json admits and no file can be written with
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("too many levels") from None
    return value


def read_json(path: Path) -> Any:
    """The content of a JSON file, of whatever type it is: see :mod:`moslora_core.typed`.

    Raises:
        UserError: it cannot be read, or is no JSON.
    """
    text = read_text(path)
    try:
        return parse_json(text)
    except ValueError as error:
        raise UserError(f"{path} is damaged: expected JSON, found {error}") from None


def read_yaml(path: Path, load: Callable[[str], T]) -> T:
    """The content of a YAML file.

    Args:
        load: reads a text, as ``yaml.safe_load`` does.

    Raises:
        UserError: it cannot be read, or is no YAML.
    """
    text = read_text(path)
    try:
        return load(text)
    except Exception as error:  # under a wrong tag or number, PyYAML fails with whatever Python raises there
        raise UserError(f"{path} is damaged: expected YAML, found {error or type(error).__name__}") from None


def append_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Appends whole lines and flushes them to the disk, so that a kill costs at most the line being written."""
    lines = "".join(_json(path, row) for row in rows)
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def read_log(path: Path) -> bytes:
    """The bytes of a log, decompressed where its name ends in ``.gz``.

    Raises:
        UserError: if it cannot be read, or is no gzip file though its name says so.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz" and not content:  # to gzip, as many files as there are
            raise EOFError("an empty one")
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged: expected a gzip file, found {error}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Reads a log written by :func:`append_jsonl`; a last line without its newline was torn by a kill and is dropped.

    Raises:
        UserError: if any other line is not a JSON object.
    """
    lines = read_log(path).split(b"\n")  # bytes: a line may be torn inside a character
    rows = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = parse_json(line.decode("utf-8"))
        except ValueError:
            row = None
        if not isinstance(row, dict):
            found = line[:60].decode("utf-8", errors="replace")
            raise UserError(f"{path} line {number} is damaged: expected a JSON object, found {found!r}")
        rows.append(row)
    return rows


def repair_jsonl(path: Path, keep=lambda row: True) -> list[dict[str, Any]]:
    """Rewrites a log without a torn last line and without rows that ``keep`` refuses; returns the rows left."""
    rows = [row for row in read_jsonl(path) if keep(row)] if path.exists() else []
    write_atomic(path, "".join(_json(path, row) for row in rows))
    return rows


def check_version(raw: Any, expected: int, where: str) -> None:
    """Checks what a JSON object says of its schema, before anything else in it is read.

    Raises:
        UserError: another schema, none, or no object.
    """
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if type(version) is not int or version != expected:
        raise UserError(f"{where}: schema_version {shown(version)}, expected {expected}")


def _read_record(kind: type[T], path: Path) -> T:
    raw = read_json(path)
    check_version(raw, SCHEMA_VERSION, str(path))
    return build(kind, raw, str(path))


def _knock_out(path: Path) -> KnockOut:
    knock_out = _read_record(KnockOut, path)
    for number, point in enumerate(knock_out.points):
        if point.tasks.keys() != knock_out.items.keys():
            raise UserError(
                f"{path}: points.{number}: expected the tasks {shown(sorted(knock_out.items))}, "
                f"found {shown(sorted(point.tasks))}"
            )
    return knock_out


# ------------------------------------------------------------------------------------------------------------ record


class InUse(UserError):
    """Another process holds a folder."""


@contextmanager
def locked(lock: Path, what: str) -> Iterator[Path]:
    """Holds something against other processes by its lock file, which it gives; a killed process holds nothing.

    Args:
        what: is held, for errors.

    Raises:
        UserError: the lock's folder cannot be written, or another process holds the lock.
    """
    from filelock import FileLock, Timeout

    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(lock, timeout=0)
        held.acquire()
    except Timeout:
        raise InUse(f"{what} is in use by another process; wait for it or stop it") from None
    except OSError as error:
        raise UserError(f"cannot write {what}: {error.strerror}") from None
    try:
        yield lock
    finally:
        held.release()


def override_label(overrides: Iterable[str]) -> str:
    """Folder name of a set of configuration overrides: sorted, safe for a file system, ``default`` when empty.

    Distinct sets have distinct names: a digest follows where the readable part had characters replaced or was cut.
    """
    given = sorted(set(overrides))
    if not given:
        return "default"
    plain = ",".join(given)
    label = re.sub(r"[^A-Za-z0-9_.,=+-]+", "_", plain).strip(".")
    if label == plain and plain.count(",") == len(given) - 1 and len(label) <= 160:  # file names end at 255 bytes
        return label
    return f"{label[:140]}~{hashlib.sha256(json.dumps(given).encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class RunRecord:
    """Reads and writes the folder of one run."""

    path: Path

    @classmethod
    def locate(
        cls, runs_dir: str | Path, experiment: str, scale: str, method: str, label: str, seed: int
    ) -> RunRecord:
        return cls(Path(runs_dir) / experiment / scale / method / label / f"seed-{seed}")

    # the files
    @property
    def config_path(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def adapter_path(self) -> Path:
        return self.path / "adapter"

    def kept_adapter_path(self, step: int) -> Path:
        """Where a training keeps a copy of its adapter as it was after ``step`` optimiser steps."""
        return self.path / "adapters" / f"step-{step}"

    def kept_adapters(self) -> dict[int, Path]:
        """Step -> folder of the copies of the adapter that were kept, the earliest first; step 0 is the start."""
        folders = {path: _KEPT.fullmatch(path.name) for path in self.path.glob("adapters/*") if path.is_dir()}
        return dict(sorted((int(match[1]), path) for path, match in folders.items() if match))

    @property
    def predictions_path(self) -> Path:
        return self.path / "predictions.jsonl"

    def predictions_file(self) -> Path | None:
        """The predictions as they are there, plain or compressed."""
        compressed = self.predictions_path.with_name(f"{self.predictions_path.name}.gz")
        return next((path for path in (self.predictions_path, compressed) if path.exists()), None)

    @property
    def checkpoints_path(self) -> Path:
        """Trainer's resumable state; removed once the training has finished."""
        return self.path / "checkpoints"

    def partial_predictions_path(self, evaluation: str) -> Path:
        """Where a running evaluation keeps its finished items; merged into predictions.jsonl at its end."""
        return self.path / f"predictions.{evaluation}.partial.jsonl"

    @property
    def subspaces_path(self) -> Path:
        return self.path / "subspaces.json"

    def knock_out_path(self, name: str) -> Path:
        return self.path / "knock_out" / f"{name}.json"

    # status
    def status(self) -> Status | None:
        path = self.path / "status.json"
        if not path.exists():
            return None
        status = build(Status, read_json(path), str(path))
        if status.state not in STATES:
            raise UserError(f"{path}: state must be one of {STATES}, found {shown(status.state)}")
        return status

    def set_status(self, state: str, stage: str, reason: str | None = None) -> None:
        write_json(self.path / "status.json", asdict(Status(state, stage, reason, _now())))

    def is_trained(self) -> bool:
        return self.results().training is not None

    # results
    def results(self) -> Results:
        path = self.path / "results.json"
        if not path.exists():
            return Results()
        results = _read_record(Results, path)
        for name, evaluation in results.evaluations.items():
            for task, result in evaluation.tasks.items():
                for part, entry in (result.breakdown or {}).items():
                    if entry.breakdown is not None:
                        where = f"evaluations.{name}.tasks.{task}.breakdown.{part}"
                        raise UserError(f"{path}: {where} has a breakdown inside a breakdown; expected none")
        return results

    def write_results(self, results: Results) -> None:
        write_json(self.path / "results.json", asdict(results))

    def set_training(self, training: Training) -> None:
        results = self.results()
        results.training = training
        self.write_results(results)

    def add_evaluation(self, name: str, evaluation: Evaluation, predictions: Iterable[Prediction]) -> None:
        """Adds (or replaces) one evaluation and its per-item predictions, and drops its partial file.

        The predictions are written first: results that name an evaluation always have its items beside them.
        """
        kept = [row for row in self.predictions() if row["evaluation"] != name]
        rows = kept + [asdict(prediction) for prediction in predictions]
        write_atomic(self.predictions_path, "".join(_json(self.predictions_path, row) for row in rows))
        results = self.results()
        results.evaluations[name] = evaluation
        self.write_results(results)
        self.partial_predictions_path(name).unlink(missing_ok=True)

    def predictions(self) -> list[dict[str, Any]]:
        """The predictions of all evaluations, as dictionaries of what :class:`Prediction` has.

        Raises:
            UserError: a line is damaged.
        """
        path = self.predictions_file()
        rows = [] if path is None else read_jsonl(path)
        for number, row in enumerate(rows, start=1):
            build(Prediction, row, f"{path} line {number}")
        return rows

    def metrics(self) -> list[dict[str, float | None]]:
        """The logged steps: numbers by name, ``step`` and ``seconds`` among them.

        Raises:
            UserError: a line is damaged.
        """
        path = self.metrics_path
        rows = read_jsonl(path) if path.exists() else []
        for number, row in enumerate(rows, start=1):
            build(_Logged, row, f"{path} line {number}", others=True)
            build(dict[str, float | None], row, f"{path} line {number}")
        return rows

    # knock-outs
    def write_knock_out(self, name: str, knock_out: KnockOut) -> None:
        """Adds (or replaces) one, and drops its partial file."""
        write_json(self.knock_out_path(name), asdict(knock_out))
        self.partial_predictions_path(name).unlink(missing_ok=True)

    def knock_outs(self) -> dict[str, KnockOut]:
        """The knock-outs of this run by name.

        Raises:
            UserError: a file is damaged or of another schema.
        """
        return {path.stem: _knock_out(path) for path in sorted(self.path.glob("knock_out/*.json"))}

    # running
    @contextmanager
    def stage(self, name: str, *, fresh: bool = False) -> Iterator[None]:
        """Runs one stage (``train``, ``evaluate``): status, environment and the lock against a second process.

        Args:
            fresh: start from an empty folder; what another process is still writing to is never removed.

        Raises:
            UserError: if the folder cannot be written, or another process holds it.
        """
        with self._locked() as lock:
            if fresh:
                self._clear(keep=lock)
            self._note_environment(name, start=True)  # a damaged one is refused before anything is changed
            self.set_status("running", name)
            try:
                yield
            except BaseException as error:
                interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
                reason = INTERRUPTED if interrupted else f"{type(error).__name__}: {error}"
                try:
                    self.set_status("failed", name, reason.splitlines()[0] if reason else None)
                except UserError as unwritten:  # a full disk, which must not hide what went wrong
                    logger.warning("%s", unwritten)
                raise
            self._note_environment(name, start=False)
            self.set_status("finished", name)

    @contextmanager
    def _locked(self) -> Iterator[Path]:
        with locked(self.path / ".lock", f"run folder {self.path}") as lock:
            for temporary in self.path.rglob(f".*{_TEMPORARY}"):  # of a write that a kill has cut short
                temporary.unlink()
            yield lock

    def settle(self, stage: str, leftovers: Iterable[Path] = ()) -> None:
        """Marks a stage as finished whose process was killed between its results and its end.

        Args:
            leftovers: files and folders that the stage would have removed.
        """
        status = self.status()
        if status is None or status.stage != stage or status.state == "finished":
            return
        try:
            with self._locked():
                for path in leftovers:
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
                self._note_environment(stage, start=False)
                self.set_status("finished", stage)
        except InUse:  # it is at its end, and does so itself
            return

    def _clear(self, keep: Path) -> None:
        for path in self.path.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path != keep:
                path.unlink()

    def _note_environment(self, stage: str, start: bool) -> None:
        path = self.path / "environment.json"
        stages = read_json(path) if path.exists() else {}
        if not isinstance(stages, dict) or not isinstance(stages.get(stage, {}), dict):
            raise UserError(f"{path} is damaged: expected an object of stages; remove it to go on")
        if start:
            stages[stage] = {**environment(), "start": _now(), "end": None}
        else:
            stages.setdefault(stage, {})["end"] = _now()
        write_json(path, stages)


def find_runs(root: str | Path, experiment: str | None = None) -> list[RunRecord]:
    """Every run folder below ``root`` (a folder that holds status.json), in a stable order.

    Hidden folders hold none: they are those of a folder of runs that is being written, or was when it was killed.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(
            f"no folder of runs at {root}; expected runs/<experiment>/<scale>/<method>/<overrides>/seed-<n>"
        )
    pattern = f"{experiment or '[!.]*'}/[!.]*/[!.]*/[!.]*/seed-*/status.json"
    return [RunRecord(path.parent) for path in sorted(root.glob(pattern))]


# ------------------------------------------------------------------------------------------------------- environment


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _git_commit() -> str | None:
    """Commit of the checkout that this code runs from, ``+dirty`` with uncommitted changes; None outside git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10)
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+dirty" if dirty.stdout.strip() else "")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """Package versions, git commit, hardware and command line of this process."""
    import torch

    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return {
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
        "python": platform.python_version(),
        "git_commit": _git_commit(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "hardware": {
            "machine": platform.machine(),
            "cpu_count": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "gpus": gpus,
            "cuda": torch.version.cuda,
        },
    }


def peak_memory() -> tuple[int, str]:
    """Peak memory so far in bytes and its kind: ``cuda`` where a device is in use, else ``rss`` of the process."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return max(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())), "cuda"
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024), "rss"


class Stopwatch:
    """Wall seconds since its start, on the monotonic clock, plus those of earlier sittings of a resumed run."""

    def __init__(self, before: float = 0.0):
        self._start = time.monotonic() - before

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

"""Damaged input for everything of the user's that the project reads: ``python benchmarks/fuzz.py``.

Valid files are changed, in what they say and in their bytes, and given to what a command reads them with
(fuzz_targets.py). A refusal is a ``UserError``; any other exception, and an input that takes longer than ``LIMIT``
seconds, is a finding: it is written to a file, by which ``--replay`` raises it again. The same seed draws the same
inputs.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import out_argument, report, run
from fuzz_inputs import inputs
from fuzz_targets import Target, targets
from hypothesis import HealthCheck, Phase, given, seed, settings

from moslora_core.arguments import Parser
from moslora_core.errors import UserError

ROOT = Path(__file__).parents[1]
BATCH = 500  # inputs from one seed of hypothesis, which remembers what it has drawn
LIMIT = 20  # seconds of one input, computing: other work on the machine makes no finding
COLUMNS = ("Area", "Inputs", "Refused", "Accepted", "Findings", "Seconds")


@dataclass
class Finding:
    """An exception that nobody expected, and the shortest input that raised it."""

    error: str
    where: str
    content: bytes
    times: int = 1


@dataclass
class Tally:
    """What became of a target's inputs."""

    accepted: int = 0
    refused: int = 0
    seconds: float = 0.0
    findings: dict[tuple[str, str], Finding] = field(default_factory=dict)

    @property
    def inputs(self) -> int:
        return self.accepted + self.refused + sum(finding.times for finding in self.findings.values())

    def counts(self) -> dict[str, float]:
        """Column of the table -> number."""
        numbers = (self.inputs, self.refused, self.accepted, len(self.findings), round(self.seconds, 1))
        return {column.lower(): number for column, number in zip(COLUMNS[1:], numbers, strict=True)}

    def add(self, content: bytes, error: BaseException) -> None:
        key = type(error).__name__, _where(error)
        known = self.findings.setdefault(key, Finding(f"{key[0]}: {error}"[:300], key[1], content, times=0))
        known.times += 1
        known.content = min(known.content, content, key=len)


def _where(error: BaseException) -> str:
    """The innermost line of the project that the exception went through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(str(ROOT))]
    ours = [frame for frame in frames if "benchmarks/fuzz" not in frame.filename] or frames
    return f"{Path(ours[-1].filename).relative_to(ROOT)}:{ours[-1].lineno}"


@contextmanager
def _limited() -> Iterator[None]:
    def late(*_: Any) -> None:
        raise TimeoutError(f"took longer than {LIMIT} seconds")

    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def take(target: Target, content: bytes, tally: Tally) -> None:
    """Gives one input to a target."""
    try:
        with _limited():
            target.read(content)
    except UserError:
        tally.refused += 1
    except (Exception, SystemExit) as error:
        tally.add(content, error)
    else:
        tally.accepted += 1


def fuzz(target: Target, count: int, number: int = 0) -> Tally:
    """Gives a target so many inputs.

    Args:
        number: the seed.
    """
    tally, begin = Tally(), time.perf_counter()
    while tally.inputs < count:
        drawn = hashlib.sha256(f"{number}/{target.name}/{tally.inputs}".encode()).digest()

        @seed(int.from_bytes(drawn[:8], "little"))
        @settings(
            max_examples=min(BATCH, count - tally.inputs),
            phases=[Phase.generate],
            database=None,
            deadline=None,
            derandomize=False,
            suppress_health_check=list(HealthCheck),
        )
        @given(inputs(target.form, target.examples))
        def batch(content: bytes) -> None:
            take(target, content, tally)

        with quietly():
            batch()
        tally.seconds = time.perf_counter() - begin
        sys.stderr.write(f"\r{target.name}: {tally.inputs} of {count}, {len(tally.findings)} findings")
    sys.stderr.write("\n")
    return tally


@contextmanager
def quietly() -> Iterator[None]:
    """Without what the readers warn of, a hundred thousand times."""
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python benchmarks/fuzz.py", description=__doc__.split(":")[0])
    parser.add_argument("--inputs", type=int, default=100_000, help="in all (default: 100000)")
    parser.add_argument("--target", action="append", help="only the targets whose name has this in it; repeatable")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs (default: 0)")
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"), help="folder for inputs that failed")
    parser.add_argument("--replay", type=Path, help="give this file to the one target, and raise what it raises")
    out_argument(parser, "fuzz")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as home:
        every = targets(Path(home))
        chosen = [t for t in every if not arguments.target or any(name in t.name for name in arguments.target)]
        if not chosen or (arguments.replay and len(chosen) > 1):
            names = ", ".join(target.name for target in chosen or every)
            raise UserError(f"--target: expected {'one' if arguments.replay else 'some'} of {names}")
        if arguments.replay:
            chosen[0].read(arguments.replay.read_bytes())
            return 0
        share = arguments.inputs / sum(target.weight for target in chosen)
        tallies = {}
        for target in chosen:
            tallies[target.name] = fuzz(target, math.ceil(target.weight * share), arguments.seed)
            for finding in tallies[target.name].findings.values():
                path = _kept(arguments.findings, target.name, finding.content)
                sys.stderr.write(f"{finding.error} at {finding.where}: --target '{target.name}' --replay {path}\n")
    rows = [_row(area, [tallies[t.name] for t in chosen if t.area == area]) for area in {t.area: 0 for t in chosen}]
    rows.append(_row("in all", list(tallies.values())))
    numbers = {name: {**tally.counts(), "errors": _errors(tally)} for name, tally in tallies.items()}
    report("fuzz", COLUMNS, rows, {"seed": arguments.seed, "targets": numbers}, arguments.out)
    return 1 if any(tally.findings for tally in tallies.values()) else 0


def _row(name: str, tallies: Sequence[Tally]) -> list[str]:
    counts = [tally.counts() for tally in tallies]
    return [name, *(f"{sum(of[column.lower()] for of in counts):,.0f}" for column in COLUMNS[1:])]


def _errors(tally: Tally) -> list[dict[str, Any]]:
    return [{"error": f.error, "where": f.where, "times": f.times} for f in tally.findings.values()]


def _kept(folder: Path, name: str, content: bytes) -> Path:
    path = folder / f"{re.sub(r'[^A-Za-z]+', '-', name)}-{hashlib.sha256(content).hexdigest()[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


if __name__ == "__main__":
    run(main)

"""The numbers of the subspaces as files, so that the figures can be drawn where the adapters are not.

    python -m analysis.subspace_files --runs runs        # writes both files of every run that has an adapter

    <run>/subspaces.json                          the numbers of one run's adapter and of its kept copies
    <experiment>/<scale>/subspace-angles.json     principal angles between the adapters of these runs

Beside the record each file is some 50 KB at the smoke scale. Numbers have six significant digits. What is drawn always
went through this form, so that figures are the same bytes with the adapters and without. A file names the adapters by
their digests: where they are there and are others, it is passed over and they are read again.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from moslora_core.arguments import Parser
from moslora_core.errors import UserError
from moslora_core.record import RunRecord, check_version, find_runs, read_json, write_atomic
from moslora_core.typed import Count, build

from .load import Run, load_runs
from .study_plan import Progress, Study, read_study
from .study_view import study_runs
from .subspace import (
    Angles,
    Bases,
    ModuleNumbers,
    Size,
    Trace,
    angle_members,
    by_setting,
    digests,
    groups_of,
    mean_angles,
    read_bases,
    read_trace,
)

SCHEMA_VERSION = 1
ANGLES_NAME = "subspace-angles.json"
COMMAND = "python -m analysis.subspace_files --runs <runs>"

# Of every step there are the numbers; of the two ends also what is a list.
_SPECTRA = ("mixer_values", "update_values")
_SCALARS = tuple(entry.name for entry in fields(ModuleNumbers) if entry.name not in ("r", *_SPECTRA))


# ---------------------------------------------------------------------------------------------------------- one run


def encode(trace: Trace) -> dict[str, Any]:
    """A trace as JSON; lists run over the modules."""
    modules = list(trace.last)
    ends = sorted({*([0] if trace.start is not None else []), max(trace.steps)})

    def column(step: int, name: str) -> list[Any]:
        found = trace.steps[step]
        return [_short(getattr(found[module], name)) if module in found else None for module in modules]

    return {
        "schema_version": SCHEMA_VERSION,
        "adapter": trace.digest,
        "kept": {str(step): digest for step, digest in trace.kept.items()},
        "modules": modules,
        "r": [trace.last[module].r for module in modules],
        "out": [trace.sizes[module].out for module in modules],
        "in": [trace.sizes[module].inp for module in modules],
        "rank": [trace.sizes[module].rank for module in modules],
        "steps": {str(step): {name: column(step, name) for name in _SCALARS} for step in trace.steps},
        "spectra": {str(step): {name: column(step, name) for name in _SPECTRA} for step in ends},
        "start": None if trace.start is None else _matrices(trace.start, modules),
        "end": _matrices(trace.end, modules),
    }


def decode(raw: Any, run: Run, where: str) -> Trace:
    """The trace that :func:`encode` wrote.

    Raises:
        UserError: another schema, or something else; names ``where``.
    """
    _check_schema(raw, where)
    try:
        modules = build(list[str], raw["modules"], "modules")
        if len(set(modules)) < len(modules):
            raise ValueError("a module stands there twice")
        steps = {int(step): columns for step, columns in raw["steps"].items()}
        if max(steps) != run.training.steps:
            raise ValueError(f"its last step is {max(steps)}, the training had {run.training.steps}")
        spectra = {int(step): columns for step, columns in raw["spectra"].items()}

        def numbers(step: int, at: int) -> ModuleNumbers:
            lists = {name: _list(spectra[step][name][at]) if step in spectra else None for name in _SPECTRA}
            lists["update_values"] = lists["update_values"] or ()
            scalars = {name: _number(steps[step][name][at]) for name in _SCALARS}
            return ModuleNumbers(r=ranks[at], **lists, **scalars)

        ranks, *sizes = (build(list[Count], raw[name], name) for name in ("r", "out", "in", "rank"))
        return Trace(
            run=run,
            digest=build(str, raw["adapter"], "adapter"),
            kept={int(step): digest for step, digest in build(dict[str, str], raw["kept"], "kept").items()},
            steps={step: {module: numbers(step, at) for at, module in enumerate(modules)} for step in sorted(steps)},
            start=None if raw["start"] is None else _by_module(raw["start"], modules, "start"),
            end=_by_module(raw["end"], modules, "end"),
            sizes={module: Size(*size) for module, *size in zip(modules, *sizes, strict=True)},
        )
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{where} is damaged: {reason}; write it again where the adapter is: {COMMAND}") from None


def _check_schema(raw: Any, where: str) -> None:
    try:
        check_version(raw, SCHEMA_VERSION, where)
    except UserError as error:
        raise UserError(f"{error}; write it again where the adapter is: {COMMAND}") from None


def _short(value: Any) -> Any:
    """Six significant digits: what the last ones are depends on the machine's linear algebra. JSON lacks infinity."""
    if value is None:
        return None
    if isinstance(value, list | tuple):
        return [_short(entry) for entry in value]
    return "inf" if math.isinf(value) else float(f"{round(value, 9) + 0.0:.6g}")


def _number(value: Any) -> float | None:
    return math.inf if value == "inf" else build(float | None, value, "a number")


def _list(value: Any) -> tuple[float, ...] | None:
    return build(tuple[float, ...] | None, value, "a list of numbers")


def _matrices(found: Mapping[str, Any], modules: Sequence[str]) -> list[Any]:
    return [_short(found[module]) if module in found else None for module in modules]


def _by_module(raw: Any, modules: Sequence[str], key: str) -> dict[str, Any]:
    found = build(list[list[list[float]] | None], raw, key)
    if any(len(row) != len(matrix) for matrix in found for row in matrix or ()):
        raise ValueError(f"{key} has a matrix that is not square")
    return {module: matrix for module, matrix in zip(modules, found, strict=True) if matrix is not None}


def load_trace(run: Run, record: RunRecord) -> Trace:
    """The trace of a run, from its file or from its adapters: the same numbers either way.

    Raises:
        UserError: neither is there, or what is there is damaged.
    """
    path = record.subspaces_path
    there = record.adapter_path.is_dir()
    if path.exists():
        try:
            found = decode(read_json(path), run, str(path))
        except UserError:
            if not there:
                raise
        else:
            if not there or (found.digest, found.kept) == digests(run, record):
                return found
    if not there:
        raise UserError("no adapter and no subspaces.json beside the record")
    return decode(encode(read_trace(run, record)), run, str(record.adapter_path))


def load_traces(runs: Iterable[Run], runs_dir: Path) -> tuple[list[Trace], list[str]]:
    """The traces of trained runs, and why each of the others has none."""
    traces, left_out = [], []
    for run in runs:
        record = RunRecord(runs_dir / run.path)
        try:
            traces.append(load_trace(run, record))
        except UserError as error:
            left_out.append(f"{run.path}: {' '.join(str(error).replace(f'{record.path}/', '').split())}")
    return traces, left_out


# ------------------------------------------------------------------------------------------------------------- angles


@dataclass(frozen=True)
class AngleFile:
    """Angles that were measured: by the digests of two adapters, in either order."""

    pairs: Mapping[frozenset[str], Angles]

    def between(self, first: Trace, second: Trace) -> Angles | None:
        return self.pairs.get(frozenset((first.digest, second.digest)))


def angles_path(runs_dir: Path, run: Run) -> Path:
    return runs_dir / run.experiment / run.scale / ANGLES_NAME


def read_angles(path: Path) -> AngleFile:
    """The angles of a file; none where it is not there.

    Raises:
        UserError: it is damaged or of another schema.
    """
    if not path.exists():
        return AngleFile({})
    raw = read_json(path)
    _check_schema(raw, str(path))
    try:
        names = build(dict[str, str], raw["adapters"], "adapters")
        angles = build(list[tuple[str, str, float | None, float | None]], raw["angles"], "angles")
        pairs = {frozenset((names[first], names[second])): Angles(*found) for first, second, *found in angles}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}; write it again where the adapters are: {COMMAND}") from None
    return AngleFile(pairs)


def angles_between(traces: Sequence[Trace], runs_dir: Path) -> dict[tuple[int, int], Angles]:
    """(i, j), i > j -> angles between two of ``traces``, from the file or from their adapters.

    A pair is absent that is not in the file and of which an adapter is not there, or is another by now.
    """
    known = read_angles(angles_path(runs_dir, traces[0].run)) if traces else AngleFile({})

    @cache
    def bases(at: int) -> dict[str, Bases] | None:
        record = RunRecord(runs_dir / traces[at].run.path)
        return read_bases(record) if record.adapter_path.is_dir() else None

    found = {}
    for i, j in ((later, earlier) for later in range(len(traces)) for earlier in range(later)):
        angles = known.between(traces[i], traces[j])
        if angles is None and (one := bases(i)) is not None and (other := bases(j)) is not None:
            exact = mean_angles(one, other)
            angles = Angles(_short(exact.columns), _short(exact.rows))
        if angles is not None:
            found[i, j] = angles
    return found


# ------------------------------------------------------------------------------------------------------------ command


def write_files(runs_dir: Path, studies: Sequence[Study] = ()) -> list[str]:
    """Writes the files of all runs below ``runs_dir`` that have adapters; returns what was done, in lines.

    Args:
        studies: whose comparisons alone are read of their experiment and scale, as their report draws them.

    Raises:
        UserError: there are no runs, or a file cannot be written.
    """
    experiments = sorted({record.path.relative_to(runs_dir).parts[0] for record in find_runs(runs_dir)})
    if not experiments:
        raise UserError(f"no runs under {runs_dir}; expected <experiment>/<scale>/<method>/<overrides>/seed-<n>")
    return [line for experiment in experiments for line in _write_files(runs_dir, experiment, studies)]


def _write_files(runs_dir: Path, experiment: str, studies: Sequence[Study]) -> list[str]:
    runs, refused = load_runs(runs_dir, experiment)
    for study in studies:
        if study.experiment == experiment:
            runs, refused = study_runs(Progress(study, runs_dir), runs, refused, variants=False)
    left_out = [f"{entry.path}: {entry.reason}" for entry in refused]
    written, pairs = 0, 0
    compared: dict[Path, list[list[Trace]]] = {}  # the runs of one setting in a list of their own
    for _, _, members in by_setting(runs):
        traces, without = load_traces(members, runs_dir)
        left_out += without
        there = [trace for trace in traces if RunRecord(runs_dir / trace.run.path).adapter_path.is_dir()]
        for trace in there:
            write_atomic(RunRecord(runs_dir / trace.run.path).subspaces_path, _text(encode(trace)))
        written += len(there)
        if there:
            chosen = [trace for _, of in angle_members(groups_of(traces)) for trace in of]
            compared.setdefault(angles_path(runs_dir, there[0].run), []).append(chosen)
    for path, settings in compared.items():
        rows = [
            [traces[i].run.path, traces[j].run.path, angles.columns, angles.rows]
            for traces in settings
            for (i, j), angles in angles_between(traces, runs_dir).items()
        ]
        adapters = {trace.run.path: trace.digest for traces in settings for trace in traces}
        write_atomic(path, _text({"schema_version": SCHEMA_VERSION, "adapters": adapters, "angles": rows}))
        pairs += len(rows)
    done = f"{experiment}: numbers of {written} runs, angles between {pairs} pairs of them"
    return [done, *(f"left out: {entry}" for entry in left_out)]


def _text(content: Mapping[str, Any]) -> str:
    """JSON with a line an entry."""
    entries = (f"{json.dumps(key)}:{json.dumps(value, separators=(',', ':'))}" for key, value in content.items())
    return "{" + ",\n".join(entries) + "}\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m analysis.subspace_files",
        description="Write the numbers that the subspace figures are drawn from beside the run records.",
        allow_abbrev=False,
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of run records (default: runs)")
    parser.add_argument("--study", type=Path, action="append", default=[], help="this study's runs alone; repeatable")
    try:
        arguments = parser.parse_args(argv)
        lines = write_files(arguments.runs, [read_study(path) for path in arguments.study])
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

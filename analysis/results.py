"""Keeps a study's results without what can be made again: ``python -m analysis.results STUDY --out results/runs``.

Copies of its run records that are small enough for a repository, and whole enough for every table and figure: no
adapters and no checkpoints, the predictions compressed and without the responses. A copy is a run record itself. The
definition of the study is kept beside them, so that they can be reported as what they are.
"""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from moslora_core.arguments import Parser
from moslora_core.errors import UserError
from moslora_core.prepared import new_folder, sha256, write_manifest
from moslora_core.record import RunRecord, write_atomic

from .study_plan import DONE, FAILED, GRID, Progress, Wanted, read_study

KEPT = ("config.yaml", "environment.json", "metrics.jsonl", "results.json", "status.json", "subspaces.json")
COLUMNS = ("evaluation", "task", "id", "gold", "prediction", "correct")


def keep(progress: Progress, out: Path) -> int:
    """Writes the study's runs below ``out``, in place of earlier copies; returns how many.

    Raises:
        UserError: a run is missing, or a record cannot be read or the copy written.
    """
    if missing := [run for run, state in progress.runs.items() if state.state not in (DONE, FAILED)]:
        path = missing[0].record(progress.runs_dir).path
        raise UserError(
            f"{len(missing)} runs of the study {progress.study.name} are missing, {path} among them; run it first: "
            f"python -m analysis.study {progress.study.path}"
        )
    study = progress.study
    relative = f"{study.experiment}/{study.scale}"
    records = _by_record(progress)
    with new_folder(out / relative, "--out") as folder:
        for path, runs in records.items():
            _copy(RunRecord(path), folder / path.relative_to(progress.runs_dir / relative), runs)
        for shared in sorted((progress.runs_dir / relative).glob("subspace-*.json")):
            shutil.copyfile(shared, folder / shared.name)
        definition = {"study": study.name, "definition": {study.path.name: sha256(study.path)}}
        write_manifest(folder, definition, summarised=sorted(path.name for path in folder.iterdir() if path.is_dir()))
    write_atomic(out / "studies" / f"{study.name}.yaml", study.path.read_bytes())
    return len(records)


def _by_record(progress: Progress) -> dict[Path, list[Wanted]]:
    found: dict[Path, list[Wanted]] = {}
    for run in progress.runs:
        found.setdefault(run.record(progress.runs_dir).path, []).append(run)
    return dict(sorted(found.items()))


def _copy(record: RunRecord, target: Path, runs: Sequence[Wanted]) -> None:
    target.mkdir(parents=True)
    for name in KEPT:
        if (source := record.path / name).exists():
            shutil.copyfile(source, target / name)
    for source in sorted(record.path.glob("knock_out/*.json")):
        (target / "knock_out").mkdir(exist_ok=True)
        shutil.copyfile(source, target / "knock_out" / source.name)
    # The trials of the rates are compared with nothing item by item.
    compared = {run.evaluation for run in runs if run.part != GRID}
    rows = [row for row in record.predictions() if row["evaluation"] in compared]
    if rows:
        text = "".join(json.dumps({name: row.get(name) for name in COLUMNS}) + "\n" for row in rows)
        # Without a time in it: the same predictions are the same bytes.
        (target / "predictions.jsonl.gz").write_bytes(gzip.compress(text.encode(), mtime=0))


# ------------------------------------------------------------------------------------------------------------ command


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m analysis.results", description="Keep a study's results.", allow_abbrev=False)
    parser.add_argument("study", type=Path, help="definition of the study")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of run records (default: runs)")
    parser.add_argument(
        "--out", type=Path, default=Path("results/runs"), help="folder to write (default: results/runs)"
    )
    try:
        arguments = parser.parse_args(argv)
        count = keep(Progress(read_study(arguments.study), arguments.runs), arguments.out)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"{count} runs kept in {arguments.out}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

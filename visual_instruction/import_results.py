"""Takes results of VLMEvalKit or lmms-eval into a run's record.

    python -m visual_instruction.import_results --run runs/visual_instruction/paper/moslora/default/seed-1
        --from vlmevalkit outputs/merged --judge gpt-4-1106-preview --date 2026-03-01

They become an evaluation of their own, ``vlmevalkit`` or ``lmms_eval``, which shares no column of a table with ours
(``exact``): prompts, answer matching and judges differ. Where a judge took part its name and the day are required, as
scores of MM-Vet and MathVista cannot be compared between judges, nor between versions of one.
"""

from __future__ import annotations

import argparse
import datetime
import logging
from collections.abc import Collection, Sequence
from pathlib import Path

from moslora_core import launch
from moslora_core.errors import UserError
from moslora_core.evaluations import is_done
from moslora_core.record import Evaluation, RunRecord

from .benchmarks.registry import BENCHMARKS
from .benchmarks.toolkits import Imported, read_lmms_eval, read_vlmevalkit
from .recorded import recorded_config

logger = logging.getLogger(__name__)

STAGE = "import_results"
READERS = {"vlmevalkit": read_vlmevalkit, "lmms_eval": read_lmms_eval}


def import_results(
    run: Path,
    toolkit: str,
    folder: Path,
    *,
    judge: str | None = None,
    date: str | None = None,
    on_finished: str = "refuse",
) -> Evaluation | None:
    """Adds the results in ``folder`` to the run's record, as an evaluation named ``toolkit``.

    Args:
        judge: model that judged or matched answers.
        date: day on which it did, as ``YYYY-MM-DD``.
        on_finished: what to do where the run has such an evaluation: refuse | skip | overwrite.

    Returns:
        What was added; None if skipped.

    Raises:
        UserError: no run, no results, faulty numbers, a judge or a date that is missing.
    """
    if toolkit not in READERS:
        raise UserError(f"--from {toolkit}: expected one of {', '.join(READERS)}")
    record = RunRecord(run)
    config = recorded_config(record)
    if is_done(record, toolkit, on_finished):
        return None
    found = READERS[toolkit](folder)
    _check_judge(found, judge, date)
    settings = {
        "base": config.model.name,
        "quantization": config.model.quantization,
        "judge": judge,
        "judge_date": date,
        "judged": _in_order(found.judged),
        "sources": found.sources,
        **found.settings,
    }
    tasks = {name: found.tasks[name] for name in _in_order(found.tasks)}
    evaluation = Evaluation(toolkit, tasks, seconds=0.0, settings=settings)  # the files do not say how long it took
    with record.stage(STAGE):
        record.add_evaluation(toolkit, evaluation, [])
    for name, result in tasks.items():
        logger.info("%s: %s %.1f%% (%s)", name, result.metric, 100 * result.value, found.sources[name])
    return evaluation


def _in_order(names: Collection[str]) -> list[str]:
    return [name for name in BENCHMARKS if name in names]


def _check_judge(found: Imported, judge: str | None, date: str | None) -> None:
    if found.judged and not (judge and date):
        names = ", ".join(_in_order(found.judged))
        raise UserError(f"{names}: a judge took part; name it and the day with --judge NAME --date YYYY-MM-DD")
    if date is not None:
        try:
            datetime.date.fromisoformat(date)
        except ValueError:
            raise UserError(f"--date {date}: expected a day as YYYY-MM-DD") from None


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m visual_instruction.import_results",
        description="Take results of VLMEvalKit or lmms-eval into a run's record.",
    )
    parser.add_argument("--run", required=True, type=Path, help="folder of the run whose export was evaluated")
    parser.add_argument(
        "--from",
        required=True,
        nargs=2,
        metavar=("TOOLKIT", "FOLDER"),
        dest="source",
        help="vlmevalkit or lmms_eval, and the folder with its result files",
    )
    parser.add_argument("--judge", help="model that judged or matched answers, with its version")
    parser.add_argument("--date", help="day of the judging, YYYY-MM-DD")
    parser.add_argument("--on-finished", default="refuse", help="where results are there: refuse | skip | overwrite")
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    toolkit, folder = given.source
    try:
        import_results(
            given.run, toolkit, Path(folder), judge=given.judge, date=given.date, on_finished=given.on_finished
        )
    except UserError as error:
        launch.fail(error)


if __name__ == "__main__":
    main()

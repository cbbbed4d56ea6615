"""Result files of the two toolkits that score exported models, as results of our benchmarks.

VLMEvalKit (read at commit e8e78f0) leaves in ``<work-dir>/<model>/`` for every data set

    <model>_<file>_acc.csv            multiple choice: split, Overall and abilities, as shares; TextVQA: in percent
    <model>_MME_score.csv             perception, reasoning and the categories, in points
    <model>_<file>_<judge>_score.csv  MMVet: Category, tot, acc; MathVista_MINI: Task&Skill, tot, .., acc; in percent

lmms-eval (0.7, commit 75571cf) writes ``<date>_results.json`` with ``results: {task: {"metric,filter": value}}`` and
``n-samples``. Both score MMBench in its circular form.
"""

from __future__ import annotations

import csv
import logging
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moslora_core.errors import UserError
from moslora_core.evaluations import share_stderr
from moslora_core.record import TaskResult, read_json
from moslora_core.typed import shown

from .registry import BENCHMARKS, JUDGED, Benchmark
from .scoring import ACCURACY, CIRCULAR, POINTS, VQA

logger = logging.getLogger(__name__)

PERCEPTION_POINTS, COGNITION_POINTS = 2000, 800
JUDGE_SCORE = "judge_score"  # MM-Vet: the mean of a judge's marks from 0 to 1


@dataclass
class Imported:
    """Results of one folder by benchmark.

    Attributes:
        judged: benchmarks whose numbers depend on a judge.
        sources: benchmark -> file, and task in it, that its number comes from.
        settings: what the files say of the toolkit.
    """

    tasks: dict[str, TaskResult] = field(default_factory=dict)
    judged: list[str] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, result: TaskResult, source: str, judged: bool) -> None:
        """Takes in one benchmark.

        Raises:
            UserError: it is there already.
        """
        if name in self.tasks:
            raise UserError(
                f"{name} is in {self.sources[name]} and in {source}; expected one result for each benchmark"
            )
        self.tasks[name] = result
        self.sources[name] = source
        if judged:
            self.judged.append(name)


def _share(value: Any, most: float, where: str) -> float:
    """``value`` over ``most``, which it must not exceed."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 <= number <= most:
        raise UserError(f"{where} is {shown(value)}; expected a number from 0 to {most:g}")
    return number / most


def _count(value: Any, where: str) -> int:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = 0.0
    if number < 1 or not number.is_integer():
        raise UserError(f"{where} is {shown(value)}; expected a positive count")
    return int(number)


def _accuracy(metric: str, share: float, n: int) -> TaskResult:
    return TaskResult(metric=metric, value=share, n=n, stderr=share_stderr(share, n))


def _mme(perception: float, cognition: float, n: int) -> TaskResult:
    """Of both parts as shares of their points."""
    points = perception * PERCEPTION_POINTS + cognition * COGNITION_POINTS
    parts = {"perception": TaskResult(POINTS, perception, n), "cognition": TaskResult(POINTS, cognition, n)}
    return TaskResult(POINTS, points / (PERCEPTION_POINTS + COGNITION_POINTS), n, breakdown=parts)


# ---------------------------------------------------------------------------------------------------------- VLMEvalKit

_PUBLISHED = {name: benchmark for name, benchmark in BENCHMARKS.items() if benchmark.questions is not None}

# Columns of MMBench's abilities: the category that the questions have, and its size in the development split (1.0).
_ABILITIES = {
    "AR": ("attribute_reasoning", 199),
    "CP": ("coarse_perception", 296),
    "FP-C": ("finegrained_perception (cross-instance)", 143),
    "FP-S": ("finegrained_perception (instance-level)", 293),
    "LR": ("logic_reasoning", 118),
    "RR": ("relation_reasoning", 115),
}
# The toolkit writes how options were matched into the name of a further file; of these, nobody is asked.
_MATCHED = re.compile(r"_(?P<how>[^_]+(?:_matching)?)_result\.\w+$")
_BY_RULE = "exact_matching"


def read_vlmevalkit(folder: Path) -> Imported:
    """Results in a folder of VLMEvalKit.

    Raises:
        UserError: no result of a known benchmark, two of one, a column or row that is missing, a number out of range.
    """
    found = Imported()
    unknown = []
    for path in sorted(_files(folder, "*.csv")):
        if path.stem.endswith("_score_fine"):  # MM-Vet's combinations of abilities
            continue
        benchmark = _vlmevalkit_benchmark(path.stem)
        if benchmark is None:
            unknown.append(path.name)
            continue
        rows = _csv_rows(path)
        if benchmark.kind == JUDGED:
            result = _judged(path, rows, benchmark)
        elif benchmark.mme:
            (row,) = _exactly(path, rows, 1)
            perception = _share(row.get("perception"), PERCEPTION_POINTS, f"{path}: perception")
            cognition = _share(row.get("reasoning"), COGNITION_POINTS, f"{path}: reasoning")
            result = _mme(perception, cognition, benchmark.questions)
        else:
            result = _accuracies(path, rows, benchmark)
        found.add(benchmark.name, result, path.name, benchmark.kind == JUDGED or _asked_a_judge(path))
    _report_unknown(folder, unknown)
    if not found.tasks:
        expected = f"<model>_{BENCHMARKS['mmbench_en'].file}_acc.csv"
        raise UserError(
            f"{folder}: holds no result of VLMEvalKit for a known benchmark; expected files like {expected}"
        )
    return found


def _vlmevalkit_benchmark(stem: str) -> Benchmark | None:
    for benchmark in _PUBLISHED.values():
        middle = {JUDGED: r"_(?!Hard_).+_score", "yes_no": "_score"}.get(benchmark.kind, "_acc")
        if re.fullmatch(rf".+_{re.escape(benchmark.file)}{middle}", stem):
            return benchmark
    return None


def _asked_a_judge(path: Path) -> bool:
    prefix = re.sub(r"_(acc|score)$", "", path.stem)
    matched = [_MATCHED.match(other.name.removeprefix(prefix)) for other in path.parent.glob(f"{prefix}_*_result.*")]
    return any(match and match["how"] != _BY_RULE for match in matched)


def _accuracies(path: Path, rows: list[dict[str, str]], benchmark: Benchmark) -> TaskResult:
    (row,) = _exactly(path, rows, 1)
    if "Overall" not in row:
        raise UserError(f"{path}: has no column 'Overall'; found {', '.join(row)}")
    if benchmark.kind == "short_answer":
        return TaskResult(VQA, _share(row["Overall"], 100, f"{path}: Overall"), benchmark.questions)
    overall = _share(row["Overall"], 1, f"{path}: Overall")
    result = _accuracy(CIRCULAR if benchmark.circular else ACCURACY, overall, benchmark.questions)
    if benchmark.circular:
        result.breakdown = {
            ability: _accuracy(CIRCULAR, _share(row[column], 1, f"{path}: {column}"), questions)
            for column, (ability, questions) in _ABILITIES.items()
            if column in row
        }
    return result


def _judged(path: Path, rows: list[dict[str, str]], benchmark: Benchmark) -> TaskResult:
    label = "Category" if benchmark.name == "mmvet" else "Task&Skill"
    metric = JUDGE_SCORE if benchmark.name == "mmvet" else ACCURACY
    results = {}
    for row in rows:
        for name in (label, "tot", "acc"):
            if name not in row:
                raise UserError(f"{path}: has no column {name!r}; found {', '.join(row)}")
        where = f"{path}: {row[label]}"
        if row[label] in results:
            raise UserError(f"{where} appears twice; expected one row for each")
        n = _count(row["tot"], f"{where}, tot")
        share = _share(row["acc"], 100, f"{where}, acc")
        results[row[label]] = TaskResult(metric, share, n, share_stderr(share, n) if metric == ACCURACY else None)
    if "Overall" not in results:
        raise UserError(f"{path}: has no row 'Overall'; found {', '.join(results) or 'none'}")
    overall = results.pop("Overall")
    overall.breakdown = results
    return overall


# ----------------------------------------------------------------------------------------------------------- lmms-eval


@dataclass(frozen=True)
class _Task:
    """A task of lmms-eval: our benchmark, its metrics with what they can reach, and whether a judge is asked."""

    benchmark: str
    metric: str
    most: float = 1
    judged: bool = False
    cognition: str | None = None


_TASKS = {
    "mmbench_en_dev": _Task("mmbench_en", "gpt_eval_score", 100, judged=True),
    "mmbench_en_dev_static": _Task("mmbench_en", "gpt_eval_score", 100),
    "mmbench_cn_dev": _Task("mmbench_cn", "gpt_eval_score", 100, judged=True),
    "seedbench": _Task("seed_bench", "seed_image"),
    "ai2d": _Task("ai2d", "exact_match"),
    "scienceqa_img": _Task("sciqa", "exact_match"),
    "textvqa_val": _Task("textvqa", "exact_match"),
    "mathvista_testmini_cot": _Task("mathvista", "llm_as_judge_eval", 100, judged=True),
    "mathvista_testmini_format": _Task("mathvista", "llm_as_judge_eval", 100, judged=True),
    "mathvista_testmini_solution": _Task("mathvista", "llm_as_judge_eval", 100, judged=True),
    "mmvet": _Task("mmvet", "gpt_eval_score", 100, judged=True),
    "mme": _Task("mme", "mme_perception_score", PERCEPTION_POINTS, cognition="mme_cognition_score"),
}


def read_lmms_eval(folder: Path) -> Imported:
    """Results in a folder of lmms-eval.

    Raises:
        UserError: no result of a known task, two of one benchmark, a metric that is not there, a number out of range.
    """
    found = Imported()
    unknown = []
    versions, models = set(), set()
    for path in sorted(_files(folder, "*_results.json")):
        content = read_json(path)
        results = content.get("results") if isinstance(content, dict) else None
        if not isinstance(results, dict):
            unknown.append(path.name)
            continue
        versions.add(str(content.get("lmms_eval_version")))
        models.add(str(content.get("model_name")))
        for name, values in results.items():
            if name not in _TASKS:
                unknown.append(f"{path.name}: {name}")
                continue
            task, where = _TASKS[name], f"{path}: {name}"
            n = _lmms_eval_count(content, name, where)
            found.add(task.benchmark, _lmms_eval_result(task, values, n, where), f"{path.name}: {name}", task.judged)
    _report_unknown(folder, unknown)
    if not found.tasks:
        raise UserError(
            f"{folder}: holds no result of lmms-eval for a known task; expected <date>_results.json with "
            f"some of {', '.join(_TASKS)}"
        )
    if len(models) > 1:
        raise UserError(f"{folder}: results of several models ({', '.join(sorted(models))}); expected those of one")
    found.settings = {"lmms_eval": ", ".join(sorted(versions)), "model_name": models.pop()}
    return found


def _lmms_eval_result(task: _Task, values: Any, n: int, where: str) -> TaskResult:
    share = _share(_metric(values, task.metric, where), task.most, f"{where}, {task.metric}")
    if task.cognition is not None:
        part = _metric(values, task.cognition, where)
        return _mme(share, _share(part, COGNITION_POINTS, f"{where}, {task.cognition}"), n)
    if task.benchmark in ("textvqa", "mmvet"):
        return TaskResult(VQA if task.benchmark == "textvqa" else JUDGE_SCORE, share, n)
    return _accuracy(CIRCULAR if BENCHMARKS[task.benchmark].circular else ACCURACY, share, n)


def _metric(values: Any, metric: str, where: str) -> Any:
    """Value of ``metric`` under whichever filter: keys read ``<metric>,<filter>``."""
    keys = [key for key in values if key.split(",")[0] == metric] if isinstance(values, Mapping) else []
    if len(keys) != 1:
        held = ", ".join(values) if isinstance(values, Mapping) else repr(values)
        raise UserError(f"{where}: expected one value of {metric}, found {len(keys)} in {held}")
    return values[keys[0]]


def _lmms_eval_count(content: Mapping[str, Any], name: str, where: str) -> int:
    """Questions that were scored: of the whole set the published number, of a part what the file says.

    The file counts rows, of which MMBench has one a rotation and SEED-Bench others for its videos.
    """
    counts = content.get("n-samples")
    samples = counts.get(name) if isinstance(counts, Mapping) else None
    published = BENCHMARKS[_TASKS[name].benchmark].questions
    if not isinstance(samples, Mapping) or samples.get("effective") == samples.get("original"):
        return published
    return _count(samples.get("effective"), f"{where}, n-samples")


# --------------------------------------------------------------------------------------------------------------- files


def _files(folder: Path, pattern: str) -> Iterator[Path]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected the results of an evaluation toolkit")
    return folder.glob(pattern)


def _csv_rows(path: Path) -> list[dict[str, str]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, strict=True))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged or no CSV file: {error}") from None
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():  # csv's filling of a longer and of a shorter row
            raise UserError(f"{path}: row {number} has another number of columns than its first line names")
    return rows


def _exactly(path: Path, rows: list[dict[str, str]], number: int) -> list[dict[str, str]]:
    if len(rows) != number:
        raise UserError(f"{path}: {len(rows)} rows of results; expected {number}")
    return rows


def _report_unknown(folder: Path, unknown: list[str]) -> None:
    if unknown:
        logger.warning("%s: not imported, as no benchmark of ours: %s", folder, "; ".join(unknown))

"""Evaluates a trained run: ``python -m visual_instruction.evaluate scale=smoke method=moslora seed=1``.

Takes the arguments that the run was trained with, and ``evaluation.*``. Questions are asked in the words of
VLMEvalKit's wrapper of XTuner's models, answers are generated greedily and scored by VLMEvalKit's rules for evaluation
without a judge. The evaluation is named ``exact``, or ``exact-validation`` on the validation files
(``evaluation.split=validation``), so that the two never meet in a table column.

Benchmarks that only a judge can score (MM-Vet, MathVista) are answered and handed over: their responses are written
to ``responses/<evaluation>/<benchmark>.tsv`` of the run, in the layout of VLMEvalKit's prediction files. Their scores
come back through ``visual_instruction.import_results``.

``method=base`` evaluates the untrained model. A stopped evaluation goes on where it stopped.
"""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from moslora_core import launch
from moslora_core.errors import UserError
from moslora_core.evaluations import (
    STAGE,
    Scoring,
    check_positive,
    choose_tasks,
    fingerprint,
    in_chunks,
    is_base,
    is_done,
    trained_adapter,
)
from moslora_core.record import Evaluation, Prediction, RunRecord, TaskResult, write_atomic

from .benchmarks.registry import BENCHMARKS, FREE_FORM_TOKENS, JUDGED
from .benchmarks.scoring import answer, gold, task_result
from .benchmarks.tsv import Item, digest, first_questions, read_tsv
from .config import CONF_MODULE, EXPERIMENT, NOT_IN_LABEL, Config, locate
from .data import PREPARE
from .generation import Responder
from .models import load_adapted, load_processor, template_of

logger = logging.getLogger(__name__)

SPLITS = ("benchmarks", "validation")


# --------------------------------------------------------------------------------------------------------------- plan


def evaluation_name(config: Config) -> str:
    """Name of the evaluation in the run record; what may share a column of a table."""
    return "exact" if config.evaluation.split == "benchmarks" else f"exact-{config.evaluation.split}"


def check(config: Config) -> list[str]:
    """Checks ``config.evaluation`` and returns the benchmarks to evaluate, in the order of the paper's table.

    Raises:
        UserError: a value that is out of range or unknown.
    """
    evaluation = config.evaluation
    if evaluation.split not in SPLITS:
        raise UserError(f"evaluation.split must be one of {', '.join(SPLITS)}, found {evaluation.split!r}")
    check_positive(
        {
            "evaluation.batch_size": evaluation.batch_size,
            "evaluation.chunk": evaluation.chunk,
            "evaluation.limit": evaluation.limit,
            "evaluation.max_new_tokens": evaluation.max_new_tokens,
        }
    )
    if unknown := [name for name in config.data.benchmarks if name not in BENCHMARKS]:
        raise UserError(f"data.benchmarks: unknown benchmark {unknown[0]!r}; expected some of {', '.join(BENCHMARKS)}")
    known = [name for name in BENCHMARKS if name in config.data.benchmarks]
    return choose_tasks(known, evaluation.benchmarks, "evaluation.benchmarks", "data.benchmarks", "benchmark")


def settings(config: Config) -> dict[str, Any]:
    """What the numbers of an evaluation depend on, beside the adapter and the items."""
    evaluation, model = config.evaluation, config.model
    return {
        "split": evaluation.split,
        "limit": evaluation.limit,
        "batch_size": evaluation.batch_size,
        "max_new_tokens": evaluation.max_new_tokens,
        "base": model.name,
        "model": model.path or [model.llm, model.llm_gguf_file, model.vision, model.projector],
        "revision": model.revision,
        "dtype": model.dtype,
        "quantization": model.quantization,
        "template": model.template,
        "square_padding": config.data.square_padding,
        "transformers": metadata.version("transformers"),
        "peft": metadata.version("peft"),
    }


def tsv_path(config: Config, name: str) -> Path:
    return Path(config.data.dir) / config.evaluation.split / f"{name}.tsv"


def read_items(config: Config, name: str) -> list[Item]:
    """The items of a benchmark that are to be answered.

    Raises:
        UserError: it is not prepared, or its file is faulty.
    """
    path = tsv_path(config, name)
    if not path.is_file():
        raise UserError(
            f"no benchmark file {path}; run python -m {PREPARE} with the same scale and data settings first"
        )
    return first_questions(read_tsv(path, BENCHMARKS[name]), config.evaluation.limit)


# -------------------------------------------------------------------------------------------------------------- score


def _prediction(evaluation: str, name: str, item: Item, response: str) -> Prediction:
    found = answer(item, response)
    return Prediction(evaluation, name, item.id, gold(item), found.prediction, found.correct, response)


def scoring(config: Config, items: Mapping[str, Sequence[Item]], adapter: Path | None) -> Scoring:
    """How the benchmarks are answered by the model with ``adapter`` on it.

    Args:
        items: by benchmark.

    Raises:
        UserError: of its ``load`` and ``answer``, an adapter that does not load, an image that cannot be read.
    """
    name = evaluation_name(config)

    def load() -> Responder:
        processor = load_processor(config.model)  # first: it is small, and checks the template
        template = template_of(config.model)
        return Responder(load_adapted(config.model, adapter), processor, template, config.data.square_padding)

    def respond(model: Responder, task: str, indices: list[int]) -> list[Prediction]:
        limit = config.evaluation.max_new_tokens
        if BENCHMARKS[task].kind == JUDGED:
            limit = max(limit, FREE_FORM_TOKENS)
        asked = [items[task][index] for index in indices]
        responses = model.respond(asked, config.evaluation.batch_size, limit)
        return [_prediction(name, task, item, said) for item, said in zip(asked, responses, strict=True)]

    def result(task: str, predictions: Sequence[Prediction]) -> TaskResult:
        answers = [answer(item, said.response) for item, said in zip(items[task], predictions, strict=True)]
        return task_result(BENCHMARKS[task], items[task], answers)

    return Scoring(
        name=name,
        settings=settings(config),
        digests={task: digest(tsv_path(config, task), found) for task, found in items.items()},
        sizes={task: len(found) for task, found in items.items()},
        load=load,
        answer=respond,
        result=result,
    )


def evaluate(
    config: Config, record: RunRecord, items: Mapping[str, Sequence[Item]]
) -> tuple[Evaluation, list[Prediction]]:
    """Answers the benchmarks, chunk by chunk into the record's partial file, and scores those that need no judge.

    Args:
        items: by benchmark.

    Raises:
        UserError: an image that cannot be read, an adapter that does not load.
    """
    adapter = trained_adapter(record, config, EXPERIMENT)
    asked = scoring(config, items, adapter)
    by_task = in_chunks(
        record.partial_predictions_path(asked.name),
        fingerprint(adapter, asked.settings, asked.digests),
        asked.sizes,
        config.evaluation.chunk,
        asked.load,
        asked.answer,
    )
    results: dict[str, TaskResult] = {}
    scored: list[Prediction] = []
    seconds = 0.0
    for task, found, spent in by_task:
        seconds += spent
        if BENCHMARKS[task].kind == JUDGED:
            path = responses_path(record, asked.name, task)
            write_responses(path, items[task], [prediction.response for prediction in found])
            logger.info("%s: not scored here; %d responses for a judge in %s", task, len(found), path)
            continue
        results[task] = asked.result(task, found)
        _log(task, results[task])
        scored += found
    return Evaluation(asked.name, results, round(seconds, 3), asked.settings), scored


def _log(task: str, result: TaskResult) -> None:
    unparsed = "" if result.unparsed is None else f", {result.unparsed:.1%} without an answer"
    logger.info("%s: %s %.1f%% of %d%s", task, result.metric, 100 * result.value, result.n, unparsed)


# --------------------------------------------------------------------------------------------------------- handed over


def responses_path(record: RunRecord, evaluation: str, name: str) -> Path:
    """Where the responses to a benchmark that is judged elsewhere are written."""
    return record.path / "responses" / evaluation / f"{name}.tsv"


def write_responses(path: Path, items: Sequence[Item], responses: Sequence[str]) -> None:
    """Writes VLMEvalKit's prediction file: the columns of the benchmark without the images, and ``prediction``.

    As ``<model>_<data set>.tsv`` in VLMEvalKit's folder of results (with ``PRED_FORMAT=tsv``) it is judged there.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, [*items[0].columns, "prediction"], delimiter="\t", lineterminator="\n")
    writer.writeheader()
    for item, response in zip(items, responses, strict=True):
        writer.writerow(item.columns | {"prediction": response})
    write_atomic(path, text.getvalue())


# ------------------------------------------------------------------------------------------------------------ command


def main(config: Config) -> None:
    names = check(config)
    name = evaluation_name(config)
    record = locate(config)
    if config.dry_run:
        logger.info("would evaluate %s on %s: %s", record.path, ", ".join(names), settings(config))
        return
    if is_done(record, name, config.on_finished):
        return
    trained_adapter(record, config, EXPERIMENT)
    template_of(config.model)
    items = {task: read_items(config, task) for task in names}
    with record.stage(STAGE):
        if is_base(config) and not record.config_path.exists():
            write_atomic(record.config_path, launch.dump(config))
        evaluation, predictions = evaluate(config, record, items)
        if evaluation.tasks:
            record.add_evaluation(name, evaluation, predictions)
    if evaluation.tasks:
        logger.info(
            "%s: mean %.1f%% over %d benchmarks: %s", name, 100 * evaluation.mean, len(evaluation.tasks), record.path
        )


if __name__ == "__main__":
    launch.run(main, Config, CONF_MODULE, not_in_label=NOT_IN_LABEL)

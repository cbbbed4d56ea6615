"""Evaluates a trained run: ``python -m commonsense_reasoning.evaluate scale=smoke method=moslora seed=1``.

Takes the arguments that the run was trained with, and ``evaluation.*``. Scoring goes through lm-eval with this
package's task files (``lm_eval_tasks``). Each mode under each protocol is an evaluation of its own name, so that no
two of them meet in a table column:

    generate-paper, generate-corrected              free generation, the published answer extraction
    loglikelihood-paper, loglikelihood-corrected    the likeliest of the offered labels
    harness                                         lm-eval's own versions of the benchmarks (needs the hub)

The first two have ``-validation`` at the end on the validation files (``evaluation.split=validation``).
``method=base`` evaluates the untrained model. A stopped evaluation goes on where it stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
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
    digest,
    fingerprint,
    in_chunks,
    is_base,
    is_done,
    share_stderr,
    trained_adapter,
)
from moslora_core.record import Evaluation, Prediction, RunRecord, TaskResult, write_atomic

from .config import CONF_MODULE, EXPERIMENT, NOT_IN_LABEL, Config, locate
from .extraction import first_answer, last_answer
from .lm_eval_tasks.functions import read_items
from .models import load_adapted, load_tokenizer
from .tasks import TASKS

logger = logging.getLogger(__name__)

MODES = ("generate", "loglikelihood", "harness")
SPLITS = ("test", "validation")
PROTOCOLS = ("paper", "corrected")


# --------------------------------------------------------------------------------------------------------------- plan


def evaluation_name(config: Config) -> str:
    """Name of the evaluation in the run record; what may share a column of a table."""
    mode, split = config.evaluation.mode, config.evaluation.split
    if mode == "harness":
        return mode
    return f"{mode}-{config.protocol.name}" + ("" if split == "test" else f"-{split}")


def check(config: Config) -> list[str]:
    """Checks ``config.evaluation`` and returns the tasks to evaluate, in the order of the paper's table.

    Raises:
        UserError: a value that is out of range or unknown.
    """
    evaluation = config.evaluation
    if evaluation.mode not in MODES:
        raise UserError(f"evaluation.mode must be one of {', '.join(MODES)}, found {evaluation.mode!r}")
    if evaluation.split not in SPLITS:
        raise UserError(f"evaluation.split must be one of {', '.join(SPLITS)}, found {evaluation.split!r}")
    if evaluation.mode == "harness" and evaluation.split != "test":
        raise UserError("evaluation.mode=harness reads lm-eval's own data; evaluation.split=validation has none there")
    if config.protocol.name not in PROTOCOLS:
        raise UserError(f"protocol.name must be one of {', '.join(PROTOCOLS)}, found {config.protocol.name!r}")
    check_positive(
        {
            "evaluation.batch_size": evaluation.batch_size,
            "evaluation.chunk": evaluation.chunk,
            "evaluation.limit": evaluation.limit,
            "protocol.num_beams": config.protocol.num_beams,
            "protocol.max_new_tokens": config.protocol.max_new_tokens,
        }
    )
    known = [name for name in TASKS if name in config.data.tasks]
    return choose_tasks(known, evaluation.tasks, "evaluation.tasks", "data.tasks")


def settings(config: Config) -> dict[str, Any]:
    """What the numbers of an evaluation depend on, beside the adapter and the items."""
    evaluation, model = config.evaluation, config.model
    found: dict[str, Any] = {
        "mode": evaluation.mode,
        "protocol": config.protocol.name,
        "split": evaluation.split,
        "limit": evaluation.limit,
        "batch_size": evaluation.batch_size,
        "model": model.path,
        "revision": model.revision,
        "dtype": model.dtype,
        "quantization": model.quantization,
        "lm_eval": metadata.version("lm_eval"),
    }
    if evaluation.mode == "generate":
        found |= {"num_beams": config.protocol.num_beams, "max_new_tokens": config.protocol.max_new_tokens}
    return found


# -------------------------------------------------------------------------------------------------------------- score


def _predictions(evaluation: str, name: str, samples: Sequence[dict[str, Any]]) -> list[Prediction]:
    """lm-eval's samples as rows of the run record."""
    found = []
    for sample in samples:
        doc, response = sample["doc"], None
        if evaluation.startswith("generate"):
            response = sample["resps"][0][0]
            answer = first_answer(name, response)
        else:
            scores = [score for score, _ in sample["filtered_resps"]]
            best = scores.index(max(scores))
            answer = str(best) if evaluation == "harness" else doc["choices"][best]
        item = f"{name}/{sample['doc_id']}" if evaluation == "harness" else doc["id"]
        gold, correct = str(sample["target"]), bool(sample["acc"])
        found.append(Prediction(evaluation, name, item, gold, answer, correct, response))
    return found


def task_result(predictions: Sequence[Prediction]) -> TaskResult:
    """Accuracy, its standard error (of a mean, with n - 1, as lm-eval's), and the share without an answer."""
    n = len(predictions)
    accuracy = sum(p.correct for p in predictions) / n
    generated = predictions[0].response is not None
    return TaskResult(
        metric="accuracy",
        value=accuracy,
        n=n,
        stderr=share_stderr(accuracy, n),
        unparsed=sum(p.prediction is None for p in predictions) / n if generated else None,
        lenient=lenient_accuracy(predictions) if generated else None,
    )


def lenient_accuracy(predictions: Sequence[Prediction]) -> float:
    """Accuracy if the last label in any case counts: how much of a score is the extraction rule's doing."""
    return sum(last_answer(p.task, p.response) == p.gold for p in predictions) / len(predictions)


def _load_tasks(config: Config, names: Sequence[str]) -> dict[str, Any]:
    """lm-eval's tasks by our names, with the generation settings of the configuration."""
    # lm-eval takes seconds to import: not before everything cheap has been checked.
    from .lm_eval_tasks import harness

    mode = config.evaluation.mode
    if mode == "harness":
        return harness.load_harness_tasks(names)
    tasks = harness.load_tasks(mode, config.protocol.name, names, config.data.dir, config.evaluation.split)
    if mode == "generate":
        generation = {"num_beams": config.protocol.num_beams, "max_gen_toks": config.protocol.max_new_tokens}
        for task in tasks.values():
            task.set_config("generation_kwargs", generation, update=True)
    return tasks


def scoring(config: Config, names: Sequence[str], adapter: Path | None) -> Scoring:
    """How the tasks ``names`` are answered by the model with ``adapter`` on it.

    Raises:
        UserError: unprepared data; of its ``load``, an adapter that does not load.
    """
    from .lm_eval_tasks import harness

    name = evaluation_name(config)
    tasks = _load_tasks(config, names)
    # Read once: some of lm-eval's own tasks process their documents anew at every access.
    docs = {task: list(found.eval_docs)[: config.evaluation.limit] for task, found in tasks.items()}

    def load() -> harness.CausalLM:
        loaded = load_adapted(config.model, adapter)
        return harness.wrap(loaded, load_tokenizer(config.model), config.evaluation.batch_size)

    def answer(model: harness.CausalLM, task: str, indices: list[int]) -> list[Prediction]:
        return _predictions(name, task, harness.run_items(model, tasks[task], indices))

    return Scoring(
        name=name,
        settings=settings(config) | {"task_versions": {task: found.VERSION for task, found in tasks.items()}},
        digests={task: digest(rows) for task, rows in docs.items()},
        sizes={task: len(docs[task]) for task in names},
        load=load,
        answer=answer,
        result=lambda task, predictions: task_result(predictions),
    )


def evaluate(config: Config, record: RunRecord, names: Sequence[str]) -> tuple[Evaluation, list[Prediction]]:
    """Scores the tasks ``names``, chunk by chunk into the record's partial file.

    Raises:
        UserError: unprepared data, an adapter that does not load.
    """
    adapter = trained_adapter(record, config, EXPERIMENT)
    asked = scoring(config, names, adapter)
    results: dict[str, TaskResult] = {}
    predictions: list[Prediction] = []
    seconds = 0.0
    for task, found, spent in in_chunks(
        record.partial_predictions_path(asked.name),
        fingerprint(adapter, asked.settings, asked.digests),
        asked.sizes,
        config.evaluation.chunk,
        asked.load,
        asked.answer,
    ):
        results[task] = asked.result(task, found)
        _log(task, results[task])
        predictions += found
        seconds += spent
    return Evaluation(asked.name, results, round(seconds, 3), asked.settings), predictions


def _log(task: str, result: TaskResult) -> None:
    unparsed = "" if result.unparsed is None else f", {result.unparsed:.1%} without an answer"
    logger.info("%s: accuracy %.1f%% of %d%s", task, 100 * result.value, result.n, unparsed)


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
    if config.evaluation.mode != "harness":
        for task in names:
            read_items(config.data.dir, task, config.evaluation.split)
    with record.stage(STAGE):
        if is_base(config) and not record.config_path.exists():
            write_atomic(record.config_path, launch.dump(config))
        evaluation, predictions = evaluate(config, record, names)
        record.add_evaluation(name, evaluation, predictions)
    logger.info("%s: mean accuracy %.1f%% over %d tasks: %s", name, 100 * evaluation.mean, len(names), record.path)


if __name__ == "__main__":
    launch.run(main, Config, CONF_MODULE, not_in_label=NOT_IN_LABEL)

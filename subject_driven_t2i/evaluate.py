"""Scores a run's images: ``python -m subject_driven_t2i.evaluate scale=smoke method=moslora data.subject=toy seed=1``.

Takes the arguments that the run was trained and its images drawn with, and ``evaluation.*``. Two evaluations:

    oracle      what the smoke world's exact oracle reads off an image against what it was to show: the subject's shape
                and colours (subject fidelity), the background that the prompt asks for (prompt fidelity)
    dreambooth  DINO, CLIP-I and CLIP-T (:mod:`subject_driven_t2i.metrics`)

A number is the mean over the prompts of the means over their images; subjects are averaged by the analysis, as a run
has one. ``breakdown.real_images`` of a task is what the subject's real images score themselves: what a method would
reach that draws them. The scores of every image are in ``scores.jsonl``, the oracle's answers in ``predictions.jsonl``
too, so that runs can be paired image by image.

``method=base`` scores images of the untrained model. A stopped evaluation goes on where it stopped.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import Tensor

from moslora_core import launch
from moslora_core.drawn_images import (
    DrawnImage,
    drawing_settings,
    read_drawn,
    verified,
    write_references,
    write_scores,
)
from moslora_core.errors import UserError
from moslora_core.evaluations import (
    STAGE,
    check_positive,
    choose_tasks,
    digest,
    fingerprint,
    in_chunks,
    is_base,
    is_done,
    share_stderr,
)
from moslora_core.prepared import sha256
from moslora_core.record import SIMILARITY, Evaluation, Prediction, RunRecord, TaskResult, write_atomic

from . import metrics, smoke_world
from .config import CONF_MODULE, EXPERIMENT, NOT_IN_LABEL, Config, EncoderConfig, locate
from .subjects import Subject, open_image, subject_of

logger = logging.getLogger(__name__)

EVALUATIONS = ("oracle", "dreambooth")
REAL = "real_images"  # part of a task: the subject's real images under the same metric
# Task -> what it is of a smoke_world.Reading.
ORACLE_TASKS = {
    "subject_shape": "shape",
    "subject_colour": "foreground",
    "subject_core": "core",
    "background": "background",
}
DREAMBOOTH_TASKS = {
    "dino": f"{SIMILARITY} to the real images, DINO",
    "clip_i": f"{SIMILARITY} to the real images, CLIP",
    "clip_t": f"{SIMILARITY} to the prompt, CLIP",
}


# --------------------------------------------------------------------------------------------------------------- plan


def check(config: Config) -> list[str]:
    """Checks ``config.evaluation`` and returns the evaluations to make.

    Raises:
        UserError: a value that is out of range or unknown.
    """
    evaluation = config.evaluation
    check_positive(
        {
            "evaluation.batch_size": evaluation.batch_size,
            "evaluation.chunk": evaluation.chunk,
            "evaluation.dino.crop": evaluation.dino.crop,
            "evaluation.clip.crop": evaluation.clip.crop,
        }
    )
    return choose_tasks(EVALUATIONS, evaluation.evaluations, "evaluation.evaluations", "this experiment", "evaluation")


def settings(config: Config, name: str, record: RunRecord) -> dict[str, Any]:
    """What the numbers of an evaluation depend on, how the images were drawn among it."""
    evaluation = config.evaluation
    used = {"subject": config.data.subject, "base": config.model.name, "drawing": drawing_settings(record)}
    if name == "dreambooth":
        used |= {"dino": _encoder(evaluation.dino), "clip": _encoder(evaluation.clip), "texts": "without the token"}
        used |= {"batch_size": evaluation.batch_size, "transformers": metadata.version("transformers")}
    return used


def _encoder(config: EncoderConfig) -> list[Any]:
    return [config.path, config.revision, config.resize, config.crop]


# ------------------------------------------------------------------------------------------------------------- images


def read_images(record: RunRecord, subject: Subject, config: Config) -> list[DrawnImage]:
    """The images to score: those that the configuration asks generate for, each as it was drawn.

    Raises:
        UserError: images that are missing, too many, of other prompts or changed since; says what to run.
    """
    command = f"python -m {EXPERIMENT}.generate with the same arguments"
    drawn = read_drawn(record)
    if not drawn:
        raise UserError(f"no images in {record.path}; run {command} first")
    if drawing_settings(record) is None:
        raise UserError(f"{record.path}: its images are not finished; run {command} first")
    asked = range(len(subject.prompts)) if config.generation.prompts is None else config.generation.prompts
    wanted = {(prompt, index) for prompt in asked for index in range(config.generation.images_per_prompt)}
    found = {image.key for image in drawn}
    if missing := sorted(wanted - found):
        prompt, index = missing[0]
        raise UserError(
            f"{record.path}: {len(missing)} of {len(wanted)} images are missing, number {index} of prompt {prompt} "
            f"first; run {command}"
        )
    if more := sorted(found - wanted):
        prompt, index = more[0]
        raise UserError(
            f"{record.path} has {len(more)} images that generation.prompts and generation.images_per_prompt do not "
            f"ask for, number {index} of prompt {prompt} first; name the settings that they were drawn with"
        )
    for image in drawn:
        expected = subject.prompts[image.prompt_index].text_without(subject.class_name)
        if image.class_prompt != expected:
            raise UserError(
                f"{record.path / image.file} was drawn for {image.class_prompt!r}, but prompt {image.prompt_index} of "
                f"{subject.name} is {expected!r} in {config.data.dir}; run {command} and on_finished=overwrite"
            )
        try:
            verified(record, image)
        except UserError as error:
            raise UserError(f"{error}; run {command} and on_finished=overwrite") from None
    return drawn


def _by_prompt(drawn: Sequence[DrawnImage], scores: Sequence[float]) -> dict[int, list[float]]:
    found = defaultdict(list)
    for image, score in zip(drawn, scores, strict=True):
        found[image.prompt_index].append(score)
    return dict(found)


# ------------------------------------------------------------------------------------------------------------- oracle


def evaluate_oracle(
    config: Config, record: RunRecord, subject: Subject, drawn: Sequence[DrawnImage]
) -> tuple[Evaluation, list[Prediction], list[dict[str, Any]]]:
    """Reads every image with the smoke world's oracle; takes moments, so nothing is kept of a stopped one.

    Returns:
        The evaluation, a prediction for each image and attribute that it was to show, and the scores by image.

    Raises:
        UserError: a subject or an image that is not of the smoke world.
    """
    predictions, rows = [], []
    for image in drawn:
        wanted = smoke_world.expected(subject.name, subject.prompts[image.prompt_index].template)
        reading = _read(record.path / image.file)
        hits = smoke_world.hits(reading, wanted)
        row = {"prompt_index": image.prompt_index, "index": image.index}
        for task, attribute in ORACLE_TASKS.items():
            if attribute not in hits:
                continue
            identity = f"{subject.name}/{image.prompt_index:03d}-{image.index:02d}"
            gold, answer = getattr(wanted, attribute), getattr(reading, attribute)
            predictions.append(Prediction("oracle", task, identity, gold, answer, hits[attribute]))
            row[task] = int(hits[attribute])
        rows.append(row)
    real = [smoke_world.hits(_read(path), smoke_world.expected(subject.name, "")) for path in subject.images]
    tasks = {}
    for task, attribute in ORACLE_TASKS.items():
        right = [prediction.correct for prediction in predictions if prediction.task == task]
        if right:
            tasks[task] = _accuracy(right)
            of_real = [hits[attribute] for hits in real if attribute in hits]
            tasks[task].breakdown = {REAL: _accuracy(of_real)} if of_real else None
    return Evaluation("oracle", tasks, 0.0, settings(config, "oracle", record)), predictions, rows


def _read(path: Path) -> smoke_world.Reading:
    try:
        return smoke_world.read(open_image(path))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _accuracy(right: Sequence[bool]) -> TaskResult:
    share = sum(right) / len(right)
    return TaskResult("accuracy", share, len(right), share_stderr(share, len(right)))


# --------------------------------------------------------------------------------------------------------- dreambooth


@dataclass
class Scores:
    """Similarities of one image; a real one has no prompt."""

    dino: float
    clip_i: float
    clip_t: float | None = None


@dataclass(frozen=True)
class _Models:
    """Both encoders, and what they make of the real images: (real images, width)."""

    dino: metrics.Encoder
    clip: metrics.Encoder
    real_dino: Tensor
    real_clip: Tensor


def evaluate_dreambooth(
    config: Config, record: RunRecord, subject: Subject, drawn: Sequence[DrawnImage]
) -> tuple[Evaluation, list[Prediction], list[dict[str, Any]]]:
    """Compares the images with the real ones and their prompts, chunk by chunk into the record's partial file.

    Returns:
        The evaluation, no predictions (a similarity is neither right nor wrong), and the scores by image.

    Raises:
        UserError: an encoder that cannot be loaded.
    """
    used = settings(config, "dreambooth", record)
    batch = config.evaluation.batch_size

    def load() -> _Models:
        dino, clip = metrics.load_dino(config.evaluation.dino), metrics.load_clip(config.evaluation.clip)
        real = [open_image(path) for path in subject.images]
        return _Models(dino, clip, *(metrics.embed_images(encoder, real, batch) for encoder in (dino, clip)))

    def score(models: _Models, task: str, indices: list[int]) -> list[Scores]:
        if task == REAL:
            dino, clip_i = metrics.to_others(models.real_dino), metrics.to_others(models.real_clip)
            return [Scores(dino[index], clip_i[index]) for index in indices]
        images = [open_image(record.path / drawn[index].file) for index in indices]
        clip = metrics.embed_images(models.clip, images, batch)
        prompts = metrics.embed_texts(models.clip, [drawn[index].class_prompt for index in indices])
        dino = metrics.to_real(metrics.embed_images(models.dino, images, batch), models.real_dino)
        columns = (dino, metrics.to_real(clip, models.real_clip), metrics.to_prompts(clip, prompts))
        return [Scores(*values) for values in zip(*columns, strict=True)]

    sizes = {"drawn": len(drawn)} | ({REAL: len(subject.images)} if len(subject.images) > 1 else {})
    digests = {
        "drawn": digest([[image.key, image.class_prompt, image.sha256] for image in drawn]),
        REAL: digest([sha256(path) for path in subject.images]),
    }
    partial = record.partial_predictions_path("dreambooth")
    found, seconds = {}, 0.0
    for task, scores, spent in in_chunks(
        partial, fingerprint(None, used, digests), sizes, config.evaluation.chunk, load, score, Scores
    ):
        found[task] = scores
        seconds += spent
    tasks = {}
    for task, metric in DREAMBOOTH_TASKS.items():
        value, stderr = metrics.over_prompts(_by_prompt(drawn, [getattr(entry, task) for entry in found["drawn"]]))
        real = [of_image for entry in found.get(REAL, ()) if (of_image := getattr(entry, task)) is not None]
        part = {REAL: TaskResult(metric, sum(real) / len(real), len(real))} if real else None
        tasks[task] = TaskResult(metric, value, len(drawn), stderr, breakdown=part)
    rows = [
        {"prompt_index": image.prompt_index, "index": image.index}
        | {task: getattr(scores, task) for task in DREAMBOOTH_TASKS}
        for image, scores in zip(drawn, found["drawn"], strict=True)
    ]
    return Evaluation("dreambooth", tasks, round(seconds, 3), used), [], rows


# ------------------------------------------------------------------------------------------------------------ command

Evaluate = Callable[
    [Config, RunRecord, Subject, Sequence[DrawnImage]], tuple[Evaluation, list[Prediction], list[dict[str, Any]]]
]
_EVALUATE: dict[str, Evaluate] = {"oracle": evaluate_oracle, "dreambooth": evaluate_dreambooth}


def main(config: Config) -> None:
    names = check(config)
    record = locate(config)
    if config.dry_run:
        for name in names:
            logger.info("would evaluate %s, %s: %s", record.path, name, settings(config, name, record))
        return
    pending = [name for name in names if not is_done(record, name, config.on_finished)]
    if not pending:
        return
    subject = subject_of(config.data)
    drawn = read_images(record, subject, config)
    with record.stage(STAGE):
        if is_base(config) and not record.config_path.exists():
            write_atomic(record.config_path, launch.dump(config))
        write_references(record, subject.images)
        for name in pending:
            evaluation, predictions, rows = _EVALUATE[name](config, record, subject, drawn)
            write_scores(record, name, rows)  # first: results that name an evaluation always have its scores
            record.add_evaluation(name, evaluation, predictions)
            values = ", ".join(f"{task} {result.value:.3f}" for task, result in evaluation.tasks.items())
            logger.info("%s of %d images: %s: %s", name, len(drawn), values, record.path)


if __name__ == "__main__":
    launch.run(main, Config, CONF_MODULE, not_in_label=NOT_IN_LABEL)

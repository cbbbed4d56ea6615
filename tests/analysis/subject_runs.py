"""Run records of subject-driven generation, written through the record's own writer, with chosen numbers."""

from __future__ import annotations

from collections.abc import Mapping

from moslora_core.record import Evaluation, Results, RunRecord, TaskResult, Training, write_json

from .conftest import COMMIT

METRICS = {
    "dino": "cosine similarity to the real images, DINO",
    "clip_i": "cosine similarity to the real images, CLIP",
    "clip_t": "cosine similarity to the prompt, CLIP",
}
ORACLE = ("subject_shape", "subject_colour", "subject_core", "background")
MODELS = {"dino": ["facebook/dino-vits16", None, 256, 224], "clip": ["openai/clip-vit-base-patch32", None, 224, 224]}


def add(
    root,
    method: str,
    subject: str | None,
    values: Mapping[str, float],
    seed: int = 1,
    overrides: str = "",
    *,
    protocol: str = "dreambooth",
    real: Mapping[str, float] | None = None,
    scale: str = "smoke",
    images: int = 8,
    settings: Mapping[str, object] | None = None,
    label: str | None = None,
    seconds: float = 10.0,
    parameters: int = 1000,
    memory: int = 2**30,
) -> RunRecord:
    """One finished run of a subject; ``real`` maps tasks to what the real images score."""
    label = (
        ",".join(sorted(filter(None, [f"data.subject={subject}", *overrides.split(",")]))) if label is None else label
    )
    record = RunRecord.locate(root, "subject_driven_t2i", scale, method, label, seed)
    tasks = {}
    for task, value in values.items():
        metric = METRICS.get(task, "accuracy")
        breakdown = {"real_images": TaskResult(metric, real[task], 5)} if task in (real or {}) else None
        tasks[task] = TaskResult(metric, value, images, stderr=0.01, breakdown=breakdown)
    used = {"base": "tiny", "drawing": {"steps": 25, "subject": subject}} | (
        MODELS if protocol == "dreambooth" else {}
    )
    used |= {} if subject is None else {"subject": subject}
    used |= settings or {}
    training = None if method == "base" else Training(seconds, 50, memory, "rss", parameters, 10**6, final_loss=1.0)
    results = record.results()
    record.write_results(Results(training, {**results.evaluations, protocol: Evaluation(protocol, tasks, 3.0, used)}))
    write_json(record.path / "environment.json", {"train": {"git_commit": COMMIT}})
    record.set_status("finished", "evaluate")
    return record

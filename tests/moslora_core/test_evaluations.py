"""Stopped evaluations: what is kept of them, and that damage to it, or to the adapter, is never evaluated."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from moslora_core.base_models import adapter_sha256
from moslora_core.errors import UserError
from moslora_core.evaluations import in_chunks, trained_adapter
from moslora_core.record import Prediction, RunRecord, Training

SIZES = {"boolq": 5, "piqa": 2}
CONFIG = SimpleNamespace(
    method=SimpleNamespace(name="lora", tuner="lora"), scale=SimpleNamespace(name="smoke"), seed=0, run_name="default"
)


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x01
    path.write_bytes(content)


# ------------------------------------------------------------------------------------------------------------- chunks


def evaluate(partial: Path, stop_after: int | None = None, fingerprint: str = "f") -> tuple[dict, list]:
    """Answers of all items by task, and the chunks that were answered this time; stops when so many are."""
    answered: list[tuple[str, list[int]]] = []

    def answer(model: None, task: str, indices: list[int]) -> list[Prediction]:
        if len(answered) == stop_after:
            raise KeyboardInterrupt
        answered.append((task, indices))
        return [Prediction("e", task, f"{task}/{i}", "7", str(i), False, "né") for i in indices]

    try:
        found = {t: items for t, items, _ in in_chunks(partial, fingerprint, SIZES, 2, lambda: None, answer)}
    except KeyboardInterrupt:
        found = {}
    return found, answered


def test_a_stopped_evaluation_goes_on_after_its_last_chunk(tmp_path):
    expected, chunks = evaluate(tmp_path / "whole")
    assert evaluate(tmp_path / "partial", stop_after=2)[1] == chunks[:2]
    assert evaluate(tmp_path / "partial") == (expected, chunks[2:])
    assert evaluate(tmp_path / "partial") == (expected, [])
    assert evaluate(tmp_path / "partial", fingerprint="g") == (expected, chunks)


@pytest.mark.parametrize(
    ("line", "key", "again"), [(2, b'"prediction": "', slice(1, 2)), (0, b'"fingerprint": "', slice(0, 4))]
)
def test_a_flipped_bit_in_a_line_that_stays_json_is_noticed(tmp_path, caplog, line, key, again):
    expected, chunks = evaluate(tmp_path / "whole")
    path = tmp_path / "partial"
    evaluate(path)
    lines = path.read_bytes().splitlines(keepends=True)
    flip(path, sum(map(len, lines[:line])) + lines[line].index(key) + len(key))
    assert json.loads(path.read_bytes().splitlines()[line]), "still JSON"
    with caplog.at_level(logging.WARNING):
        assert evaluate(path) == (expected, chunks[again])
    assert f"{path}: a damaged line is left out" in caplog.text


# ------------------------------------------------------------------------------------------------------------ adapter


@pytest.fixture
def trained(tmp_path) -> RunRecord:
    record = RunRecord(tmp_path / "run")
    record.adapter_path.mkdir(parents=True)
    (record.adapter_path / "adapter_config.json").write_text('{"r": 8}')
    (record.adapter_path / "adapter_model.safetensors").write_bytes(bytes(range(256)))
    record.set_training(Training(1.0, 1, 1, "rss", 1, 2, adapter_sha256=adapter_sha256(record.adapter_path)))
    return record


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_that_changed_since_its_training_is_named(trained, name):
    assert trained_adapter(trained, CONFIG, "commonsense_reasoning") == trained.adapter_path
    flip(trained.adapter_path / name, 6)
    with pytest.raises(UserError) as caught:
        trained_adapter(trained, CONFIG, "commonsense_reasoning")
    assert str(caught.value) == (
        f"{trained.adapter_path / name} is damaged: its sha256 is not the one in results.json; train the run again"
    )


def test_an_adapter_of_a_record_without_digests_is_used(trained):
    results = json.loads((trained.path / "results.json").read_text())
    del results["training"]["adapter_sha256"]
    (trained.path / "results.json").write_text(json.dumps(results))
    flip(trained.adapter_path / "adapter_config.json", 6)
    assert trained_adapter(trained, CONFIG, "commonsense_reasoning") == trained.adapter_path

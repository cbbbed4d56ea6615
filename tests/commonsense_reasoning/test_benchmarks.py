"""The benchmark's published way answers as the evaluation does, and does its writing."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("evaluation")


def test_the_published_way_and_ours_give_the_same_answers(
    benchmark, items, data_dir, fluent_llama_dir, tmp_path, monkeypatch
):
    chosen = {task: items[task] for task in ("boolq", "winogrande")}
    written = []
    write = Path.write_text
    monkeypatch.setattr(Path, "write_text", lambda path, text: written.append((path.stem, text)) or write(path, text))
    model = AutoModelForCausalLM.from_pretrained(fluent_llama_dir).eval()
    published = benchmark.published(model, AutoTokenizer.from_pretrained(fluent_llama_dir), chosen, tmp_path)
    monkeypatch.undo()

    overrides = ["method=base", "protocol=paper", f"data.dir={data_dir}", f"model.path={fluent_llama_dir}"]
    config = benchmark.configuration(overrides)
    assert published == benchmark.ours(config, list(chosen), None, tmp_path)()
    assert len(set(published.values())) > 2
    assert [(task, len(json.loads(text))) for task, text in written] == [
        (task, number + 1) for task, rows in chosen.items() for number in range(len(rows))
    ]
    last = json.loads((tmp_path / "boolq.json").read_text())
    assert [row["pred"] for row in last] == [published[row["id"]] for row in chosen["boolq"]]
    assert [row["flag"] for row in last] == [row["pred"] == row["answer"] for row in last]

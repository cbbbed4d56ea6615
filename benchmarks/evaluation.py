"""Items a second of the commonsense evaluation, against the published way: ``python benchmarks/evaluation.py``.

The published way (commonsense_evaluate.py of LLM-Adapters, which the paper's code keeps) is written out here from its
description: one item at a time, beam search of 4 and 32 new tokens, and the whole result file written again after
every item. It runs in evaluation mode here; the published script leaves dropout on, which costs time and answers.

All ways answer the same items after the same prompts (protocol=paper) with one model and adapter, which is trained
first. What they write while they answer is part of their time, loading the model is not. Arguments are overrides of
``commonsense_reasoning``'s configuration: for real items, ``scale=small data.path=...``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import common
import torch
from common import operations, out_argument, ratio, report, run, side_by_side, spread

import commonsense_reasoning.config
from commonsense_reasoning import evaluate
from commonsense_reasoning.config import EXPERIMENT, Config, locate
from commonsense_reasoning.extraction import first_answer
from commonsense_reasoning.lm_eval_tasks.functions import read_items
from commonsense_reasoning.prompts import RESPONSE_MARK, published_evaluate
from moslora_core.arguments import Parser
from moslora_core.errors import UserError
from moslora_core.evaluations import fingerprint, in_chunks

PUBLISHED = "published: beam 4, batch 1"
OURS = {  # way -> overrides, and how many times the published way's items a second it should answer
    "ours: beam 4": ((), 5),
    "ours: greedy": (("protocol.num_beams=1",), 20),
    "ours: label likelihood": (("evaluation.mode=loglikelihood",), 20),
}

Answers = dict[str, str | None]


def published(model: Any, tokenizer: Any, items: dict[str, list[dict]], folder: Path) -> Answers:
    """Answers by id of the item, as the published script finds them; one result file a task in ``folder``."""
    answers: Answers = {}
    for task, rows in items.items():
        results = []
        for item in rows:
            inputs = tokenizer(published_evaluate(item["instruction"]), return_tensors="pt").to(model.device)
            with torch.no_grad():
                output = model.generate(
                    **inputs,
                    num_beams=4,
                    max_new_tokens=32,
                    do_sample=False,
                    return_dict_in_generate=True,
                    output_scores=True,
                )
            new = output.sequences[0, inputs["input_ids"].shape[1] :]
            response = tokenizer.decode(new, skip_special_tokens=True).split(RESPONSE_MARK)[0].strip()
            answer = answers[item["id"]] = first_answer(task, response)
            results.append(item | {"output_pred": response, "pred": answer, "flag": answer == item["answer"]})
            (folder / f"{task}.json").write_text(json.dumps(results, indent=4))
    return answers


def configuration(overrides: Sequence[str]) -> Config:
    return common.configuration(commonsense_reasoning.config, overrides)


def ours(config: Config, tasks: Sequence[str], adapter: Path, folder: Path) -> Callable[[], Answers]:
    """Answers as ``commonsense_reasoning.evaluate`` does, with the model loaded and a partial file in ``folder``."""
    scoring = evaluate.scoring(config, tasks, adapter)
    model = scoring.load()
    partial = folder / "partial.jsonl"

    def answer() -> Answers:
        partial.unlink(missing_ok=True)
        expected = fingerprint(adapter, scoring.settings, scoring.digests)
        chunks = in_chunks(partial, expected, scoring.sizes, config.evaluation.chunk, lambda: model, scoring.answer)
        return {found.id: found.prediction for _, predictions, _ in chunks for found in predictions}

    return answer


def prepared(work: Path, overrides: Sequence[str]) -> list[str]:
    """Prepares data below ``work``, unless that was done before; returns the overrides that name a run there."""
    folders = [f"data.dir={work / 'data'}", f"model.cache_dir={work / 'models'}", f"runs_dir={work / 'runs'}"]
    named = [*overrides, *folders, "run_name=benchmark"]
    if not (work / "data").exists():
        _command("prepare_data", *named)
    return named


def _command(name: str, *arguments: str) -> None:
    if subprocess.run([sys.executable, "-m", f"{EXPERIMENT}.{name}", *arguments], stdout=sys.stderr).returncode:
        raise UserError(f"{EXPERIMENT}.{name} failed")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python benchmarks/evaluation.py", description=__doc__.split(":")[0])
    parser.add_argument("--items", type=int, default=100, help="of each task (default: 100)")
    parser.add_argument("--rounds", type=int, default=3, help="every way answers all items so often (default: 3)")
    parser.add_argument("--work", type=Path, help="folder for data and adapter, kept (default: a temporary one)")
    out_argument(parser, "evaluation")
    parser.add_argument("overrides", nargs="*", help="settings of commonsense_reasoning")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        return _measure(arguments, (arguments.work or Path(temporary)).resolve(), Path(temporary))


def _measure(arguments: Any, work: Path, temporary: Path) -> int:
    named = prepared(work, ["protocol=paper", "method=moslora", *arguments.overrides])
    _command("train", *named, "on_finished=skip")
    named.append(f"evaluation.limit={arguments.items}")
    config = configuration(named)
    tasks, adapter = evaluate.check(config), locate(config).adapter_path
    items = {task: read_items(config.data.dir, task)[: arguments.items] for task in tasks}
    model, tokenizer = evaluate.load_adapted(config.model, adapter), evaluate.load_tokenizer(config.model)

    found: dict[str, Answers] = {}

    def keeping(name: str, way: Callable[[], Answers]) -> Callable[[], None]:
        def run() -> None:
            found[name] = way()

        return run

    ways = {PUBLISHED: keeping(PUBLISHED, lambda: published(model, tokenizer, items, temporary))}
    for name, (overrides, _) in OURS.items():
        way = ours(configuration([*named, *overrides]), tasks, adapter, temporary)
        way()  # the first calls of all pay for what is allocated once
        ways[name] = keeping(name, way)
    taken = side_by_side(ways, arguments.rounds, warm_up=0)
    counted = {name: operations(way) for name, way in ways.items()}

    gold = {item["id"]: item["answer"] for rows in items.values() for item in rows}
    rows, numbers = [], {"items": len(gold), "tasks": tasks, "overrides": arguments.overrides, "ways": {}}
    for name, seconds in taken.items():
        speed = spread(len(gold) / value for value in seconds)
        faster = ratio(taken[PUBLISHED], seconds)
        agreeing = sum(found[name][key] == answer for key, answer in found[PUBLISHED].items())
        right = sum(found[name][key] == answer for key, answer in gold.items())
        aim = OURS[name][1] if name in OURS else None
        rows.append(
            [
                name,
                f"{speed.median:.1f}",
                faster.text(1),
                f"{counted[PUBLISHED] / counted[name]:.1f}",
                f">= {aim}" if aim else "",
                f"{agreeing} of {len(gold)}",
                f"{right / len(gold):.1%}",
            ]
        )
        numbers["ways"][name] = {
            "seconds": seconds,
            "items_a_second": speed,
            "times_the_published": faster,
            "operations": counted[name],
            "aim": aim,
            "agreeing_answers": agreeing,
            "accuracy": right / len(gold),
        }
    headers = ["way", "items a second", "times the published way", "fewer operations", "aim"]
    headers += ["same answers", "accuracy"]
    report("evaluation", headers, rows, numbers, arguments.out)
    return 0


if __name__ == "__main__":
    run(main)

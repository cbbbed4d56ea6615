"""Tokens a second of a commonsense training, against the published way: ``python benchmarks/throughput.py``.

The published script shuffles, pads each micro-batch of 4 to its longest item, and accumulates 4 of them; every token
gets logits. Ours is ``commonsense_reasoning.train`` as it is configured. Both train an adapter of the same base on the
same items with the same loss; steps are drawn evenly from one epoch, and only tokens that are no padding count.

Arguments are overrides of ``commonsense_reasoning``'s configuration: for real items, ``scale=small data.path=...``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from common import out_argument, ratio, report, run, seconds, spread
from evaluation import configuration, prepared
from transformers import DataCollatorForSeq2Seq, Trainer

from commonsense_reasoning import train
from commonsense_reasoning.config import locate
from commonsense_reasoning.models import load_tokenizer
from moslora_core.arguments import Parser

# Way -> overrides. Without grouping the same items meet in a step as in the published way's, given the same seed.
PUBLISHED = "published: shuffled, 4 x 4, all logits"
WAYS = {
    PUBLISHED: ("training.group_by_length=false", "training.per_device_batch_size=4"),
    "ours, shuffled": ("training.group_by_length=false",),
    "ours, grouped by length": ("training.group_by_length=true",),
}
AIM = 1.5


class Way:
    """One way of training: some optimiser steps of its epoch, and how much of the epoch is padding."""

    def __init__(self, name: str, overrides: Sequence[str], steps: int):
        config = configuration([*overrides, *WAYS[name]])
        ready = train.prepare(config, locate(config))
        if name == PUBLISHED:
            tokenizer = load_tokenizer(config.model)
            ready.collator = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8, padding=True)
        loader = Trainer(
            model=ready.model, args=ready.arguments, train_dataset=ready.train_set, data_collator=ready.collator
        ).get_train_dataloader()
        epoch = list(_by(ready.arguments.gradient_accumulation_steps, loader))
        masks = [batch["attention_mask"] for micro_batches in epoch for batch in micro_batches]
        self.padding = 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
        self.steps = [epoch[(2 * number + 1) * len(epoch) // (2 * steps)] for number in range(steps)]
        self.model = ready.model.train()
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=1e-4)

    def tokens(self, number: int) -> int:
        """Tokens of a step that are no padding."""
        return sum(int(batch["attention_mask"].sum()) for batch in self.steps[number])

    def step(self, number: int) -> None:
        micro_batches = self.steps[number]
        for batch in micro_batches:
            (self.model(**batch).loss / len(micro_batches)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def _by(size: int, batches: Iterable[Any]) -> Iterator[list[Any]]:
    """Groups of ``size`` batches; what is over at the end of an epoch is left out."""
    group = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python benchmarks/throughput.py", description=__doc__.split(":")[0])
    parser.add_argument("--steps", type=int, default=20, help="optimiser steps of each way (default: 20)")
    parser.add_argument("--work", type=Path, help="folder for data and base, kept (default: a temporary one)")
    out_argument(parser, "throughput")
    parser.add_argument("overrides", nargs="*", help="settings of commonsense_reasoning")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        work = (arguments.work or Path(temporary)).resolve()
        overrides = prepared(work, ["method=moslora", "training.global_batch_size=16", *arguments.overrides])
        ways = {name: Way(name, overrides, arguments.steps) for name in WAYS}
    way = next(iter(ways.values()))
    way.step(0)  # the first of all pays for what is allocated once
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(arguments.steps):
        for name, way in ways.items():
            taken[name].append(seconds(lambda way=way, number=number: way.step(number)) / way.tokens(number))

    rows, numbers = [], {"steps": arguments.steps, "overrides": arguments.overrides, "ways": {}}
    for name, per_token in taken.items():
        speed, faster = spread(1 / value for value in per_token), ratio(taken[PUBLISHED], per_token)
        padding = ways[name].padding
        aim = "" if name == PUBLISHED else f">= {AIM}"
        rows.append([name, f"{speed.median:.0f}", faster.text(), aim, f"{padding:.0%}"])
        numbers["ways"][name] = {
            "tokens_a_second": speed,
            "times_the_published": faster,
            "padding": padding,
            "tokens": [ways[name].tokens(number) for number in range(arguments.steps)],
        }
    headers = ["way", "tokens a second", "times the published way", "aim", "padding of an epoch"]
    report("throughput", headers, rows, numbers, arguments.out)
    return 0


if __name__ == "__main__":
    run(main)

"""Table 1 of the paper: LoRA against two-subspaces mixing at ranks 8 and 16, from our runs."""

from __future__ import annotations

from collections.abc import Sequence

from . import paper_rows
from .arms import RATE, settings_of, split, without
from .claims import Arm, Statement
from .load import LeftOut, Run, with_config
from .paper import PaperNumbers
from .paper_rows import Wanted
from .task_table import Document

RANKS = (8, 16)
METHODS = {"lora": "LoRA", "two_subspaces": "Two-subspaces mixing"}
RANK = "adapter.r"
# Overrides of an arm that change its rank; alpha is given beside it to keep alpha / r.
SIZE = (RANK, "adapter.lora_alpha")


def build(runs: Sequence[Run], left_out: Sequence[LeftOut], numbers: PaperNumbers) -> list[Document]:
    """A document per scale and evaluation protocol with runs of either method at either rank, in a stable order."""
    runs, unread = with_config(runs, lambda run: _sets_no_more_than_size(run) and RANK not in settings_of(run.label))
    return paper_rows.build("table1", wanted, runs, [*left_out, *unread], numbers)


def wanted(runs: Sequence[Run]) -> list[Wanted]:
    """Both methods at both ranks; a rank that was run at several alphas has a pair of rows for each."""
    found = labels(runs)
    rows = []
    for rank in RANKS:
        at = [label for label, of in found.items() if of == rank] or [f"adapter.r={rank}"]
        for label in at:
            note = "" if len(at) == 1 else f" ({label})"
            arguments = "" if label == "default" else " " + label.replace(",", " ")
            rows += [
                Wanted(method, f"{title}, r = {rank}{note}", method, (label,), f"method={method}{arguments}")
                for method, title in METHODS.items()
            ]
    return rows


def labels(runs: Sequence[Run]) -> dict[str, int]:
    """Label without learning rate -> rank, of the runs of both methods that set no more than their size."""
    found: dict[str, int] = {}
    for run in runs:
        label = without(split(run.label)[0], RATE)
        if label not in found and _sets_no_more_than_size(run):
            rank = settings_of(label).get(RANK, run.setting(RANK))
            if rank is not None:
                found[label] = int(rank)
    return dict(sorted(found.items(), key=lambda item: (item[0] != "default", item)))


def _sets_no_more_than_size(run: Run) -> bool:
    """Of either method, the learning rate and what belongs to a whole table aside."""
    label = without(split(run.label)[0], RATE)
    return run.method in METHODS and set(settings_of(label)) <= set(SIZE) and "~" not in label


def statements(runs: Sequence[Run]) -> list[Statement]:
    """The claim of the table at every size that was named on the command line."""
    found = {label: rank for label, rank in labels(runs).items() if label != "default" and rank in RANKS}
    statements = []
    for label, rank in found.items():
        alone = list(found.values()).count(rank) == 1
        text = f"Mixing two subspaces is better than LoRA at r = {rank}" + ("" if alone else f" ({label})")
        arms = [Arm(METHODS[method], method, (label,)) for method in ("two_subspaces", "lora")]
        statements.append(Statement(f"two_subspaces_{label}", text, "Table 1", *arms))
    return statements

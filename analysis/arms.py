"""Which row of a table is an arm of a claim: by its method and overrides, at the one learning rate that it was run at.

A study's runs come without their learning rate among the overrides (:mod:`analysis.study_view`). Where rates were
swept without a study, the rate is in the name of the runs: an arm that has no runs without it is found at its one
rate; of several none is taken, for nobody has chosen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

# Overrides that belong to all methods of a comparison: the protocol and the base model.
CONTEXT = ("protocol", "base", "model", "model.name", "model.quantization")
RATE = "training.learning_rate"

Key = tuple[str, str]  # method, label


def split(label: str) -> tuple[str, str]:
    """The overrides that set a method apart, and those that name the conditions of a whole table (its context)."""
    parts = parts_of(label)
    context = [part for part in parts if part.split("=")[0] in CONTEXT]
    rest = [part for part in parts if part not in context]
    return ",".join(rest) or ("default" if "~" not in label else label), ",".join(context)


def parts_of(label: str) -> list[str]:
    """The overrides in a label; a shortened label is no list of them."""
    return [] if label == "default" or "~" in label else label.split(",")


def settings_of(label: str) -> dict[str, str]:
    """Key -> value of the overrides in a label."""
    return dict(part.split("=", 1) for part in parts_of(label) if "=" in part)


def without(label: str, *keys: str) -> str:
    """The label of the same overrides but for those of ``keys``."""
    if "~" in label:
        return label
    return ",".join(part for part in parts_of(label) if part.split("=")[0] not in keys) or "default"


def contexts(rows: Iterable[Key]) -> list[str]:
    """The distinct contexts of rows, given as (method, label), in their order."""
    return list(dict.fromkeys(split(label)[1] for _, label in rows))


def find(rows: Iterable[Key], method: str, labels: Iterable[str], context: str = "") -> Key | None:
    """The row, (method, label), of a method under the first of ``labels`` that has one, None if there is none.

    Where no label has a row as it stands, the row at the one learning rate that it was run at is taken.

    Args:
        labels: without a learning rate, unless the rate is what the arm is about.
        context: of the rows to look among.
    """
    rows, labels = list(rows), list(labels)
    return as_named(rows, method, labels, context) or at_one_rate(rows, method, labels, context)


def as_named(rows: Iterable[Key], method: str, labels: Iterable[str], context: str) -> Key | None:
    """The row of a method under the first of ``labels`` that has one, context aside."""
    known = _cores(rows, method, context)
    return next(((method, known[label]) for label in labels if label in known), None)


def at_one_rate(rows: Iterable[Key], method: str, labels: Iterable[str], context: str) -> Key | None:
    """The row of a method under one of ``labels`` with a learning rate, if there is one rate alone."""
    known = _cores(rows, method, context)
    for label in labels:
        if len(found := at_rates(known, label)) == 1:
            return method, known[found[0]]
    return None


def find_pair(
    rows: Iterable[Key], first: tuple[str, Sequence[str]], second: tuple[str, Sequence[str]], context: str
) -> tuple[Key | None, Key | None]:
    """The rows of two arms, (method, labels), that are to be compared: both as they are named or both at a rate.

    An arm at a rate that somebody tried and one at the rate that is there by default are no pair.
    """
    rows = list(rows)
    named, tried = (tuple(of(rows, *arm, context) for arm in (first, second)) for of in (as_named, at_one_rate))
    return tried if None in named and None not in tried else named


def _cores(rows: Iterable[Key], method: str, context: str) -> dict[str, str]:
    """Label without its context -> label, of the rows of a method in the context."""
    split_labels = {label: split(label) for of, label in rows if of == method}
    return {core: label for label, (core, of) in split_labels.items() if of == context}


def at_rates(labels: Iterable[str], label: str) -> list[str]:
    """Those of ``labels`` that are ``label`` with a learning rate."""
    return [name for name in labels if without(split(name)[0], RATE) == label and RATE in settings_of(name)]

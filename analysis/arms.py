"""Which row of a table is an arm of a claim: by its method and overrides, at the learning rate to be shown.

A study runs every arm at a learning rate of its own, which then is one of the overrides in the name of its runs. An
arm that has no runs without such an override is found by that of its one rate; among several somebody has to choose.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

# Overrides that belong to all methods of a comparison: the protocol and the base model.
CONTEXT = ("protocol", "base", "model", "model.name", "model.quantization")
RATE = "training.learning_rate"

# (method, label without a rate) -> label of the runs to show.
Chosen = Mapping[tuple[str, str], str]
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


def find(
    rows: Iterable[Key], method: str, labels: Iterable[str], context: str = "", chosen: Chosen | None = None
) -> Key | None:
    """The row, (method, label), of a method under the first of ``labels`` that has one, None if there is none.

    Args:
        labels: without a learning rate, unless the rate is what the arm is about.
        context: of the rows to look among.
        chosen: labels to show; where a label is not among them, its runs without an override of the rate are.
    """
    known = [label for of, label in rows if of == method and split(label)[1] == context]
    for label in labels:
        wanted = (chosen or {}).get((method, label))
        if wanted is not None:
            fits = [name for name in known if wanted in (name, split(name)[0])]
        elif not (fits := [name for name in known if split(name)[0] == label]):
            fits = at_rates(known, label)
            fits = fits if len(fits) == 1 else []
        if fits:
            return method, fits[0]
    return None


def at_rates(labels: Iterable[str], label: str) -> list[str]:
    """Those of ``labels`` that are ``label`` with a learning rate."""
    return [name for name in labels if without(split(name)[0], RATE) == label and RATE in settings_of(name)]

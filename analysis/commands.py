"""The command lines that make runs, as a reader of the report would type them."""

from __future__ import annotations

from collections.abc import Iterable

SEEDS = (0, 1, 2)  # of what nobody has run yet
STAGES = {"subject_driven_t2i": ("train", "generate", "evaluate")}
_MODES = ("loglikelihood", "harness")


def run(experiment: str, scale: str, arguments: str, protocol: str = "", seeds: Iterable[int] = SEEDS) -> list[str]:
    """Training to evaluation of all methods and seeds that ``arguments`` names, as sweeps.

    Args:
        protocol: of the evaluation; its first word is the mode where it is not the one that is there by default.
        seeds: fewer than two, and a sweep over the usual ones is made.
    """
    seeds = list(seeds)
    listed = ",".join(map(str, seeds if len(seeds) > 1 else SEEDS))
    mode = protocol.split("-")[0]
    lines = []
    for stage in STAGES.get(experiment, ("train", "evaluate")):
        more = f" evaluation.mode={mode}" if stage == "evaluate" and mode in _MODES else ""
        lines.append(f"python -m {experiment}.{stage} -m scale={scale} {arguments} seed={listed}{more}")
    return lines


def prepare(experiment: str, scale: str) -> str:
    """The command that makes the data of a scale."""
    more = " protocol=paper" if (experiment, scale) == ("commonsense_reasoning", "paper") else ""
    more += " data.path=path/to/llm-adapters" if more else ""
    return f"python -m {experiment}.prepare_data scale={scale}{more}"


def joined(lines: Iterable[str]) -> str:
    return " && ".join(lines)

"""The command lines that make runs, as a reader of the report would type them."""

from __future__ import annotations

from collections.abc import Iterable

SEEDS = (0, 1, 2)  # of what nobody has run yet
_STAGES = {"subject_driven_t2i": ("train", "generate", "evaluate")}
_MODES = ("loglikelihood", "harness")
# Training items of a scale where a part of them is asked for by number, and the protocol that is the paper's.
FULL = {("commonsense_reasoning", "smoke"): 2400, ("commonsense_reasoning", "paper"): 170_420}
_PROTOCOL = {("commonsense_reasoning", "paper"): "protocol=paper"}
_DATA = {("commonsense_reasoning", "paper"): "data.path=path/to/llm-adapters"}
_DATA |= {("commonsense_reasoning", "small"): "data.path=path/to/llm-adapters"}
_DATA |= {
    ("visual_instruction", "paper"): "data.path=llava_v1_5_mix665k.json data.image_root=path/to/images "
    "data.benchmark_root=path/to/LMUData"
}


def stages(experiment: str) -> tuple[str, ...]:
    """What makes a run of an experiment whose data are prepared."""
    return _STAGES.get(experiment, ("train", "evaluate"))


def run(experiment: str, scale: str, arguments: str, protocol: str = "", seeds: Iterable[int] = SEEDS) -> list[str]:
    """Training to evaluation of all methods and seeds that ``arguments`` names, as sweeps.

    Args:
        protocol: of the evaluation; its first word is the mode where it is not the one that is there by default.
        seeds: fewer than two, and a sweep over the usual ones is made.
    """
    seeds = list(seeds)
    listed = ",".join(map(str, seeds if len(seeds) > 1 else SEEDS))
    mode = protocol.split("-")[0]
    arguments = _words(f"scale={scale}", _PROTOCOL.get((experiment, scale)), arguments, f"seed={listed}")
    lines = []
    for stage in stages(experiment):
        more = f" evaluation.mode={mode}" if stage == "evaluate" and mode in _MODES else ""
        lines.append(f"python -m {experiment}.{stage} -m {arguments}{more}")
    return lines


def prepare(experiment: str, scale: str, *more: str) -> str:
    """The command that makes the data of a scale."""
    given = [of.get((experiment, scale)) for of in (_PROTOCOL, _DATA)]
    return f"python -m {experiment}.prepare_data {_words(f'scale={scale}', *given, *more)}"


def run_parts(experiment: str, scale: str, arguments: str, shares: Iterable[float]) -> list[str]:
    """Data, training and evaluation on parts of the training data; none where its size is not known."""
    if (full := FULL.get((experiment, scale))) is None:
        return []
    lines = []
    for items in [round(share * full) for share in shares]:
        part = f"data.train_items={items} data.dir=data/{experiment}/{scale}-{items}"
        lines += [prepare(experiment, scale, part), *run(experiment, scale, f"{arguments} {part}")]
    return lines


def joined(lines: Iterable[str]) -> str:
    return " && ".join(lines)


def _words(*words: str | None) -> str:
    """The words in a line, none of them twice."""
    return " ".join(dict.fromkeys(word for given in words if given for word in given.split()))

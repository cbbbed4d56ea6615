"""What a mixer does inside an adapter: numbers from the saved adapters of the runs, without a model.

Notation as in :mod:`moslora_core.subspaces`: delta_W = scaling * sum_ij m_ij B_i A_j, where LoRA has the r terms with
i = j. Of every run there is the trained adapter, and where ``training.keep_steps`` asked for them its copies along the
training. Records without adapters have the same numbers in a file (:mod:`analysis.subspace_files`).

The squared Frobenius norm of an update divides into that of its diagonal part D (i = j), that of its mixed part X
(i != j) and a cross term, which is positive where the two reinforce one another and negative where they cancel:

    |delta_W|^2 = |D|^2 + |X|^2 + 2 <D, X>          the three shares, each over |delta_W|^2, add up to 1

The mixed share of what is drawn is |X|^2 / (|D|^2 + |X|^2), which lies in [0, 1] whatever the cross term is. Terms of
equal size in independent directions would make it (r^2 - r) / r^2 = 1 - 1/r.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from moslora_core.base_models import adapter_digest, check_adapter
from moslora_core.record import RunRecord
from moslora_core.subspaces import (
    Factors,
    adapter_factors,
    basis_angles,
    condition_number,
    distance_from_start,
    effective_rank,
    effective_scale,
    mixer_spectrum,
    principal_angles,
    rank_one_terms,
    update_bases,
    update_spectrum,
)

from .aggregate import Row, Setting, Summary, rows_of, summarize
from .load import REFERENCES, Run
from .style import LOOKS
from .visual import NO_BASE, short_names

MOST_RANKS = 32  # rows of a mixer that are kept and drawn one by one
MOST_GROUPS = len(LOOKS)  # that are drawn in one figure
MOST_RUNS = 18  # rows of the matrix of angles, whose numbers would be too small to read

Matrix = Sequence[Sequence[float]]
Bases = tuple[torch.Tensor, torch.Tensor]

# ------------------------------------------------------------------------------------------------------------ modules


@dataclass(frozen=True, order=True)
class Place:
    """Where a module stands: the stack of layers (``language_model``), the layer's number in it, the kind of module.

    A module inside several numbered containers has a number of each; one outside of any has none.
    """

    stack: str
    layer: tuple[int, ...]
    kind: str


def place_of(module: str) -> Place:
    """``model.language_model.layers.0.mlp.up_proj`` is ``up_proj`` of layer 0 in ``language_model``."""
    parts = module.split(".")
    # A number at the end (to_out.0) belongs to the module's own name.
    numbers = [i for i, part in enumerate(parts[:-1]) if part.isdigit()]
    if not numbers:
        return Place("", (), module)
    stack = [part for part in parts[: numbers[0]] if part not in ("model", "base_model", "layers", "encoder")]
    kind = parts[numbers[-1] + 1 :]
    # Projections have names of their own wherever they stand; others do not (attn1.to_q and attn2.to_q).
    kind = kind[-1:] if kind[0] in ("self_attn", "mlp") else kind
    return Place(".".join(stack), tuple(int(parts[i]) for i in numbers), ".".join(kind))


@dataclass(frozen=True)
class ModuleNumbers:
    """Of one adapted module at one moment.

    The numbers of a mixer are None where there is none; ``distance`` also where its start was not kept; the shares and
    the cosine where the update is zero, as it is at LoRA's start.

    Attributes:
        mixer_values: singular values of M, largest first.
        rank: effective rank of M.
        condition: condition number of M, inf for a singular one.
        distance: of M from its start, over the norm of the start.
        scale: |M A| / |A|.
        update_values: singular values of delta_W over the largest, largest first; empty for a zero update.
        update_rank: effective rank of delta_W, None for a zero update.
        diagonal, mixed, cross: shares of |delta_W|^2 that add up to 1; of a LoRA, 1, 0 and 0.
        mixed_share: mixed / (diagonal + mixed).
        cosine: of the angle between the diagonal and the mixed part.
    """

    r: int
    mixer_values: tuple[float, ...] | None
    rank: float | None
    condition: float | None
    distance: float | None
    scale: float | None
    update_values: tuple[float, ...]
    update_rank: float | None
    diagonal: float | None
    mixed: float | None
    cross: float | None
    mixed_share: float | None
    cosine: float | None


def module_numbers(factors: Factors, start: torch.Tensor | None) -> ModuleNumbers:
    """The numbers of one module; ``start`` is its mixer before the training, if that is known."""
    M = factors.M if factors.mixed else None
    terms = rank_one_terms(factors)
    energy = terms.total_norm**2
    update = update_spectrum(factors)
    there = energy > 0 and float(update[0]) > 0
    return ModuleNumbers(
        r=factors.r,
        mixer_values=None if M is None else tuple(mixer_spectrum(M).tolist()),
        rank=None if M is None else effective_rank(M),
        condition=None if M is None else condition_number(M),
        distance=None if M is None or start is None else distance_from_start(M, start).relative,
        scale=None if M is None else effective_scale(M, factors.A),
        update_values=tuple((update / update[0]).tolist()) if there else (),
        update_rank=effective_rank(torch.diag(update)) if there else None,
        diagonal=terms.diagonal_norm**2 / energy if there else None,
        mixed=terms.mixed_norm**2 / energy if there else None,
        cross=2 * terms.cosine * terms.diagonal_norm * terms.mixed_norm / energy if there else None,
        mixed_share=terms.mixed_share if there else None,
        cosine=terms.cosine if there else None,
    )


# --------------------------------------------------------------------------------------------------------------- runs


@dataclass(frozen=True)
class Size:
    """Of one update: outputs, inputs, and its rank, which is that of its column space and its row space."""

    out: int
    inp: int
    rank: int


@dataclass(frozen=True)
class Trace:
    """The adapters of one run in numbers.

    Attributes:
        digest: of the trained adapter's files.
        kept: step -> digest of the kept copy.
        steps: step -> module -> numbers, the earliest first; the last is the trained adapter.
        start: module -> |m_ij| before the training; None where step 0 was not kept.
        end: module -> |m_ij| of the trained adapter, for modules that have a mixer.
        sizes: module -> size of the trained update.
    """

    run: Run
    digest: str
    kept: dict[int, str]
    steps: dict[int, dict[str, ModuleNumbers]]
    start: dict[str, Matrix] | None
    end: dict[str, Matrix]
    sizes: dict[str, Size]

    @property
    def last(self) -> dict[str, ModuleNumbers]:
        return self.steps[max(self.steps)]

    @property
    def has_mixers(self) -> bool:
        return bool(self.end)


def read_trace(run: Run, record: RunRecord) -> Trace:
    """Reads the trained adapter of a run and its kept copies.

    Raises:
        UserError: there is no adapter, it is damaged, or it is no LoRA.
    """
    trained = adapter_factors(record.adapter_path)
    digest, kept = digests(run, record)
    paths = record.kept_adapters()
    start = _mixers(adapter_factors(paths[0])) if 0 in kept else None
    return Trace(
        run=run,
        digest=digest,
        kept=kept,
        # One copy at a time: together they would take many times the memory of the adapter.
        steps={step: _numbers(adapter_factors(paths[step]), start) for step in kept}
        | {run.training.steps: _numbers(trained, start)},
        start=None if start is None else {module: magnitudes(M) for module, M in start.items()},
        end={module: magnitudes(M) for module, M in _mixers(trained).items()},
        sizes={module: _size(found) for module, found in trained.items()},
    )


def digests(run: Run, record: RunRecord) -> tuple[str, dict[int, str]]:
    """Digest of the trained adapter, and of the copies from before its last step.

    Raises:
        UserError: a folder lacks a file, or the trained adapter is not the one that the run gave.
    """
    check_adapter(record.adapter_path, run.training.adapter_sha256)
    kept = {step: path for step, path in record.kept_adapters().items() if step < run.training.steps}
    return adapter_digest(record.adapter_path), {step: adapter_digest(path) for step, path in kept.items()}


def magnitudes(mixer: torch.Tensor) -> Matrix:
    """|m_ij|, (r, r); of more than ``MOST_RANKS`` ranks the means over square blocks that are as small as can be."""
    block = math.ceil(len(mixer) / MOST_RANKS)
    pooled = torch.nn.functional.avg_pool2d(mixer.abs()[None], block, ceil_mode=True, count_include_pad=False)
    return pooled[0].tolist()


def _numbers(modules: Mapping[str, Factors], start: Mapping[str, torch.Tensor] | None) -> dict[str, ModuleNumbers]:
    return {module: module_numbers(factors, (start or {}).get(module)) for module, factors in modules.items()}


def _mixers(modules: Mapping[str, Factors]) -> dict[str, torch.Tensor]:
    return {module: factors.M for module, factors in modules.items() if factors.mixed}


def _size(factors: Factors) -> Size:
    columns, rows = update_bases(factors)
    return Size(columns.shape[0], rows.shape[0], columns.shape[1])


@dataclass(frozen=True)
class Group:
    """The runs that differ only in their seed, in the order of the seeds."""

    row: Row
    traces: tuple[Trace, ...]

    @property
    def key(self) -> tuple[str, str]:
        return self.row.method, self.row.label

    @property
    def has_mixers(self) -> bool:
        return any(trace.has_mixers for trace in self.traces)


def setting_of(run: Run) -> Setting | None:
    """Base model and quantisation of a run, where its experiment has several of them."""
    for _, evaluation in sorted(run.evaluations.items()):
        if "base" in evaluation.settings:
            quantization = str(evaluation.settings.get("quantization") or "none")
            return Setting(str(evaluation.settings["base"] or NO_BASE), quantization)
    return None


def by_setting(runs: Iterable[Run]) -> list[tuple[str, Setting | None, list[Run]]]:
    """The trained runs of every scale and setting, in a stable order: what may share a figure."""
    members: dict[tuple[str, Setting | None], list[Run]] = defaultdict(list)
    for run in runs:
        if run.method not in REFERENCES:
            members[run.scale, setting_of(run)].append(run)

    def order(entry: tuple[tuple[str, Setting | None], list[Run]]) -> tuple:
        (scale, setting), _ = entry
        return scale, () if setting is None else setting.order

    return [
        (*key, sorted(found, key=lambda run: (run.path, run.seed)))
        for key, found in sorted(members.items(), key=order)
    ]


def groups_of(traces: Iterable[Trace]) -> list[Group]:
    """The traces of one setting by method and overrides, in the order of a table."""
    members: dict[tuple[str, str], list[Trace]] = defaultdict(list)
    for trace in traces:
        members[trace.run.method, trace.run.label].append(trace)
    rows = short_names(rows_of([trace.run for of in members.values() for trace in of], lambda run: {}, (), setting_of))
    by_seed = {key: tuple(sorted(of, key=lambda trace: trace.run.seed)) for key, of in members.items()}
    return [Group(row, by_seed[row.method, row.label]) for row in rows]


def chosen_rows(rows: Sequence[tuple[Row, bool]]) -> set[tuple[str, str]]:
    """Method and label of the rows that a figure has room for: those of the most seeds; of as many, LoRA and mixers.

    A study has few seeds of many learning rates, and more of the rates that it chose.

    Args:
        rows: each with whether it has mixers.
    """
    most_seeds = sorted(rows, key=lambda entry: -len(entry[0].seeds))
    lora = next((row for row, _ in most_seeds if row.method == "lora"), None)
    first = sorted(rows, key=lambda entry: (-len(entry[0].seeds), not (entry[1] or entry[0] is lora)))
    return {(row.method, row.label) for row, _ in first[:MOST_GROUPS]}


def drawn_groups(groups: Sequence[Group]) -> list[Group]:
    """The groups that a figure has room for, in their order."""
    kept = chosen_rows([(group.row, group.has_mixers) for group in groups])
    return [group for group in groups if group.key in kept]


# ---------------------------------------------------------------------------------------------------------- summaries

# Over the modules of one adapter. A condition number may be infinite, which a mean does not bear.
QUANTITIES: dict[str, tuple[Callable[[ModuleNumbers], float | None], Callable[[Sequence[float]], float]]] = {
    "distance": (lambda numbers: numbers.distance, statistics.fmean),
    "rank": (lambda numbers: numbers.rank, statistics.fmean),
    "condition": (lambda numbers: numbers.condition, statistics.median),
    "scale": (lambda numbers: numbers.scale, statistics.fmean),
    "mixed_share": (lambda numbers: numbers.mixed_share if numbers.rank is not None else None, statistics.fmean),
    "update_rank": (lambda numbers: numbers.update_rank, statistics.fmean),
    "cosine": (lambda numbers: numbers.cosine if numbers.rank is not None else None, statistics.fmean),
    "diagonal": (lambda numbers: numbers.diagonal, statistics.fmean),
    "mixed": (lambda numbers: numbers.mixed, statistics.fmean),
    "cross": (lambda numbers: numbers.cross, statistics.fmean),
}


def over_modules(modules: Mapping[str, ModuleNumbers], quantity: str) -> float | None:
    """A quantity of one adapter: the mean over its modules (of condition numbers the median), None where none has it.

    Only modules with a mixer have the numbers of mixers and the mixed share.
    """
    of, average = QUANTITIES[quantity]
    found = [value for numbers in modules.values() if (value := of(numbers)) is not None]
    return average(found) if found else None


def over_seeds(values: Iterable[float | None]) -> Summary | None:
    """Summary over the seeds that have a value; an infinite one leaves no deviation."""
    found = [value for value in values if value is not None]
    if any(math.isinf(value) for value in found):
        return Summary(math.inf, None, len(found))
    return summarize(found)


def mean_spectrum(spectra: Iterable[Sequence[float] | None]) -> list[float]:
    """Mean by index over spectra, each index over those that are long enough."""
    found = [spectrum for spectrum in spectra if spectrum]
    longest = max(map(len, found), default=0)
    return [statistics.fmean(s[i] for s in found if len(s) > i) for i in range(longest)]


# ------------------------------------------------------------------------------------------------------------- angles


@dataclass(frozen=True)
class Angles:
    """Mean principal angle between two updates in degrees, over the angles of a module and then over the modules.

    Attributes:
        columns: in the output; None where the adapters share no module, or no update that is not zero.
        rows: the same in the input.
    """

    columns: float | None
    rows: float | None


def angle_members(groups: Sequence[Group]) -> list[tuple[Group, tuple[Trace, ...]]]:
    """The runs between which angles are measured, alike by group."""
    drawn = drawn_groups(groups)
    most = max(1, MOST_RUNS // len(drawn)) if drawn else 0
    return [(group, group.traces[:most]) for group in drawn]


def read_bases(record: RunRecord) -> dict[str, Bases]:
    """Module -> orthonormal bases of the trained update's column space and row space.

    Raises:
        UserError: there is no adapter, it is damaged, or it is no LoRA.
    """
    return {module: update_bases(found) for module, found in adapter_factors(record.adapter_path).items()}


def mean_angles(first: Mapping[str, Bases], second: Mapping[str, Bases]) -> Angles:
    """Angles between the trained updates of two runs, over the modules that both adapt in the same size."""
    sides = []
    for side in (0, 1):
        found = []
        for module in sorted(first.keys() & second.keys()):
            one, other = first[module], second[module]
            if any(one[i].shape[0] != other[i].shape[0] for i in (0, 1)):
                continue
            angles = basis_angles(one[side], other[side])
            if len(angles):
                found.append(float(angles.mean()))
        sides.append(math.degrees(statistics.fmean(found)) if found else None)
    return Angles(*sides)


def chance_angles(traces: Iterable[Trace]) -> Angles:
    """Mean principal angles in degrees between random spaces of these sizes, mean over modules; drawn, to about 1°."""
    sizes = [size for trace in traces for size in trace.sizes.values() if size.rank]
    if not sizes:
        return Angles(None, None)
    return Angles(
        columns=statistics.fmean(_random_angle(size.out, size.rank) for size in sizes),
        rows=statistics.fmean(_random_angle(size.inp, size.rank) for size in sizes),
    )


@cache
def _random_angle(size: int, rank: int, draws: int = 20) -> float:
    generator = torch.Generator().manual_seed(0)
    spaces = [torch.randn(2, size, rank, generator=generator, dtype=torch.float64) for _ in range(draws)]
    return math.degrees(statistics.fmean(float(principal_angles(*pair).mean()) for pair in spaces))

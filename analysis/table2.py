"""Table 2 of the paper, a definition: which matrices stand between A and B, and how many subspaces they mix.

Nothing is measured: every mixer of :mod:`moslora_core` is made at several ranks and looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from moslora_core.config import MIXERS, MixerSetting
from moslora_core.methods import METHODS, MethodConfig
from moslora_core.mixer import init_mixer, seeded_generator

from .paper import PaperNumbers
from .paper_block import paper_block, paper_lines
from .tables import Block, Grid, Page, csv_text, latex_page, markdown_page
from .task_table import Document

RANKS = (4, 8, 16)
# What the numbers may be as functions of r, the simplest first.
FORMULAS: dict[str, Callable[[int], float]] = {
    "0": lambda r: 0,
    "r/2": lambda r: r / 2,
    "r": lambda r: r,
    "2r": lambda r: 2 * r,
    "r²": lambda r: r**2,
}
KINDS = {"identity": "Identity", "two_subspaces": "Butterfly [[I, I], [I, I]]", "frozen": "Dense", "learned": "Dense"}
CSV_FIELDS = ("origin", "method", "column", "unit", "r", "value", "low", "high", "provenance", "source")


@dataclass(frozen=True)
class Mixer:
    """A mixer M (r, r) at the ranks of ``RANKS``.

    Attributes:
        subspaces: entries that are not zero, each of which weighs a rank-one subspace B_i A_j.
        rank: of the matrix, which bounds that of the update.
        parameters: trained ones.
    """

    method: str
    kind: str
    trained: bool
    subspaces: tuple[int, ...]
    rank: tuple[int, ...]
    parameters: tuple[int, ...]


def mixers() -> list[Mixer]:
    """Every kind of mixer, in the order of the number of subspaces, those that are trained last."""
    found = [_mixer(kind, next(of for of in METHODS.values() if of.mixer == kind)) for kind in MIXERS]
    return sorted(found, key=lambda mixer: (mixer.subspaces, mixer.trained))


def _mixer(kind: str, method: MethodConfig) -> Mixer:
    setting = MixerSetting(kind, method.mixer_init)
    matrices = [init_mixer(setting.start, r, generator=seeded_generator(0, kind)) for r in RANKS]
    return Mixer(
        method=method.name,
        kind=KINDS[kind],
        trained=setting.trains,
        subspaces=tuple(int(torch.count_nonzero(matrix)) for matrix in matrices),
        rank=tuple(int(torch.linalg.matrix_rank(matrix)) for matrix in matrices),
        parameters=tuple(matrix.numel() if setting.trains else 0 for matrix in matrices),
    )


def build(numbers: PaperNumbers) -> list[Document]:
    """The one document of the table."""
    paper, found = numbers.tables["table2"], mixers()
    headers = ["Method", "Mixer", "Learned", "Mixed subspaces", "Rank of M", "Parameters added"]
    rows = [
        [
            *(mixer.method, mixer.kind, "yes" if mixer.trained else "no"),
            *(_formula(values) for values in (mixer.subspaces, mixer.rank, mixer.parameters)),
        ]
        for mixer in found
    ]
    page = Page(
        label="tab:2",
        measured=Block(
            title=paper.title,
            grid=Grid(headers, rows, left=3),
            facts=[
                "The update is ΔW = scaling · B M A with A (r, in), B (out, r) and the mixer M (r, r): the sum of "
                "m_ij B_i A_j over all i and j. An entry of M that is not zero mixes one more subspace.",
                f"Counted on the mixers as they start, at r = {', '.join(map(str, RANKS[:-1]))} and {RANKS[-1]}.",
            ],
            notes=[
                "Two-subspaces mixing pairs r/2 columns of B with r/2 rows of A: its update has half of LoRA's rank.",
                "A learned mixer of full rank leaves the set of updates within reach as it is with LoRA. What it "
                "changes is the way there.",
            ],
        ),
        left_out=[],
        paper=paper_block(paper, numbers.sources),
    )
    lines = [
        {"origin": "computed", "method": mixer.method, "column": column, "unit": unit, "r": r, "value": value}
        | {"provenance": "COMPUTED"}
        for mixer in found
        for column, unit in (("subspaces", "subspaces"), ("rank", "dimensions"), ("parameters", "parameters"))
        for r, value in zip(RANKS, getattr(mixer, column), strict=True)
    ]
    return [
        Document(
            folder="",
            name="table2",
            title=paper.title,
            markdown=markdown_page(page),
            csv=csv_text(CSV_FIELDS, [*lines, *paper_lines(paper)]),
            latex=latex_page(page),
        )
    ]


def _formula(values: tuple[int, ...]) -> str:
    """The function of r that gives the values, or else the values."""
    fits = (name for name, of in FORMULAS.items() if all(of(r) == v for r, v in zip(RANKS, values, strict=True)))
    return next(fits, ", ".join(map(str, values)))

"""The paper's tables and figures in the order of the report: what makes each from the runs, and what makes the runs.

One entry each in ``EXHIBITS``. One whose runs are missing stays in the report, with the command that makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import commands, figure4, figure5, figure6, t2i_table, table1, table2, table3, table4, table5, table6
from .figure5 import Figure
from .load import LeftOut, Run
from .paper import PaperNumbers
from .task_table import Document

# How the experiments are called in a sentence.
TITLES = {
    "commonsense_reasoning": "Commonsense reasoning",
    "visual_instruction": "Visual instruction tuning",
    "subject_driven_t2i": "Subject-driven generation",
}
COMMONSENSE, VISUAL, IMAGES = "commonsense_reasoning", "visual_instruction", "subject_driven_t2i"


@dataclass(frozen=True)
class Given:
    """What there is to make an exhibit of: the runs of its experiment, below ``runs_dir``, and the paper's numbers.

    Attributes:
        normalised: divide every axis of a radar by its largest mean.
    """

    runs_dir: Path
    runs: Sequence[Run]
    left_out: Sequence[LeftOut]
    numbers: PaperNumbers
    normalised: bool = False


@dataclass(frozen=True)
class Exhibit:
    """A table or figure of the paper.

    Attributes:
        id: of its entry in the paper's numbers.
        experiment: whose runs it is made of; None for a definition.
        build: makes its documents from the runs; none where nothing can be shown.
        sweeps: arguments of the sweeps that make the runs.
        parts: shares of the training data that are run one by one, each in a folder of its own.
    """

    id: str
    experiment: str | None
    build: Callable[[Given], Sequence[Document | Figure]]
    sweeps: tuple[str, ...] = ()
    parts: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        """``Table 4``; in words what the paper does not number."""
        numbered = f"{self.id[:-1]} {self.id[-1]}" if self.id[-1].isdigit() else self.id.replace("_", " ")
        return numbered.capitalize()

    @property
    def is_figure(self) -> bool:
        return self.id.startswith("figure")

    def commands(self, scale: str) -> list[str]:
        """The command lines that make its runs at a scale, in the order in which they are typed."""
        if self.experiment is None:
            return []
        lines = [commands.prepare(self.experiment, scale)]
        for sweep in self.sweeps:
            lines += commands.run(self.experiment, scale, sweep)
        if self.parts:
            lines += commands.run_parts(self.experiment, scale, self.sweeps[0], self.parts)
        return lines


EXHIBITS = (
    Exhibit(
        "table1",
        COMMONSENSE,
        lambda of: table1.build(of.runs, of.left_out, of.numbers),
        sweeps=("method=lora,two_subspaces adapter.r=8,16",),
    ),
    Exhibit("table2", None, lambda of: table2.build(of.numbers)),
    Exhibit(
        "table3",
        COMMONSENSE,
        lambda of: table3.build(of.runs, of.left_out, of.numbers),
        sweeps=("method=lora", f"method=moslora method.mixer_init={','.join(table3.INITS)}"),
    ),
    Exhibit(
        "table4",
        COMMONSENSE,
        lambda of: table4.build(of.runs, of.left_out, of.numbers),
        sweeps=("method=lora,lokr,loha,adalora,dora,moslora",),
    ),
    Exhibit(
        "figure4",
        COMMONSENSE,
        lambda of: figure4.build(of.runs, of.left_out, of.numbers),
        sweeps=("method=lora,moslora",),
        parts=(0.125, 0.25, 0.5, 0.75),
    ),
    Exhibit(
        "table5",
        VISUAL,
        lambda of: table5.build(of.runs, of.left_out, of.numbers),
        sweeps=(
            "method=lora,moslora model.quantization=none,nf4",
            "method=moslora method.mixer_init=orthogonal model.quantization=none,nf4",
        ),
    ),
    Exhibit(
        "figure5",
        VISUAL,
        lambda of: figure5.build(of.runs, of.left_out, of.numbers, of.normalised),
        sweeps=("method=lora,moslora",),
    ),
    Exhibit(
        "figure6",
        IMAGES,
        lambda of: figure6.build(of.runs_dir, of.runs, of.left_out, of.numbers),
        sweeps=("method=lora,moslora data.subject=toy,badge,lamp",),
    ),
    Exhibit(
        "table6",
        IMAGES,
        lambda of: table6.build(of.runs_dir, None, of.runs, of.left_out, of.numbers),
        sweeps=("method=lora,moslora data.subject=toy,badge,lamp",),
    ),
    Exhibit(
        "automatic_metrics",
        IMAGES,
        lambda of: t2i_table.build(of.runs, of.left_out, of.numbers),
        sweeps=("method=lora,moslora data.subject=toy,badge,lamp",),
    ),
)

# The table of an experiment that shows all of its methods: the place of claims that are of no table of the paper.
MAIN = {COMMONSENSE: "table4", VISUAL: "table5"}


def experiments(exhibits: Iterable[Exhibit] = EXHIBITS) -> tuple[str, ...]:
    """The experiments of the exhibits, in their order."""
    return tuple(dict.fromkeys(exhibit.experiment for exhibit in exhibits if exhibit.experiment is not None))

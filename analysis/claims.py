"""What the paper claims that runs can speak to: two arms, which should be the better one, and by how much it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .paper import Claim, PaperNumbers
from .paper_block import claims_text


@dataclass(frozen=True)
class Arm:
    """A method with one set of overrides; ``labels`` are the folders that it may be found under, the first before."""

    title: str
    method: str
    labels: tuple[str, ...] = ("default",)

    @property
    def overrides(self) -> str:
        """What makes the arm on a command line."""
        given = [] if self.labels[0] == "default" else self.labels[0].split(",")
        return " ".join([f"method={self.method}", *given])


def _mixer(init: str, title: str) -> Arm:
    return Arm(f"MoSLoRA, {title}", "moslora", (f"method.mixer_init={init}",))


LORA = Arm("LoRA", "lora")
# The published start of the mixer, which is the default here.
MOSLORA = Arm("MoSLoRA", "moslora", ("default", "method.mixer_init=kaiming_uniform"))
ORTHOGONAL, IDENTITY = _mixer("orthogonal", "orthogonal start"), _mixer("identity", "start at the identity")
TWO_SUBSPACES = Arm("Two-subspaces mixing", "two_subspaces")
FROZEN = Arm("MoSLoRA, mixer frozen at its start", "moslora_frozen")
FOLDED = Arm("LoRA, the mixer's start folded into A", "moslora_folded")
SCALED = Arm("LoRA, scaled as the mixer's start scales", "lora_scaled")


@dataclass(frozen=True)
class Gap:
    """Cells of the paper whose difference is the size of its claim: (table, row of the better, row of the other).

    ``second_column`` is that of the other, where it is another.
    """

    table: str
    first: str
    second: str
    column: str = "avg"
    second_column: str | None = None


@dataclass(frozen=True)
class Statement:
    """``first`` is better than ``second`` on the mean over the tasks.

    Attributes:
        id: name in the CSV.
        source: where the paper says it; for a control of this project, whose question it is.
        gap: None where no numbers are known.
        yardstick: for what the paper did not measure, the gap that an effect would have to explain.
    """

    id: str
    text: str
    source: str
    first: Arm
    second: Arm
    gap: Gap | None = None
    yardstick: Gap | None = None


def _controls(headline: Gap) -> tuple[Statement, ...]:
    """Is a learned mixer more than another initialisation? Nobody has it from the paper; PEFT's maintainers asked."""
    asked = "asked in PEFT's pull request 1905; the paper argues from its gradients"
    texts = (
        ("folded", FOLDED, "A learned mixer is more than another start of A: better than the start folded into A"),
        ("frozen", FROZEN, "Learning the mixer matters: better than the same mixer frozen at its start"),
        ("scaled", SCALED, "A learned mixer is more than a smaller step: better than LoRA at the mixer's scale"),
    )
    return tuple(Statement(name, text, asked, MOSLORA, arm, yardstick=headline) for name, arm, text in texts)


_TABLE4, _TABLE5 = Gap("table4", "moslora", "lora"), Gap("table5", "internlm2_moslora", "internlm2_lora")

STATEMENTS: dict[str, tuple[Statement, ...]] = {
    "commonsense_reasoning": (
        Statement("mean", "MoSLoRA is better than LoRA", "Table 4", MOSLORA, LORA, _TABLE4),
        *_controls(_TABLE4),
        Statement(
            *("identity", "A Kaiming start of the mixer is better than a start at the identity", "Table 3"),
            *(MOSLORA, IDENTITY, Gap("table3", "kaiming_uniform", "identity")),
        ),
        Statement(
            *("orthogonal", "A Kaiming start of the mixer is better than an orthogonal one", "Table 3"),
            *(MOSLORA, ORTHOGONAL),
        ),
        Statement(
            *("orthogonal_identity", "An orthogonal start of the mixer is better than a start at the identity"),
            *("Table 3", ORTHOGONAL, IDENTITY),
        ),
        Statement("two_subspaces", "Mixing two subspaces is better than LoRA", "Table 1", TWO_SUBSPACES, LORA),
    ),
    "visual_instruction": (
        Statement("mean", "MoSLoRA is better than LoRA", "Table 5", MOSLORA, LORA, _TABLE5),
        Statement(
            "orthogonal_lora", "MoSLoRA with an orthogonal start is better than LoRA", "Table 5", ORTHOGONAL, LORA
        ),
        *_controls(_TABLE5),
    ),
}


def paper_gap(gap: Gap | None, numbers: PaperNumbers) -> tuple[float, str] | None:
    """The gap in points, and the cells that it is the difference of; None where one of them is not known."""
    if gap is None:
        return None
    rows = {row.id: row.cells for row in numbers.tables[gap.table].rows}
    places = ((gap.first, gap.column), (gap.second, gap.second_column or gap.column))
    cells = [_headline(rows.get(row, {}).get(column, ())) for row, column in places]
    if None in cells:
        return None
    first, second = cells
    return first.value - second.value, f"{claims_text([first])} against {claims_text([second])}"


def _headline(claims: Sequence[Claim]) -> Claim | None:
    return claims[0] if claims and claims[0].value is not None else None

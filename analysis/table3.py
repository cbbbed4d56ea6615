"""Table 3 of the paper: initialisations of the mixer, with LoRA as the mixer that is the identity and fixed."""

from __future__ import annotations

from collections.abc import Sequence

from moslora_core import MIXER_INITS
from moslora_core.methods import METHODS

from . import paper_rows
from .load import LeftOut, Run
from .paper import PaperNumbers
from .paper_rows import Wanted
from .task_table import Document

TITLES = {
    "zero": "Zero",
    "identity": "Identity, learned",
    "gaussian": "Normal distribution",
    "orthogonal": "Orthogonal",
    "kaiming_uniform": "Kaiming uniform",
}
# The paper's order, then what the registry has beside it.
INITS = (*TITLES, *(name for name in MIXER_INITS if name not in TITLES))


def build(runs: Sequence[Run], left_out: Sequence[LeftOut], numbers: PaperNumbers) -> list[Document]:
    """A document per scale and evaluation protocol with runs of any start, in a stable order."""
    return paper_rows.build("table3", lambda _: wanted(), runs, left_out, numbers, beside=True)


def wanted() -> list[Wanted]:
    """LoRA, then every start that a mixer can have, in the paper's order."""
    rows = [Wanted("lora", "LoRA (identity, fixed)", "lora", ("default",), "method=lora")]
    for init in INITS:
        override = f"method.mixer_init={init}"
        usual = METHODS["moslora"].mixer_init == init
        labels = ("default", override) if usual else (override,)
        arguments = "method=moslora" if usual else f"method=moslora {override}"
        rows.append(Wanted(init, TITLES.get(init, init), "moslora", labels, arguments))
    return rows

"""A run without some of its subspaces: ``python -m visual_instruction.knock_out scale=smoke method=moslora``.

Takes the arguments of ``evaluate``, whose evaluation it repeats on the benchmarks that need no judge, and
``evaluation.knock_out.*`` (moslora_core/knock_out_curve.py). The numbers go to ``knock_out/<evaluation>+<unit>.json``
of the run. A stopped command goes on where it stopped. The trained projector stays as it is throughout: it is no
adapter.
"""

from __future__ import annotations

from pathlib import Path

from moslora_core import launch
from moslora_core.errors import UserError
from moslora_core.evaluations import Scoring
from moslora_core.knock_out_curve import knock_out_command

from .benchmarks.registry import BENCHMARKS, JUDGED
from .config import CONF_MODULE, EXPERIMENT, NOT_IN_LABEL, Config, locate
from .evaluate import check, evaluation_name, read_items, scoring


def main(config: Config) -> None:
    names = [name for name in check(config) if BENCHMARKS[name].kind != JUDGED]
    if not names:
        raise UserError("evaluation.benchmarks: all of them need a judge; expected one that is scored here")

    def of(adapter: Path) -> Scoring:
        return scoring(config, {name: read_items(config, name) for name in names}, adapter)

    knock_out_command(config, EXPERIMENT, locate(config), evaluation_name(config), of)


if __name__ == "__main__":
    launch.run(main, Config, CONF_MODULE, not_in_label=NOT_IN_LABEL)

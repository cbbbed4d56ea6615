"""A run without some of its subspaces: ``python -m commonsense_reasoning.knock_out scale=smoke method=moslora``.

Takes the arguments of ``evaluate``, whose evaluation it repeats, and ``evaluation.knock_out.*``
(moslora_core/knock_out_curve.py). The numbers go to ``knock_out/<evaluation>+<unit>.json`` of the run. A stopped
command goes on where it stopped.
"""

from __future__ import annotations

from moslora_core import launch
from moslora_core.knock_out_curve import knock_out_command

from .config import CONF_MODULE, EXPERIMENT, NOT_IN_LABEL, Config, locate
from .evaluate import check, evaluation_name, scoring


def main(config: Config) -> None:
    names = check(config)
    name = evaluation_name(config)
    knock_out_command(config, EXPERIMENT, locate(config), name, lambda adapter: scoring(config, names, adapter))


if __name__ == "__main__":
    launch.run(main, Config, CONF_MODULE, not_in_label=NOT_IN_LABEL)

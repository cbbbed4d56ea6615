"""What ``import moslora_core`` adds to ``import peft``: ``python benchmarks/imports.py``.

Each import is a process of its own, which times the statement; the two take turns.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from common import out_argument, report, run, side_by_side, spread

from moslora_core.arguments import Parser

WAYS = {"import peft": "import peft", "import moslora_core": "import moslora_core"}
TIMED = "import time; begin = time.perf_counter(); {}; print(time.perf_counter() - begin)"
AIM = 0.5  # seconds


def _seconds(statement: str) -> float:
    done = subprocess.run(
        [sys.executable, "-c", TIMED.format(statement)], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    return float(done.stdout.split()[-1])


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python benchmarks/imports.py", description=__doc__.split(":")[0])
    parser.add_argument("--rounds", type=int, default=10)
    out_argument(parser, "imports")
    arguments = parser.parse_args(argv)
    found = side_by_side(WAYS, arguments.rounds, measure=_seconds)
    peft, ours = found.values()
    added = spread(one - other for one, other in zip(ours, peft, strict=True))
    rows = [[way, spread(of).text(), ""] for way, of in found.items()]
    rows.append(["added by moslora_core", added.text(), AIM])
    report("imports", ["", "Seconds", "Aim"], rows, {"seconds": found, "added": added}, arguments.out)
    return 0


if __name__ == "__main__":
    run(main)

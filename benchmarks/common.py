"""What the benchmarks share: timing side by side, a table on standard output, and the same numbers as JSON.

Two ways of doing the same are timed in turn, round after round, and each round gives a ratio: what slows the machine
down for a while slows both, and the median of the ratios is what is reported, with its quartiles as the spread.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, TypeVar

from hydra import compose, initialize_config_module
from torch.utils.flop_counter import FlopCounterMode

from moslora_core import launch
from moslora_core.arguments import Parser
from moslora_core.errors import UserError
from moslora_core.record import environment, write_json

T = TypeVar("T")

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a number over the rounds."""

    median: float
    low: float
    high: float

    def text(self, decimals: int = 2) -> str:
        """``0.93 (0.91 to 0.95)``."""
        return f"{self.median:.{decimals}f} ({self.low:.{decimals}f} to {self.high:.{decimals}f})"


def spread(values: Iterable[float]) -> Spread:
    """Median and quartiles; a single value is all three."""
    found = sorted(values)
    if len(found) == 1:
        return Spread(found[0], found[0], found[0])
    low, median, high = statistics.quantiles(found, n=4, method="inclusive")
    return Spread(median, low, high)


def seconds(of: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call."""
    begin = time.perf_counter()
    of()
    return time.perf_counter() - begin


def side_by_side(
    ways: Mapping[str, T], rounds: int, warm_up: int = 1, measure: Callable[[T], float] = seconds
) -> dict[str, list[float]]:
    """Seconds of each way in each round.

    Every round runs each way once; the order turns from round to round, so that none is always behind another.

    Args:
        warm_up: rounds before, which are not counted.
        measure: runs a way and gives its seconds; by default a way is called.
    """
    names, found = list(ways), {name: [] for name in ways}
    for turn in range(-warm_up, rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            taken = measure(ways[name])
            if turn >= 0:
                found[name].append(taken)
    return found


def operations(of: Callable[[], Any]) -> int:
    """Floating-point operations of the products (of matrices, convolutions and attention) in a call."""
    with FlopCounterMode(display=False) as counter:
        of()
    return counter.get_total_flops()


def ratio(of: Sequence[float], to: Sequence[float]) -> Spread:
    """The ratios of two ways within their rounds."""
    return spread(one / other for one, other in zip(of, to, strict=True))


def markdown(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table, first column to the left."""
    lines = [headers, ["---", *["---:"] * (len(headers) - 1)], *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def report(name: str, headers: Sequence[str], rows: Sequence[Sequence[object]], numbers: Any, out: Path) -> None:
    """Prints the table, and writes the numbers behind it with what they were measured on.

    Args:
        name: of the benchmark.
        numbers: what JSON can hold, and spreads.
        out: the file to write.
    """
    sys.stdout.write(markdown(headers, rows))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, {"benchmark": name, "environment": environment(), "numbers": _plain(numbers)})


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return asdict(value) if isinstance(value, Spread) else value


def out_argument(parser: Parser, name: str) -> None:
    """Adds ``--out``, whose default is the committed file of the benchmark."""
    default = RESULTS / f"{name}.json"
    parser.add_argument(
        "--out", type=Path, default=default, help=f"JSON to write (default: {default.name} in results/)"
    )


def configuration(module: ModuleType, overrides: Sequence[str]) -> Any:
    """An experiment's configuration as its command line would have it.

    Args:
        module: the experiment's ``config``.
    """
    launch.register(module.Config)
    with initialize_config_module(module.CONF_MODULE, version_base="1.3"):
        return launch.instantiate(module.Config, compose("config", overrides=list(overrides)))


def run(main: Callable[[], int]) -> NoReturn:
    """A benchmark's ``__main__``: a mistake of the user ends in one line, as it does in the project's commands."""
    try:
        raise SystemExit(main())
    except UserError as error:
        launch.fail(error)

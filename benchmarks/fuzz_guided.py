"""One target of the fuzz run guided by coverage: ``python benchmarks/fuzz_guided.py 'answers: labels'``.

Needs atheris (``pip install atheris``), which no other part of the project does. Inputs that reach new code are kept
and changed further, as bytes: it suits what is parsed by hand, such as answers, and the headers of safetensors. It
ends with the first finding, whose input is written to the current folder, and is then to be given to
``python benchmarks/fuzz.py --replay``.
"""

from __future__ import annotations

import inspect
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from common import run
from fuzz import quietly
from fuzz_targets import EXPERIMENTS, targets

from moslora_core.arguments import Parser
from moslora_core.errors import UserError

PACKAGES = ("moslora_core", "analysis", *EXPERIMENTS)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python benchmarks/fuzz_guided.py", description=__doc__.split(":")[0])
    parser.add_argument("target", help="its name, as fuzz.py has it")
    parser.add_argument("--inputs", type=int, default=100_000, help="(default: 100000)")
    parser.add_argument("--seed", type=int, default=1, help="of the inputs (default: 1)")
    arguments = parser.parse_args(argv)
    try:
        import atheris
    except ImportError:
        raise UserError("atheris is not installed; pip install atheris") from None
    home = Path(tempfile.mkdtemp())
    found = {target.name: target for target in targets(home / "files")}
    if arguments.target not in found:
        raise UserError(f"no target {arguments.target!r}; expected one of {', '.join(found)}")
    target = found[arguments.target]
    for name, module in sys.modules.items():
        if name.split(".")[0] in PACKAGES:
            for _, function in inspect.getmembers(module, inspect.isfunction):
                if function.__module__ == name:
                    atheris.instrument_func(function)

    def one(content: bytes) -> None:
        try:
            target.read(content)
        except UserError:
            return

    corpus = home / "corpus"
    corpus.mkdir()
    for number, example in enumerate(target.examples):
        (corpus / str(number)).write_bytes(example)
    options = [f"-runs={arguments.inputs}", f"-seed={arguments.seed}", "-max_len=65536", "-timeout=20"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], one)
    with quietly():
        atheris.Fuzz()  # which ends the process
    return 0


if __name__ == "__main__":
    run(main)

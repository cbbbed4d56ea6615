"""``python -m subject_driven_t2i.human_study serve`` and ``export``; see the package."""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from moslora_core.errors import UserError
from moslora_core.launch import fail

from ..config import EXPERIMENT
from .design import draw_study, write_study
from .export import export
from .runs import find_arms
from .server import serve
from .study import STUDY_FILE, differences, read_study

_SERVE = """
Make a study from two finished runs of every subject, unless it is there already, and serve its page.

The methods are named as they were trained, or by the folders of their runs, one a subject:
  serve --scale smoke --subjects dog can --seed 1 --first method=moslora --second method=lora
  serve --scale smoke --name again --first RUN_OF_DOG RUN_OF_CAN --second RUN_OF_DOG RUN_OF_CAN
A study that was made before is served again, with its votes, by its name alone:
  serve --scale smoke --name again
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Ends with status 2 and one line on stderr for bad input."""
    given = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        folder = _folder(given)
        if given.command == "export":
            sys.stdout.write(f"{export(folder)}\n")
        else:
            _prepare(folder, given)
            serve(folder, given.host, given.port)
    except UserError as error:
        fail(error)


def _folder(given: argparse.Namespace) -> Path:
    for option in ("scale", "name"):
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", getattr(given, option)):
            raise UserError(f"--{option} {getattr(given, option)!r}: expected a name of letters, digits, - _ and .")
    return given.runs / EXPERIMENT / given.scale / "human_study" / given.name


def _prepare(folder: Path, given: argparse.Namespace) -> None:
    """Makes the study that is asked for, or makes sure that the one that is there is the same."""
    if given.first is None and given.second is None:
        read_study(folder)
        return
    if given.first is None or given.second is None:
        raise UserError("--first and --second belong together: name both methods, or neither to serve an old study")
    arms = find_arms(given.first, given.second, given.runs, given.scale, given.subjects, given.seed)
    draft = draw_study(
        *arms,
        name=given.name,
        prompts=given.prompts,
        images_per_prompt=given.images_per_prompt,
        checks=given.checks,
        seed=given.study_seed,
    )
    if not (folder / STUDY_FILE).is_file():
        write_study(folder, draft)
    elif found := differences(read_study(folder), draft.study):
        raise UserError(f"{folder} is another study: its {', '.join(found)} differ; choose another --name")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {EXPERIMENT}.human_study", description="The blind human study of Table 6."
    )
    commands = parser.add_subparsers(required=True, dest="command", metavar="WHAT")
    made = commands.add_parser(
        "serve",
        help="make a study and serve its page",
        description=_SERVE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _place(made)
    made.add_argument("--first", nargs="+", metavar="METHOD", help="method=<name> and its overrides, or run folders")
    made.add_argument("--second", nargs="+", metavar="METHOD", help="the method that it is compared with")
    made.add_argument("--subjects", nargs="+", default=[], help="their names (default: those of the run folders)")
    made.add_argument("--seed", type=int, default=0, help="seed of the runs (default: 0)")
    made.add_argument("--prompts", type=int, default=8, help="prompts of each subject, at random (default: 8)")
    made.add_argument("--images-per-prompt", type=int, default=1, help="images of each prompt (default: 1)")
    made.add_argument("--checks", type=int, default=4, help="attention checks (default: 4)")
    made.add_argument("--study-seed", type=int, default=0, help="seed of pairs, order and sides (default: 0)")
    made.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine alone)")
    made.add_argument("--port", type=int, default=8000, help="0 for a free one (default: 8000)")
    _place(commands.add_parser("export", help="write the votes as CSV", description="Write the votes as CSV."))
    return parser


def _place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of run records (default: runs)")
    parser.add_argument("--scale", default="smoke", help="scale of the runs (default: smoke)")
    parser.add_argument("--name", default="main", help="name of the study (default: main)")


if __name__ == "__main__":
    main()

"""Command lines with options: a parser whose mistakes are told in a line, as all others are."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from .errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse's parser, which raises a UserError where it would print its usage and end the process."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def write(self, argv: Sequence[str] | None, work: Callable[[argparse.Namespace], Path]) -> int:
        """A whole command that writes something and says where.

        Returns:
            Its exit status; 2 for a UserError of the arguments or of ``work``, which is told in a line.
        """
        try:
            written = work(self.parse_args(argv))
        except UserError as error:
            sys.stderr.write(f"error: {error}\n")
            return 2
        sys.stdout.write(f"{written}\n")
        return 0

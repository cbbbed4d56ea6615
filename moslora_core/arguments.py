"""Command lines with options: a parser whose mistakes are told in a line, as all others are."""

from __future__ import annotations

import argparse
from typing import NoReturn

from .errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse's parser, which raises a UserError where it would print its usage and end the process."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

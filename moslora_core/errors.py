"""The one exception for mistakes of the user: told in a line, without a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input: a wrong key, file, shape or state that the user can mend.

    The message is one line that names the file or key, what was found and what was expected. Command lines print it
    and exit with status 2 (see :mod:`moslora_core.launch`); library callers catch it as the ``ValueError`` that it is.
    """

    def __str__(self) -> str:  # a key, a name or what a library said may have line breaks
        return " ".join(map(str.strip, super().__str__().splitlines()))

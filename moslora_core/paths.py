"""Names of files that stand in files: where they may lead."""

from __future__ import annotations

from pathlib import Path

from .errors import UserError


def inside(folder: Path, name: str, where: str) -> Path:
    """The file ``name`` below ``folder``.

    Args:
        where: what named it: a file, a line of one.

    Raises:
        UserError: the name, or a link on its way, leads out of the folder.
    """
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{where}: file must lie in {folder}, found {name!r}")
    return path

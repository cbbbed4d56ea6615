"""Names of files that stand in files: where they may lead."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath

from .errors import UserError
from .typed import shown


def is_below(name: str) -> bool:
    """Whether a path in a file leads nowhere but down, on any system; links on its way are the user's own."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    return not (posix.is_absolute() or windows.drive or windows.root or ".." in (*posix.parts, *windows.parts))


def is_file(path: Path) -> bool:
    """Whether there is such a file; a name that is too long for the file system is that of none."""
    try:
        return path.is_file()
    except OSError:
        return False


def inside(folder: Path, name: str, where: str) -> Path:
    """The file ``name`` below ``folder``.

    Args:
        where: what named it: a file, a line of one.

    Raises:
        UserError: the name, or a link on its way, leads out of the folder.
    """
    path = folder / name
    try:
        lies_in = path.resolve().is_relative_to(folder.resolve())
    except (ValueError, OSError, RuntimeError):  # a NUL, a name that is too long, links in a circle
        lies_in = False
    if not lies_in:
        raise UserError(f"{where}: file must lie in {folder}, found {shown(name)}")
    return path

"""What can be wrong with a file before anybody looks at what it says, as rows of the tables of bad inputs."""

from __future__ import annotations

import functools
import io
import json
import struct
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from .row import BadInput, contents

_DEEP = 100_000

NOT_JSON: dict[str, bytes] = {
    "is empty": b"",
    "is cut off": b'[{"id": "0", "conv',
    "is not UTF-8": b'["\xff\xfe"]',
    "is UTF-16": "[]".encode("utf-16"),
    "has a NUL byte": b'["a\x00b"]',
    "has text after its end": b"[] []",
    "nests too deep": b"[" * _DEEP + b"]" * _DEEP,
    "is YAML": b"- id: 0\n",
}


def png(size: tuple[int, int] = (6, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(size, 90).save(buffer, format="PNG")
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG of a hundred bytes that claims 900 million pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


NOT_IMAGES = {
    "is empty": b"",
    "is a text": b"<html>404</html>",
    "is cut off": png((64, 64))[:600],
    "has a wrong checksum": png()[:40] + b"\xff" + png()[41:],
    "claims 900 million pixels": bomb(),
}


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path


def instead(file: str, before: Callable[[Path], object], content: bytes) -> Callable[[Path], object]:
    """Writes what ``before`` writes, and ``content`` in place of one of its files."""

    def write(folder: Path) -> None:
        before(folder)
        put(folder / file, content)

    return write


def once(write: Callable[[Path], object]) -> Callable[[Path], None]:
    """``write``, called once in all; its files are copied for every row."""

    @functools.cache
    def written() -> dict[str, bytes]:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder))
            return contents(Path(folder))

    def copy(folder: Path) -> None:
        for name, content in written().items():
            put(folder / name, content)

    return copy


# What JSON can say and Python's writer cannot; an edit puts the name where the value is to stand.
LITERALS = {"<1e400>": "1e400", "<huge>": "9" * 5000, "<half>": r'"\ud800"'}


def edited(file: str, before: Callable[[Path], object], change: Callable[[Any], object]) -> Callable[[Path], object]:
    """Writes what ``before`` writes, and changes the content of one of its JSON files, or of every line of a log."""

    def text(line: str) -> str:
        raw = json.loads(line)
        change(raw)
        found = json.dumps(raw)
        for name, literal in LITERALS.items():
            found = found.replace(json.dumps(name), literal)
        return found

    def write(folder: Path) -> None:
        before(folder)
        path = folder / file
        content = path.read_text(encoding="utf-8")
        put(path, "".join(f"{text(line)}\n" for line in content.splitlines()) if ".jsonl" in file else text(content))

    return write


def unreadable(
    what: str,
    file: str,
    before: Callable[[Path], object],
    read: Callable[[Path], object],
    contents: dict[str, bytes] = NOT_JSON,
    names: tuple[str, ...] | None = None,
) -> list[BadInput]:
    """Rows of one file: not there, a folder, and everything that is not JSON.

    Args:
        before: writes everything as it should be.
        names: see :class:`BadInput`; the file's name by default.
    """
    names = (Path(file).name,) if names is None else names

    def remove(folder: Path) -> None:
        before(folder)
        (folder / file).unlink()

    def replace(folder: Path) -> None:
        remove(folder)
        (folder / file).mkdir()

    return [
        BadInput(f"{what} is absent", remove, read, names),
        BadInput(f"{what} is a folder", replace, read, names),
        *(BadInput(f"{what} {wrong}", instead(file, before, bad), read, names) for wrong, bad in contents.items()),
    ]

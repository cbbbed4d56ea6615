"""Damaged files: valid ones with a few changes of what they say, of their bytes, or of both."""

from __future__ import annotations

import copy
import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from hypothesis import strategies as st

# What no tree can be dumped with stands in its text afterwards: nested too deeply, too many digits for Python's int.
_AFTERWARDS = {b"@deep@": b"[" * 2000 + b"]" * 2000, b"@huge@": b"9" * 5000}
_MARKS = re.compile(rb"""['"]?(@deep@|@huge@)['"]?""")

_TEXT = st.text(st.characters(exclude_categories=()), max_size=8)  # with lone surrogates
_VALUE = st.one_of(
    st.sampled_from([None, True, False, 0, -1, 1, 2, 0.5, 1e-3, 2**63, 10**400, 1e308, float("nan"), float("-inf")]),
    st.sampled_from(["", " ", "0", "1e3", "nan", "@deep@", "@huge@", "../x", "/etc", "x\ny", "\x00", "\ud800", "é"]),
    st.sampled_from(["{", "{0}", "{0.x}", "(", "a|b", "???", "${x}", "default", "method", "2001-99-99", "x" * 300]),
    st.sampled_from([[], {}, [[]], [None], ["a", 1], {"": None}, {"a": {"b": [1]}}]),
    st.integers(),
    st.floats(),
    _TEXT,
).map(copy.deepcopy)
_KEY = st.one_of(st.sampled_from(["", "name", "id", "default", "0", "a.b", "\ud800", "x" * 300]), _TEXT)
_BYTES = st.one_of(
    st.binary(min_size=1, max_size=8),
    st.sampled_from(
        [
            *(b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\r", b"\n", b"\t", b'"', b"'", b",", b":"),
            *(b"{", b"}", b"[", b"]", b"NaN", b"1e999", b"-", b"null", b"../", b"{0.x}", b"\\ud800", b"9" * 5000),
            *(
                b"!!python/name:os.system",
                b"!!timestamp 2001-99-99",
                b"&a [*a]",
                b"<<: 1",
                b"? [a]",
                b"- ",
                b"%",
                b"$",
            ),
        ]
    ),
)


@dataclass(frozen=True)
class Form:
    """How a file is taken apart into lists, dictionaries and values, and put together again."""

    load: Callable[[bytes], Any]
    dump: Callable[[Any], bytes]


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _lines(content: bytes) -> list[bytes]:
    return [line for line in content.split(b"\n") if line]


def _rows(tree: Any) -> list[Any]:
    return tree if isinstance(tree, list) else [tree]


def _table(delimiter: str) -> Form:
    def dump(rows: Any) -> bytes:
        text = io.StringIO()
        writer = csv.writer(text, delimiter=delimiter, lineterminator="\n")
        for row in _rows(rows):
            writer.writerow(_rows(row))
        return _encoded(text.getvalue())

    return Form(lambda content: list(csv.reader(io.StringIO(content.decode()), delimiter=delimiter)), dump)


def _load_safetensors(content: bytes) -> Any:
    end = 8 + int.from_bytes(content[:8], "little")
    return [json.loads(content[8:end]), content[end:].decode("latin-1")]


def _dump_safetensors(tree: Any) -> bytes:
    header, data = tree if isinstance(tree, list) and len(tree) == 2 else (tree, "")
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + str(data).encode("latin-1", "replace")


def _dump_objects(rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in _rows(rows))


def _dump_overrides(tree: Any) -> bytes:
    entries = tree.items() if isinstance(tree, dict) else [(tree, "")]
    given = [(key, value if isinstance(value, str) else json.dumps(value)) for key, value in entries]
    return b"\n".join(_encoded(f"{key}={value}") for key, value in given)


JSON = Form(json.loads, lambda tree: json.dumps(tree).encode())
JSONL = Form(lambda content: [json.loads(line) for line in _lines(content)], _dump_objects)
YAML = Form(yaml.safe_load, lambda tree: yaml.safe_dump(tree).encode())
TSV, CSV = _table("\t"), _table(",")
LINES = Form(lambda content: content.decode().split("\n"), lambda tree: _encoded("\n".join(map(str, _rows(tree)))))
SAFETENSORS = Form(_load_safetensors, _dump_safetensors)
OVERRIDES = Form(lambda content: dict(line.decode().split("=", 1) for line in _lines(content)), _dump_overrides)


def inputs(form: Form | None, examples: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """Damaged examples, and some as they are.

    Args:
        form: of the files; None where they have no parts that are known.
    """

    @st.composite
    def damaged(draw: Callable[[st.SearchStrategy], Any]) -> bytes:
        content = draw(st.sampled_from(examples))
        what = draw(st.sampled_from(["tree"] * 6 + ["bytes"] * 3 + ["both"]))
        if form is not None and what != "bytes":
            tree = [form.load(content)]
            for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2, 3]))):
                _change(draw, tree)
            content = _MARKS.sub(lambda mark: _AFTERWARDS[mark[1]], form.dump(tree[0]))
        if form is None or what != "tree":
            for _ in range(draw(st.sampled_from([0 if form is None else 1, 1, 1, 2, 3]))):
                content = _change_bytes(draw, content)
        return content

    return damaged()


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every container with each of its keys or indices, from the top down."""
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(value, dict | list):
            yield from _places(value)


def _change(draw: Callable[[st.SearchStrategy], Any], tree: list[Any]) -> None:
    """One change somewhere below ``tree``, which has the whole as its only entry."""
    places = list(_places(tree))
    inside, key = draw(st.sampled_from(places))
    how = draw(st.sampled_from(["replace", "replace", "copy", "drop", "rename", "add"]))
    if how == "replace" or (inside is tree and how in ("drop", "rename")):
        inside[key] = draw(_VALUE)
    elif how == "copy":
        there, other = draw(st.sampled_from(places))
        inside[key] = copy.deepcopy(there[other])
    elif how == "drop":
        del inside[key]
    elif how == "rename" and isinstance(inside, dict):
        inside[draw(_KEY)] = inside.pop(key)
    elif isinstance(inside[key], dict):
        inside[key][draw(_KEY)] = draw(_VALUE)
    elif isinstance(inside[key], list):
        inside[key].append(draw(_VALUE) if not inside[key] else copy.deepcopy(inside[key][0]))
    else:
        inside[key] = [inside[key]]


def _change_bytes(draw: Callable[[st.SearchStrategy], Any], content: bytes) -> bytes:
    at = draw(st.integers(0, len(content)))
    how = draw(st.sampled_from(["flip", "insert", "insert", "overwrite", "cut", "end"]))
    if how == "flip" and at < len(content):
        return content[:at] + bytes([content[at] ^ 1 << draw(st.integers(0, 7))]) + content[at + 1 :]
    if how == "end":
        return content[:at]
    if how == "cut":
        return content[:at] + content[at + draw(st.integers(1, 40)) :]
    new = draw(_BYTES)
    return content[:at] + new + content[at + (len(new) if how == "overwrite" else 0) :]

"""The fuzz run in short: every target of it, and that it finds what there is to find."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from moslora_core.errors import UserError

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def fuzz(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("fuzz")


@pytest.mark.slow
def test_nothing_but_a_refusal_comes_of_damaged_input(fuzz, tmp_path):
    accepted = {}
    for target in fuzz.targets(tmp_path):
        tally = fuzz.fuzz(target, max(2, round(10 * target.weight)))
        assert not tally.findings, target.name
        accepted[target.area] = accepted.get(target.area, 0) + tally.accepted
    assert min(accepted.values()) > 0  # what refuses everything at its first byte tests nothing behind it


def planted(content: bytes) -> None:
    """Refuses what is no object, and forgets that a name may be something else than text."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        raise UserError("no JSON") from None
    if not isinstance(value, dict):
        raise UserError("no object")
    value.get("name", "").strip()


def test_a_fault_is_found_kept_and_raised_again(fuzz, tmp_path, monkeypatch, capsys):
    form = importlib.import_module("fuzz_inputs").JSON
    target = fuzz.Target("planted: name", form, [b'{"name": "a", "r": [1, 2]}'], planted)
    monkeypatch.setattr(fuzz, "targets", lambda home: [target])
    arguments = ["--inputs", "300", "--findings", str(tmp_path / "found"), "--out", str(tmp_path / "fuzz.json")]
    assert fuzz.main(arguments) == 1
    (file,) = (tmp_path / "found").iterdir()
    numbers = json.loads((tmp_path / "fuzz.json").read_text())["numbers"]["targets"]["planted: name"]
    assert numbers["inputs"] == 300 and numbers["refused"] > 0 and numbers["accepted"] > 0
    assert [error["error"].split(":")[0] for error in numbers["errors"]] == ["AttributeError"]
    assert f"--replay {file}" in capsys.readouterr().err
    with pytest.raises(AttributeError):
        fuzz.main(["--replay", str(file)])


def test_an_input_that_takes_too_long_is_found(fuzz, monkeypatch):
    def endless(content: bytes) -> None:
        while True:
            pass

    monkeypatch.setattr(fuzz, "LIMIT", 1)
    tally = fuzz.Tally()
    fuzz.take(fuzz.Target("endless: loop", None, [b""], endless), b"", tally)
    assert [finding.error.split(":")[0] for finding in tally.findings.values()] == ["TimeoutError"]


def test_the_same_seed_draws_the_same_inputs(fuzz):
    def drawn(seed: int) -> list[bytes]:
        seen = []
        target = fuzz.Target("seen: all", None, [b"abc", b"defghi"], seen.append)
        fuzz.fuzz(target, 40, seed)
        return seen

    assert drawn(0) == drawn(0) != drawn(1)


@pytest.mark.skipif(importlib.util.find_spec("atheris") is not None, reason="atheris is installed")
def test_guiding_by_coverage_says_what_it_needs(fuzz):
    with pytest.raises(UserError, match="pip install atheris"):
        importlib.import_module("fuzz_guided").main(["answers: labels"])

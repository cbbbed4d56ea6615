"""The export says in terms of the methods what was clicked; the commands make a study, serve it, and export it."""

from __future__ import annotations

import csv
import sqlite3

import pytest

from subject_driven_t2i.human_study import __main__ as command
from subject_driven_t2i.human_study import server, store
from subject_driven_t2i.human_study.study import read_study

from .study_runs import place_runs

SERVE = ["serve", "--subjects", "rex", "fizz", "--seed", "1", "--prompts", "2", "--checks", "2"]
METHODS = ["--first", "method=moslora", "--second", "method=lora"]
QUESTIONS = ("subject_similarity", "prompt_consistency")


@pytest.fixture
def runs(tmp_path):
    return place_runs(tmp_path, ["rex", "fizz"])


@pytest.fixture
def served(monkeypatch):
    """The folders that the server would have served."""
    folders = []
    monkeypatch.setattr(command, "serve", lambda folder, host, port: folders.append(folder))
    return folders


def call(runs, *arguments):
    command.main([*arguments, "--runs", str(runs)])


def refused(capsys, runs, *arguments) -> str:
    with pytest.raises(SystemExit) as caught:
        call(runs, *arguments)
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    return message


def table(path):
    with open(path, encoding="utf-8", newline="") as file:
        return [*csv.DictReader(file)]


def test_one_command_makes_a_study_and_serves_it_again(runs, served, capsys):
    call(runs, *SERVE, *METHODS)
    folder = runs / "subject_driven_t2i" / "smoke" / "human_study" / "main"
    study = read_study(folder)
    call(runs, *SERVE, *METHODS)  # the same again
    call(runs, "serve")  # by its name alone
    assert served == [folder] * 3 and read_study(folder) == study
    for more, parts in (
        (["--study-seed", "1"], "seed, pairs"),
        (["--prompts", "3"], "prompts, pairs"),
    ):
        message = refused(capsys, runs, *SERVE, *METHODS, *more)
        assert f"is another study: its {parts} differ; choose another --name" in message
    call(runs, *SERVE, *METHODS, "--study-seed", "1", "--name", "other")
    assert served[-1].name == "other"
    assert served[:-1] == [folder] * 3


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["serve"], "no study at "),
        (["serve", "--first", "method=lora"], "--first and --second belong together"),
        (["serve", "--name", "../x"], "--name '../x': expected a name of letters"),
        (["serve", "--scale", "a/b"], "--scale 'a/b': expected a name of letters"),
        (
            ["serve", "--subjects", "rex", "--first", "method=dora", "--second", "method=lora"],
            "rex, --first: no run at",
        ),
        (["export"], "no study at "),
    ],
)
def test_bad_input_ends_in_one_line(runs, served, capsys, arguments, expected):
    assert expected in refused(capsys, runs, *arguments)
    assert served == [] and not (runs / "subject_driven_t2i" / "smoke" / "human_study").exists()


def test_votes_are_exported_in_terms_of_the_methods(runs, served, capsys):
    call(runs, *SERVE, *METHODS)
    (folder,) = served
    study = read_study(folder)
    assert "was never served" in refused(capsys, runs, "export")
    store.open_store(folder)
    pairs = {pair.id: pair for pair in study.pairs}
    # The first rater always prefers the first image; the second says left, and changes that once.
    for rater in (1, 2):
        store.add_rater(folder, study)
        for screen in store.screens_of(folder, rater):
            for question in QUESTIONS:
                preferred = "right" if screen.swapped else "left"
                store.vote(folder, rater, screen.pair, question, preferred if rater == 1 else "left")
    changed = store.screens_of(folder, 2)[0].pair
    store.vote(folder, 2, changed, "prompt_consistency", "tie")
    call(runs, "export")
    assert capsys.readouterr().out == f"{folder / 'votes.csv'}\n"
    rows = table(folder / "votes.csv")
    assert len(rows) == 2 * 6 * 2
    assert [(row["rater"], row["position"], row["question"]) for row in rows] == [
        (f"{rater:03d}", str(position), question)
        for rater in (1, 2)
        for position in range(1, 7)
        for question in QUESTIONS
    ]
    for row in rows:
        pair = pairs[row["pair"]]
        assert (row["kind"], row["subject"], row["prompt"]) == (pair.kind, pair.subject, pair.prompt)
        assert row["index"] == ("" if pair.index is None else str(pair.index))
        swapped = {screen.pair: screen.swapped for screen in store.screens_of(folder, int(row["rater"]))}[pair.id]
        assert (row["left"], row["right"]) == (("second", "first") if swapped else ("first", "second"))
        expected = pair.expected.get(row["question"], "")
        assert row["expected"] == expected and row["correct"] == (
            str(int(row["winner"] == expected)) if expected else ""
        )
        if row["rater"] == "001":
            assert row["winner"] == "first" and row["changes"] == "0"
        elif (row["pair"], row["question"]) == (changed, "prompt_consistency"):
            assert (row["choice"], row["winner"], row["changes"]) == ("tie", "tie", "1")
        else:
            assert (row["choice"], row["winner"]) == ("left", row["left"])
    text = (folder / "votes.csv").read_text("utf-8")
    codes = [code for (code,) in _codes(folder)]
    assert len(codes) == 2 and not any(code in text for code in codes)


def _codes(folder):
    with sqlite3.connect(folder / store.VOTES_FILE) as connection:
        return connection.execute("SELECT code FROM raters").fetchall()


def test_a_study_without_votes_has_an_empty_export(runs, served, capsys):
    call(runs, *SERVE, *METHODS)
    store.open_store(served[0])
    call(runs, "export")
    assert table(served[0] / "votes.csv") == []


def test_damaged_votes_end_the_export_and_the_server_in_one_line(runs, served, monkeypatch, capsys):
    call(runs, *SERVE, *METHODS)
    (served[0] / store.VOTES_FILE).write_text("no database" * 1000)
    monkeypatch.setattr(command, "serve", server.serve)
    for arguments in (["export"], ["serve", "--port", "0"]):
        assert f"{served[0] / store.VOTES_FILE}: file is not a database" in refused(capsys, runs, *arguments)
    assert not (served[0] / "votes.csv").exists()


def test_votes_of_another_study_are_refused(runs, served, monkeypatch, capsys):
    call(runs, *SERVE, *METHODS)
    call(runs, *SERVE, *METHODS, "--prompts", "4", "--name", "larger")
    small, large = served
    store.open_store(large)
    store.add_rater(large, read_study(large))
    store.vote(large, 1, read_study(large).pairs[-1].id, QUESTIONS[0], "left")
    (large / store.VOTES_FILE).rename(small / store.VOTES_FILE)
    monkeypatch.setattr(command, "serve", server.serve)
    for arguments in (["export"], ["serve", "--port", "0"]):
        assert "votes on pair 007, which is not of the study" in refused(capsys, runs, *arguments)
    (large / store.VOTES_FILE).unlink(missing_ok=True)
    store.open_store(large)
    store.add_rater(large, read_study(small))
    store.vote(large, 1, read_study(small).pairs[0].id, QUESTIONS[0], "left")
    (large / store.VOTES_FILE).rename(small / store.VOTES_FILE)
    with sqlite3.connect(small / store.VOTES_FILE) as connection:
        connection.execute("UPDATE votes SET question = 'beauty'")
    assert "votes on question beauty, which is not of the study" in refused(capsys, runs, "export")

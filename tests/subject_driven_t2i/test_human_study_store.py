"""Votes are kept: each once, with its history, whoever else votes at the time and whenever the process dies."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
from concurrent.futures import ThreadPoolExecutor

import pytest

from moslora_core.errors import UserError
from subject_driven_t2i.human_study import store
from subject_driven_t2i.human_study.study import read_study, screens

from .study_runs import place_study


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return place_study(tmp_path_factory.mktemp("study"))


@pytest.fixture
def folder(made, tmp_path):
    """A folder of votes of its own."""
    store.open_store(tmp_path)
    return tmp_path


def rows(folder, query):
    with sqlite3.connect(folder / store.VOTES_FILE) as connection:
        return connection.execute(query).fetchall()


def begin(folder, made):
    code = store.add_rater(folder, read_study(made))
    return code, store.find_rater(folder, code)


def test_raters_get_codes_and_the_screens_of_their_number(folder, made):
    study = read_study(made)
    found = [begin(folder, made) for _ in range(3)]
    assert [rater for _, rater in found] == [1, 2, 3]
    assert len({code for code, _ in found}) == 3 and all(len(code) == 8 for code, _ in found)
    for _, rater in found:
        assert store.screens_of(folder, rater) == screens(study, rater)
    assert store.find_rater(folder, "nobody") is None


def test_a_later_vote_replaces_an_earlier_one_and_the_history_has_both(folder, made):
    _, rater = begin(folder, made)
    for choice in ("left", "right", "tie"):
        store.vote(folder, rater, "001", "subject_similarity", choice)
    store.vote(folder, rater, "001", "prompt_consistency", "left")
    assert store.votes_of(folder, rater) == {
        ("001", "subject_similarity"): "tie",
        ("001", "prompt_consistency"): "left",
    }
    assert rows(folder, "SELECT choice FROM history ORDER BY id") == [("left",), ("right",), ("tie",), ("left",)]
    votes = store.all_votes(folder, read_study(made).questions)
    assert [(vote.question, vote.choice, vote.changes) for vote in votes] == [
        ("subject_similarity", "tie", 2),
        ("prompt_consistency", "left", 0),
    ]


def test_the_same_vote_again_is_no_change(folder, made):
    _, rater = begin(folder, made)
    for choice in ("left", "left", "right", "right"):
        store.vote(folder, rater, "001", "subject_similarity", choice)
    assert rows(folder, "SELECT choice FROM history ORDER BY id") == [("left",), ("right",)]
    (found,) = store.all_votes(folder, read_study(made).questions)
    assert (found.choice, found.changes) == ("right", 1)


def test_a_clock_that_goes_backwards_changes_neither_order_nor_what_counts(folder, made, monkeypatch):
    _, rater = begin(folder, made)
    order = [screen.pair for screen in store.screens_of(folder, rater)]
    cast = [*((pair, "left") for pair in order), (order[0], "right")]
    for number, (pair, choice) in enumerate(cast):
        monkeypatch.setattr(store, "_now", lambda number=number: f"{2040 - number}-01-01T00:00:00+00:00")
        store.vote(folder, rater, pair, "subject_similarity", choice)
    votes = store.all_votes(folder, read_study(made).questions)
    assert [(vote.pair, vote.choice) for vote in votes] == [(order[0], "right"), *cast[1:-1]]
    assert rows(folder, "SELECT pair, choice FROM history ORDER BY id") == cast


def test_a_vote_on_what_the_rater_does_not_see_is_refused(folder, made):
    _, rater = begin(folder, made)
    for bad in ((rater, "999", "subject_similarity", "left"), (rater, "001", "subject_similarity", "up")):
        with pytest.raises(sqlite3.IntegrityError):
            store.vote(folder, *bad)
    assert rows(folder, "SELECT COUNT(*) FROM history") == [(0,)]


def test_many_raters_vote_at_once(folder, made):
    study = read_study(made)

    def rate(_):
        code, rater = begin(folder, made)
        for screen in store.screens_of(folder, rater):
            for question in study.questions:
                store.vote(folder, rater, screen.pair, question, "left")
        return code

    with ThreadPoolExecutor(6) as pool:
        codes = set(pool.map(rate, range(6)))
    assert len(codes) == 6
    votes = store.all_votes(folder, study.questions)
    assert len(votes) == 6 * len(study.pairs) * 2 and {vote.rater for vote in votes} == set(range(1, 7))


def vote_forever(folder, rater, pairs, report):
    while True:
        for choice in store.CHOICES:
            for pair in pairs:
                store.vote(folder, rater, pair, "subject_similarity", choice)
                os.write(report, f"{pair} {choice}\n".encode())


def test_no_vote_that_was_taken_is_lost_when_the_process_is_killed(folder, made):
    _, rater = begin(folder, made)
    pairs = [pair.id for pair in read_study(made).pairs]
    mouth, report = os.pipe()
    child = multiprocessing.get_context("fork").Process(target=vote_forever, args=(folder, rater, pairs, report))
    child.start()
    os.close(report)
    with os.fdopen(mouth) as lines:
        taken = [lines.readline() for _ in range(20)]
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        taken += lines.readlines()
    taken = [tuple(line.split()) for line in taken if line.endswith("\n")]
    store.open_store(folder)
    assert rows(folder, "PRAGMA integrity_check") == [("ok",)]
    history = rows(folder, "SELECT pair, choice FROM history ORDER BY id")
    assert len(taken) >= 20 and len(history) - len(taken) in (0, 1)  # the last may be kept and not reported
    assert history[: len(taken)] == taken
    last = dict(history)
    assert store.votes_of(folder, rater) == {(pair, "subject_similarity"): last[pair] for pair in last}


def test_a_study_takes_so_many_raters_and_no_more(folder, made, monkeypatch):
    monkeypatch.setattr(store, "MOST_RATERS", 1)
    begin(folder, made)
    with pytest.raises(store.Full):
        begin(folder, made)


def test_a_file_that_is_no_database_is_named(tmp_path):
    (tmp_path / store.VOTES_FILE).write_text("no database, but long enough to be looked at as one" * 100)
    with pytest.raises(UserError, match=r"votes.sqlite: file is not a database; expected the votes of a study"):
        store.open_store(tmp_path)
    with pytest.raises(UserError, match=r"votes.sqlite: unable to open database file"):
        store.open_store(tmp_path / "absent")


@pytest.mark.parametrize(
    "harm",
    [
        lambda content: content[:-2000],
        lambda content: content[:4096] + bytes(len(content) - 4096),
        lambda content: content.replace(b"similarityleft", b"similaritylef\xf4"),
        lambda content: content.replace(b"similarityleft", b"similaritylift"),
    ],
    ids=["cut off", "overwritten", "no text", "no choice"],
)
def test_damage_inside_the_database_is_found_in_a_line(folder, made, harm):
    _, rater = begin(folder, made)
    store.vote(folder, rater, "001", "subject_similarity", "left")
    path = folder / store.VOTES_FILE
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(UserError, match=f"{path}: .*; expected the votes of a study") as caught:
        store.open_store(folder)
    assert "\n" not in str(caught.value)

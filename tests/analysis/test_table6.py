"""Table 6 from studies: against numbers counted from the same votes, with votes missing, and with damaged files."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter

import numpy as np
import pandas as pd
import pytest

from analysis.load import load_runs
from analysis.paper import load_paper_numbers
from analysis.table6 import build
from subject_driven_t2i.human_study import store
from subject_driven_t2i.human_study.export import export
from subject_driven_t2i.human_study.study import read_study

from ..subject_driven_t2i.study_runs import place_study

NUMBERS = load_paper_numbers()
QUESTIONS = {"subject_similarity": "Subject similarity", "prompt_consistency": "Prompt consistency"}
SUBJECTS = ("cat", "dog", "sloth", "can")
FIELDS = ("rater", "pair", "question", "choice", "winner", "expected")


class Studies:
    """Studies below a folder of runs, with chosen votes."""

    def __init__(self, root):
        self.root = root

    def add(self, votes, name="main", scale="smoke", subjects=SUBJECTS, pairs=8, label="default", max_wrong=0.25):
        """``votes`` has (rater, pair, question, winner); pairs are numbered by subject, then two checks follow."""
        folder = self.root / "subject_driven_t2i" / scale / "human_study" / name
        folder.mkdir(parents=True)
        designed = [
            {"id": f"{number:03d}", "kind": "pair", "subject": subject}
            for number, subject in enumerate((s for s in subjects for _ in range(pairs)), start=1)
        ]
        designed += [{"id": kind, "kind": kind, "subject": subjects[0]} for kind in ("same", "other")]
        methods = {"first": {"method": "moslora", "label": label}, "second": {"method": "lora", "label": "default"}}
        design = {"schema_version": 1, **methods, "pairs": designed}
        design |= {
            "questions": [*QUESTIONS],
            "subjects": {subject: {} for subject in subjects},
            "max_wrong": max_wrong,
        }
        (folder / "study.json").write_text(json.dumps(design), encoding="utf-8")
        if votes is not None:
            with open(folder / "votes.csv", "w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(FIELDS)
                for rater, pair, question, winner in votes:
                    choice = {"first": "left", "second": "right", "tie": "tie"}[winner]
                    writer.writerow([rater, pair, question, choice, winner, expected_of(pair, question)])
        return folder

    def page(self, **given):
        (page,) = build(self.root, given.get("scale"), [], [], NUMBERS)
        return page


def expected_of(pair, question):
    return {"same": "tie", "other": "first" if question == "subject_similarity" else ""}.get(pair, "")


def attentive(rater):
    return [
        (rater, pair, question, expected_of(pair, question) or "tie")
        for pair in ("same", "other")
        for question in QUESTIONS
    ]


def random_votes(raters=15, pairs=32, seed=0, weights=(0.45, 0.44, 0.11)):
    generator = np.random.default_rng(seed)
    return [
        vote
        for rater in range(1, raters + 1)
        for vote in (
            *(
                (f"{rater:03d}", f"{pair:03d}", question, str(generator.choice(["first", "tie", "second"], p=weights)))
                for pair in range(1, pairs + 1)
                for question in QUESTIONS
            ),
            *attentive(f"{rater:03d}"),
        )
    ]


@pytest.fixture
def studies(tmp_path):
    return Studies(tmp_path)


def grids(page):
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", page.markdown, re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in block.splitlines()]
        found.append(pd.DataFrame(rows[2:], columns=[header.strip() for header in rows[0]]))
    return found


def csv_of(page):
    frame = pd.read_csv(io.StringIO(page.csv), keep_default_na=False, na_values=[""])
    return frame[frame.origin == "measured"], frame[frame.origin == "paper"]


def test_shares_are_counted_by_subject_and_their_mean(studies):
    votes = random_votes()
    studies.add(votes)
    page = studies.page()
    table = grids(page)[0].set_index(["Question", "Subject"])
    assert list(table.columns) == ["Votes", "moslora wins", "Tie", "lora wins", "Difference"]
    measured, _ = csv_of(page)
    measured = measured[measured.resampled == "raters and pairs"].set_index(["question", "subject", "column"])
    for question, title in QUESTIONS.items():
        means = Counter()
        for number, subject in enumerate(SUBJECTS):
            ids = {f"{pair:03d}" for pair in range(8 * number + 1, 8 * number + 9)}
            count = Counter(winner for _, pair, asked, winner in votes if pair in ids and asked == question)
            assert count.total() == 15 * 8
            row = table.loc[title, subject]
            assert row["Votes"] == "120"
            for winner, column, key in (
                ("first", "moslora wins", "moslora_wins"),
                ("tie", "Tie", "tie"),
                ("second", "lora wins", "lora_wins"),
            ):
                share = 100 * count[winner] / 120
                means[key] += share / 4
                line = measured.loc[question, subject, key]
                assert line.value == pytest.approx(share) and line.low < share < line.high and line.n == 120
                assert row[column] == f"{share:.1f} ({line.low:.1f} to {line.high:.1f})"
            difference = 100 * (count["first"] - count["second"]) / 120
            assert row["Difference"].startswith(f"{difference:+.1f} (" if difference else "0.0 (")
        for key, mean in means.items():
            line = measured.loc[question, "mean", key]
            assert line.value == pytest.approx(mean) and line.n == 480
        assert table.loc[title, "mean"]["moslora wins"].startswith(f"{means['moslora_wins']:.1f} (")
    assert "Raters: 15; subjects: 4; pairs: 32, and 2 attention checks; questions: 2." in page.markdown
    assert "‡" not in page.markdown


def test_the_difference_is_told_by_raters_and_by_pairs(studies):
    # Raters are of one mind and pairs are not: other raters would say the same, other pairs would not.
    winners = ["first", "first", "tie", "second"] * 8
    votes = [(f"{r:03d}", f"{p:03d}", q, winners[p - 1]) for r in range(1, 9) for p in range(1, 33) for q in QUESTIONS]
    studies.add(votes)
    page = studies.page()
    row = grids(page)[1].iloc[0]
    assert row["Difference"] == "+25.0" and row["Resampling raters"] == "+25.0 to +25.0"
    low, high = (float(end) for end in row["Resampling pairs"].split(" to "))
    assert low < 15 and high > 35
    assert row["Pairs for either (even)"] == "16 : 8 (8)" and row["Raters for either (even)"] == "8 : 0 (0)"
    assert (row["Pairs: p"], row["Pairs: p (Holm)"]) == ("0.152", "0.303")
    assert (row["Raters: p"], row["Raters: p (Holm)"]) == ("0.008", "0.016")
    agreeing = grids(page)[2].iloc[0]
    assert (agreeing["Alike (%)"], agreeing["Krippendorff's alpha"]) == ("100.0", "1.00")


@pytest.mark.parametrize(
    ("winners", "raters", "expected"),
    [
        (["first", "tie", "tie", "first"] * 8, 5, "moslora is preferred"),
        (["second", "tie", "tie", "second"] * 8, 5, "lora is preferred"),
        (["first", "second", "tie", "tie"] * 8, 5, "cannot be told"),
        (["first"] * 4 + ["tie"] * 28, 5, "cannot be told"),  # four pairs are too few for the sign test
        (["first", "tie", "tie", "first"] * 8, 1, "cannot be told"),  # of other raters one rater says nothing
    ],
)
def test_a_preference_needs_the_interval_and_the_sign_test(studies, winners, raters, expected):
    studies.add(
        [
            (f"{rater:03d}", f"{pair:03d}", question, winner)
            for rater in range(1, raters + 1)
            for pair, winner in enumerate(winners, start=1)
            for question in QUESTIONS
        ]
    )
    for title in QUESTIONS.values():
        assert f"- {title}: {expected}.\n" in studies.page().markdown


def test_inattentive_raters_are_left_out_by_the_studys_rule_and_named(studies):
    votes = [("001", "001", "subject_similarity", "first"), *attentive("001")]
    # The second misses one of three attention questions, the third one of two.
    votes += [("002", "001", "subject_similarity", "second"), *attentive("002")[1:]]
    votes += [("002", "same", "subject_similarity", "first")]
    votes += [("003", "001", "subject_similarity", "tie"), ("003", "same", "subject_similarity", "tie")]
    studies.add(votes, max_wrong=0.4)
    table = grids(studies.page())[0].set_index(["Question", "Subject"])
    assert table.loc["Subject similarity", "cat"]["Votes"] == "3‡"
    assert "Rater 002: 1 of 3 attention questions wrong, kept." in studies.page().markdown
    (studies.root / "subject_driven_t2i/smoke/human_study/main").rename(studies.root / "away")
    studies.add(votes, max_wrong=0.3)
    page = studies.page()
    row = grids(page)[0].set_index(["Question", "Subject"]).loc["Subject similarity", "cat"]
    assert row["Votes"] == "2‡" and row["moslora wins"].startswith("50.0") and row["lora wins"].startswith("0.0")
    assert "(more than 30% of a rater's attention questions wrong, as the study set before its first vote): 002." in (
        page.markdown
    )
    assert "Rater 002: 1 of 3 attention questions wrong, left out." in page.markdown
    assert "Rater 001:" not in page.markdown and "Rater 003:" not in page.markdown


def test_a_rater_at_the_limit_of_the_rule_is_kept(studies):
    half = [("001", "same", "subject_similarity", "first"), ("001", "same", "prompt_consistency", "tie")]
    studies.add([("001", "001", "subject_similarity", "first"), *half], max_wrong=0.5)
    assert "Rater 001: 1 of 2 attention questions wrong, kept." in studies.page().markdown


def test_votes_on_attention_checks_are_no_votes_on_methods(studies):
    one = [("001", "001", "subject_similarity", "first")]
    studies.add(one + attentive("001"))
    measured, _ = csv_of(studies.page())
    assert measured[measured.column == "moslora_wins"].n.tolist() == [1]


def test_partial_results_say_what_is_missing(studies):
    votes = random_votes(raters=3)
    kept = [vote for vote in votes if vote[0] != "003" or (vote[1] <= "010" and vote[1].isdigit())]
    studies.add(kept)
    page = studies.page()
    table = grids(page)[0].set_index(["Question", "Subject"])
    assert table["Votes"].tolist() == 2 * ["24", "18‡", "16‡", "16‡", "74‡"]
    assert "‡ not all votes are there. Raters who have not finished, and votes: 003 20 of 64." in page.markdown
    assert "Kept without having met an attention check yet: 003." in page.markdown


def test_one_rater_has_shares_and_no_interval(studies):
    studies.add(random_votes(raters=1))
    page = studies.page()
    row = grids(page)[0].set_index(["Question", "Subject"]).loc["Prompt consistency", "mean"]
    assert re.fullmatch(r"\d+\.\d", row["moslora wins"]) and "(" not in row["Difference"]
    assert grids(page)[2]["Pairs with two votes"].tolist() == ["0", "0"]
    assert "One rater: nothing can be said about others" in page.markdown


@pytest.mark.parametrize(
    ("votes", "count", "expected"), [([], "0", "No votes yet."), (attentive("001"), "0‡", "001 0 of 64")]
)
def test_a_study_without_votes_on_the_methods_is_shown_empty(studies, votes, count, expected):
    studies.add(votes)
    page = studies.page()
    table = grids(page)[0]
    assert set(table["Votes"]) == {count} and set(table["Tie"]) == {"-"} and expected in page.markdown
    assert csv_of(page)[0].empty


def test_a_lean_to_a_side_is_told(studies):
    votes = [("001", f"{p:03d}", "subject_similarity", "first" if p <= 3 else "second") for p in range(1, 5)]
    studies.add([*votes, ("001", "005", "subject_similarity", "tie"), *attentive("001")])
    assert "Of 4 votes that are no tie, 75.0% are for the left image." in studies.page().markdown


def test_the_papers_numbers_stand_beside_ours_with_their_marks(studies):
    studies.add(random_votes())
    page = studies.page()
    theirs = grids(page)[-1].set_index("Method")
    assert theirs.loc["Prompt consistency"].tolist() == ["45.1ˢ", "44.1ᵈ", "10.8ᵈ"]
    assert theirs.loc["Subject similarity"].tolist() == ["-", "-", "-"]
    _, paper = csv_of(page)
    assert paper.set_index(["question", "subject", "column"]).loc["prompt_consistency", "mean", "tie"].value == 44.1
    assert set(paper.column) == {"moslora_wins", "tie", "lora_wins"} < set(csv_of(page)[0].column)


def test_every_study_has_a_page_of_its_own_and_the_same_bytes(studies):
    studies.add(random_votes(), "main")
    studies.add(random_votes(seed=1), "again", label="method.mixer_init=orthogonal")
    studies.add(random_votes(), "main", scale="paper")
    pages = build(studies.root, None, [], [], NUMBERS)
    assert [(page.folder, page.name) for page in pages] == [
        ("paper/human_study", "table6-main"),
        ("smoke/human_study", "table6-again"),
        ("smoke/human_study", "table6-main"),
    ]
    assert "| moslora (orthogonal) wins |" in pages[1].markdown and "moslora_wins" in pages[1].csv
    assert [page.files() for page in build(studies.root, None, [], [], NUMBERS)] == [page.files() for page in pages]
    assert [page.folder for page in build(studies.root, "paper", [], [], NUMBERS)] == ["paper/human_study"]
    assert build(studies.root / "nowhere", None, [], [], NUMBERS) == []
    assert r"\label{tab:6-smoke-main}" in pages[2].latex and r"\midrule" in pages[2].latex
    assert pages[2].title in pages[2].section("base")


# --------------------------------------------------------------------------------------------------------------- files


def faulty(studies, expected):
    page = studies.page()
    assert re.search(r"Left out:\n\n- subject_driven_t2i/smoke/human_study/main: ", page.markdown)
    assert expected in page.markdown.replace("\\", "") and csv_of(page)[0].empty
    assert "% Left out: " in page.latex


def test_votes_that_are_not_exported_are_asked_for(studies):
    studies.add(None)
    faulty(studies, "run python -m subject_driven_t2i.human_study export --scale smoke --name main")


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("001,002,prompt", "001,077,prompt", "votes.csv line 5: pair '077' is not of this study"),
        ("001,002,prompt", "001,001,prompt", "votes.csv line 5: a second vote of 001 on 001"),
        ("prompt_consistency", "beauty", "question 'beauty' is not of this study"),
        ("first", "moslora", "winner 'moslora' is not of this study"),
        ("winner", "won", "votes.csv has no column winner"),
        ("001,001,subject_similarity,left,first,", "001", "votes.csv line 2: expected rater, pair, question"),
    ],
)
def test_damaged_votes_are_named(studies, old, new, expected):
    votes = [("001", f"{pair:03d}", question, "first") for pair in (1, 2) for question in QUESTIONS]
    path = studies.add(votes) / "votes.csv"
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    faulty(studies, expected)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{}", "study.json: schema_version None, expected 1"),
        ("[]", "study.json: schema_version None"),
        ('{"schema_version": 9}', "schema_version 9, expected 1"),
        ("{", "is damaged: expected JSON"),
    ],
)
def test_a_damaged_study_is_named(studies, content, expected):
    (studies.add([]) / "study.json").write_text(content, encoding="utf-8")
    faulty(studies, expected)


# ------------------------------------------------------------------------------------------------------------ contract


def test_an_exported_study_is_read_as_it_was_voted(tmp_path):
    """The only test that joins the two packages: a study as it is made, served and exported."""
    folder = place_study(tmp_path)
    study = read_study(folder)
    pairs = {pair.id: pair for pair in study.pairs}
    store.open_store(folder)
    for rater in (1, 2, 3):
        store.add_rater(folder, study)
        for screen in store.screens_of(folder, rater):
            first, second = ("right", "left") if screen.swapped else ("left", "right")
            similar = {"pair": first, "same": "tie", "other": first if rater < 3 else second}[pairs[screen.pair].kind]
            consistent = "tie" if pairs[screen.pair].kind != "pair" else second if rater == 1 else "tie"
            store.vote(folder, rater, screen.pair, "subject_similarity", similar)
            store.vote(folder, rater, screen.pair, "prompt_consistency", consistent)
    export(folder)
    (page,) = build(tmp_path / "runs", None, [], [], NUMBERS)
    assert page.folder == "smoke/human_study" and page.name == "table6-test"
    table = grids(page)[0].set_index(["Question", "Subject"])
    assert {subject for _, subject in table.index} == {"rex", "fizz", "mean"}
    row = table.loc["Subject similarity", "mean"]
    assert (row["Votes"], row["moslora wins"]) == ("8", "100.0 (100.0 to 100.0)")
    row = table.loc["Prompt consistency", "mean"]
    assert row["Tie"].startswith("50.0") and row["lora wins"].startswith("50.0")
    assert "Rater 003: 1 of 3 attention questions wrong, left out." in page.markdown
    # The study's folder is no run to those who look for runs.
    runs, left_out = load_runs(tmp_path / "runs", "subject_driven_t2i")
    assert not [entry for entry in (*runs, *left_out) if "human_study" in entry.path]

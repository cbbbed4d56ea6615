"""The report as one HTML file: complete, self-contained, safe with any name, and the same numbers as the tables."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser

import pytest

from analysis.contents import gather
from analysis.exhibits import EXHIBITS, experiments
from analysis.html_page import render
from analysis.paper import load_paper_numbers
from analysis.report import main

NUMBERS = load_paper_numbers()
MISSING = ("table1", "figure4", "figure6", "table6", "automatic_metrics")  # of the runs below
VOID = {"meta", "img", "br", "link", "input", "wbr"}


class Reader(HTMLParser):
    """Checks that tags close in order, and collects what the tests ask for."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def values(self, key: str) -> list[str]:
        return [attributes[key] for _, attributes in self.tags if key in attributes]


def page_of(runs, names=None):
    contents = gather(runs.root, names or experiments(), NUMBERS)
    return contents, render(contents)


@pytest.fixture
def page(runs, visual):
    for seed in (1, 2, 3):
        for method, shift in (("lora", 0), ("moslora", 1)):
            right = {task: [(i + seed) % 4 > shift for i in range(20)] for task in runs.tasks}
            runs.add(method, seed, right=right)
            visual.add(method, seed, accuracies=0.4 + 0.1 * shift + 0.01 * seed)
    runs.add("dora").set_status("failed", "train", "RuntimeError: out of memory")
    return page_of(runs)


def test_nothing_is_fetched_and_nothing_runs(page):
    reader = Reader(page[1])
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in reader.tags}
    assert all(source.startswith("data:image/") for source in reader.values("src"))
    assert not re.search(r"url\(|@import|\son\w+=", page[1])
    outside = [target for target in reader.values("href") if "://" in target]
    assert outside == ["https://arxiv.org/abs/2406.11909"]


def test_every_link_inside_leads_somewhere_and_files_are_named(page):
    contents, text = page
    reader = Reader(text)
    ids = reader.values("id")
    assert len(ids) == len(set(ids))
    inside = [target[1:] for target in reader.values("href") if target.startswith("#")]
    assert inside and set(inside) <= set(ids)
    files = {target for target in reader.values("href") if not target.startswith(("#", "https:"))}
    assert files <= {f"{part.base}.{suffix}" for part in contents.parts for suffix in part.document.files()}


def test_every_table_and_figure_is_there_with_its_command(page):
    text = Reader(page[1]).text
    sections = dict(re.findall(r'<section id="(\w+)">(.*?)</section>', page[1], flags=re.DOTALL))
    for exhibit in EXHIBITS:
        section = sections[exhibit.id]
        assert ("Missing." in section) == (exhibit.id in MISSING)
        for line in exhibit.commands("smoke"):
            assert line in section
        for note in NUMBERS.tables[exhibit.id].notes:
            assert f"{note.text} {note.mark}" in text


def test_verdicts_stand_at_the_table_that_makes_the_claim_and_in_the_glance(page):
    contents, text = page
    sections = dict(re.findall(r'<section id="([\w-]+)">(.*?)</section>', text, flags=re.DOTALL))
    assert len(contents.verdicts) == sum(len(section.verdicts) for section in contents.sections)
    for verdict_page, verdict in contents.verdicts:
        home = "table4" if verdict_page.experiment == "commonsense_reasoning" else "table5"
        home = verdict.statement.source.lower().replace(" ", "") if "able " in verdict.statement.source[:6] else home
        assert Reader(sections[home]).text.count(" ".join(verdict.reasons)) >= 1
        assert verdict.outcome in Reader(sections["glance"]).text
    assert "They cannot say whether a difference of the paper exists at its scale" in Reader(sections["glance"]).text


def test_the_papers_numbers_stand_under_our_columns_with_their_marks(page):
    section = re.search(r'<section id="table4">(.*?)</section>', page[1], flags=re.DOTALL)[1]
    (beside,) = re.findall(r'<tbody class="paper">(.*?)</tbody>', section, flags=re.DOTALL)
    (headers,) = re.findall(r"<thead>(.*?)</thead>", section, flags=re.DOTALL)[:1]
    titles = re.findall(r"<th[^>]*>(.*?)</th>", headers)
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", beside)[1:]]
    moslora = dict(zip(titles, next(row for row in rows if row[0] == "MoSLoRA"), strict=True))
    assert moslora["ARC-e"] == "90.5ˢ" and moslora["HellaS"] == "95.0ʳ (94.5-95.3ᵈ)" and moslora["Avg."] == "85.6ˢ"
    assert moslora["Train (s)"] == ""  # the paper's is in hours
    assert "8.2ʳ" in section


def test_measured_numbers_are_those_of_the_markdown(page):
    contents, text = page
    (part,) = (part for part in contents.parts if part.base.endswith("corrected/table4"))
    (line,) = (line for line in part.document.markdown.split("\n") if line.startswith("| moslora "))
    section = re.search(r'<section id="table4">(.*?)</section>', text, flags=re.DOTALL)[1]
    (row,) = re.findall(r"<tr>(<td[^>]*>moslora</td>.*?)</tr>", section)
    assert re.findall(r"<td[^>]*>(.*?)</td>", row) == [cell.strip() for cell in line.strip("|").split("|")]


def test_pictures_are_those_of_the_files(page):
    contents, text = page
    (figure,) = (part.document for part in contents.parts if part.base.endswith("figure5-smoke"))
    uris = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', text)
    assert figure.pictures["svg"] in [base64.b64decode(uri) for uri in uris]


def test_left_out_runs_are_listed_once_with_the_reason(page):
    text = Reader(page[1]).text
    assert text.count("out of memory") == 1 and "1 left out" in text


def test_names_are_no_markup(runs):
    runs.add("lora", 1, "method.name=<img src=x onerror=alert(1)>")
    runs.add("<b>x", 1)
    _, text = page_of(runs)
    assert "<img src=x" not in text and "<b>" not in text
    assert "<b>x" in Reader(text).text


def test_a_report_of_one_experiment_has_its_own_sections(visual):
    visual.add("lora")
    contents, text = page_of(visual, ["visual_instruction"])
    assert [section.exhibit.id for section in contents.sections] == ["table2", "table5", "figure5"]
    assert 'id="table4"' not in text


def test_the_same_runs_give_the_same_page(page, runs):
    assert page_of(runs)[1] == page[1]


def test_the_page_is_written_beside_the_markdown(runs, tmp_path):
    runs.add("lora")
    out = tmp_path / "out"
    assert main(["--runs", str(runs.root), "--out", str(out), "--no-comparisons"]) == 0
    text = (out / "report.html").read_text("utf-8")
    assert "The claims at a glance" not in text and Reader(text).text.startswith("MoSLoRA, reproduced: report")

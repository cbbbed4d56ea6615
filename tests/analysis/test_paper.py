"""The data file of the paper's numbers: its content against itself, and its refusals."""

from __future__ import annotations

import pytest
import yaml

from analysis.paper import PROVENANCE_MARKS, Claim, load_paper_numbers
from analysis.paper_block import claims_text, paper_block, paper_lines
from moslora_core.errors import UserError


@pytest.fixture(scope="module")
def numbers():
    return load_paper_numbers()


def headlines(row, columns):
    return [row.cells[column][0].value for column in columns]


def test_a_row_of_table_4_averages_to_its_average_or_a_note_says_otherwise(numbers, runs):
    paper = numbers.tables["table4"]
    full = [row for row in paper.rows if set(runs.tasks) <= set(row.cells)]
    assert len(full) >= 7
    for row in full:
        mean = sum(headlines(row, runs.tasks)) / 8
        agrees = abs(mean - row.cells["avg"][0].value) <= 0.05 + 1e-9
        assert agrees or any(note.text.startswith(f"{row.title}'s eight cells average") for note in paper.notes)


def test_a_range_derived_from_an_average_follows_from_the_other_seven_cells(numbers, runs):
    for row in numbers.tables["table4"].rows:
        for claim in row.cells.get("hellaswag", ()):
            if claim.low is not None:
                seven = sum(headlines(row, [task for task in runs.tasks if task != "hellaswag"]))
                average = row.cells["avg"][0].value  # rounded from half a last digit below to half a digit above
                assert claim.low == pytest.approx(8 * (average - 0.05) - seven, abs=0.05)
                assert claim.high == pytest.approx(8 * (average + 0.05) - seven, abs=0.05)
                assert claim.low <= row.cells["hellaswag"][0].value <= claim.high


def test_relative_costs_that_are_sourced_agree_with_the_recalled_ones(numbers):
    hours = {row.id: row.cells["hours"][0].value for row in numbers.tables["table4"].rows if "hours" in row.cells}
    assert hours["moslora"] - hours["lora"] <= 0.2 + 1e-9
    assert 1 - hours["moslora"] / hours["loha"] == pytest.approx(0.68, abs=0.005)
    assert hours["lokr"] / hours["moslora"] > 3


def test_derived_numbers_of_other_tables_follow_from_their_sources(numbers):
    average = {row.id: row.cells["avg"][0].value for row in numbers.tables["table5"].rows if "avg" in row.cells}
    assert average["internlm2_moslora"] - average["internlm2_lora"] == pytest.approx(1.7)
    human = next(row for row in numbers.tables["table6"].rows if row.id == "prompt_consistency")
    wins, tie, losses = headlines(human, ("moslora_wins", "tie", "lora_wins"))
    assert wins - losses == pytest.approx(34.3)
    assert wins + tie + losses == pytest.approx(100)


def test_what_no_source_relays_is_marked_as_recalled_until_the_paper_is_read(numbers, runs):
    """Seven cells of a leaderboard and the quoted averages are relayed; no other cell of Table 4 may claim so."""
    relayed = {
        (row.id, column)
        for row in numbers.tables["table4"].rows
        for column, claims in row.cells.items()
        if claims[0].provenance not in ("RECALLED", "PAPER")
    }
    seven = {("moslora", task) for task in runs.tasks if task != "hellaswag"}
    assert relayed <= seven | {(method, "avg") for method in ("lora", "lokr", "dora_larger_r", "moslora")}


def test_every_number_of_every_table_is_shown_with_its_mark_and_listed_with_its_provenance(numbers):
    for paper in numbers.tables.values():
        block = paper_block(paper, numbers.sources)
        for row, cells in zip(paper.rows, block.grid.rows, strict=True):
            for column, text in zip(paper.columns, cells[1:], strict=True):
                claims = row.cells.get(column.id, ())
                assert [mark for mark in text if mark in PROVENANCE_MARKS.values()] == [c.mark for c in claims]
                assert bool(claims) == any(character.isdigit() for character in text)
        lines = paper_lines(paper)
        assert len(lines) == len(paper.claims())
        assert all(line["provenance"] in PROVENANCE_MARKS and line["source"] in numbers.sources for line in lines)
        for entry in (*paper.claims(), *paper.notes):
            legend = next(note for note in block.notes if note.startswith(f"{entry.mark} {entry.provenance}"))
            assert numbers.sources[entry.source] in legend


def test_claims_read_headline_first():
    value = Claim("RECALLED", "recalled", value=95.0)
    between = Claim("DERIVED", "arithmetic", low=94.5, high=95.3)
    below = Claim("SECONDARY", "KR", high=85.6)
    assert claims_text([value, between]) == "95.0ʳ (94.5-95.3ᵈ)"
    assert claims_text([below]) == "<85.6ˢ"
    assert claims_text([]) == "-"


SMALL = """
sources:
  pdf: {provenance: PAPER, text: the paper}
  recalled: {provenance: RECALLED, text: from memory}
tables:
  table4:
    title: Table 4
    setting: LLaMA-3 8B
    columns:
      piqa: {title: PIQA, unit: percent}
      "100": {title: All, unit: percent}
    rows:
      lora:
        title: LoRA
        cells:
          piqa: {value: 86.7, provenance: RECALLED, source: recalled}
          "100":
            - {low: 94.5, high: 95.3, provenance: RECALLED, source: recalled}
    notes:
      - {text: A note, provenance: PAPER, source: pdf}
"""

DAMAGE = {
    "no provenance": (lambda cell: cell.pop("provenance"), "provenance is missing"),
    "no source": (lambda cell: cell.pop("source"), "source is missing"),
    "no value": (lambda cell: cell.pop("value"), "expected value, or low and high"),
    "unknown key": (lambda cell: cell.update(page=7), "unknown key 'page'"),
    "unknown provenance": (lambda cell: cell.update(provenance="GUESSED"), "GUESSED"),
    "unhashable provenance": (lambda cell: cell.update(provenance=["PAPER"]), "provenance must be one of"),
    "unknown source": (lambda cell: cell.update(source="blog"), "'blog'"),
    "half corrected": (lambda cell: cell.update(source="pdf"), "source pdf is PAPER, found provenance RECALLED"),
    "value is text": (lambda cell: cell.update(value="87,7"), "'87,7'"),
    "value is NaN": (lambda cell: cell.update(value=float("nan")), "finite number"),
    "value is a truth": (lambda cell: cell.update(value=True), "True"),
    "value and range": (lambda cell: cell.update(low=1, high=2), "expected value, or low and high"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_cell_is_named(tmp_path, name):
    damage, expected = DAMAGE[name]
    raw = yaml.safe_load(SMALL)
    damage(raw["tables"]["table4"]["rows"]["lora"]["cells"]["piqa"])
    path = tmp_path / "numbers.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_paper_numbers(path)
    assert f"{path}: table4.lora.piqa" in str(caught.value) and expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("tables:", "tabels:", "tables is missing"),
        ("    setting: LLaMA-3 8B\n", "", "setting is missing"),
        ("          piqa: {value", "          pika: {value", "unknown column 'pika'"),
        ('          "100":\n', "          100:\n", "key 100 must be text"),
        ("sources:\n", "sources: [\n", "is damaged"),
        ("low: 94.5", "low: 95.5", "low 95.5 is above high 95.3"),
        (
            "            - {low: 94.5, high: 95.3, provenance: RECALLED, source: recalled}",
            "            []",
            "empty cell",
        ),
        ("text: A note", "text: ''", "notes[0]: text: expected text"),
        ("    notes:\n      - {", "    notes:\n      {", "expected a list"),
        ("        title: LoRA\n", "        title: 7\n", "expected text, found 7"),
        ("{title: PIQA, unit: percent}", "{title: PIQA}", "unit is missing"),
        (
            "        cells:\n",
            "        cells:\n          piqa: {value: 86.8, provenance: PAPER, source: pdf}\n",
            "'piqa' appears twice",
        ),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path, old, new, expected):
    assert old in SMALL
    path = tmp_path / "numbers.yaml"
    path.write_text(SMALL.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_paper_numbers(path)
    assert str(path) in str(caught.value) and expected in str(caught.value) and "\n" not in str(caught.value)


def test_an_unreadable_file_is_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        load_paper_numbers(tmp_path / "absent.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"sources: \xff")
    with pytest.raises(UserError, match="damaged"):
        load_paper_numbers(tmp_path / "latin.yaml")


def test_a_correction_needs_the_data_file_alone(tmp_path):
    path = tmp_path / "numbers.yaml"
    old, new = "{value: 86.7, provenance: RECALLED, source: recalled}", "{value: 86.8, provenance: PAPER, source: pdf}"
    path.write_text(SMALL.replace(old, new), encoding="utf-8")
    corrected = load_paper_numbers(path)
    block = paper_block(corrected.tables["table4"], corrected.sources)
    assert list(block.grid.rows[0]) == ["LoRA", "86.8ᵖ", "94.5-95.3ʳ"]
    assert block.notes[0] == "ᵖ PAPER (1 of 2 numbers): the paper (pdf)."

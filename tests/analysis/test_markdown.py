"""What the tables write is read back as it was."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from analysis.markdown import Bullets, Code, Heading, Paragraph, Picture, Table, blocks
from analysis.tables import Grid, bullets, heading, markdown_table

texts = st.text(st.characters(blacklist_categories=("Cs", "Cc", "Zl", "Zp")), max_size=20)
words = texts.map(lambda text: " ".join(text.split())).filter(bool)


@given(st.lists(st.tuples(texts, texts, texts), min_size=1, max_size=4), st.integers(0, 3))
def test_a_table_is_read_back(rows, left):
    (table,) = blocks(markdown_table(Grid(["Method", "a|b", "c"], rows, left=left)))
    assert table.headers == ("Method", "a|b", "c")
    assert table.rows == tuple(tuple(" ".join(cell.split()) for cell in row) for row in rows)
    assert table.left == tuple(number < left for number in range(3))


@given(words, st.lists(words, min_size=1, max_size=4))
def test_headings_and_lists_are_read_back(title, items):
    assert blocks(f"{heading(3, title)}\n{bullets(items)}") == [Heading(3, title), Bullets(tuple(items))]


def test_the_blocks_of_a_page_come_in_order():
    page = (
        f"{heading(2, 'T')}\n![a \\[b\\]](c.png)\n\nLeft out:\n\n{bullets(['x'])}\n{markdown_table(Grid(['h'], []))}"
    )
    page += "\n```\n| no table\n- no list\n```\n"
    assert blocks(page) == [
        Heading(2, "T"),
        Picture("a [b]", "c.png"),
        Paragraph("Left out:"),
        Bullets(("x",)),
        Table(("h",), (), (True,)),
        Code("| no table\n- no list"),
    ]

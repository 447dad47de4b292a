"""docs/tuning.md's tables are those of the code."""

from pathlib import Path

from tuning_tables import TABLES, renewed

PAGE = Path(__file__).parents[1] / "docs" / "tuning.md"


def test_the_page_is_current_and_has_every_table():
    page = PAGE.read_text()
    assert page == renewed(page), "run: python docs/tuning_tables.py docs/tuning.md"
    assert all(f"<!-- table: {name} -->\n|" in page for name in TABLES)


def test_a_stale_table_is_renewed():
    page = PAGE.read_text()
    stale = page.replace("| `h100` |", "| `h99` |")
    assert stale != page
    assert "| `h100` |" in renewed(stale)

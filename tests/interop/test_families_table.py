from pathlib import Path

from interop.families import FAMILIES
from interop.families_table import families_table


def test_the_docs_have_the_table_of_the_registry():
    """If not: put the output of `python -m interop.families_table` between the markers."""
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    _, _, rest = page.partition("<!-- families -->")
    shown, _, _ = rest.partition("<!-- /families -->")
    assert shown.strip() == families_table()
    assert all(f"`{name}`" in shown for name in FAMILIES)

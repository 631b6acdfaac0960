from pathlib import Path

from interop.hf.families.readme import families_table
from interop.hf.families.registry import FAMILIES


def test_the_docs_have_the_table_of_the_registry():
    """If not: put the output of `python -m interop.hf.families.readme` between the markers."""
    page = (Path(__file__).parents[4] / "docs" / "models.md").read_text()
    _, _, rest = page.partition("<!-- families -->")
    shown, _, _ = rest.partition("<!-- /families -->")
    assert shown.strip() == families_table()
    assert all(f"`{name}`" in shown for name in FAMILIES)

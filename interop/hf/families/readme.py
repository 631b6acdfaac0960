"""Generate the table of families in docs/models.md: ``python -m interop.hf.families.readme``."""

from __future__ import annotations

from interop.hf.families.registry import FAMILIES
from interop.hf.families.table import ADAPTABLE, Family
from xlora_jax.models import Decoder

__all__ = ["families_table"]


def families_table() -> str:
    """Return the table in Markdown, one row per family."""
    rows = ["| `model_type` | class in transformers | experts on | generates |", "|---|---|---|---|"]
    for family in FAMILIES.values():
        classes = ", ".join(f"`{name}`" for name in family.causal_lm.split(" or "))
        generates = "yes" if family.module is Decoder else "no"
        rows.append(f"| `{family.model_type}` | {classes} | {_targets(family)} | {generates} |")
    return "\n".join(rows)


def _targets(family: Family) -> str:
    """Return the adaptable modules, by the shortest names that adapters use."""
    names = [row.hf for row in (*family.before, *family.block, *family.after) if row.kind in ADAPTABLE]
    last = [name.split(".")[-1] for name in names]
    short = [name if last.count(end) > 1 else end for name, end in zip(names, last, strict=True)]
    return ", ".join(f"`{name}`" for name in dict.fromkeys(short))


if __name__ == "__main__":
    print(families_table())  # noqa: T201

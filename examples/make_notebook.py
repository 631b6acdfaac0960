"""Run walkthrough.py cell by cell and write it with its outputs as walkthrough.ipynb (or: make notebook)."""

from __future__ import annotations

from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent


def main() -> None:
    """Write the notebook beside the script; if a cell fails, the old notebook stays."""
    notebook = jupytext.read(HERE / "walkthrough.py")
    notebook.metadata = nbformat.from_dict({"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = nbformat.from_dict({})
    # Cells run in this directory, so that they find the quickstart's models.
    place = {"metadata": {"path": str(HERE)}}
    client = NotebookClient(notebook, timeout=1200, kernel_name="python3", resources=place, coalesce_streams=True)
    client.execute()
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({})  # remove execution times
        if cell.cell_type == "code":  # libraries' warnings name local paths: print them, don't keep them
            for output in cell.outputs:
                if output.get("name") == "stderr":
                    print(output.text)
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata.pop("language_info", None)
    nbformat.validate(notebook)
    nbformat.write(notebook, HERE / "walkthrough.ipynb")


if __name__ == "__main__":
    main()

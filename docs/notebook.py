"""Makes the notebook of the tutorial, and the tutorial's pictures.

    python docs/notebook.py

The tutorial is written once, in docs/tutorial.md. This turns its text and code into cells of examples/tutorial.ipynb,
runs these, keeps what they print and draw, and takes the pictures for the page.
"""

from __future__ import annotations

import base64
import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "tutorial.md"
NOTEBOOK = DOCS.parent / "examples" / "tutorial.ipynb"
SECONDS = 120
"""What a cell may take."""


def notebook() -> nbformat.NotebookNode:
    """Text and code of the page by turns; without its pictures, which the code draws."""
    cells = []
    # What the pattern splits off comes at odd places: the code.
    for place, part in enumerate(
        re.split(r"^```python\n(.*?)^```\n", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    ):
        if place % 2:
            cells.append(nbformat.v4.new_code_cell(part.strip(), id=f"cell-{place}"))
            continue
        text = re.sub(r"^!\[.*\n", "", part, flags=re.MULTILINE)
        text = re.sub(r"\]\(([\w/-]+\.md)", r"](../docs/\1", text).strip()
        if text:
            cells.append(nbformat.v4.new_markdown_cell(text, id=f"cell-{place}"))
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})


def run(made: nbformat.NotebookNode) -> list[bytes]:
    """Run all cells in place; returns the pictures."""
    NotebookClient(made, timeout=SECONDS, record_timing=False).execute()
    outputs = [output for cell in made.cells if cell.cell_type == "code" for output in cell.outputs]
    return [base64.b64decode(output.data["image/png"]) for output in outputs if "image/png" in output.get("data", {})]


def main() -> None:
    made = notebook()
    for number, picture in enumerate(run(made), 1):
        (DOCS / "figures" / f"tutorial-{number}.png").write_bytes(picture)
    made.metadata = {"kernelspec": made.metadata["kernelspec"]}  # not of this machine
    nbformat.write(made, NOTEBOOK)


if __name__ == "__main__":
    main()

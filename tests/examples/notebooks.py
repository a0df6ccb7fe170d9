"""Executes the notebooks of ``examples/``, and stores what they show.

python -m tests.examples.notebooks    # after a change of a notebook, or of what it shows
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.fresh_process import ROOT

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def read(path: Path) -> Any:
    import nbformat

    return nbformat.read(path, as_version=4)


def execute(path: Path) -> Any:
    """Returns the notebook as a reader who runs all of it, from the folder of the examples, would see it."""
    from nbclient import NotebookClient

    notebook = read(path)
    options = {"resources": {"metadata": {"path": str(path.parent)}}, "timeout": 200, "record_timing": False}
    NotebookClient(notebook, kernel_name="python3", **options).execute()
    for cell in code_cells(notebook):
        cell.metadata.clear()
    notebook.metadata.language_info = {"name": "python"}
    return notebook


def warnings_of(notebook: Any) -> str:
    """Returns what the notebook wrote to its error stream: warnings and progress bars."""
    outputs = (output for cell in code_cells(notebook) for output in cell.outputs)
    return "".join(output.text for output in outputs if output.get("name") == "stderr")


def for_storage(notebook: Any) -> Any:
    """Returns the notebook with what it shows, but for its error stream and texts that HTML shows better.

    A reader on the web sees what comes out, and a change of it is seen in review. Progress bars and warnings of other
    libraries are those of one machine. Pieces of a stream are joined, since where it is cut is chance.
    """
    for cell in code_cells(notebook):
        kept = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in kept:
            if "text/html" in output.get("data", {}):
                output.data = {"text/html": output.data["text/html"], "text/plain": "(a table)"}
        streams = [output for output in kept if output.output_type == "stream"]
        for other in streams[1:]:
            streams[0].text += other.text
            kept.remove(other)
        cell.outputs = kept
    return notebook


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(cell: Any) -> list[tuple[str, ...]]:
    """Returns the kinds of what a cell shows: the name of a stream, or the media types of a result."""
    return [tuple(sorted(output.data)) if "data" in output else (output.name,) for output in cell.outputs]


def main() -> None:
    import nbformat

    for path in NOTEBOOKS:
        nbformat.write(for_storage(execute(path)), path)
        print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()

"""Every notebook runs from its first cell to its last, and shows what is stored in it."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

import pytest

import smet_compile
from tests.examples.notebooks import NOTEBOOKS, code_cells, execute, for_storage, read, shown, warnings_of
from tests.support.fresh_process import ROOT
from tests.support.rooms import used_of_ours

for needed in ("nbclient", "nbformat", "ipykernel"):
    pytest.importorskip(needed)
NEEDS = {"trainer": ("transformers", "accelerate")}
by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@by_name
def test_a_notebook_shows_what_is_stored(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kinds of outputs are compared, since numbers differ from one processor to another."""
    for needed in NEEDS.get(path.stem, ()):
        pytest.importorskip(needed)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    executed = execute(path)
    written = warnings_of(executed)
    assert "smet_compile" not in written, f"a first notebook comes without warnings of ours: {written}"
    executed, stored = for_storage(executed), read(path)
    assert [shown(cell) for cell in code_cells(executed)] == [shown(cell) for cell in code_cells(stored)], (
        "run python -m tests.examples.notebooks"
    )
    first, last = losses(executed)
    assert last < first - 0.3


def losses(notebook: object) -> tuple[float, float]:
    """Returns the first loss that a notebook prints, and the last."""
    text = "".join(output.get("text", "") for cell in code_cells(notebook) for output in cell.outputs)
    found = re.findall(r"(?<!_)loss'?:? '?([\d.]+)(?: → ([\d.]+))?", text)
    numbers = [float(number) for pair in found for number in pair if number]
    return numbers[0], numbers[-1]


@by_name
def test_what_is_stored_is_small_and_of_no_machine(path: Path) -> None:
    text = path.read_text()
    assert len(text) < 40_000
    assert "image/png" not in text and "stderr" not in text and "Traceback" not in text
    assert re.findall(r"[\"' (](/(?:home|root|tmp|usr|work)/[^\"' )]*)", text) == []
    assert any("<table>" in str(output.get("data")) for cell in code_cells(read(path)) for output in cell.outputs)
    for cell in code_cells(read(path)):
        assert max(map(len, cell.source.splitlines())) <= 120 and len(cell.source.splitlines()) <= 25


@by_name
def test_a_notebook_uses_public_names(path: Path) -> None:
    code = "\n".join(cell.source for cell in code_cells(read(path)))
    allowed = {f"smet_compile.{name}" for name in smet_compile.__all__}
    for _, name in used_of_ours(ast.parse(code)):
        ours = name.split(".")[0] == "smet_compile"
        assert not ours or name in allowed or name.startswith("smet_compile.integrations."), name


@by_name
def test_links_of_a_notebook_lead_somewhere(path: Path) -> None:
    text = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert link.startswith("https://") or (path.parent / link).exists(), link

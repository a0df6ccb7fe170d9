"""Every sample and every command of README and docs, run in the order of its page, as a reader would."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.docs.commands import run_command
from tests.docs.page import Page, Sample, all_pages
from tests.docs.preambles import PREAMBLES
from tests.support.fresh_process import ROOT

PAGES = all_pages()
PROSE = {"", "text", "math", "console", "json", "markdown", "mermaid"}
"""Languages of blocks that are to be read: formulas, trees, what a sample prints on one machine."""
OUTPUT = "output"
"""The language of a block that holds what the sample before it prints, on any machine."""
WARNING_PAGES = {"docs/microscope.md"}
"""Pages that look at a model of which `sparsify` warns."""
SMALL_LAYERS = "sparsify: the model's matrices as a whole"
"""The warning that embeddings are most of a model, as in one that is small enough for a sample."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_samples_run(page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The samples of a page share their names and a folder, and none warns that its settings suit its model badly.

    ``torch.compile`` does not compile here: that takes up to half a minute a model, and that compiled is eager is
    tested elsewhere (tests/passes, tests/train_step). ``explain`` captures all the same.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    names: dict[str, Any] = {"__name__": "__main__"}
    waiting = {heading: make for (name, heading), make in PREAMBLES.items() if name == page.name}
    printed = ""
    with torch.compiler.set_stance("force_eager"):
        for sample in page.samples():
            if sample.heading in waiting:
                _add_names(waiting.pop(sample.heading), names)
            printed = _run(sample, names, printed)
    assert not waiting, f"preambles for headings that {page.name} has not, or that no sample stands under"


def _add_names(preamble: Callable[[dict[str, Any]], None], names: dict[str, Any]) -> None:
    """Gives the samples that follow what their reader has already; what earlier samples made stays as it is."""
    before = dict(names)
    preamble(names)
    replaced = [name for name, item in before.items() if names[name] is not item]
    assert not replaced, f"the page has made {replaced} already, so a reader who runs it in order has those"


def _run(sample: Sample, names: dict[str, Any], printed: str) -> str:
    """Returns what the last Python sample printed, this one or the one before, which printed ``printed``."""
    for line in sample.commands() if sample.language in ("shell", "") else ():
        run_command(line, only_named=sample.is_inline)
    if sample.file is not None:
        Path(sample.file).write_text(sample.text)
    elif sample.language == "python":
        with redirect_stdout(StringIO()) as output, warnings.catch_warnings():
            action = "ignore" if sample.page.path in map(ROOT.joinpath, WARNING_PAGES) else "error"
            warnings.filterwarnings(action, "(TopologyManager|sparsify): ")
            warnings.filterwarnings("ignore", SMALL_LAYERS)
            exec(compile("\n" * sample.line + sample.text, str(sample.page.path), "exec"), names)
        return output.getvalue()
    elif sample.language == OUTPUT:
        assert sample.text.strip() in printed, f"{sample.page.path.name}:{sample.line}: the sample prints\n{printed}"
    elif sample.language != "shell":
        assert sample.language in PROSE, f"{sample.page.name}:{sample.line}: nobody can run {sample.language!r}"
    return printed


def test_a_file_is_told_apart_from_code_to_run(tmp_path: Path) -> None:
    page = Page(tmp_path / "page.md")
    page.path.write_text(
        '# A\n\n```python title="a.py"\nx\n```\n\n    make demo  # soon\n\nSee `python -m smet_compile`.\n'
    )
    file, shell, inline = page.samples()
    assert (file.file, file.language, file.text, file.line, file.heading) == ("a.py", "python", "x\n", 3, "A")
    assert list(shell.commands()) == ["make demo  # soon"] and not shell.is_inline
    assert list(inline.commands()) == ["python -m smet_compile"] and inline.is_inline


def test_a_sample_that_prints_something_else_is_an_error(tmp_path: Path) -> None:
    page = Page(tmp_path / "page.md")
    page.path.write_text("# A\n\n```python\nprint(1)\n```\n\nprints\n\n```output\n1\n```\n\nor\n\n```output\n2\n```\n")
    sample, right, wrong = page.samples()
    printed = _run(sample, {}, "")
    assert _run(right, {}, printed) == printed == "1\n"
    with pytest.raises(AssertionError, match="the sample prints"):
        _run(wrong, {}, printed)


@pytest.mark.parametrize("line", ["make nothing", "pip install '.[nothing]'", "pytest tests/nothing", "nothing"])
def test_a_wrong_command_is_an_error(line: str) -> None:
    with pytest.raises((AssertionError, KeyError)):
        run_command(line, only_named=False)


@pytest.mark.parametrize("line", ["pretrain --nothing 1", "pretrain --preset nano --densty 0.3", "nothing"])
def test_a_wrong_option_is_an_error(line: str) -> None:
    with pytest.raises(AssertionError):
        run_command(f"python -m smet_compile {line}", only_named=True)

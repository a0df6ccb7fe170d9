"""Builds the site of the documentation: the pages as they lie in the repository, and a page of the public names.

    python docs/site/build.py --out build/site

Pages link to one another and to other files of the repository, so the site has the repository's folders, as links to
them. It is strict: a link or an anchor that leads nowhere is an error.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.commands.build import build
from mkdocs.config import load_config

import smet_compile

ROOT = Path(__file__).resolve().parents[2]
BESIDE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "benchmarks", "examples")
"""Files and folders beside ``docs`` that pages link to."""

NOTEBOOKS = [ROOT / f"examples/{name}.ipynb" for name in ("plain_loop", "trainer", "resnet")]

GROUPS = {
    "Make a model sparse, and plain again": ["sparsify", "report", "Report", "masks", "materialize", "export_dense"],
    "Optimizers": [
        *("ActiveAdamW", "ActiveLion", "ActiveSGD", "ActiveScale", "NaiveAdamW", "ActiveOptimizer"),
        *("param_groups", "decay_groups", "clip_grad_norm_", "scale_initial_"),
    ],
    "Topology": [
        *("TopologyManager", "TopologyContext", "TopologyEvent", "SiteEvent"),
        *("needs_gradient", "mix_growth", "cubic_density"),
    ],
    "Compiled steps": ["compile_train_step", "TrainStep", "explain", "Explanation"],
    "Batch norm": ["correct_gradients", "Correction"],
    "Checkpoints, and folders to share": ["save_checkpoint", "load_checkpoint", "save_compact", "load_compact"],
    "Planning": ["plan", "Plan"],
    "Looking inside": ["inspect", "Inspection"],
    "Rules and kernels of your own": [
        *("Rule", "Slot", "register_rule", "Kernel", "register_kernel", "unregister_kernel"),
    ],
}
"""The public names by what they are for; a test holds them to ``smet_compile.__all__``."""


def make_pages(folder: Path) -> None:
    """Writes the tree that the site is made of: links to what is in the repository, and the page of public names."""
    shutil.rmtree(folder, ignore_errors=True)
    docs = folder / "docs"
    docs.mkdir(parents=True)
    for name in BESIDE:
        (folder / name).symlink_to(ROOT / name)
    for path in (ROOT / "docs").iterdir():
        if path.name != "site":
            (docs / path.name).symlink_to(path)
    (docs / "api.md").write_text(api_page())
    (folder / "notebooks").mkdir()
    for path in NOTEBOOKS:
        (folder / f"notebooks/{path.stem}.md").write_text(notebook_page(json.loads(path.read_text())))


def api_page() -> str:
    """Returns the page of public names, each by the place of its definition: some share their name with a module."""
    parts = ["# Public names\n\n`import smet_compile as smet` has all of them.\n"]
    for group, names in GROUPS.items():
        parts.append(f"## {group}\n")
        parts += [f"::: {getattr(smet_compile, name).__module__}.{name}\n" for name in names]
    return "\n".join(parts)


def notebook_page(notebook: dict[str, Any]) -> str:
    """Returns a notebook as a page: its texts, its code, and what it shows."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            text = "".join(output.get("text") or data.get("text/plain", ""))
            parts.append("".join(data.get("text/html", "")) or f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def navigation() -> list[Any]:
    """Returns the pages in the order of the index, docs/README.md, then those about the project."""
    first = [{"smet_compile": "README.md"}, {"All pages": "docs/README.md"}]
    last = [{"Public names": "docs/api.md"}, {"Changes": "CHANGELOG.md"}, {"Working on it": "CONTRIBUTING.md"}]
    notebooks = {"Notebooks": [f"notebooks/{path.stem}.md" for path in NOTEBOOKS]}
    return [*first, notebooks, *_linked_from("docs/README.md"), *last]


def _linked_from(index: str) -> Iterator[dict[str, Any]]:
    """Yields the pages of docs that an index links to, by the text of the links; results are a group."""
    text = (ROOT / index).read_text()
    results: dict[str, str] = {}
    for title, target in re.findall(r"\[([^\]]+)\]\(([\w/]+\.md)\)", text):
        page = os.path.normpath(Path(index).parent / target)
        if page.startswith("docs/results/"):
            results.setdefault(page, title[0].upper() + title[1:])
        elif page.startswith("docs/"):
            yield {title: page}
    yield {"Results": [{title: page} for page, title in results.items()]}


def build_site(pages: Path, out: Path, nav: list[Any]) -> None:
    """Builds the site of a tree of pages; raises ``mkdocs.exceptions.Abort`` where anything in it leads nowhere."""
    settings: dict[str, Any] = {"docs_dir": str(pages), "site_dir": str(out), "nav": nav, "strict": True}
    build(load_config(str(ROOT / "docs/site/mkdocs.yml"), **settings))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "site")
    out = parser.parse_args().out.resolve()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    pages = out.parent / "pages"
    make_pages(pages)
    build_site(pages, out, navigation())
    print(f"open {out / 'index.html'}")


if __name__ == "__main__":
    main()

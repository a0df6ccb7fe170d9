"""Tests the site of the documentation: it builds strictly, and has every page and every public name."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

import smet_compile
from tests.docs.page import Page, all_pages
from tests.support.fresh_process import ROOT, run_python

pytest.importorskip("mkdocs")
pytest.importorskip("mkdocstrings")
pytest.importorskip("material")


@pytest.fixture(scope="module")
def builder() -> Any:
    """The module docs/site/build.py."""
    spec = importlib.util.spec_from_file_location("build_of_site", ROOT / "docs/site/build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    run_python(str(ROOT / "docs/site/build.py"), "--out", str(tmp_path / "site"))
    for page in all_pages():
        assert html_of(tmp_path / "site", page).is_file(), f"{page.name} is not a page of the site"
    api = (tmp_path / "site/docs/api.html").read_text()
    for name in smet_compile.__all__:
        assert f'id="{getattr(smet_compile, name).__module__}.{name}"' in api
    assert "::</p>" not in api and "</p>" in api  # what stands before a sample ends with one colon
    assert "fonts.googleapis" not in api
    for notebook in (ROOT / "examples").glob("*.ipynb"):
        page = (tmp_path / f"site/notebooks/{notebook.stem}.html").read_text()
        assert ">smet_compile</span>" in page and "<th" in page, "a page of a notebook shows its code and its tables"


def html_of(site: Path, page: Page) -> Path:
    return site / page.name.replace("README.md", "index.md").replace(".md", ".html")


def test_every_public_name_is_in_one_group(builder: Any) -> None:
    grouped = [name for names in builder.GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(smet_compile.__all__)


@pytest.mark.parametrize("link", ["nowhere.md", "#nothing", "other.md#nothing", "../x.py", "/root.md", "folder/"])
def test_a_link_that_leads_nowhere_fails(builder: Any, link: str, tmp_path: Path) -> None:
    exceptions = pytest.importorskip("mkdocs.exceptions")
    pages = tmp_path / "pages"
    pages.mkdir()
    (pages / "other.md").write_text("# Other\n\n## A part\n")
    nav = [{"First": "README.md"}, {"Other": "other.md"}]
    (pages / "README.md").write_text("# First\n\n[other](other.md#a-part)\n")
    builder.build_site(pages, tmp_path / "site", nav)
    (pages / "README.md").write_text(f"# First\n\n[other]({link})\n")
    with pytest.raises(exceptions.Abort):
        builder.build_site(pages, tmp_path / "site", nav)

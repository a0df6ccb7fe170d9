"""What README and docs point to is there."""

from __future__ import annotations

import re
from urllib.parse import unquote

import pytest

from tests.docs.page import Page, all_pages
from tests.support.fresh_process import ROOT


@pytest.mark.parametrize("page", all_pages(), ids=lambda page: page.name)
def test_links_and_images_exist(page: Page) -> None:
    assert [link for link in page.links() if is_relative(link) and not _exists(page, link)] == []


def test_every_page_can_be_found_from_the_index() -> None:
    """By a link of its own, or by one to its folder."""
    index = Page(ROOT / "docs/README.md")
    linked = {(index.path.parent / link.partition("#")[0]).resolve() for link in index.links() if is_relative(link)}
    for page in all_pages():
        assert linked & {page.path, page.path.parent} or page == index, f"docs/README.md has no link to {page.name}"


def is_relative(link: str) -> bool:
    return not re.match(r"[a-z]+:", link)


def _exists(page: Page, link: str) -> bool:
    path, _, anchor = unquote(link).partition("#")
    target = (page.path.parent / path).resolve() if path else page.path
    if anchor and target.suffix == ".md" and target.exists():
        return anchor in Page(target).anchors
    return target.exists()

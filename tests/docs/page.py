"""A page in Markdown: its samples and commands in their order, its links, its headings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

from tests.support.fresh_process import ROOT

PROGRAMS = ("python", "smet-compile", "make", "pip", "pytest", "torchrun")
SHELLS = ("bash", "sh", "shell")


@dataclass(frozen=True)
class Sample:
    """Code in a page.

    Args:
        line: of its first line, from 0. heading: the one it stands under, "" before the first.
        language: "python", "shell", or what else the page calls it; "" for indented text.
        file: the name that ``title="..."`` gives it: it is a file of the reader's.
        is_inline: within a sentence or a table, where a command is named but not told to run.
    """

    page: Page
    line: int
    heading: str
    language: str
    text: str
    file: str | None = None
    is_inline: bool = False

    def commands(self) -> Iterator[str]:
        """Its lines that call a program; of a shell block all lines are such."""
        for line in self.text.replace("\\\n", " ").splitlines():
            if line.strip() and (self.language == "shell" or line.split()[0] in PROGRAMS):
                yield line.strip()


@dataclass(frozen=True)
class Page:
    path: Path

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @cached_property
    def _tokens(self) -> list[Any]:
        return list(MarkdownIt("commonmark").enable("table").parse(self.path.read_text()))

    def samples(self) -> Iterator[Sample]:
        """Blocks of code, fenced or indented, and code within text, as they come."""
        heading, line = "", 0
        for before, token in zip([None, *self._tokens], self._tokens, strict=False):
            line = token.map[0] if token.map else line
            if before is not None and before.type == "heading_open":
                heading = token.content
            if token.type == "fence":
                yield _fenced(self, token, heading)
            elif token.type == "code_block":
                yield Sample(self, line, heading, "", token.content)
            for child in token.children or ():
                if child.type == "code_inline":
                    yield Sample(self, line, heading, "", child.content, is_inline=True)

    @property
    def headings(self) -> list[str]:
        pairs = zip(self._tokens, self._tokens[1:], strict=False)
        return [token.content for before, token in pairs if before.type == "heading_open"]

    @property
    def anchors(self) -> set[str]:
        """What GitHub makes of the headings."""
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in self.headings}

    def links(self) -> Iterator[str]:
        """Where links and images point to."""
        for child in (child for token in self._tokens for child in token.children or ()):
            target = child.attrGet("href") or child.attrGet("src")
            if target:
                yield str(target)


def _fenced(page: Page, token: Any, heading: str) -> Sample:
    language, _, options = token.info.partition(" ")
    titled = re.search(r'title="([^"]+)"', options)
    language = "shell" if language in SHELLS else language
    return Sample(page, token.map[0] + 1, heading, language, token.content, titled[1] if titled else None)


def all_pages() -> list[Page]:
    return [Page(ROOT / "README.md"), *map(Page, sorted((ROOT / "docs").rglob("*.md")))]

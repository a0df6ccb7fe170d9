"""Tests that docstrings of public names describe their arguments one a line, so that tools can show each alone."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest

import smet_compile as smet
import smet_compile.distributed as distributed

_NAMES = {name: getattr(smet, name) for name in smet.__all__} | {
    f"distributed.{name}": getattr(distributed, name) for name in distributed.__all__
}


def documented(name: str, item: Any) -> Iterator[tuple[str, Any]]:
    """Yields the item, and the public methods that a class defines."""
    yield name, item
    for method, function in vars(item).items() if inspect.isclass(item) else ():
        if inspect.isfunction(function) and not method.startswith("_"):
            yield f"{name}.{method}", function


def mistakes(name: str, item: Any) -> list[str]:
    """Returns the lines of ``Args`` that describe no argument, or more than one."""
    text = inspect.cleandoc(item.__doc__ or "")
    section = re.search(r"^Args:\n((?: {4}.*\n|\n)*)", text + "\n", re.MULTILINE)
    if section is None:
        return []
    known = set(inspect.signature(item).parameters)
    found = []
    for line in section[1].splitlines():
        entry = re.match(r" {4}(\S.*?):(?: |$)", line)
        second = re.findall(r"[.;] +(\w+): ", line)
        if (entry and entry[1] not in known) or (re.match(r" {4}\S", line) and not entry) or known & set(second):
            found.append(f"{name}: {line.strip()}")
    return found


@pytest.mark.parametrize("name", _NAMES)
def test_arguments_are_described_one_a_line(name: str) -> None:
    assert [line for each in documented(name, _NAMES[name]) for line in mistakes(*each)] == []


def test_two_arguments_in_a_line_are_a_mistake() -> None:
    def function(first: int, second: int) -> None:
        """Does something.

        Args:
            first, second: two numbers.
            first: a number. second: another.
            third: a number that it does not take.
            first: a number, such as 1: the smallest. It
                may be larger.
        """

    lines = [
        "first, second: two numbers.",
        "first: a number. second: another.",
        "third: a number that it does not take.",
    ]
    assert mistakes("f", function) == [f"f: {line}" for line in lines]

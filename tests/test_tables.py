"""A table of text is aligned as it shows on a terminal, and knows no markup, colours or width."""

import pytest

from smet_compile.tables import table_lines


def test_names_to_the_left_and_figures_to_the_right() -> None:
    rows = [("layer", "density"), ("q_proj", "0.3"), ("x", "")]
    assert table_lines(rows) == ["layer   density", "q_proj      0.3", "x"]
    assert table_lines(rows, left=()) == [" layer  density", "q_proj      0.3", "     x"]
    assert table_lines(rows, left=range(2)) == ["layer   density", "q_proj  0.3", "x"]
    assert table_lines([]) == []


def test_brackets_and_codes_are_text() -> None:
    shown = table_lines([("[red]a[/red]", ":smile:"), ("b", "1")])
    assert shown == ["[red]a[/red]  :smile:", "b".ljust(12) + "1".rjust(9)]


def test_wide_characters_take_two_columns() -> None:
    assert table_lines([("漢字", "1"), ("abcd", "2")]) == ["漢字  1", "abcd  2"]


@pytest.mark.parametrize("name", ["FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS"])
def test_the_environment_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [("name " * 60, "1"), ("b", "2")]
    plain = table_lines(rows)
    monkeypatch.setenv(name, "1")
    assert table_lines(rows) == plain and len(plain) == 2

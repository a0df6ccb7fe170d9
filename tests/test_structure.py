"""Tests that the package stays readable: no file is too long, no import goes both ways, few functions take many
parameters."""

from tests.support.structure import files, long_functions, num_lines, two_way_imports

MOST_LINES, MOST_LONG_FUNCTIONS = 400, 12


def test_files_are_short() -> None:
    assert [path.name for path in files() if num_lines(path) > MOST_LINES] == []


def test_functions_take_few_parameters() -> None:
    assert len(list(long_functions())) <= MOST_LONG_FUNCTIONS


def test_no_two_modules_import_each_other() -> None:
    assert two_way_imports() == []

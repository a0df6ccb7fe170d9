"""Errors of the library name options on the command line."""

import pytest

from smet_compile.pretrain.option_errors import name_options

OPTIONS = {"min_age": "--min-age", "every": "--every", "tokens": "--tokens", "pattern": "--pattern", "model": "PRESET"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("min_age: expected at most 4, got 9; lower min_age", "--min-age: expected at most 4, got 9; lower --min-age"),
        ("model: expected one of a, got b", "PRESET: expected one of a, got b"),
        ("every[0]: an update every 2 steps", "--every[0]: an update every 2 steps"),
        ("x: expected none without tokens; pass tokens=, say", "x: expected none without tokens; pass --tokens, say"),
        ('x: got pattern="2:4" and every=3', 'x: got --pattern "2:4" and --every 3'),
        ("model.layers.0.weight: too few", "model.layers.0.weight: too few"),
        ("--every: expected 1", "--every: expected 1"),
        ("x: my.min_age, in_min_age and other_name", "x: my.min_age, in_min_age and other_name"),
    ],
)
def test_arguments_become_options(text: str, expected: str) -> None:
    assert str(name_options(ValueError(text), OPTIONS)) == expected

"""The values of options: read from the text of a command line, checked as a file or a caller gives them."""

import re
from numbers import Integral, Real
from typing import Any

import numpy

LARGEST = 2**63 - 1
EXPECTED = {
    bool: "true or false",
    str: "text without NUL characters",
    int: "a whole number such as 400",
    float: "a number such as 0.3",
}
NUMBER = {
    int: r"[+-]?[0-9]+",
    float: r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?(?i:nan|inf|infinity)",
}
MOST_CHARACTERS = 80


def option_name(field: str) -> str:
    """Return the command-line option of a field: --lr-density-exponent of lr_density_exponent."""
    return "--" + field.replace("_", "-")


def checked(option: str, value: Any, kind: type) -> Any:
    """Return `value` as a `kind` of Python; numpy scalars are converted, whole numbers serve as floats.

    Raises ValueError, which names `option`, for a value of another type, empty text or a number out of range.
    """
    is_bool = isinstance(value, bool | numpy.bool_)
    if kind is str and isinstance(value, str):
        if not value:
            raise ValueError(f"{option}: expected a value, got an empty text; leave the option out for its default")
        if "\0" not in value:
            return str(value)
    if kind is bool and is_bool:
        return bool(value)
    if kind is int and isinstance(value, Integral) and not is_bool:
        if abs(int(value)) > LARGEST:
            raise ValueError(f"{option}: expected a whole number of at most {LARGEST}, got {shown(value)}")
        return int(value)
    if kind is float and isinstance(value, Real) and not is_bool:
        try:
            return float(value)
        except OverflowError:
            pass
    raise ValueError(f"{option}: expected {EXPECTED[kind]}, got {shown(value)}")


def from_text(option: str, text: str, kind: type) -> Any:
    """Return the number that `text` writes in plain digits; a ValueError names `option` otherwise."""
    if kind not in NUMBER:
        return checked(option, text, kind)
    if not re.fullmatch(NUMBER[kind], text) or len(text) > MOST_CHARACTERS:
        raise ValueError(f"{option}: expected {EXPECTED[kind]}, got {shown(text)}")
    return checked(option, kind(text), kind)


def shown(value: object) -> str:
    """Return `repr(value)`, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + "..."

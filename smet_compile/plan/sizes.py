"""Sizes as people write and read them: "24GB" is 24e9 bytes, "24GiB" is 24 * 2**30."""

from __future__ import annotations

import re

from smet_compile.format import arguments

_DECIMAL = ("", "k", "M", "G", "T", "P")
_UNITS = {f"{prefix}b".lower(): 1000**power for power, prefix in enumerate(_DECIMAL)}
_UNITS |= {f"{prefix}ib".lower(): 1024**power for power, prefix in enumerate(_DECIMAL) if power}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)\s*")


def parse_bytes(argument: str, size: str | float) -> int:
    """Bytes of "24GB", "1.5 GiB", "800MB" or a number of bytes.

    Raises ValueError, naming ``argument``, for anything else.
    """
    found = _SIZE.fullmatch(size) if isinstance(size, str) else None
    unit = _UNITS.get((found[2] or "b").lower()) if found else None
    try:
        written = float(found[1]) * unit if found and unit else size
        return int(arguments.number(argument, written, at_least=1, at_most=2**63))
    except ValueError:
        raise ValueError(
            f'{argument}: expected bytes such as "24GB", "22.5GiB" or 24e9, got {arguments.described(size)}; give the '
            "memory of the device"
        ) from None


def bytes_text(num_bytes: float) -> str:
    """1234567 → "1.23 MB"."""
    return _text(num_bytes, "B")


def operations_text(number: float) -> str:
    """1.5e12 → "1.50 TFLOP"."""
    return _text(number, "FLOP")


def _text(number: float, unit: str) -> str:
    power = 0
    while abs(number) >= 999.5 and power < len(_DECIMAL) - 1:
        number, power = number / 1000, power + 1
    digits = 0 if power == 0 else max(0, 3 - len(str(round(abs(number)))))
    return f"{number:,.{digits}f} {_DECIMAL[power]}{unit}"

"""Reads the machine code of a kernel: which loops it has, and how many instructions a thread makes in each."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);")
_LEAST = 20
"""Instructions of a loop of a kernel here; shorter ones lie in what the compiler adds."""


@dataclass(frozen=True)
class Loop:
    """Holds the instructions of a loop, without those of loops inside it, which run rarely if at all."""

    instructions: list[str]

    @property
    def count(self) -> int:
        return len(self.instructions)

    def has(self, pattern: str) -> bool:
        return any(re.search(pattern, each) for each in self.instructions)


def machine_code(cubin: bytes, tool: Path) -> str:
    """Disassembles a compiled kernel with ``cuobjdump``."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout


def outer_loops(code: str) -> list[Loop]:
    """Returns the loops that lie in no other, in order: from the target of each branch backwards to the branch."""
    listing = [(int(address, 16), text.strip()) for address, text in _INSTRUCTION.findall(code)]
    number = {address: place for place, (address, _) in enumerate(listing)}
    spans = []
    for place, (_, text) in enumerate(listing):
        target = re.search(r"\bBRA\b.*0x([0-9a-f]+)", text)
        first = None if target is None else number.get(int(target[1], 16))
        if first is not None and place - first >= _LEAST:
            spans.append((first, place))
    outer = [one for one in spans if not any(_contains(other, one) for other in spans)]
    return [Loop(_own(listing, one, [each for each in spans if _contains(one, each)])) for one in outer]


def _contains(outer: tuple[int, int], inner: tuple[int, int]) -> bool:
    return outer != inner and outer[0] <= inner[0] and inner[1] <= outer[1]


def _own(listing: list[tuple[int, str]], one: tuple[int, int], inside: list[tuple[int, int]]) -> list[str]:
    places = range(one[0], one[1] + 1)
    return [listing[place][1] for place in places if not any(first <= place <= last for first, last in inside)]

import io
from itertools import pairwise

import pytest
from rich.console import Console
from rich.text import Text

from smet_compile.pretrain.console import Status, open_progress


def shown(terminal: bool, steps: int) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=80)
    with open_progress(console, 0, steps) as progress:
        for step in range(1, steps + 1):
            progress.update(Status(step, 2.5, 12345.6, 0.3, 30 if step < 30 else None))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_file_gets_a_few_plain_lines() -> None:
    lines = shown(terminal=False, steps=200).splitlines()
    assert len(lines) == 21
    assert lines[0] == "step 1/200  loss 2.500  12,346 tok/s  density 0.300  next update 30"
    assert lines[-1].startswith("step 200/200") and lines[-1].endswith("no more updates")
    assert "\x1b" not in "".join(lines)


def test_at_80_columns_the_bar_is_long_and_tells_the_time_left() -> None:
    frames = Text.from_ansi(shown(terminal=True, steps=200)).plain.splitlines()
    bar, status = next((above, below) for above, below in pairwise(frames) if "200/200" in above)
    assert bar.count("━") > 40 and " left 0:00" in bar and len(bar) == 80
    assert status.strip() == "loss 2.500  12,346 tok/s  density 0.300  no more updates"


@pytest.mark.parametrize("part", ["loss 2.500", "12,346 tok/s", "density 0.300", "200/200", "\x1b["])
def test_a_terminal_gets_a_live_bar(part: str) -> None:
    assert part in shown(terminal=True, steps=200)

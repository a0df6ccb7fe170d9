"""The figures of docs/how_it_works.md show what its text says of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

import smet_compile as smet
from smet_compile.passes.pipeline import PASSES
from tests.support.fresh_process import ROOT


@pytest.fixture
def drawing(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """A module of docs/figures by its name."""
    monkeypatch.syspath_prepend(ROOT / "docs/figures")
    return importlib.import_module


def test_what_the_passes_take_away(drawing: Callable[[str], Any]) -> None:
    torch._dynamo.reset()
    draw = drawing("draw_graphs")
    before, after = (draw.count_tensors(*draw.captured_step((24, 40, 56), passes)) for passes in ((), PASSES))
    assert list(before.values())[:3] == [1, 2, 2]
    assert set(after.values()) == {0}


@pytest.mark.parametrize(("rule", "first", "twelfth"), [(smet.NaiveAdamW, 3.16, 6.57), (smet.ActiveAdamW, 0.01, 0.12)])
def test_the_first_steps_after_growth(
    drawing: Callable[[str], Any], rule: type[smet.ActiveAdamW], first: float, twelfth: float
) -> None:
    """The naive correction by the global step, which is still √(1 - 0.999^t) after t steps."""
    draw = drawing("draw_rule")
    late = 1500
    constant, noisy = draw.steps_after_growth(lambda model: rule(model, lr_density_exponent=0.0), late)
    for age, expected in ((1, first), (12, twelfth)):
        left = (1 - 0.999 ** (late + age)) ** 0.5 if rule is smet.NaiveAdamW else 1.0
        assert constant[age - 1].item() == pytest.approx(expected * left, rel=2e-3)
    assert noisy[0].item() == pytest.approx(constant[0].item(), rel=1e-3)
    assert noisy[50] < constant[50] / 2


def test_the_bytes_in_the_figure_are_those_of_the_text(drawing: Callable[[str], Any]) -> None:
    draw = drawing("draw_memory")

    def total(dtype: torch.dtype, moments: Any, density: float | None, block: int) -> float:
        return round(sum(draw.measure_bytes(dtype, moments, density, block).values()), 2)

    assert total(torch.float32, None, None, 1) == 16
    assert [total(torch.float32, None, 0.25, block) for block in (1, 64)] == [4.38, 4.00]
    assert [total(torch.bfloat16, "int8", 0.25, block) for block in (1, 64)] == [1.89, 1.50]


def test_the_format_is_drawn(drawing: Callable[[str], Any]) -> None:
    texts = {text.get_text() for axes in drawing("draw_format").draw_format().axes for text in axes.texts}
    assert any("row_starts     [0, 2, 4, 5]" in text for text in texts)
    assert "what hangs over the edge is zero, always" in texts

"""Provides the fixture that tells direct products from unpacked ones."""

import pytest
from torch import Tensor

from smet_compile.ops import CompactWeight


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lists the names of the weights that are unpacked by a read."""
    names: list[str] = []
    forward = CompactWeight.forward

    def noted(self: CompactWeight, values: Tensor) -> Tensor:
        names.append(self.name)
        return forward(self, values)

    monkeypatch.setattr(CompactWeight, "forward", noted)
    return names

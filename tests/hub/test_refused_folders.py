"""A folder that does not hold all that a model without data needs is refused, and the model stays as it was."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import smet_compile as smet
from smet_compile.ops import find_sites
from tests.support.states import structure


def test_truth_values_that_no_file_holds_are_named(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.register_buffer("mask", torch.ones(4, 4, dtype=torch.bool).tril(), persistent=False)

    smet.save_compact(smet.sparsify(Masked(), 0.5), tmp_path)
    with torch.device("meta"):
        empty = Masked()
    with pytest.raises(ValueError, match="mask were written by no reset_parameters"):
        smet.load_compact(tmp_path, empty)


class Shifted(nn.Module):
    """Has a buffer in no file, which only ``fill`` writes, and a layer that has data in every case."""

    def __init__(self, fill: bool = False) -> None:
        super().__init__()
        self.linear, self.fill = nn.Linear(16, 8), fill
        self.register_buffer("shift", torch.arange(8.0), persistent=False)
        with torch.device("cpu"):
            self.last = nn.Linear(8, 8)

    def reset_parameters(self) -> None:
        if self.fill:
            self.shift.copy_(torch.arange(8.0))

    def forward(self, x: torch.Tensor) -> Any:
        return self.last(self.linear(x) + self.shift)


@pytest.mark.parametrize("compact", [False, True])
def test_a_model_without_data_that_is_refused_is_unchanged(compact: bool, tmp_path: Path) -> None:
    """Buffers that no file holds are known only after they were computed. A second call is refused as the first one."""
    saved = smet.sparsify(Shifted(), 0.4)
    smet.save_compact(saved, tmp_path)
    with torch.device("meta"):
        model = Shifted()
    if compact:
        smet.sparsify(model, 0.4)
    last = {name: tensor.clone() for name, tensor in model.last.named_parameters()}

    def shape() -> list[Any]:
        buffers = [(id(buffer), buffer.device) for buffer in model.buffers()]
        return [structure(model), buffers, [list(vars(module)) for module in model.modules()]]

    before = shape()
    for _ in range(2):
        with pytest.raises(ValueError, match="shift were written by no reset_parameters"):
            smet.load_compact(tmp_path, model)
        assert shape() == before
        assert len(find_sites(model)) == (2 if compact else 0)
        assert all(p.is_meta for p in model.linear.parameters()) and model.shift.is_meta
        assert all(torch.equal(tensor, last[name]) for name, tensor in model.last.named_parameters())
    model.fill = True
    smet.load_compact(tmp_path, model, device="cpu")
    theirs = saved.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(torch.ones(2, 16)), saved(torch.ones(2, 16)))

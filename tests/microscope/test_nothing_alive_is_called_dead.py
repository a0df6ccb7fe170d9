"""Dead units make no difference, as derivatives show and what comes to a layer from other inputs."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smet_compile as smet
from smet_compile.ops import find_sites
from tests.microscope.forwards import (
    NOT_KNOWN,
    OF_FEATURES,
    OF_TOKENS,
    Batch,
    Forward,
    Layers,
    features,
    rows_of_a_weight,
    tokens,
)
from tests.microscope.programs import scattered

pytestmark = pytest.mark.filterwarnings("ignore:sparsify. the model's matrices as a whole")


def outputs_that_matter(model: nn.Module, x: Any, looks_up: bool) -> dict[str, Tensor]:
    """Returns the rows of each weight on which the result depends; columns where rows are looked up."""
    model.zero_grad()
    out = model(x)
    out = out.features if isinstance(out, Batch) else out
    if not out.requires_grad:
        return {name: torch.zeros(site.layout.rows, dtype=torch.bool) for name, site in find_sites(model).items()}
    (out * torch.randn_like(out)).sum().backward()
    found = {}
    for name, site in find_sites(model).items():
        grad, mask = site.values.grad, site.mask().view(site.layout.matrix)
        grads = torch.zeros(site.layout.matrix, dtype=torch.float64)
        grads[mask] = 0.0 if grad is None else grad
        found[name] = (grads != 0).any(0 if looks_up else 1)
    return found


def columns_that_change(model: nn.Module, make: Any) -> dict[str, Tensor]:
    """Returns the columns of each linear layer to which other inputs bring something else."""
    came: dict[str, list[Tensor]] = {}
    for name, module in model.named_children():
        module.register_forward_pre_hook(
            lambda _, args, name=name: came.setdefault(f"{name}.weight", []).append(args[0].detach().clone())
        )
    for _ in range(2):
        model(make())
    return {name: (a != b).flatten(0, -2).any(0) for name, (a, b) in came.items()}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("forward", [*OF_FEATURES, *OF_TOKENS], ids=lambda forward: forward.__name__)
def test_nothing_alive_is_called_dead(forward: Forward, seed: int) -> None:
    torch.manual_seed(seed)
    model = scattered(smet.sparsify(Layers(forward).double(), 0.15), seed)

    def make() -> Any:
        x = tokens() if forward in OF_TOKENS else features()
        return Batch(x) if forward.__name__ == "of_a_dataclass" else x

    found = smet.inspect(model, make())
    assert any("not known" in note for note in found.notes) == (forward in NOT_KNOWN)
    for name, matter in outputs_that_matter(model, make(), forward is rows_of_a_weight).items():
        reach = found[name].reach
        assert reach is None or not (reach.unread & matter).any(), f"{name}: outputs that matter are called unread"
    for name, change in columns_that_change(model, make).items():
        reach = found[name].reach
        assert reach is None or not (reach.starved & change).any(), f"{name}: inputs that change are called starved"

"""Reads go into compiled functions, and compiled forwards see changes of a read or refuse them."""

import pytest
import torch
from torch import Tensor, nn

import smet_compile as smet
from smet_compile.ops import find_sites
from smet_compile.tracing import Capture
from tests.support.small_models import sparse_layers


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_read_goes_into_a_compiled_function(backend: str) -> None:
    model, x = sparse_layers(), torch.randn(4, 12)
    compiled = torch.compile(lambda weight, x: x @ weight.t() * 2, backend=backend, fullgraph=True)
    compiled(model[0].weight, x).sum().backward()
    compact = find_sites(model)["0.weight"].values
    got, compact.grad = compact.grad, None
    (x @ model[0].weight.t() * 2).sum().backward()
    assert got is not None and compact.grad is not None
    torch.testing.assert_close(got, compact.grad)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_compiled_forward_sees_a_change_of_a_read_that_is_still_held(backend: str) -> None:
    model, x = sparse_layers(), torch.randn(3, 12)
    compiled = torch.compile(model, backend=backend)
    compiled(x).sum().backward()
    for layer in (model[0], model[3]):
        held = layer.weight  # the last one outlives the loop
        with torch.no_grad():
            held.clamp_(-0.01, 0.01)
    values = model[3].parametrizations.weight.original
    actual = compiled(x)
    assert values.abs().max() <= 0.01 and held.shape == (7, 20)
    assert torch.allclose(actual, model(x))
    actual.sum().backward()


def test_a_compiled_forward_raises_where_a_change_cannot_be_kept() -> None:
    model, x = sparse_layers(), torch.randn(3, 12)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(x)
    held = model[3].weight
    held.mul_(2)
    with pytest.raises(ValueError, match="was changed in place while gradients are recorded"):
        compiled(x)
    assert held.shape == (7, 20)


def test_a_compiled_forward_in_another_dtype_raises_once_and_keeps_the_change() -> None:
    model, x = sparse_layers(), torch.randn(3, 12)
    compiled = torch.compile(model, backend=Capture())
    with torch.autocast("cpu", torch.bfloat16):
        compiled(x)
        held = model[3].weight
        with torch.no_grad():
            held.zero_()
        with pytest.raises(ValueError, match="call the function again"):
            compiled(x)
        assert torch.equal(compiled(x).float(), model[3].bias.bfloat16().float().expand(3, -1))


def test_a_change_after_the_compiled_forward_waits_for_the_next_use() -> None:
    model, x = sparse_layers(), torch.randn(3, 12)
    loss = torch.compile(model, backend=Capture())(x).square().sum()
    before = model[3].parametrizations.weight.original.detach().clone()
    held = model[3].weight
    with torch.no_grad():
        held.zero_()
    loss.backward()
    assert torch.equal(model[3].parametrizations.weight.original, before)
    assert (model(x) == model[3].bias).all()


def test_a_constraint_in_the_forward_of_its_own_module_is_kept() -> None:
    class Constrained(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.3)
            return super().forward(x)

    torch.manual_seed(0)
    model = smet.sparsify(nn.Sequential(Constrained(12, 20), nn.Linear(20, 7)), 0.5)
    before = model[0].weight.detach().clone()
    model(torch.ones(2, 12)).sum().backward()
    torch.testing.assert_close(model[0].weight.detach(), torch.renorm(before, p=2, dim=0, maxnorm=0.3))
    assert float(model[0].weight.detach().norm(dim=1).max()) <= 0.3 + 1e-6

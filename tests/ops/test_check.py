"""The arguments of a product are checked before a kernel reads them by their address."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import smet_compile as smet
from tests.ops.matmul_cases import case

ops = torch.ops.smet
EACH = case("ragged", (8, 8))
VALUES = EACH.values(torch.float32)


def masked(input: Tensor, values: Tensor = VALUES, bias: Tensor | None = None) -> Any:
    return ops.masked_matmul(input, values, *EACH.topology, True, bias)


def sampled(left: Tensor, right: Tensor) -> Any:
    return ops.sampled_matmul(left, right, *EACH.topology, EACH.compact.num_active)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: masked(torch.randn(5, 29).bfloat16()), "expected input of torch.float32 on cpu, got torch.bfloat16"),
        (lambda: masked(torch.randn(5, 29), bias=torch.randn(37).double()), "expected bias of torch.float32"),
        (lambda: masked(torch.randn(5, 29), bias=torch.randn(3)), r"expected a bias of \(37,\), got \(3,\)"),
        (lambda: masked(torch.randn(5, 8)), r"input: expected \(tokens, 29\), got \(5, 8\)"),
        (lambda: masked(torch.randn(2, 5, 29)), r"input: expected \(tokens, 29\), got \(2, 5, 29\)"),
        (lambda: masked(torch.randn(5, 29), VALUES.view(-1, 64)), r"values: expected shape \(N, \*\(8, 8\)\)"),
        (lambda: sampled(torch.randn(5, 37).bfloat16(), torch.randn(5, 29)), "expected right of torch.bfloat16"),
        (lambda: sampled(torch.randn(5, 37), torch.randn(4, 29)), "expected as many tokens on both sides"),
        (lambda: sampled(torch.randn(5, 29), torch.randn(5, 29)), r"left: expected \(tokens, 37\), got \(5, 29\)"),
    ],
)
def test_what_does_not_go_together_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_they_have_no_gradient_of_their_own() -> None:
    out = masked(torch.randn(5, 29, requires_grad=True))
    with pytest.raises(RuntimeError, match="multiply with the module's weight instead"):
        out.sum().backward()


@pytest.mark.parametrize("block_shape", [(1, 1), (1, 8), (8, 8)], ids=str)
def test_lists_of_another_topology_are_refused(block_shape: tuple[int, int]) -> None:
    each = case("ragged", block_shape)
    topology, lists, layout = each.topology
    values, other = each.values(torch.float32), lists.flip(0).contiguous()
    assert torch.equal(ops.unpack(values, topology, lists, layout, None, None, False), each.dense[0].float())
    with pytest.raises(ValueError, match=r"expected the lists that are derived from it, got others"):
        ops.unpack(values, topology, other, layout, None, None, False)


def test_a_size_that_is_a_symbol() -> None:
    """Parameters given by ``functional_call`` to a dynamic graph have symbols for their number of blocks."""
    model = smet.sparsify(nn.Linear(64, 64), 0.5, block_shape=(8, 8))
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    x = torch.randn(3, 64)

    def call(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, parameters, (x,)).sum()

    compiled = torch.compile(call, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(parameters, x), call(parameters, x))

"""Tests the products as torch sees them: schemas with true mutations, fakes, tracing with symbolic sizes."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from tests.ops.matmul_cases import Case, case
from tests.support.pairs import pairwise
from tests.support.updates import after_gradient, settings

CASES = {
    "single": ("ragged", (1, 1)),
    "runs": ("convolution", (1, 8)),
    "tiles": ("ragged", (8, 8)),
    "stack_of_singles": ("stack", (1, 1)),
    "stack_of_tiles": ("stack", (16, 8)),
}
every_case = pytest.mark.parametrize("name", list(CASES))
grouped_or_not = pytest.mark.parametrize("grouped", [False, True], ids=["", "grouped"])


def make(name: str, grouped: bool, dtype: torch.dtype = torch.float32) -> tuple[Case, Tensor, Tensor, Tensor | None]:
    """Makes a weight, the left and the right factor of its gradient, and offsets."""
    each = case(*CASES[name])
    num_matrices, rows, cols = each.grid.matrix
    left, right = each.tokens(6, rows, dtype), each.tokens(6, cols, dtype)
    if not grouped:
        return each, left, right, None
    left, right = left.reshape(-1, rows), right.reshape(-1, cols)
    return each, left, right, torch.arange(1, num_matrices + 1, dtype=torch.int32)


def masked_arguments(name: str, grouped: bool, transposed: bool) -> tuple[Any, ...]:
    each, left, right, offsets = make(name, grouped)
    bias = torch.randn(each.grid.matrix[1]) if transposed else None
    x = right if transposed else left
    return x, each.values(torch.float32), *each.topology, transposed, bias, offsets


def sampled_arguments(name: str, grouped: bool) -> tuple[Any, ...]:
    each, left, right, offsets = make(name, grouped)
    return left, right, *each.topology, each.compact.num_active, offsets


def assert_fake_is_real(op: Any, arguments: tuple[Any, ...]) -> None:
    real = op(*arguments)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = op(*arguments)
    for what in ("shape", "dtype", "device"):
        assert getattr(fake, what) == getattr(real, what), what
    assert fake.stride() == real.stride() and real.is_contiguous()
    given = {leaf.untyped_storage()._cdata for leaf in arguments if isinstance(leaf, Tensor)}
    assert real.untyped_storage()._cdata not in given


@pytest.mark.parametrize("transposed", [True, False], ids=["transposed", "plain"])
@grouped_or_not
@every_case
def test_masked_matmul(name: str, grouped: bool, transposed: bool) -> None:
    arguments = masked_arguments(name, grouped, transposed)
    torch.library.opcheck(torch.ops.smet.masked_matmul.default, arguments)
    assert_fake_is_real(torch.ops.smet.masked_matmul, arguments)
    x, *others = arguments
    assert_fake_is_real(torch.ops.smet.masked_matmul, (x.mT.contiguous().mT, *others))
    assert_fake_is_real(
        torch.ops.smet.masked_matmul, (x[..., :0, :], *others[:-1], None if not grouped else others[-1] * 0)
    )


@grouped_or_not
@every_case
def test_sampled_matmul(name: str, grouped: bool) -> None:
    arguments = sampled_arguments(name, grouped)
    torch.library.opcheck(torch.ops.smet.sampled_matmul.default, arguments)
    assert_fake_is_real(torch.ops.smet.sampled_matmul, arguments)
    left, right, *others = arguments
    assert_fake_is_real(torch.ops.smet.sampled_matmul, (left.mT.contiguous().mT, right.mT.contiguous().mT, *others))


@pytest.mark.parametrize(
    ("name", "grouped", "noise_seed", "codes"), pairwise(list(CASES), [False, True], [None, 3], [False, True])
)
def test_sampled_update(name: str, grouped: bool, noise_seed: int | None, codes: bool) -> None:
    dtype = torch.bfloat16 if noise_seed else torch.float32
    each, left, right, offsets = make(name, grouped, dtype)
    values = each.values(dtype)
    moments = [torch.zeros_like(values, dtype=torch.uint8 if codes else torch.float32) for _ in range(2)]
    scales = torch.zeros(2, each.compact.layout.num_groups) if codes else None
    generation = torch.zeros(each.compact.num_active, dtype=torch.uint8)
    state = [*moments, scales, torch.tensor(0), torch.tensor(4)]
    numbers = settings(warmup_steps=10, noise_seed=noise_seed)
    rest = after_gradient(state, torch.tensor(0.1), (generation, torch.tensor([0])), each.topology, numbers)
    torch.library.opcheck(torch.ops.smet.sampled_update_.default, (values, left, right, offsets, *rest))


def test_it_takes_the_arguments_of_update() -> None:
    """Whoever puts the one op in place of the other hands on all that comes after the gradient."""
    names = {
        op: [a.name for a in getattr(torch.ops.smet, op).default._schema.arguments]
        for op in ("update_", "sampled_update_")
    }
    assert names["update_"][:2] == ["values", "grad"]
    assert names["sampled_update_"][:4] == ["values", "left", "right", "offsets"]
    assert names["sampled_update_"][4:] == names["update_"][2:]

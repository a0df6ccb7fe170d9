"""Tests the factor of each row against its definition, as an op, and in the backward of ``unpack``."""

import pytest
import torch
from torch import Tensor

from smet_compile.format import Layout, Topology
from smet_compile.ops import CompactWeight, choose, law, row_scale

LAYOUTS = {
    "single": ((7, 9), (1, 1), False),
    "runs": ((3, 19), (1, 16), False),
    "tiles": ((11, 13), (4, 4), False),
    "columns": ((9, 5), (2, 1), False),
    "stack": ((2, 5, 6), (2, 4), False),
    "convolution": ((6, 3, 3, 3), (1, 1), True),
}


def site(name: str, dtype: torch.dtype = torch.float64, with_empty_row: bool = True) -> tuple[CompactWeight, Tensor]:
    shape, block_shape, flatten = LAYOUTS[name]
    layout = Layout.of(shape, block_shape, flatten)
    mask = torch.rand(layout.num_blocks) < 0.6
    mask[0] = True
    if with_empty_row and layout.block_rows > 1:
        mask[layout.block_cols : 2 * layout.block_cols] = False
    compact = CompactWeight(layout, mask, int(mask.sum()))
    return compact, torch.randn(layout.values_shape(compact.num_active), dtype=dtype)


def factors_of_rows(compact: CompactWeight) -> Tensor:
    """Returns √(k / k̄) of every row of all matrices, counted one by one."""
    layout = compact.layout
    dense = law.unpack(torch.ones(layout.values_shape(compact.num_active)), compact.active)
    rows = dense.view(-1, layout.cols).tolist()
    counts = [sum(1 for entry in row if entry) for row in rows]
    mean = sum(counts) / len(counts)
    return torch.tensor([(count / mean) ** 0.5 for count in counts], dtype=torch.float64)


def scaled(grad: Tensor, compact: CompactWeight) -> Tensor:
    result: Tensor = torch.ops.smet.scale_rows(grad, compact.topology, compact.lists, compact.layout.text)
    return result


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_equals_its_law_and_its_definition(name: str) -> None:
    compact, grad = site(name)
    expected = law.unpack(grad, compact.active).view(-1, compact.layout.cols) * factors_of_rows(compact)[:, None]
    for actual in (scaled(grad, compact), law.scale_rows(grad, compact.active)):
        dense = law.unpack(actual, compact.active).view(-1, compact.layout.cols)
        torch.testing.assert_close(dense, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_mean_of_squares_is_one(name: str) -> None:
    compact, _ = site(name)
    assert factors_of_rows(compact).square().mean().item() == pytest.approx(1.0, abs=1e-14)


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_is_an_op(name: str) -> None:
    compact, grad = site(name, torch.float32)
    arguments = grad.requires_grad_(), compact.topology, compact.lists, compact.layout.text
    torch.library.opcheck(torch.ops.smet.scale_rows.default, arguments)


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_unpack_scales_its_gradient_and_its_sinks(name: str) -> None:
    compact, values = site(name)
    dense_grad = torch.randn(compact.layout.shape, dtype=torch.float64)
    topology = compact.topology, compact.lists, compact.layout.text
    expected = law.scale_rows(law.pack(dense_grad, compact.active), compact.active)

    leaf = values.clone().requires_grad_()
    compact.scales_rows = True
    compact(leaf).backward(dense_grad)
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-14, atol=1e-14)

    sink = torch.zeros_like(values).requires_grad_()
    growth = torch.zeros_like(dense_grad).requires_grad_()
    torch.ops.smet.unpack(values, *topology, sink, growth, False, True).backward(dense_grad)
    torch.testing.assert_close(sink.grad, expected, rtol=1e-14, atol=1e-14)
    assert torch.equal(growth.grad, dense_grad), "growth sees the gradient as it is"
    torch.library.opcheck(torch.ops.smet.unpack.default, (leaf.detach(), *topology, sink, growth, False, True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", list(LAYOUTS))
def test_the_kernel_is_plain_torch_bit_for_bit(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each number is rounded once, whoever multiplies; gradients that are not contiguous are read as they are."""
    compact, grad = site(name, dtype)
    grad = law.pack(law.unpack(grad, compact.active), compact.active)  # zero where blocks hang over an edge
    grad = torch.stack((grad, grad), -1)[..., 0]
    case = choose.case_of(grad, compact.active)
    assert choose.kernel_of("scale_rows", case) == ("torch" if dtype == torch.bfloat16 else "cpu_rows")
    actual = scaled(grad, compact)
    assert torch.equal(row_scale.scaled(grad.clone(), compact.active), actual)
    for forced in ("torch", "reference"):
        monkeypatch.setenv("SMET_COMPILE_KERNEL", forced)
        assert choose.kernel_of("scale_rows", case) == forced
        assert torch.equal(row_scale.scaled(grad.clone(), compact.active), scaled(grad, compact))
        torch.testing.assert_close(
            actual, scaled(grad, compact), **({"rtol": 0, "atol": 0} if forced == "torch" else {})
        )


def test_low_precision_is_rounded_once() -> None:
    compact, grad = site("single", torch.bfloat16)
    expected = law.scale_rows(grad.double(), compact.active)
    assert torch.equal(scaled(grad, compact), expected.float().bfloat16())


def test_gradients_of_gradients() -> None:
    compact, values = site("tiles")
    compact.scales_rows = True

    def loss(leaf: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(compact(leaf).pow(3).sum(), leaf, create_graph=True)
        return grad

    inputs = values.requires_grad_()
    (second,) = torch.autograd.grad(loss(inputs).sum(), inputs)
    expected = law.scale_rows(6 * law.pack(law.unpack(values, compact.active), compact.active), compact.active)
    factor = law.scale_rows(torch.ones_like(values), compact.active)
    torch.testing.assert_close(second, (expected * factor).detach(), rtol=1e-12, atol=1e-12)


def test_is_computed_once_for_a_topology(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Topology] = []
    compute = row_scale._row_factors
    monkeypatch.setattr(row_scale, "_row_factors", lambda topology: calls.append(topology) or compute(topology))
    compact, grad = site("single")
    for _ in range(3):
        scaled(grad, compact)
    assert len(calls) == 1
    before = scaled(grad, compact)
    compact.set_mask(compact.mask().flip(0))
    after = scaled(grad, compact)
    assert len(calls) == 2 and not torch.equal(before, after)
    torch.testing.assert_close(after, law.scale_rows(grad, compact.active), rtol=1e-14, atol=1e-14)


def test_refuses_another_shape() -> None:
    compact, grad = site("tiles")
    with pytest.raises(ValueError, match=r"scale_rows: expected a gradient of \(\d+, 4, 4\), got"):
        scaled(grad.flatten(1), compact)


@pytest.mark.parametrize(("mask", "equal"), [([1, 0, 0, 1], True), ([1, 1, 0, 1], False), ([1, 1, 1, 1], True)])
def test_equal_fan_in(mask: list[int], equal: bool) -> None:
    layout = Layout.of((2, 2), (1, 1))
    assert row_scale.has_equal_fan_in(Topology.from_mask(torch.tensor(mask, dtype=torch.bool), layout)) == equal

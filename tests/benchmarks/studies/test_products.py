"""Products of bf16 matrices that are computed in fp32 are torch's own, but for how sums are rounded."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.studies.products import ProductsInFp32, fast_products

PRODUCTS = (functional.linear, lambda a, b: a @ b.T, lambda a, b: a.matmul(b.T), lambda a, b: torch.matmul(a, b.T))


def _products(product: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((5, 48), (7, 48), (5, 7))
    a, b, gradient = (torch.randn(*shape, generator=generator).to(torch.bfloat16).to(dtype) for shape in shapes)
    a.requires_grad_(), b.requires_grad_()
    result = product(a, b)
    result.backward(gradient)
    assert a.grad is not None and b.grad is not None
    return [result.detach(), a.grad, b.grad]


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("is_compiled", [False, True])
def test_they_are_the_exact_products_rounded(product: Callable[[Tensor, Tensor], Tensor], is_compiled: bool) -> None:
    exact = _products(product, torch.float64)
    with ProductsInFp32():
        found = _products(torch.compile(product, backend="aot_eager") if is_compiled else product, torch.bfloat16)
    for each, expected in zip(found, exact, strict=True):
        assert each.dtype == torch.bfloat16
        torch.testing.assert_close(each.double(), expected, rtol=2**-8, atol=1e-5)


def test_other_dtypes_and_functions_stay() -> None:
    a, b = torch.randn(4, 6), torch.randn(3, 6)
    with ProductsInFp32():
        assert torch.equal(functional.linear(a, b), a @ b.T)
        assert torch.equal(a.bfloat16() + 1, (a.bfloat16() + 1))


def test_where_the_cpu_has_avx2_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, is_slow in (("AVX2", True), ("AVX512", False), ("DEFAULT", False)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda found=capability: found)
        assert isinstance(fast_products("cpu"), ProductsInFp32) is is_slow
        assert not isinstance(fast_products("cuda"), ProductsInFp32)

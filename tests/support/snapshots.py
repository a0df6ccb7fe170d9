"""Copies whatever has a state_dict, and compares copies bit for bit."""

import copy
from typing import Any

import torch
from torch import Tensor


def snapshot(*objects: Any) -> list[Any]:
    return [copy.deepcopy(dict(o.state_dict())) for o in objects if o is not None]


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))


def assert_same(actual: Any, expected: Any, where: str = "") -> None:
    if isinstance(expected, Tensor):
        assert isinstance(actual, Tensor) and same_bits(actual.detach(), expected.detach()), f"{where} differs"
    elif isinstance(expected, dict):
        assert list(actual) == list(expected), f"{where}: keys {list(actual)} != {list(expected)}"
        for key in expected:
            assert_same(actual[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), f"{where}: length {len(actual)} != {len(expected)}"
        for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
            assert_same(a, e, f"{where}[{i}]")
    else:
        assert actual == expected, f"{where}: {actual!r} != {expected!r}"

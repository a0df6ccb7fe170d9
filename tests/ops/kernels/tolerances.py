"""The one table of tolerances for kernels: relative RMS of the difference to the reference in fp64, by dtype.

A sum is made in fp32 and rounded once, so of a bf16 result (8 bits) half a last place is left, 2^-9 at most and less
in the mean; of an fp32 result what the order of a sum of some thousand numbers makes.
"""

import torch
from torch import Tensor

TOLERANCES = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 4e-4, torch.bfloat16: 3e-3}


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """Of the difference, by that of what is expected; 0 where both are 0."""
    difference = (actual.double() - expected.double()).norm()
    return float(difference / expected.double().norm()) if difference else 0.0


def assert_close(name: str, actual: Tensor, expected: Tensor) -> None:
    """``actual`` is as good as its dtype allows. A NaN in it fails too."""
    assert actual.shape == expected.shape, f"{name}: expected {tuple(expected.shape)}, got {tuple(actual.shape)}"
    error, allowed = relative_rms(actual, expected), TOLERANCES[actual.dtype]
    assert error <= allowed, f"{name}: relative RMS {error:.2g}, allowed are {allowed:.2g} in {actual.dtype}"

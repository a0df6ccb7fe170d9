"""Holds the one table of tolerances for kernels: relative RMS of the difference to the law in fp64, by dtype.

A sum is made in fp32 and rounded once. Rounding to b bits of mantissa leaves 2^-b / √12 times about 1.4 in the mean,
which is 1.6e-3 in bf16 and 2e-4 in fp16; an fp32 result has what the order of a sum of some thousand numbers makes.
Of a few numbers (zeros, which need no rounding, do not count) the mean says little: there half a last place is
allowed, the most that rounding once can make.
"""

import torch
from torch import Tensor

from tests.ops.kernels.device import INTERPRETED

TOLERANCES = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 3e-4, torch.bfloat16: 2e-3}
HALF_A_PLACE = {torch.float16: 2**-11, torch.bfloat16: 2**-8}
FEW = 2000
if INTERPRETED:  # it cuts bf16 off where devices round to nearest: twice the error
    TOLERANCES[torch.bfloat16] *= 2
    HALF_A_PLACE[torch.bfloat16] *= 2


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """Returns the root mean square of the difference by that of what is expected; 0 where both are 0."""
    difference = (actual.double() - expected.double()).norm()
    return float(difference / expected.double().norm()) if difference else 0.0


def assert_close(name: str, actual: Tensor, expected: Tensor) -> None:
    """Asserts that ``actual`` is as good as its dtype allows. A NaN in it fails too."""
    assert actual.shape == expected.shape, f"{name}: expected {tuple(expected.shape)}, got {tuple(actual.shape)}"
    error, allowed = relative_rms(actual, expected), TOLERANCES[actual.dtype]
    if expected.count_nonzero() < FEW:
        allowed = HALF_A_PLACE.get(actual.dtype, allowed)
    assert error <= allowed, f"{name}: relative RMS {error:.2g}, allowed are {allowed:.2g} in {actual.dtype}"

"""Says where Triton's kernels are tested: on a GPU if there is one, else on the CPU in Triton's interpreter.

The interpreter must be asked for before a kernel is defined, so it has a process of its own:
``test_triton_interpreted.py`` starts it, and everywhere else the tests marked ``on_device`` are skipped.
"""

import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from tests.support.pairs import pairwise

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
on_device = pytest.mark.skipif(not (HAS_GPU or INTERPRETED), reason="no GPU: test_triton_interpreted.py runs it")
compiled_only = pytest.mark.skipif(INTERPRETED, reason="the interpreter has replaced the compiler")


def combinations(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Returns every combination of values on a GPU; in the interpreter, which is slow, every pair of values."""
    return list(itertools.product(*axes)) if HAS_GPU else pairwise(*axes)


@pytest.fixture
def new_memory_is_nan() -> Iterator[None]:
    """Fills every ``torch.empty`` of floating point with NaN: what a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)

"""What a launch wants to know: the device's kind and size, whether it is the interpreter."""

from __future__ import annotations

import contextlib
import functools

import torch
import triton
from torch import Tensor

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
"""Whether kernels run in Python on the CPU (``TRITON_INTERPRET=1``): small blocks then."""
_SMS_OF_INTERPRETER = 4


@functools.cache
def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors of ``device``."""
    if device.type != "cuda":
        return _SMS_OF_INTERPRETER
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def architecture(device: torch.device) -> str:
    """The row of ``configs`` that fits: "interpreter", "ampere", or "hopper" for it and what has its shared memory.

    Consumer cards of the generation after (sm_120) have less than half of that, and get the smaller row.
    """
    if device.type != "cuda":
        return "interpreter"
    return "hopper" if torch.cuda.get_device_capability(device)[0] in (9, 10) else "ampere"


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the device of ``tensor`` current, since that is where Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()

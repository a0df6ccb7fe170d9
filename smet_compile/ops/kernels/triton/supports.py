"""What the kernels here can do, for whoever chooses among kernels. Imports nothing that needs Triton."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from smet_compile.format import Layout

OPS = ("masked_matmul", "sampled_matmul", "unpack", "pack")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_OLDEST = (8, 0)
"""Compute capability of Ampere: the first with bf16, tf32 and copies that do not wait."""


def supports(op: str, device: torch.device, dtype: torch.dtype, layout: Layout, has_offsets: bool) -> bool:
    """Whether ``op``, one of ``OPS``, runs in Triton there, for tensors of ``dtype``.

    Tokens sorted by matrix (``has_offsets``) are multiplied for tiles alone; the other kinds of block would have to
    wait for the offsets. The CPU counts where Triton interprets its kernels (``TRITON_INTERPRET=1``).
    """
    if op not in OPS or dtype not in _DTYPES or not runs_on(device):
        return False
    return layout.tiles or not has_offsets


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def runs_on(device: torch.device) -> bool:
    """Whether Triton's kernels run there at all: it has to be installed, and the device young enough."""
    if not _installed():
        return False
    if device.type == "cuda" and torch.version.hip is None:
        return torch.cuda.get_device_capability(device) >= _OLDEST
    return device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"

"""Records where Python waits for a tensor's content, which on a GPU waits for the device.

On a CPU nothing waits, but the same calls are made. Copies between host and device cannot be told there from tensors
that stay where they are, so every call of ``cpu``, ``tolist``, ``numpy`` and ``to(device)`` counts as one, unless it is
asked not to block.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import smet_compile

PACKAGE = str(Path(smet_compile.__file__).parent)
WAITING = frozenset(
    {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "unique_consecutive"}
    | {"bincount", "repeat_interleave"}
)
"""ops of aten that wait for the device, since Python or the size of their result depends on numbers there."""
_INDEXING = frozenset({"index", "index_put_", "index_put"})
_COPYING = ("cpu", "tolist", "numpy", "to")


class HostSyncs(TorchDispatchMode):
    """Records the calls as "file:function call", each as often as it was made."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITING and not (name == "repeat_interleave" and (kwargs or {}).get("output_size") is not None):
            self.note(name)
        elif name in _INDEXING and _waits(name, args):
            self.note(f"{name} by a mask")
        return func(*args, **(kwargs or {}))

    def note(self, call: str) -> None:
        self.found.append(f"{_place()} {call}")


def _waits(name: str, args: Any) -> bool:
    """Tells whether an index is a mask. A mask that is given one number is filled without waiting."""
    is_mask = any(isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1])
    return is_mask and not (name != "index" and args[2].numel() == 1)


def _place() -> str:
    """Returns the innermost function of the package that is being called, else the innermost function at all."""
    frame: Any = sys._getframe(2)
    innermost = frame
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE) and not frame.f_code.co_name.startswith("<"):
            path = Path(frame.f_code.co_filename).relative_to(PACKAGE).as_posix()
            return f"{path}:{frame.f_code.co_name}"
        frame = frame.f_back
    return f"{Path(innermost.f_code.co_filename).name}:{innermost.f_code.co_name}"


@contextmanager
def host_syncs() -> Iterator[list[str]]:
    """Yields the list to which the calls are added that are made by eager code from now on."""
    mode = HostSyncs()

    def recorded(name: str) -> Callable[..., Any]:
        original = getattr(Tensor, name)

        def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            is_copy = name != "to" or any(isinstance(x, torch.device | str) for x in (*args, kwargs.get("device")))
            if is_copy and not kwargs.get("non_blocking") and sys._getframe(1).f_code.co_filename.startswith(PACKAGE):
                mode.note(name)
            return original(tensor, *args, **kwargs)

        return call

    patches = [mock.patch.object(Tensor, name, recorded(name)) for name in _COPYING]
    for patch in patches:
        patch.start()
    try:
        with mode:
            yield mode.found
    finally:
        for patch in patches:
            patch.stop()


def waiting_ops(call: Callable[[], object]) -> list[str]:
    """Returns the names of the ops that wait for the device in a call that may run compiled code."""
    with profile(activities=[ProfilerActivity.CPU]) as events:
        call()
    names = (event.name.removeprefix("aten::") for event in events.events() if event.name.startswith("aten::"))
    return sorted(name for name in names if name in WAITING)

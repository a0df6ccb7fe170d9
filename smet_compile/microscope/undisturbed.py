"""A forward that leaves no trace: not in the model, its buffers, its attributes, nor in torch's settings."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_CONTAINERS = (dict, OrderedDict, defaultdict, list, deque, set)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Within it the model runs in eager mode, without autograd, op by op; afterwards all is as it was.

    What modules keep for themselves is put back, such as a cache that the first forward fills: attributes, and what
    is in their dicts, lists and sets. What hooks keep elsewhere is theirs.
    """
    devices = {t.device.index for t in model.parameters() if t.device.type == "cuda"}
    with (
        _kept_attributes(model),
        _no_fast_path(),
        torch.random.fork_rng(devices=sorted(index for index in devices if index is not None)),
        torch.compiler.set_stance("force_eager"),
        torch.inference_mode(False),  # there, composite ops would come whole
        torch.no_grad(),
    ):
        yield


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Buffers (those of a BatchNorm, say) are afterwards what they were."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


@contextmanager
def _kept_attributes(model: nn.Module) -> Iterator[None]:
    kept: dict[int, tuple[Any, Any]] = {}
    for module in model.modules():
        _keep(vars(module), kept)
    try:
        yield
    finally:
        for container, content in kept.values():
            _put_back(container, content)


def _keep(container: Any, kept: dict[int, tuple[Any, Any]]) -> None:
    """What a dict, a list or a set holds, and those within it."""
    if type(container) not in _CONTAINERS or id(container) in kept:
        return
    kept[id(container)] = container, container.copy()
    for inner in container.values() if isinstance(container, dict) else container:
        _keep(inner, kept)


def _put_back(container: Any, content: Any) -> None:
    before, after = (list(held.items() if isinstance(held, dict) else held) for held in (content, container))
    if len(before) == len(after) and all(_is_same(*pair) for pair in zip(before, after, strict=True)):
        return  # what torch.compile guards on is not touched
    container.clear()
    (container.extend if isinstance(container, list | deque) else container.update)(content)


def _is_same(one: Any, other: Any) -> bool:
    """Also of two items of a dict: pairs of a key and a value."""
    pairs = isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other)
    return one is other or (pairs and all(a is b for a, b in zip(one, other, strict=True)))


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """nn.TransformerEncoderLayer in eval mode is one op that hides what feeds what."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)

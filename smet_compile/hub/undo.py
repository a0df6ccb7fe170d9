"""Puts a model back whose loading failed after it was changed."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from smet_compile.ops import following
from smet_compile.shards import is_sharded

_CONTAINERS = (dict, OrderedDict, set, list)


@contextmanager
def put_back_on_error(model: nn.Module) -> Iterator[None]:
    """Puts classes, attributes and tensors of a model that lacks data back, in the same objects, if the block raises.

    References are enough: the block makes weights compact and gives the model other memory before it writes any of it.
    """
    modules = [(module, type(module), dict(vars(module)), _contents(module)) for module in model.modules()]
    parameters = [(parameter, parameter.detach(), parameter.grad) for parameter in model.parameters()]
    with following.deferred():
        try:
            yield
        except BaseException:
            for module, kind, attributes, contents in modules:
                module.__class__ = kind
                vars(module).clear()
                vars(module).update(attributes)
                for container, content in contents:
                    container.clear()
                    container.extend(content) if isinstance(container, list) else container.update(content)
            for parameter, before, gradient in parameters:
                _put_back(parameter, before)
                parameter.grad = gradient
            raise


def _contents(module: nn.Module) -> list[tuple[Any, Any]]:
    """Returns the containers among the attributes of a module, such as that of its buffers, with what they hold."""
    return [(value, copy.copy(value)) for value in vars(module).values() if type(value) in _CONTAINERS]


def _put_back(parameter: nn.Parameter, before: Tensor) -> None:
    if is_sharded(parameter) or parameter.device != before.device:  # torch swapped it, and it has no data to set
        torch.utils.swap_tensors(parameter, nn.Parameter(before, parameter.requires_grad))
    else:
        parameter.data = before

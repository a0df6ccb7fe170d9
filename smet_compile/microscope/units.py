"""Units of a tensor: a label for each of its elements, saying which unit of a node of the flow it belongs to.

Labels have the tensor's shape. They are expanded (stride 0) along every dimension that tells no units apart, so they
take memory for units only, and ops that only move elements can be applied to them as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class Units:
    """What is known of a tensor: its elements belong to units ``labels`` of node ``node``."""

    node: int
    labels: Tensor


@dataclass(frozen=True)
class Weight:
    """A matrix, or a stack of them, in any arrangement: the row and the column that each element stands in.

    Rows are numbered through all matrices of the stack, columns too. ``chosen``: it is one matrix of a stack, or
    several, at places that only the data know; the labels of all lie along a first dimension that the tensor lacks.
    """

    name: str
    rows: Tensor
    cols: Tensor
    num_rows: int
    num_cols: int
    chosen: bool = False


Value = Units | Weight


def single(node: int, shape: tuple[int, ...]) -> Units:
    """All elements belong to the one unit of ``node``."""
    return Units(node, torch.zeros((), dtype=torch.int64).expand(shape))


def varies(labels: Tensor, dim: int) -> bool:
    return labels.shape[dim] > 1 and labels.stride(dim) != 0


def narrowed(labels: Tensor) -> Tensor:
    """With size 1 wherever the labels do not vary."""
    for dim in range(labels.dim()):
        if labels.shape[dim] > 1 and labels.stride(dim) == 0:
            labels = labels.narrow(dim, 0, 1)
    return labels


def settled(labels: Tensor) -> Tensor:
    """The same labels, expanded along every dimension on which they do not vary."""
    shape = labels.shape
    labels = narrowed(labels)
    for dim in range(labels.dim()):
        first = labels.narrow(dim, 0, 1) if labels.shape[dim] else labels
        if varies(labels, dim) and torch.equal(labels, first.expand_as(labels)):
            labels = first
    return labels.expand(shape)


def reshaped(labels: Tensor, shape: tuple[int, ...]) -> Tensor:
    """As ``reshape``. Dimensions that stay what they are and tell no units apart stay expanded."""
    if prod(shape) == 0:
        return torch.zeros((), dtype=torch.int64).expand(shape)
    inner = list(shape)
    for step in (1, -1):
        dims = range(labels.dim()) if step == 1 else range(-1, -labels.dim() - 1, -1)
        for dim in dims:
            if not -len(shape) <= dim < len(shape) or labels.shape[dim] != inner[dim]:
                break
            if not varies(labels, dim):
                labels, inner[dim] = labels.narrow(dim, 0, 1), 1
    return settled(labels.reshape(inner)).expand(shape)

"""Cuts models for tensor parallelism, and trains them beside one process with the same slabs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import smet_compile as smet
from tests.shards.setting import Net

SLABS = {"*.up": (4, 0), "*.down": (4, 1)}
PLAN = {"up": ColwiseParallel, "down": RowwiseParallel}


def dense_net(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return Net(hidden=48).to(dtype)


def cut_layers(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for layer in model.layers:
        parallelize_module(layer, mesh, {name: style() for name, style in PLAN.items()})
    return model


def parallel_net(
    dtype: torch.dtype, tp: int, dp: int = 1, block_shape: Any = 1, fully: bool = False, **options: Any
) -> tuple[nn.Module, DeviceMesh]:
    """Makes the model that ``tp`` ranks hold together, ``dp`` times; with ``fully``, its shards."""
    mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
    model = cut_layers(dense_net(dtype), mesh["tp"])
    make_sparse(model, block_shape, **options)
    if fully:
        for layer in model.layers:
            fully_shard(layer, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
    return model, mesh


def whole_net(dtype: torch.dtype, block_shape: Any = 1, **options: Any) -> nn.Module:
    return make_sparse(dense_net(dtype), block_shape, **options)


def make_sparse(model: nn.Module, block_shape: Any, density: float | None = 0.3, **options: Any) -> nn.Module:
    return smet.sparsify(model, density, block_shape=block_shape, exclude="head", **({"slabs": SLABS} | options))


def dense_weights(model: nn.Module) -> dict[str, Tensor]:
    """Returns the weights of the dense model that ``model`` stands for; every rank has to ask."""
    return {name: tensor.double() for name, tensor in smet.export_dense(model).state_dict().items()}

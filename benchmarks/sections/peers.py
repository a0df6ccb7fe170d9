"""Measures a sparse linear layer beside others that skip work on a CPU: SparseLab's CSR, torch's block-sparse format.

SparseLab is on the package registry; rows that need it say so where it is not installed (`pip install sparselab`).
"""

from __future__ import annotations

import importlib
import importlib.util
import statistics
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

import smet_compile as smet
from benchmarks import chosen
from benchmarks.layer import DENSITY, Size
from benchmarks.ratios import Clock, Work, in_turns
from benchmarks.sections import linear
from benchmarks.settings import Settings
from benchmarks.tables import Row, Table, at_least
from benchmarks.training import BYTES, Shape
from smet_compile.ops import find_sites

SIZES = tuple(size for size in linear.SIZES if size.tokens == 2048)
DENSITIES, STEP_DENSITIES = (0.5, DENSITY, 0.1, 0.05), (DENSITY, 0.1)
TILE = 64
TARGET = at_least(1.5)
MISSING = "needs SparseLab: pip install sparselab"
SHAPE = Shape(hidden=768, intermediate=2048, heads=12, layers=2, vocabulary=BYTES, sequence=256, batch=8)
QUICK_SHAPE = Shape(hidden=256, intermediate=256, heads=4, layers=1, vocabulary=BYTES, sequence=16, batch=2)
LAYER_NOTE = (
    "Forward and backward of one linear layer with a gradient for its input, as modules in eager PyTorch, fp32: "
    "`nn.Linear`, `sparselab.SparseLinear`, and a layer made sparse with single weights. SparseLab's time over ours."
)
STEP_NOTE = (
    "Forward, backward and fused AdamW (ours: `ActiveAdamW`) of one LLaMA of {layers} layers, hidden {hidden}, {batch} "
    "sequences of {sequence} tokens, in eager PyTorch. SparseLab's layers replace every linear layer but the head; "
    "ours are single weights of the same density."
)
BLOCKS_NOTE = (
    f"Forward alone, tiles of {TILE}, density {DENSITY}, fp32: torch's `x @ weight.to_sparse_bsr(...).T` over ours."
)


def tables(settings: Settings) -> list[Table]:
    sizes = settings.size(SIZES, linear.QUICK_SIZES)
    shape = settings.size(SHAPE, QUICK_SHAPE)
    layers = [_layer(size, density, settings) for size in sizes for density in DENSITIES]
    steps = [_step(shape, density, settings) for density in STEP_DENSITIES]
    blocks = [_blocks(size, settings) for size in sizes]
    return [
        Table("Peers: single weights, one layer", "SparseLab / ours", LAYER_NOTE, layers),
        Table("Peers: single weights, a step", "SparseLab / ours", STEP_NOTE.format(**vars(shape)), steps),
        Table("Peers: tiles", "torch / ours", BLOCKS_NOTE, blocks),
    ]


def _layer(size: Size, density: float, settings: Settings) -> Row:
    input_TC = torch.randn(size.tokens, size.cols, requires_grad=True)
    grad_TR = torch.randn(size.tokens, size.rows)

    def both_ways(layer: nn.Module) -> Work:
        def work() -> None:
            layer(input_TC).backward(grad_TR)
            input_TC.grad = None
            layer.zero_grad()

        return work

    layers = (
        nn.Linear(size.cols, size.rows, bias=False),
        _peer_layer(size.cols, size.rows, density),
        _sparse(nn.Linear(size.cols, size.rows, bias=False), density),
    )
    return _compared(f"density {density}, {size}", layers, map(both_ways, layers), settings)


def _step(shape: Shape, density: float, settings: Settings) -> Row:
    batch = shape.batch_on(settings.device)

    def step_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Work:
        def work() -> None:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return work

    dense, peer, ours = (shape.model(torch.float32) for _ in range(3))
    _replace_layers(peer, density)
    ours = _sparse(ours, density)
    steps = [step_of(model, torch.optim.AdamW(model.parameters(), fused=True)) for model in (dense, peer)]
    steps.append(step_of(ours, smet.ActiveAdamW(ours)))
    return _compared(f"density {density}", (dense, peer, ours), steps, settings)


def _blocks(size: Size, settings: Settings) -> Row:
    layer = _sparse(nn.Linear(size.cols, size.rows, bias=False), DENSITY, TILE)
    input_TC = torch.randn(size.tokens, size.cols)
    pad = -size.rows % TILE  # torch's format takes whole blocks only
    weight = nn.functional.pad(layer.weight.detach(), (0, 0, 0, pad)).to_sparse_bsr((TILE, TILE))
    works: list[Work] = [lambda: _without_gradient(layer, input_TC), lambda: (weight @ input_TC.T).T]
    found = in_turns(works[0], works[1:], settings.repeats, Clock(settings.device))[0]
    ours, torch_s = found.medians
    more = {"torch, ms": f"{1000 * torch_s:.1f}", "ours, ms": f"{1000 * ours:.1f}"}
    return Row(str(size), _kernels(layer), found.costs, None, more)


@torch.no_grad()
def _without_gradient(layer: nn.Module, input: Tensor) -> Tensor:
    out: Tensor = layer(input)
    return out


def _compared(what: str, modules: Iterable[nn.Module], works: Iterable[Work], settings: Settings) -> Row:
    """Measures dense, the peer and ours in turns; the ratio is the peer's time over ours."""
    *_, ours = modules
    dense, peer, mine = works
    if not has_peer():
        return Row(what, _kernels(ours), unmeasured=MISSING)
    by_dense, by_mine = in_turns(peer, [dense, mine], settings.repeats, Clock(settings.device))
    (peer_s, mine_s), dense_s = by_mine.medians, by_dense.medians[1]
    over_dense = statistics.median(m / d for m, d in zip(by_mine.candidate, by_dense.candidate, strict=True))
    more = {
        "ours / dense": f"{over_dense:.2f}", "dense, ms": f"{1000 * dense_s:.1f}",
        "SparseLab, ms": f"{1000 * peer_s:.1f}", "ours, ms": f"{1000 * mine_s:.1f}",
    }  # fmt: skip
    return Row(what, _kernels(ours), by_mine.speedups, TARGET, more)


def has_peer() -> bool:
    return importlib.util.find_spec("sparselab") is not None


def _peer_layer(cols: int, rows: int, density: float) -> nn.Module:
    """Returns SparseLab's layer without bias; a dense one, which is not measured, where it is not installed."""
    if not has_peer():
        return nn.Linear(cols, rows, bias=False)
    peer: Any = importlib.import_module("sparselab")
    peer.ops._clear_transpose_cache()  # by id: a new layer could find the transpose of one that is gone
    layer: nn.Module = peer.SparseLinear(cols, rows, bias=False, sparsity=1 - density)
    return layer


def _replace_layers(model: nn.Module, density: float) -> None:
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and "lm_head" not in name:
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], _peer_layer(layer.in_features, layer.out_features, density))


def _sparse(model: nn.Module, density: float, block: int | tuple[int, int] = (1, 1)) -> nn.Module:
    smet.sparsify(model, density, block_shape=block)
    return model


def _kernels(model: nn.Module) -> str:
    return chosen.of_products(find_sites(model).values())

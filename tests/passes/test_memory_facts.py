"""No dense weight is saved, no dense gradient is built, and no compact gradient outlives its update."""

import warnings
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import smet_compile as smet
from smet_compile.ops import find_sites
from smet_compile.passes.fuse_update import SAMPLED_UPDATE, UPDATE, updates
from smet_compile.passes.graph import MASKED, SAMPLED, calls
from smet_compile.tracing import Captured
from tests.passes.compiled import capture, dense_sizes, randn
from tests.passes.memory_facts import makes_no_dense_gradient, of_size, returned, saves_no_dense_weight
from tests.passes.steps import capture_step

BLOCKS: list[Any] = [1, 8]
MODES = pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpoint"])


class Block(nn.Module):
    """Computes two products and a residual. No activation has as many elements as a weight."""

    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.up = nn.Linear(size, inner)
        self.down = nn.Linear(inner, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(x)))


class Blocks(nn.Module):
    def __init__(self, checkpointing: bool, convolution: bool = False) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.first = nn.Conv1d(5, 7, 3, padding=1) if convolution else nn.Identity()
        self.blocks = nn.ModuleList(Block(16, inner) for inner in (24, 40, 56))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        return x


def sparse(checkpointing: bool, block: Any, convolution: bool = False) -> nn.Module:
    return smet.sparsify(Blocks(checkpointing, convolution).double(), 0.5, block_shape=block, include="*.weight")


def backward_of(captured: Captured) -> fx.Graph:
    assert captured.backward is not None
    return captured.backward.graph


def compact_sizes(model: nn.Module) -> set[int]:
    return {site.values.numel() for site in find_sites(model).values()}


@MODES
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_fused_sites_neither_save_a_dense_weight_nor_make_a_dense_gradient(block: Any, checkpointing: bool) -> None:
    model = sparse(checkpointing, block)
    graph = capture(model, randn(5, 16))
    saves_no_dense_weight(graph, model)
    makes_no_dense_gradient(graph, model)


@MODES
def test_an_unfused_site_beside_them_saves_none_either(checkpointing: bool) -> None:
    model = sparse(checkpointing, 1, convolution=True)
    graph = capture(model, randn(2, 5, 16))
    saves_no_dense_weight(graph, model)
    assert of_size(backward_of(graph).nodes, dense_sizes(model)) != [], "the convolution's are made in backward"


def test_the_facts_are_seen_to_fail_without_the_passes() -> None:
    model = sparse(False, 1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "smet_compile: a compiled graph runs without the passes")
        graph = capture(model, randn(5, 16), passes=())
    assert graph.forward is not None
    assert len(of_size(returned(graph.forward.graph), dense_sizes(model))) >= 6
    assert len(of_size(backward_of(graph).nodes, dense_sizes(model))) >= 6


@MODES
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_with_the_update_no_compact_gradient_is_made(block: Any, checkpointing: bool) -> None:
    model = sparse(checkpointing, block)
    graph = capture_step(model, randn(5, 16).detach())
    backward = backward_of(graph)
    assert calls(backward, SAMPLED) == [] and updates(backward, UPDATE) == []
    assert len(updates(backward, SAMPLED_UPDATE)) == 6
    assert of_size(returned(backward), compact_sizes(model)) == []
    saves_no_dense_weight(graph, model)
    makes_no_dense_gradient(graph, model)


@MODES
def test_factors_of_a_gradient_die_in_its_update(checkpointing: bool) -> None:
    """An update's inputs live on only where later nodes need them too; after the last update none does."""
    graph = capture_step(sparse(checkpointing, 8), randn(5, 16).detach())
    backward = backward_of(graph)
    place = {node: i for i, node in enumerate(backward.nodes)}
    input_gradients = [place[node] for node in calls(backward, MASKED) if not node.args[5]]
    for update in updates(backward, SAMPLED_UPDATE):
        later = [i for i in input_gradients if i > place[update]]
        for factor in (update.kwargs["left"], update.kwargs["right"]):
            last_use = max(place[user] for user in factor.users)
            assert not later[1:] or last_use < later[1], f"{factor} lives longer than the next layer's gradient"


@MODES
def test_updates_alternate_with_input_gradients(checkpointing: bool) -> None:
    graph = capture_step(sparse(checkpointing, 8), randn(5, 16).detach())
    backward = backward_of(graph)
    steps = ["update" if "auto_functionalized" in str(node.target) else "product" for node in _main_work(backward)]
    assert steps == ["product", "update"] * 5 + ["update"]


def _main_work(graph: fx.Graph) -> list[fx.Node]:
    found = {*updates(graph, SAMPLED_UPDATE), *(node for node in calls(graph, MASKED) if not node.args[5])}
    return [node for node in graph.nodes if node in found]

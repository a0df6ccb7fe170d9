"""After fuse_update an update takes the factors of its gradient, at the place where the gradient was made."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils.checkpoint import checkpoint

import smet_compile as smet
from smet_compile.ops import find_sites
from smet_compile.ops.growth import Collected
from smet_compile.passes.fuse_sampled_matmul import fuse_sampled_matmul
from smet_compile.passes.fuse_update import SAMPLED_UPDATE, TORCH_OPTIM, UPDATE, fuse_update, updates
from smet_compile.passes.graph import MASKED, PACK, SAMPLED, PassReport, calls
from smet_compile.tracing import Captured
from tests.passes.compiled import assert_idempotent, matched, parts, reads, targets, upto
from tests.passes.steps import capture_step

W = (24, 16)
FUSED = {"forward": ["fused"], "weight gradient": ["fused"], "update": ["fused"]}


def chain(num_layers: int = 2, checkpointing: bool = False) -> nn.Module:
    class Layer(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if checkpointing:
                return checkpoint(lambda y: super(Layer, self).forward(y).tanh(), x, use_reentrant=False)
            return super().forward(x).tanh()

    sizes = [16, 24, 40, 32, 8][: num_layers + 1]
    layers = [Layer(a, b, dtype=torch.float64) for a, b in pairwise(sizes)]
    return smet.sparsify(nn.Sequential(*layers), 0.5, block_shape=8)


def data(*shape: int) -> Tensor:
    return torch.randn(shape or (5, 16), dtype=torch.float64)


def made(captured: Captured, *ops: object) -> list[fx.Node]:
    assert captured.joint is not None
    return updates(captured.joint.graph, *ops)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpoint"])
def test_products_go_into_their_updates(checkpointing: bool) -> None:
    graph = capture_step(chain(3, checkpointing), data())
    assert graph.joint is not None
    assert matched(graph, "fuse_update") == 3 == len(made(graph, SAMPLED_UPDATE))
    assert made(graph, UPDATE) == [] and SAMPLED not in targets(graph.joint.graph)
    assert [part | {"input gradient": []} for part in parts(graph)] == [FUSED | {"input gradient": []}] * 3


def test_gradient_of_autocast_goes_through_its_conversion() -> None:
    def apply(x: Tensor, w: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.linear(x, w)

    model = reads(W, apply, 1, torch.float32)
    graph = capture_step(model, data().float(), loss=lambda m, x: m(x).float().square().mean(), tolerance=2e-2)
    assert matched(graph, "fuse_update") == 1


def test_gradient_that_is_read_by_others_too_is_left_alone() -> None:
    def read_by_others(graph: fx.Graph) -> PassReport:
        for product in calls(graph, SAMPLED):
            if len(product.users) == 1:
                with graph.inserting_after(product):
                    reader = graph.call_function(torch.ops.aten.any.default, (product,))
                reader.meta["val"] = product.meta["val"].any()
                with graph.inserting_after(reader):
                    graph.call_function(torch.ops.aten._assert_async.msg, (reader, "all zero")).meta["val"] = None
        return PassReport("read")

    passes = (*upto(fuse_sampled_matmul), read_by_others, fuse_update)
    graph = capture_step(chain(1), data(), passes=passes)
    assert matched(graph, "fuse_update") == 0
    assert len(made(graph, UPDATE)) == 1


def test_gradient_in_parts_of_one_weight_gets_one_update() -> None:
    graph = capture_step(reads(W, lambda x, w: F.linear(x, w) + F.linear(x.sin(), w)), data())
    assert matched(graph, "fuse_update") == 0
    (update,) = made(graph, UPDATE)
    assert update.kwargs["grad"].target is torch.ops.aten.add.Tensor
    assert parts(graph) == [FUSED]


def test_gradient_that_is_no_product_is_updated_with_what_was_packed() -> None:
    graph = capture_step(reads((8, 4, 3), lambda x, w: F.conv1d(x, w), 1), data(1, 4, 7))
    assert matched(graph, "fuse_update") == 0
    (update,) = made(graph, UPDATE)
    assert update.kwargs["grad"].target is PACK
    assert parts(graph)[0]["update"] == ["fused"]


def test_gradient_that_growth_reads_is_updated_with_what_was_packed() -> None:
    model = chain(1)
    for site in find_sites(model).values():
        site.compact.collected = Collected.empty(site.values, site.layout, num_kept=2, num_active=0)
    graph = capture_step(model, data())
    assert matched(graph, "fuse_update") == 0
    assert len(made(graph, UPDATE)) == 1


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "AdamW": lambda m: AdamW(m.parameters(), lr=1e-2),
    "Adam": lambda m: Adam(m.parameters(), lr=1e-2),
    "SGD": lambda m: SGD(m.parameters(), lr=1e-2, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_of_torch_take_the_gradient_itself(name: str) -> None:
    graph = capture_step(chain(), data(), OPTIMIZERS[name])
    assert matched(graph, "fuse_update") == 0
    assert [update.kwargs["grad"].target for update in made(graph, TORCH_OPTIM)] == [SAMPLED] * 2


def test_without_updates_in_the_graph_there_is_nothing_to_do() -> None:
    graph = capture_step(chain(), data(), max_grad_norm=1e9)
    assert matched(graph, "fuse_update") == 0
    assert made(graph, UPDATE, SAMPLED_UPDATE) == []


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpoint"])
@pytest.mark.parametrize("optimizer", ["ActiveAdamW", "SGD"])
def test_each_update_stands_before_the_gradients_of_earlier_layers(optimizer: str, checkpointing: bool) -> None:
    make = OPTIMIZERS.get(optimizer, lambda m: smet.ActiveAdamW(m, lr=1e-2))
    graph = capture_step(chain(4, checkpointing), data(), make)
    assert graph.joint is not None
    place = {node: i for i, node in enumerate(graph.joint.graph.nodes)}
    in_order = sorted(made(graph, SAMPLED_UPDATE, TORCH_OPTIM), key=place.__getitem__)
    products = [node for node in calls(graph.joint.graph, MASKED) if not node.args[5]]
    assert len(in_order) == 4 and len(products) == 3
    for update, own, following in zip(in_order, products, [*products[1:], None], strict=False):
        assert place[own] < place[update]
        assert following is None or place[update] < place[following]


def test_the_old_values_are_read_before_they_change() -> None:
    """With two reads the input gradient of the first comes after all of the weight's gradient is known."""

    def apply(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(F.linear(x, w).tanh() @ w, w)

    graph = capture_step(reads(W, apply), data())
    (update,) = made(graph, UPDATE)
    assert graph.joint is not None
    assert all(product < update for product in calls(graph.joint.graph, MASKED))


def test_idempotent() -> None:
    assert_idempotent(fuse_update, capture_step(chain(), data(), passes=upto(fuse_update)))

"""No dense weight of a site is kept for backward: while the loss is alive, every one of them is gone."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import smet_compile as smet
from tests.ops.call_forms import ReadTwice
from tests.support.masked import fill_masked, masked_gradients, parameter_of
from tests.support.small_models import chain
from tests.support.snapshots import same_bits
from tests.support.weight_watch import WeightSized, dense_sizes

pytestmark = pytest.mark.usefixtures("unpacked")


class Twice(nn.Module):
    """Reads its weight once and uses it twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(23, 23, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.inner.weight
        return torch.tanh(x @ weight.t()) @ weight


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(24, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(23, 23) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(lambda x, layer=layer: torch.tanh(layer(x)), x, use_reentrant=False)
        return x


def bfloat16() -> torch.autocast:
    """Returns autocast without its cache, which would add up the gradients of one parameter's two uses in bf16."""
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linears": (chain, (5, 23)),
    "linears_3d": (chain, (2, 5, 23)),
    "convolutions": (lambda: nn.Sequential(nn.Conv1d(23, 13, 3), nn.Conv1d(13, 23, 3)), (2, 23, 9)),
    "one_read_used_twice": (Twice, (5, 23)),
    "read_twice": (lambda: nn.Sequential(ReadTwice(23, 29), nn.Tanh(), ReadTwice(29, 23)), (5, 23)),
    "attention": (SelfAttention, (2, 5, 24)),
    "checkpointed": (Checkpointed, (5, 23)),
    "encoder": (lambda: nn.TransformerEncoderLayer(24, 2, 37, dropout=0.0, batch_first=True), (2, 5, 24)),
}


@pytest.mark.parametrize("block_shape", [1, (4, 4)], ids=str)
@pytest.mark.parametrize("context", [nullcontext, bfloat16], ids=["fp32", "autocast"])
@pytest.mark.parametrize("name", list(MODELS))
def test_no_dense_weight_is_kept(name: str, context: Callable[[], Any], block_shape: Any) -> None:
    make, input_shape = MODELS[name]
    sparse = make()
    plain = copy.deepcopy(sparse)
    include = "*weight" if name == "convolutions" else None
    smet.sparsify(sparse, density=0.5, block_shape=block_shape, include=include)
    fill_masked(plain, sparse)
    x = torch.randn(input_shape)
    with WeightSized(dense_sizes(sparse)) as seen, context():
        loss = sparse(x).square().mean()
    assert seen.storages and seen.num_alive() == 0, f"{seen.num_alive()} of {len(seen.storages)} still alive"
    loss.backward()
    with context():
        plain(x).square().mean().backward()
    for parameter_name, expected in masked_gradients(plain, sparse).items():
        grad = parameter_of(sparse, parameter_name).grad
        assert grad is not None and expected is not None and same_bits(grad, expected), parameter_name


def test_one_dense_weight_at_a_time_in_a_checkpointed_segment() -> None:
    """The recompute of a whole segment keeps values as the forward does: weights come and go one by one."""
    layers = nn.Sequential(*[layer for _ in range(6) for layer in (nn.Linear(23, 23), nn.Tanh())])
    model = smet.sparsify(layers, density=0.5)
    alive: list[int] = []

    def watch_backward(layer: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda _: alive.append(seen.num_alive()))

    with WeightSized(dense_sizes(model)) as seen:
        for layer in model:
            layer.register_forward_hook(watch_backward)
        checkpoint(model, torch.randn(5, 23, requires_grad=True), use_reentrant=False).square().mean().backward()
    assert len(seen.storages) >= 12 and len(alive) >= 12
    assert max(alive) <= 1, alive

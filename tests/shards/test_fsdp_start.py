"""A model that is sharded before it has data starts as on one device, on any number of ranks."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import smet_compile as smet
from smet_compile.ops import find_sites
from tests.shards.setting import Layer, Net, shard, train_steps, whole_state
from tests.support.ranks import processes


class Residual(nn.Module):
    """Draws parameters of its children, as GPT-2 does: one that is compact, and a plain one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = Layer(width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.layer.down.weight, std=0.05)
        nn.init.trunc_normal_(self.layer.norm.bias, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Odd(nn.Module):
    """Has a row of zeros in an embedding, attention, buffers, and weights that are tied."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.places = nn.Embedding(17, 20), nn.Embedding(9, 20, padding_idx=3)
        self.layers = nn.ModuleList([Residual(20), nn.TransformerEncoderLayer(20, 2, 22, 0.0, batch_first=True)])
        self.norm, self.head = nn.BatchNorm1d(7), nn.Linear(20, 17)
        self.embedding.weight = self.head.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.places.weight[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def make(kind: type[nn.Module], options: dict[str, Any], meta: bool) -> nn.Module:
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta" if meta else "cpu"):
            model = kind()
    finally:
        torch.set_default_dtype(torch.float32)
    return smet.sparsify(model, 0.3, exclude="head", seed=5, **options)


def start(rank: int, world: int, kind: type[nn.Module], options: dict[str, Any], by_hand: bool) -> Any:
    """Returns the first weights, losses of some steps, and the topologies after them; one process shards nothing."""
    model = make(kind, options, meta=True)
    if world > 1:
        shard(model)
    if by_hand:
        model.to_empty(device="cpu")
    random_state = torch.get_rng_state()
    assert smet.materialize(model, seed=5) is model
    assert torch.equal(torch.get_rng_state(), random_state)
    optimizer = smet.ActiveAdamW(model, 3e-3)
    manager = smet.TopologyManager(model, optimizer, total_steps=20, every=2)
    state = whole_state(model, optimizer)
    losses = train_steps((model, optimizer, manager), range(5), rank, world)
    return state, losses, {name: site.compact.topology.clone() for name, site in find_sites(model).items()}


CASES: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "single weights": (Net, {}),
    "tiles": (Net, {"block_shape": 4}),
    "magnitude": (Net, {"select": "magnitude"}),
    "odd": (Odd, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_it_starts_as_on_one_device_and_trains(case: str) -> None:
    kind, options = CASES[case]
    torch.manual_seed(5)
    expected = dict(make(kind, options, meta=False).state_dict())
    state, losses, topologies = processes.run(1, start, kind, options, False)[0]
    assert {name: tensor for name, tensor in state.items() if "/" not in name}.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(state[name], tensor)] == []
    for world in (2, 3):
        results = processes.run(world, start, kind, options, case == "tiles")
        for got_state, got_losses, got_topologies in results:
            assert all(torch.equal(got_state[name], tensor) for name, tensor in state.items()), world
            torch.testing.assert_close(got_losses, losses, rtol=0, atol=1e-12)
            assert all(torch.equal(got_topologies[name], bits) for name, bits in topologies.items())


def mesh_of_one(rank: int, world: int) -> Any:
    model = shard(make(Odd, {}, meta=True))
    return whole_state(smet.materialize(model, seed=5), torch.optim.SGD(model.parameters()))


def test_a_mesh_of_one_rank() -> None:
    torch.manual_seed(5)
    expected = dict(make(Odd, {}, meta=False).state_dict())
    state = processes.run(1, mesh_of_one)[0]
    assert [name for name, tensor in expected.items() if not torch.equal(state[name], tensor)] == []


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(8, 8), nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale.sum()


def ones(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.data.fill_(1)
    if isinstance(module, nn.Linear):
        nn.init.ones_(module.weight)


def leave_out(rank: int, world: int) -> str:
    with torch.device("meta"):
        model = Scaled()
    smet.sparsify(model, 0.5, rescale=False)
    fully_shard(model)
    with pytest.raises(ValueError) as caught:
        smet.materialize(model)
    smet.materialize(model, initialize=ones)
    assert torch.equal(smet.export_dense(model).linear.weight.data.sum(), torch.tensor(32.0))
    assert torch.equal(model(torch.ones(1, 8)).shape.numel() * torch.ones(1), torch.tensor([8.0]))
    return str(caught.value)


def test_what_nothing_writes_is_named_on_every_rank() -> None:
    """One of the ranks holds no row of it."""
    expected = "materialize: scale were written by no reset_parameters and no _init_weights; pass initialize="
    assert [text[: len(expected)] for text in processes.run(3, leave_out)] == [expected] * 3

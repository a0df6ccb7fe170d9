"""Dense exports, masks, reports, scales and inspections of a sharded model are those of one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import smet_compile as smet
from smet_compile.shards import make_whole
from tests.shards.setting import Net, loss_of, put_gradients, shard, sparse_net
from tests.support.ranks import processes
from tests.support.snapshots import same_bits


def both(block_shape: Any = 1) -> tuple[nn.Module, nn.Module]:
    """Makes a whole and a sharded model, and takes them through the same steps and topology updates."""
    models = sparse_net(torch.float32, block_shape), shard(sparse_net(torch.float32, block_shape))
    for model in models:
        optimizer = smet.ActiveAdamW(model, 1e-2)
        manager = smet.TopologyManager(model, optimizer, total_steps=20, every=2)
        for step in range(5):
            put_gradients(model, step)
            optimizer.step()
            manager.step()
        optimizer.zero_grad()
    return models


def differences(model: nn.Module, expected: nn.Module) -> list[str]:
    state, expected_state = model.state_dict(), expected.state_dict()
    assert list(state) == list(expected_state)
    return [name for name in state if not same_bits(state[name], expected_state[name])]


def export(rank: int, world: int, block_shape: Any) -> Any:
    whole, sharded = both(block_shape)
    expected = smet.export_dense(whole)
    dense, nowhere = smet.export_dense(sharded), smet.export_dense(sharded, keep=False)
    assert [type(module) for module in dense.modules()] == [type(module) for module in Net().modules()]
    assert all(type(parameter) is nn.Parameter for parameter in dense.parameters())
    assert not [key for module in dense.modules() for key in vars(module) if "fsdp" in key or "composable" in key]
    assert [(n, p.shape, p.is_meta) for n, p in nowhere.named_parameters()] == [
        (n, p.shape, True) for n, p in expected.named_parameters()
    ]
    found = differences(dense, expected)
    with torch.no_grad():
        loss = loss_of(sharded, 0, rank, world)  # leaves whole parameters registered
    assert torch.equal(loss, loss_of(dense, 0, rank, world).detach())
    found += differences(smet.export_dense(sharded), expected)
    dense.load_state_dict(expected.state_dict())  # no hook of FSDP2 is left
    loss_of(sharded, 1, rank, world).backward()
    return found


@pytest.mark.parametrize("block_shape", [1, 4, (1, 5)], ids=str)
@pytest.mark.parametrize("world", [2, 3])
def test_an_export_is_that_of_one_process(world: int, block_shape: Any) -> None:
    assert processes.run(world, export, block_shape) == [[]] * world


class Linears(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 96))


LAYOUTS: dict[Any, dict[str, Any]] = {
    "csr": {"density": 0.3},
    "bsr": {"density": 0.3, "block_shape": 16},
    "2:4": {"pattern": "2:4"},
}


def export_layouts(rank: int, world: int) -> None:
    for layout, options in LAYOUTS.items():
        models = []
        for sharded in (False, True):
            torch.manual_seed(0)
            models.append(smet.sparsify(Linears(), **options))
            if sharded:
                fully_shard(models[-1][0])
                fully_shard(models[-1])
        expected, dense = (smet.export_dense(model, layout) for model in models)
        for number in (0, 2):
            got, wanted = dense[number].weight, expected[number].weight
            assert got.layout == wanted.layout
            assert torch.equal(got.to_dense(), wanted.to_dense()), layout
        assert smet.export_dense(models[1], layout, keep=False)[0].weight.is_meta


def test_layouts_of_torch() -> None:
    processes.run(2, export_layouts)


def save_pretrained(rank: int, world: int, folder: Path) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 36, "intermediate_size": 50, "num_attention_heads": 2, "vocab_size": 61}
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(
            smet.sparsify(LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, tie_word_embeddings=True, **sizes)), 0.3)
        )
    whole, sharded = models
    for block in sharded.model.layers:
        fully_shard(block)
    fully_shard(sharded)
    with pytest.raises(ValueError, match="save_pretrained: expected a model that is whole on each rank"):
        sharded.save_pretrained(folder)
    dense = smet.export_dense(sharded, keep=rank == 0)
    if rank > 0:
        return all(parameter.is_meta for parameter in dense.parameters())
    assert dense.lm_head.weight is dense.model.embed_tokens.weight
    dense.save_pretrained(folder)
    tokens = torch.arange(12).view(2, 6)
    return torch.equal(LlamaForCausalLM.from_pretrained(folder)(tokens).logits, smet.export_dense(whole)(tokens).logits)


def test_a_hugging_face_model_is_saved_by_one_rank(tmp_path: Path) -> None:
    assert processes.run(2, save_pretrained, tmp_path) == [True, True]


def read(rank: int, world: int) -> None:
    whole, sharded = both()
    assert smet.report(sharded) == smet.report(whole)
    masks, expected = smet.masks(sharded), smet.masks(whole)
    assert list(masks) == list(expected) and all(torch.equal(masks[name], expected[name]) for name in masks)
    options = {"weight_decay": 0.1, "base_width": 8, "embedding_lr": 0.3}
    names = [{parameter: name for name, parameter in model.named_parameters()} for model in (whole, sharded)]
    for make in (lambda model: smet.param_groups(model, 0.1, **options), lambda model: smet.decay_groups(model, 0.1)):
        groups, others = (
            [{**group, "params": [names[i][p] for p in group["params"]]} for group in make(model)]
            for i, model in enumerate((whole, sharded))
        )
        assert groups == others
    tokens = torch.arange(10).view(2, 5)
    assert str(smet.inspect(sharded, tokens)) == str(smet.inspect(whole, tokens))
    for model in (whole, sharded):
        smet.scale_initial_(model, std=0.02, base_width=16)
    for parameter, other in zip(sharded.parameters(), whole.parameters(), strict=True):
        assert torch.equal(make_whole(parameter.detach()), other.detach())


@pytest.mark.parametrize("world", [2, 3])
def test_reports_and_scales_are_those_of_one_process(world: int) -> None:
    processes.run(world, read)


def message(call: Any) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    return str(caught.value)


def refuse(rank: int, world: int) -> dict[str, str]:
    whole, model = sparse_net(), shard(sparse_net())
    up, tokens = model.layers[0].up, torch.arange(10).view(2, 5)
    found = {
        "read": message(lambda: up.weight),
        "product": message(lambda: up(torch.ones(2, 20, dtype=torch.float64))),
        "assign": message(lambda: setattr(up, "weight", torch.zeros(41, 20, dtype=torch.float64))),
        "assign parameter": message(lambda: setattr(up, "weight", nn.Parameter(torch.zeros(41, 20)))),
        "explain": message(lambda: smet.explain(model, tokens)),
        "sparsify": message(lambda: smet.sparsify(shard(Net()), 0.3)),
        "magnitude": message(lambda: smet.sparsify(shard(Net()), 0.3, select="magnitude")),
        "masks": message(lambda: smet.sparsify(shard(Net()), masks=smet.masks(whole))),
    }
    gathered = shard(Net())
    gathered.layers[0].unshard()
    found["gathered"] = message(lambda: smet.sparsify(gathered, 0.3))
    model.layers[0].unshard()
    assert torch.equal(up.weight, whole.layers[0].up.weight)
    model.layers[0].reshard()
    assert message(lambda: up.weight) == found["read"]
    model(tokens).sum().backward()
    return found


def test_a_shard_is_never_taken_for_the_weight() -> None:
    found = processes.run(2, refuse)[1]
    a_read = "layers.0.up.weight: expected a whole weight to read, got a shard; export_dense(model) .* unshard()"
    an_order = "layers.0.up.weight: expected a whole weight, got a shard of fully_shard; call sparsify first, then"
    starts = {
        "read": a_read.partition(" .*")[0],
        "product": a_read.partition(" .*")[0],
        "assign": "layers.0.up.weight: expected a whole weight to assign to, got a shard; assign before fully_shard",
        "explain": "explain: expected a model that is whole, got one that fully_shard has cut",
    }
    starts |= {"assign parameter": starts["assign"]} | dict.fromkeys(
        ("sparsify", "magnitude", "masks", "gathered"), an_order
    )
    assert {name: text[: len(starts[name])] for name, text in found.items()} == starts

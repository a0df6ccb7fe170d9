"""Updates of slabs on several ranks are those of the whole weight, bit for bit, in every dtype and under every rule."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smet_compile as smet
from smet_compile.ops import find_sites
from smet_compile.shards import local, make_whole
from tests.shards.parallel import parallel_net, whole_net
from tests.support.ranks import processes

BF16 = torch.bfloat16
KINDS: dict[str, tuple[Any, ...]] = {
    "fp32 tiles": (torch.float32, 4, None, smet.ActiveAdamW),
    "bf16": (BF16, 1, BF16, smet.ActiveAdamW),
    "bf16 runs": (BF16, (1, 4), BF16, smet.ActiveAdamW),
    "8-bit tiles": (BF16, 4, "int8", smet.ActiveAdamW),
    "Lion": (BF16, (4, 2), BF16, smet.ActiveLion),
    "SCALE": (torch.float64, 1, None, smet.ActiveScale),
}


def whole_rows(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns values and state of compact weights in the order of whole weights; every rank has to ask."""
    found = {}
    for name, site in find_sites(model).items():
        bits = site.bits_of_whole(site.compact.topology)
        found[f"{name}/topology"] = bits
        state = optimizer.state_dict()["state"]
        number = next(i for i, p in enumerate(model.parameters()) if p is site.values)
        for key, tensor in {"values": site.values, **state[number]}.items():
            whole = make_whole(tensor.detach())
            is_rows = whole.dim() > 0 and key not in ("births", "scales")
            found[f"{name}/{key}"] = site.part.in_order(whole, bits) if site.part and is_rows else whole
    return found


def put_gradients(model: nn.Module, step: int) -> None:
    """Gives every compact weight a gradient that follows from the place of a weight in the whole dense weight."""
    for site in find_sites(model).values():
        generator = torch.Generator().manual_seed(step)
        dense = torch.randn(site.whole.shape, generator=generator).to(site.values.dtype)
        here = dense if site.part is None else site.part.band.cut_dense(dense)
        rows = site.compact.right_inverse(here)
        site.values.grad = site.rows.wrap(site.values, rows[site.rows.here].clone())


def run(rank: int, world: int, tp: int, kind: str, goes_back: bool = False) -> list[str]:
    dtype, block_shape, moment_dtype, make = KINDS[kind]
    model, _ = parallel_net(dtype, tp, world // tp, block_shape, fully=world > tp)
    models = model, whole_net(dtype, block_shape)
    runs = []
    for each in models:
        compact = [site.values for site in find_sites(each).values()]
        for parameter in each.parameters():
            parameter.requires_grad_(any(parameter is values for values in compact))
        optimizer = make(each, 1e-2, moment_dtype=moment_dtype, warmup_steps=3)
        manager = smet.TopologyManager(each, optimizer, total_steps=100, every=3, schedule="cosine", min_age=3)
        runs.append((each, optimizer, manager))
    best: dict[int, dict[str, Tensor]] = {}
    for step in range(10):
        for each, optimizer, manager in runs:
            if goes_back and step == 2:
                best[id(each)] = {name: tensor.clone() for name, tensor in each.state_dict().items()}
            if goes_back and step == 8:  # the state moves back with the weights
                each.load_state_dict(best[id(each)])
            put_gradients(each, step)
            optimizer.step()
            manager.step()
    (got, expected) = (whole_rows(each, optimizer) for each, optimizer, _ in runs)
    assert runs[0][2].history == runs[1][2].history and len(runs[0][2].history) == 3
    assert got.keys() == expected.keys()
    if kind == "SCALE":  # sums of squares are added up in another order
        return [
            name for name in got if not torch.allclose(got[name].double(), expected[name].double(), rtol=0, atol=1e-12)
        ]
    return [name for name in got if not torch.equal(got[name], expected[name])]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("world", "tp"), [(4, 2), (4, 4)])
def test_updates_are_those_of_whole_weights(world: int, tp: int, kind: str) -> None:
    assert processes.run(world, run, tp, kind) == [[]] * world


@pytest.mark.parametrize("kind", ["fp32 tiles", "bf16", "8-bit tiles"])
@pytest.mark.parametrize(("world", "tp"), [(4, 2), (2, 2)])
def test_state_follows_weights_that_are_loaded_alone(world: int, tp: int, kind: str) -> None:
    assert processes.run(world, run, tp, kind, True) == [[]] * world


def unequal(rank: int, world: int) -> dict[str, Any]:
    model, _ = parallel_net(torch.float32, 2)
    site = find_sites(model)["layers.0.down.weight"]
    return {"values": tuple(site.values.shape), "here": local(site.values).numel(), "slabs": tuple(site.layout.slabs)}


def test_each_rank_holds_its_slabs_alone() -> None:
    first, second = processes.run(2, unequal)
    num_active = first["values"][0]
    assert num_active == 4 * 72  # of four slabs of 20 x 12 at density 0.3
    assert first["here"] == second["here"] == num_active // 2
    assert (first["slabs"], second["slabs"]) == ((2, 1, 0), (2, 1, 2))

"""Inspects a network that a person can check by hand; errors; what is printed; how much is touched."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import smet_compile as smet
from smet_compile.ops import find_sites


def mlp(bias: bool = False) -> nn.Module:
    """Makes 3 → 4 → 2: hidden unit 0 has no input, unit 1 no reader, unit 2 no input that lives without bias."""
    model = nn.Sequential(nn.Linear(3, 4, bias=bias), nn.ReLU(), nn.Linear(4, 2, bias=False))
    smet.sparsify(model, 0.5)
    first = torch.tensor([[0, 0, 0], [1, 1, 0], [1, 0, 0], [1, 1, 0]], dtype=torch.bool)
    second = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    for site, mask in zip(find_sites(model).values(), (first, second), strict=True):
        site.compact.resize(site.values, mask.flatten())
    return model


def test_by_hand() -> None:
    found = smet.inspect(mlp(), torch.randn(5, 3))
    first, second = found.sites
    assert first.dead.inputs.tolist() == [False, False, True]
    assert first.dead.outputs.tolist() == [True, False, False, False]
    assert first.reach is not None and second.reach is not None
    assert first.reach.unread.tolist() == [False, True, False, False]
    assert first.reach.num_live_weights == 3 and first.effective_density == 3 / 12
    assert second.dead.inputs.tolist() == [False, True, False, False]
    assert second.dead.outputs.tolist() == [False, True]
    assert second.reach.starved.tolist() == [True, False, False, False]
    assert second.reach.num_live_weights == 2
    assert found.path_log10_share == pytest.approx(math.log10(3 / (3 * 4 * 2)))
    assert set(found.graph.edges) == {("input", "0.weight"), ("0.weight", "2.weight"), ("2.weight", "output")}
    assert found.graph.nodes["0.weight"] == {"kind": "site", "density": 5 / 12}


def test_a_bias_makes_a_constant_and_no_path() -> None:
    with_bias, without = smet.inspect(mlp(bias=True), torch.randn(3)), smet.inspect(mlp(), torch.randn(3))
    assert with_bias.path_log10_share == without.path_log10_share
    assert [site.num_starved_inputs for site in with_bias.sites] == [0, 1]


def test_no_path_at_all() -> None:
    model = mlp()
    site = find_sites(model)["2.weight"]
    site.compact.resize(site.values, torch.tensor([1, 0, 0, 0, 0, 0, 0, 0], dtype=torch.bool))
    found = smet.inspect(model, torch.randn(5, 3))
    assert found.path_log10_share == -math.inf
    assert "input-output paths alive: none" in str(found)
    assert [site.reach.num_live_weights for site in found.sites if site.reach] == [0, 0]


def test_a_weight_used_twice_lives_where_one_use_has_it_live() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(torch.relu(self.layer(x)))

    model = smet.sparsify(Twice(), 0.5)
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[1, 0] = mask[2, 1] = mask[3, 3] = True
    site = find_sites(model)["layer.weight"]
    site.compact.resize(site.values, mask.flatten())
    (site,) = smet.inspect(model, torch.randn(2, 4)).sites
    assert site.reach is not None and site.reach.num_live_weights == 3
    assert not site.reach.starved.any() and not site.reach.unread.any()


def test_the_model_is_left_as_it_was() -> None:
    model = smet.sparsify(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 4)), 0.5)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert smet.inspect(model.train(), torch.randn(6, 4, generator=torch.Generator())).notes == ()
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(torch.get_rng_state(), state)


class LooksAtData(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.one, self.other = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        return self.one(x) if x.sum() > -1e9 else self.other(x)


def test_a_forward_that_looks_at_its_data_is_run_for_real_and_a_note_says_so() -> None:
    model = smet.sparsify(LooksAtData(), 0.5)
    before = copy.deepcopy(model.state_dict())
    found = smet.inspect(model, torch.randn(5, 4))
    assert "cannot run without data (aten._local_scalar_dense" in found.notes[0] and "of this example" in found.notes[0]
    assert found.notes[1:] == ("other.weight: nothing of the example passes through it",)
    assert found["one.weight"].reach is not None and found["other.weight"].reach is None
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_on_the_meta_device_such_a_forward_leaves_what_holds_of_each_weight_alone() -> None:
    model = smet.sparsify(LooksAtData(), 0.5)
    topologies = [site.compact.topology for site in find_sites(model).values()]
    model.to("meta")
    for site, topology in zip(find_sites(model).values(), topologies, strict=True):
        site.compact.topology = topology
    found = smet.inspect(model, torch.randn(5, 4))
    assert "on the meta device there are none" in found.notes[0]
    assert found.path_log10_share is None and all(site.reach is None for site in found.sites)
    assert found.sites[0].density == 0.5 and not found.graph.edges


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        result: torch.Tensor = torch.cond(x.sum() > 0, lambda y: self.left(y), lambda y: self.right(y), (y,))
        return result


def test_branches_are_not_followed_and_a_note_says_so() -> None:
    model = smet.sparsify(Branches(), density=0.5)
    found = smet.inspect(model, torch.randn(3, 4))
    assert found.notes[0] == (
        "the forward calls torch.cond, which runs functions that the inspection does not follow, so what feeds what is "
        "not known"
    )
    assert [row.reach for row in found.sites] == [None] * 3
    assert [len(row.dead.outputs) for row in found.sites] == [4] * 3


def test_an_op_that_nobody_knows_is_named_and_kills_nothing() -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.after = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.after(torch.linalg.solve(torch.eye(8), self.before(x).mT).mT)

    found = smet.inspect(smet.sparsify(Sorted(), 0.1), torch.randn(2, 8))
    assert len(found.notes) == 1 and "mixes units in a way that is not known" in found.notes[0]
    assert ("before.weight", "after.weight") in found.graph.edges
    assert [site.num_starved_inputs for site in found.sites] == [0, 0]
    assert [site.num_unread_outputs for site in found.sites] == [0, 0]


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"inspect: expected a model with compact weights, got one with none"):
        smet.inspect(nn.Linear(2, 2), torch.randn(2))
    with torch.device("meta"):
        model = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"weight: expected a topology with data, got one on the meta device; load"):
        smet.inspect(smet.sparsify(model, 0.5), torch.randn(4))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        smet.inspect(mlp(), torch.randn(2, 7))


def test_without_an_example_and_compiled() -> None:
    alone = smet.inspect(torch.compile(mlp()))
    assert [site.num_dead_outputs for site in alone.sites] == [1, 1]
    assert [site.num_starved_inputs for site in alone.sites] == [None, None]
    assert "starved" not in str(alone) and "no example was given" in str(alone)


def test_the_table() -> None:
    lines = str(smet.inspect(mlp(), torch.randn(5, 3))).splitlines()
    assert lines[0].split("  ")[0] == "site" and "churn" not in lines[0]
    assert lines[1].split() == ["0.weight", "4x3", "0.4167", "1/3", "1/4", "0", "1/4", "0.2500"]
    assert lines[3] == "2 sites, 8 of 20 weights active (0.4000), 5 on a live path"
    assert lines[4] == "input-output paths alive: a share of 10^-0.90"


class Touched(TorchDispatchMode):
    """Counts the elements that ops write or read afresh, not those that are only views or stand for no data."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if type(leaf) is torch.Tensor and not leaf.is_meta:
                self.count += min(leaf.numel(), leaf.untyped_storage().nbytes() // leaf.element_size())
        return result


def touched(width: int, block: int, density: float, layers: int) -> int:
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    smet.sparsify(model, density, block_shape=block)
    with Touched() as counter:
        smet.inspect(model, torch.randn(2, width))
    return counter.count


def test_work_is_linear_in_units_and_active_blocks() -> None:
    small = touched(256, 16, 0.25, 4)
    assert touched(256, 16, 0.25, 8) < 2.2 * small
    assert touched(512, 32, 0.25, 4) < 2.1 * small  # twice the units, as many blocks, four times the weights
    assert touched(256, 16, 0.5, 4) < 1.6 * small
    assert small < 4 * 256 * 256


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")
def test_nothing_passes_through_a_matrix_without_entries() -> None:
    """Between 8 → 8 matrices lies 8 → 0 → 8; beside them, it adds nothing to what passes."""

    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
            self.empty = nn.Sequential(nn.Linear(8, 0), nn.Linear(0, 8))

        def forward(self, x: torch.Tensor, alone: bool) -> Any:
            y = self.first(x)
            return self.second(y if alone else y + self.empty(y))

    between = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 0), nn.Linear(0, 8), nn.Linear(8, 8))
    smet.sparsify(between, 63 / 64)
    first, last = smet.inspect(between, torch.ones(2, 8)).sites
    assert first.reach is not None and last.reach is not None
    assert first.reach.unread.all() and last.reach.starved.all()
    assert first.reach.num_live_weights == last.reach.num_live_weights == 0
    model = smet.sparsify(Beside(), 63 / 64)
    beside, alone = (smet.inspect(model, torch.ones(2, 8), alone) for alone in (False, True))
    assert [site.reach.num_live_weights for site in beside.sites if site.reach] == [63, 63]
    assert beside.path_log10_share is not None and beside.path_log10_share == alone.path_log10_share

"""A switch brings all that decides how a run goes on, and refuses what it cannot bring before anything moves."""

from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import smet_compile as smet
from smet_compile.distributed import Blueprint, Run, switch
from smet_compile.ops import find_sites
from tests.support.ranks import processes


def over(*ranks: int) -> DeviceMesh:
    return DeviceMesh("cpu", list(ranks), mesh_dim_names=("dp",))


def trained(run: Run, first: int, last: int) -> list[float]:
    """Makes steps; returns the losses of this rank."""
    losses = []
    for step in range(first, last):
        loss = loss_of(run, step)
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def loss_of(run: Run, step: int) -> Tensor:
    batch = torch.randn(8, 16, generator=torch.Generator().manual_seed(10 * step + distributed.get_rank()))
    return (run.forward(batch) - 1).square().mean()


def adamw(model: nn.Module) -> Any:
    optimizer = smet.ActiveAdamW(model, lr=1e-2)
    return optimizer, smet.TopologyManager(model, optimizer, total_steps=100, every=5)


class Tied(nn.Module):
    """Reads one weight in two layers, and has one buffer in two."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(16, 32), nn.Linear(32, 16, bias=False), nn.Linear(16, 32)
        self.last.weight = self.first.weight
        self.first.register_buffer("shift", torch.zeros(16))
        self.last.register_buffer("shift", self.first.shift)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.last.shift += x.mean(0).detach()
        return self.last(self.middle(self.first(x + self.first.shift).relu()))


def with_ties(mesh: Any) -> nn.Module:
    with torch.device("meta"):
        model = Tied()
    smet.sparsify(model, 0.3, include="middle")
    return fully_shard(model, mesh=mesh) if mesh.size() > 1 else model


def started(model: nn.Module) -> None:
    """Draws weights, and ties the buffers that ``materialize`` parts."""
    smet.materialize(model, seed=0, initialize=draw)
    model.last.shift = model.first.shift


def draw(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        module.reset_parameters()
        if "shift" in module._buffers:
            module.shift.zero_()


def stays_tied(rank: int, world: int) -> Any:
    found = []
    for moves in (False, True):
        plan = Blueprint(with_ties, adamw, initialize=started)
        run = plan.begin(over(*range(world)))
        assert run is not None
        losses = trained(run, 0, 7)
        if moves:
            run = switch(run, plan.prepare(over(*range(world)))).run
            assert run is not None and run.model.last.weight is run.model.first.weight
            assert run.model.last.shift is run.model.first.shift
        found.append(losses + trained(run, 7, 14))
    return found


def test_tied_weights_and_buffers_stay_tied() -> None:
    processes.stop()
    for world in (1, 2):
        for stayed, moved in processes.run(world, stays_tied):
            assert moved == stayed and len(set(stayed)) == 14


def layers(mesh: Any) -> nn.Module:
    """Builds a model whose last bias does not train at first."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(16, 33), nn.BatchNorm1d(33), nn.ReLU(), Counting(33, 8))
    model[3].bias.requires_grad_(False)
    smet.sparsify(model, 0.3)
    return fully_shard(model, mesh=mesh) if mesh.size() > 1 else model


class Counting(nn.Linear):
    """Counts its forwards outside of tensors, and adds a little of the count."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return super().forward(x) + 0.01 * self.count

    def get_extra_state(self) -> Any:
        return self.count

    def set_extra_state(self, state: Any) -> None:
        self.count = state


def sgd(model: nn.Module) -> Any:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    return optimizer, smet.TopologyManager(model, optimizer, total_steps=100, every=5)


def active(model: nn.Module) -> Any:
    optimizer = smet.ActiveAdamW([p for p in model.parameters() if p.requires_grad], model=model, lr=1e-2)
    return optimizer, smet.TopologyManager(model, optimizer, total_steps=100, every=5)


def nothing(run: Run) -> None:
    """Changes nothing."""


def freeze(run: Run) -> None:
    run.model[0].requires_grad_(False)
    run.model[1].bias.requires_grad_(False)


def unfreeze(run: Run) -> None:
    run.model[3].bias.requires_grad_(True)
    run.optimizer.add_param_group({"params": [run.model[3].bias], "lr": 0.05})


def evaluate(run: Run) -> None:
    run.model[1].eval()


def correct(run: Run) -> None:
    found = smet.correct_gradients(run.model, run.optimizer, torch.randn(8, 16))
    assert len(found.corrected) == 1


def correct_steps(run: Run) -> None:
    found = smet.correct_gradients(run.model, run.optimizer, torch.randn(8, 16), scale_steps=True)
    assert len(found.corrected) == 1


def changed(rank: int, world: int, optimize: Any, changes: list[Any]) -> Any:
    """Returns for each change the losses of a run that stays, and of one that moves after it."""
    found = []
    for change in changes:
        losses = []
        for moves in (False, True):
            plan = Blueprint(layers, optimize)
            run = plan.begin(over(*range(world)))
            assert run is not None
            torch.manual_seed(1)
            trained(run, 0, 4)
            change(run)
            decided = decisions(run)
            if moves:
                run = switch(run, plan.prepare(over(*range(world)))).run
                assert run is not None and decisions(run) == decided
            losses.append(trained(run, 4, 13))
        found.append(losses)
    return found


def decisions(run: Run) -> list[Any]:
    compacts = (site.compact for site in find_sites(run.model).values())
    modes = [module.training for module in run.model.modules()]
    trains = [parameter.requires_grad for parameter in run.model.parameters()]
    return [*modes, *trains, *((each.scales_rows, each.scales_steps, each.correction) for each in compacts)]


def all_travel(world: int, optimize: Any, changes: list[Any]) -> None:
    processes.stop()
    for found in processes.run(world, changed, optimize, [nothing, *changes]):
        for stayed, moved in found:
            assert moved == stayed
        assert len({tuple(stayed) for stayed, _ in found}) == 1 + len(changes)  # each changes the run


def test_frozen_layers_modes_and_corrections_travel() -> None:
    all_travel(2, sgd, [freeze, evaluate, correct])


def test_scaled_steps_travel() -> None:
    all_travel(1, active, [correct_steps])


def test_groups_that_were_added_travel() -> None:
    all_travel(2, active, [unfreeze])
    all_travel(2, sgd, [unfreeze])


def errors_of(*attempts: Any) -> list[str]:
    """Returns the errors of attempts that are refused."""
    found = []
    for attempt in attempts:
        try:
            attempt()
        except ValueError as error:
            found.append(str(error))
    return found


OUTSIDE = nn.Parameter(torch.ones(3))


def with_one_outside(model: nn.Module) -> Any:
    return torch.optim.SGD([{"params": list(model.parameters())}, {"params": [OUTSIDE]}], lr=0.1), None


def cannot_move(rank: int, world: int) -> Any:
    """Asks for a switch that would lose something, and one that leaves a gradient behind.

    Returns the errors of the first, and whether the run trains on after the second as one that stayed.
    """
    whole = over(0, 1)
    runs = [Blueprint(layers, sgd).begin(whole) for _ in range(2)]
    for run in runs:
        trained(run, 0, 4)
    moved, stayed = runs
    outside = Blueprint(layers, with_one_outside)
    holds = outside.begin(whole)
    errors = errors_of(lambda: switch(holds, outside.prepare(whole)))
    moved.model[1].bias.grad = torch.zeros_like(moved.model[1].bias)
    with pytest.warns(UserWarning, match="gradients do not travel"):
        moved = switch(moved, Blueprint(layers, sgd).prepare(whole)).run
    return errors, trained(moved, 4, 9) == trained(stayed, 4, 9)


def test_what_has_no_place_in_the_model_is_refused_and_gradients_that_stay_behind_are_told() -> None:
    processes.stop()
    for (outside,), goes_on in processes.run(2, cannot_move):
        assert outside == (
            "group 1 of SGD: expected parameters of the model, got one of shape (3,) that it does not have; keep it in "
            "the model, as a parameter of one of its modules; the run is as it was"
        )
        assert goes_on


def normalized(mesh: Any) -> nn.Module:
    """Builds layers with batch norm for a mesh with or without "tp"."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 8))
    if "tp" in mesh.mesh_dim_names:
        parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "3": RowwiseParallel()})
    smet.sparsify(model, 0.3, slabs={"0": (2, 0)}, include="0")
    return fully_shard(model, mesh=mesh) if "tp" not in mesh.mesh_dim_names and mesh.size() > 1 else model


def adam(model: nn.Module) -> Any:
    return torch.optim.Adam(model.parameters(), lr=0.1), None


def corrected_elsewhere(rank: int, world: int) -> list[str]:
    whole, both, cut = over(0), over(0, 1), DeviceMesh("cpu", [[0, 1]], mesh_dim_names=("dp", "tp"))
    run = Blueprint(normalized, sgd).begin(both)
    correct(run)
    scaled = Blueprint(normalized, adam).begin(whole)
    if scaled is not None:
        correct_steps(scaled)
    plans = Blueprint(normalized, sgd).prepare(cut), Blueprint(normalized, adam).prepare(both)
    return errors_of(lambda: switch(run, plans[0]), lambda: switch(scaled, plans[1]))


def test_a_correction_stays_out_of_layouts_that_cannot_have_it() -> None:
    processes.stop()
    for parallel, sharded in processes.run(2, corrected_elsewhere):
        assert "0.weight: expected a layout with whole rows" in parallel and "got tensor parallelism" in parallel
        assert "0.weight: expected a layout that holds the weight whole" in sharded and "without fully_shard" in sharded


def by_momentum(model: nn.Module) -> Any:
    optimizer = smet.ActiveAdamW(model, lr=1e-2)
    return optimizer, smet.TopologyManager(model, optimizer, total_steps=100, every=20, grow="momentum")


def alone(mesh: Any) -> nn.Module:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    return smet.sparsify(model, 0.25)


def in_a_window(rank: int, world: int) -> Any:
    """Trains through an update for which each rank has collected gradients of its own, moving in between or not."""
    found = []
    plan = Blueprint(alone, by_momentum, lambda m, mesh: DistributedDataParallel(m, process_group=mesh.get_group()))
    for moves in (False, True):
        run = plan.begin(over(0, 1))
        losses = trained(run, 0, 15)
        if moves:
            run = switch(run, plan.prepare(over(0, 1))).run
        losses += trained(run, 15, 25)
        topologies = [site.compact.topology.tolist() for site in find_sites(run.model).values()]
        found.append((losses, topologies, len(run.manager.history)))
    return found


def test_gradients_that_each_rank_collected_for_growth_travel() -> None:
    processes.stop()
    for stayed, moved in processes.run(2, in_a_window):
        assert moved == stayed and stayed[-1] == 1
    processes.stop()

"""Options of FSDP2 and habits of its users: each trains as one process with the same arithmetic does."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.utils.checkpoint import checkpoint

import smet_compile as smet
from tests.shards.setting import Layer, loss_of, mean_over_ranks, shard, sparse_net, topologies
from tests.support.ranks import processes

STEPS = 10
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16 parameters, fp32 reduction": {"mixed": torch.float32},
    "bf16 parameters, bf16 reduction": {"mixed": torch.bfloat16},
    "clipping": {"clip": 0.05},
    "CPU offload": {"options": {"offload_policy": CPUOffloadPolicy(pin_memory=False)}},
    "checkpointing": {"reentrant": False},
    "reentrant checkpointing": {"reentrant": True},
    "kept after forward": {"options": {"reshard_after_forward": False}},
    "accumulation": {"accumulate": 2},
    "AdamW": {"optimizer": lambda model: torch.optim.AdamW(model.parameters(), 3e-3)},
    "SGD with momentum": {"optimizer": lambda model: torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)},
    "Lion": {"optimizer": lambda model: smet.ActiveLion(model, 1e-3)},
    "evaluation between": {"evaluate": True, "options": {"reshard_after_forward": False}},
    "HSDP": {"replicas": 2},
    "saliency and momentum": {"drop": "saliency", "grow": "momentum"},
    "relative magnitude": {"drop": "relative_magnitude"},
}
OWN_POLICY = "a policy of one's own"


class Checkpointed(nn.Module):
    """Recomputes a layer in backward."""

    def __init__(self, layer: Layer, reentrant: bool) -> None:
        super().__init__()
        self.layer, self.reentrant = layer, reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.layer, x, use_reentrant=self.reentrant)


def train(rank: int, world: int, name: str) -> Any:
    case = CASES[name]
    low = "mixed" in case
    model = sparse_net(torch.float32 if low else torch.float64)
    if "reentrant" in case:
        model.layers = nn.ModuleList(Checkpointed(layer, case["reentrant"]) for layer in model.layers)
    options = dict(case.get("options", {}))
    if low:
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, case["mixed"])
    replicas = min(world, case.get("replicas", 1))
    names = ("replicate", "shard")
    shape, names = ((replicas, world // replicas), names) if replicas > 1 else ((world,), ("shard",))
    shard(model, mesh=init_device_mesh("cpu", shape, mesh_dim_names=names), **options)
    make = case.get("optimizer", lambda model: smet.ActiveAdamW(model, 3e-3, warmup_steps=5))
    optimizer = make(model)
    policies = {"drop": case.get("drop", "magnitude"), "grow": case.get("grow", "gradient")}
    manager = smet.TopologyManager(model, optimizer, total_steps=30, every=4, **policies)
    losses, parts = [], case.get("accumulate", 1)
    for step in range(STEPS):
        for part in range(parts):
            model.set_requires_gradient_sync(part == parts - 1)
            loss = loss_of(model, parts * step + part, rank, world) / parts
            loss.backward()
        if "clip" in case:
            nn.utils.clip_grad_norm_(model.parameters(), case["clip"])
        if "evaluate" in case:
            with torch.no_grad():
                loss_of(model, 99, rank, world)
        optimizer.step()
        optimizer.zero_grad()
        manager.step()
        losses.append(mean_over_ranks(loss))
    assert len(manager.history) == 2
    return losses, topologies(model)


@pytest.mark.parametrize("name", CASES)
def test_a_run_with_this_is_that_of_a_mesh_of_one_rank(name: str) -> None:
    world = 4 if "replicas" in CASES[name] else 2
    losses, topology = processes.run(1, train, name)[0]
    got_losses, got_topology = processes.run(world, train, name)[0]
    low = "mixed" in CASES[name]
    torch.testing.assert_close(got_losses, losses, rtol=0, atol=2e-2 if low else 1e-12)
    if not low:
        assert all(torch.equal(got_topology[key], bits) for key, bits in topology.items())

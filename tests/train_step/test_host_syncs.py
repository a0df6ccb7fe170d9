"""Lists every place that waits for a GPU: none in a step, and in a topology update those below, each with its reason.

On a CPU the same calls are made. The C++ kernels read a rate on the CPU, where it lies; no GPU takes part in that.
"""

from functools import partial
from typing import Any

import pytest
import torch
from torch.optim import SGD

import smet_compile as smet
from smet_compile.format import topology
from tests.support.host_syncs import host_syncs, waiting_ops
from tests.train_step.setting import Batch, active, batch_of, sparse

EVERY = 4
CPU_KERNEL = "ops/kernels/native/jobs.py:update_all _local_scalar_dense"
OF_A_MOVE = {
    "format/topology.py:positions_of nonzero": "the blocks that are active, dropped and moved, by position",
    "format/topology.py:count_active _local_scalar_dense": "the new bits are checked, and counted for the history",
    "format/topology.py:spare_bits _local_scalar_dense": "the new bits are checked",
    "format/topology.py:digest_bits tolist": "the accepted bits are recognised later",
    "runtime/policies.py:check_scores _local_scalar_dense": "an error for scores that are NaN, before anything changes",
    "runtime/policies.py:check_scores to": "scores of a user's policy may lie elsewhere",
    "runtime/update.py:_mean_over_parts _local_scalar_dense": "the mean age, for the history",
    "runtime/update.py:make_and_record cpu": "bits before and after, for the history",
    "format/patterns.py:_protected_last _local_scalar_dense": "how many blocks may not be dropped",
    "runtime/history.py:protected to": "where newcomers lie, which is kept on the CPU",
    "optim/active.py:on_topology_change _local_scalar_dense": "whether any block is new",
    "optim/state.py:add_generation _local_scalar_dense": "whether a generation is free",
    "optim/state.py:add_generation nonzero": "which generation is free",
}
OF_RANDOM_GROWTH = {
    "format/sampling.py:sample_positions _local_scalar_dense": "how many blocks may grow",
    "format/sampling.py:sample_positions to": "random numbers are those of the CPU, the same on every device",
}
OF_GRADIENT_GROWTH = {
    "format/patterns.py:_lost bincount": "how many blocks each group lost",
    "format/patterns.py:_first_in_groups _local_scalar_dense": "how many blocks grow",
    "format/topology.py:_starts bincount": "the lists of tiles",
    "ops/growth.py:has_gradient _local_scalar_dense": "whether backward has come by",
    "runtime/update.py:collect _local_scalar_dense": "the size of buffers, in the step before",
}
OF_A_LOOKED_AT_STEP = {
    "runtime/optimizer_steps.py:read_scalars tolist": "whether gradients are finite; before and after it, the counts "
    "of updates in backward",
    "ops/sinks.py:at_first _local_scalar_dense": "these counts, where none was read before",
}
OF_ANOTHER_OPTIMIZER = {"runtime/fresh_state.py:first_written _local_scalar_dense": "what a fresh state holds; once"}


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes positions be found without waiting where their number is known, as on a GPU."""
    monkeypatch.setattr(topology, "_is_asynchronous", lambda _: True)


def single(step: int) -> Batch:
    return {key: value.float() for key, value in batch_of(step).items()}


def trained(block: int, grow: str) -> tuple[Any, Any, smet.TopologyManager]:
    model = sparse(block_shape=block).float()
    optimizer = active(model)
    options: Any = {"total_steps": 100, "every": EVERY, "grow": grow, "schedule": "cosine", "auto_step": False}
    return model, optimizer, smet.TopologyManager(model, optimizer, **options)


@pytest.mark.filterwarnings("ignore:TopologyManager")
@pytest.mark.parametrize(
    ("block", "grow", "more"), [(1, "random", OF_RANDOM_GROWTH), (4, "gradient", OF_GRADIENT_GROWTH)]
)
def test_eager_steps_and_topology_updates(block: int, grow: str, more: dict[str, str]) -> None:
    model, optimizer, manager = trained(block, grow)
    in_updates: set[str] = set()
    for step in range(2 * EVERY + 1):
        optimizer.zero_grad()
        model(**single(step)).loss.backward()
        with host_syncs() as found:
            optimizer.step()
        looks = {"runtime/optimizer_steps.py:read_scalars tolist"} if (step + 1) % EVERY == 0 else set()
        assert set(found) - {CPU_KERNEL} == looks, f"step {step}"
        with host_syncs() as found:
            manager.step()
        assert not found or (step + 2) % EVERY < 2, f"step {step}"
        in_updates.update(found)
    assert len(manager.history) == 2
    assert in_updates == {*OF_A_MOVE, *more}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eager_steps_of_another_rule(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain torch reads where groups start once for each topology, where rounding noise and scales depend on it."""
    monkeypatch.setenv("SMET_COMPILE_KERNEL", "torch")
    model = sparse().to(dtype)
    optimizer = smet.ActiveLion(model, lr=1e-3, moment_dtype="int8")
    for step in range(3):
        optimizer.zero_grad()
        model(**{key: value.to(dtype) for key, value in batch_of(step).items()}).loss.backward()
        with host_syncs() as found:
            optimizer.step()
        of_topology = {"format/topology.py:constant tolist"} if step == 0 else set()
        assert set(found) - of_topology == set(), f"step {step}"


def dampened(model: Any) -> SGD:
    return SGD(model.parameters(), 0.1, momentum=0.9, dampening=0.5)


@pytest.mark.filterwarnings("ignore:TopologyManager")
@pytest.mark.parametrize(
    ("make_optimizer", "of_host_tensors"), [(active, 0), (dampened, 4)], ids=["active_adamw", "sgd"]
)
def test_compiled_steps(make_optimizer: Any, of_host_tensors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No step waits but the first, which makes state, and the two before an update, which are looked at.

    Steps of torch's optimizers read their rate, a tensor on the CPU: twice for each of two weights with dampening.
    """
    monkeypatch.setenv("SMET_COMPILE_KERNEL", "torch")
    model = sparse().float()
    optimizer = make_optimizer(model)
    manager = smet.TopologyManager(model, optimizer, auto_step=False, total_steps=100, every=EVERY)
    step = smet.compile_train_step(model, optimizer)
    in_updates: set[str] = set()
    for number in range(2 * EVERY):
        if number % EVERY == 1:
            assert waiting_ops(partial(step, single(number))) == ["_local_scalar_dense"] * of_host_tensors
        else:
            step(single(number))
        with host_syncs() as found:
            manager.step()
        in_updates.update(found)
    assert step.fused and len(manager.history) == 2
    if make_optimizer is active:
        assert in_updates == {*OF_A_MOVE, *OF_RANDOM_GROWTH}
    else:
        of_ages = {each for each, reason in OF_A_MOVE.items() if each.startswith("optim") or "age" in reason}
        assert in_updates == {*OF_A_MOVE, *OF_RANDOM_GROWTH, *OF_ANOTHER_OPTIMIZER} - of_ages


def test_what_counts_as_waiting() -> None:
    x = torch.arange(4.0)
    with host_syncs() as found:
        assert x.sum() == 6 and x.nonzero().numel() == 3
        x[x > 2] = 0  # one number: filled in place
        x[x > 0] = torch.ones(2)
        x.clone().add_(1)
    assert [each.split(" ", 1)[1] for each in found] == ["_local_scalar_dense", "nonzero", "index_put_ by a mask"]
    assert waiting_ops(lambda: (x.add(1), x.max().item(), x.clone())) == ["_local_scalar_dense"]

"""Steps that others make of an optimizer: torch.compile round it, and torch.distributed.checkpoint's own."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import smet_compile as smet
from tests.support.small_models import two_layers
from tests.support.snapshots import assert_same, snapshot
from tests.support.training import loss_on, train


def make(kind: Any = smet.ActiveAdamW, **options: Any) -> tuple[nn.Module, Any, smet.TopologyManager]:
    torch.manual_seed(0)
    model = smet.sparsify(two_layers(), density=0.4)
    optimizer = kind(model, lr=1e-2, **options)
    return model, optimizer, smet.TopologyManager(model, optimizer, total_steps=1000, every=3)


def run(backend: str | None, **options: Any) -> list[Any]:
    torch._dynamo.reset()
    model, optimizer, manager = make(**options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    def step() -> None:
        optimizer.step()
        scheduler.step()
        manager.step()

    compiled = torch.compile(step, backend=backend) if backend else step
    for i in range(7):
        loss_on(model, i).backward()
        compiled()
        optimizer.zero_grad()
    assert manager.num_steps == 7 and [event.step for event in manager.history] == [3, 6]
    return snapshot(model, optimizer, manager)


@pytest.mark.parametrize("options", [{}, {"kind": smet.NaiveAdamW}, {"moment_dtype": "int8"}], ids=str)
def test_compiled_steps_are_the_eager_ones(options: dict[str, Any]) -> None:
    """The rate changes in every step, and topology updates are made inside the compiled function."""
    expected = run(None, **options)
    for backend in ("eager", "aot_eager") if not options else ("eager",):
        assert_same(run(backend, **options), expected)


def test_a_step_of_torch_optim_is_counted_in_a_compiled_function() -> None:
    run("eager", kind=lambda model, lr: torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9))


@pytest.mark.parametrize("which", ["optimizer", "manager"])
def test_one_graph_is_refused_with_advice(which: str) -> None:
    torch._dynamo.reset()
    model, optimizer, manager = make()
    loss_on(model, 0).backward()
    step = {"optimizer": optimizer.step, "manager": manager.step}[which]
    with pytest.raises(
        torch._dynamo.exc.Unsupported, match=r"in eager mode; .*without? .*fullgraph=True|fullgraph=True"
    ):
        torch.compile(step, backend="eager", fullgraph=True)()


KINDS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "int8": {"moment_dtype": "int8"},
    "naive": {"kind": smet.NaiveAdamW, "weight_decay": 0.1},
}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_a_state_dict_taken_before_training_leaves_no_trace(options: dict[str, Any]) -> None:
    model, optimizer, manager = make(**options)
    before = snapshot(model)
    get_state_dict(model, optimizer)
    assert_same(snapshot(model), before)
    assert all(state["step"] == 0 for state in optimizer.state.values())
    twin = make(**options)
    train(model, optimizer, manager, steps=7)
    train(*twin, steps=7)
    assert manager.num_steps == 7
    assert_same(snapshot(model, optimizer, manager), snapshot(*twin))


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_a_run_resumed_by_distributed_checkpoint_is_the_undisturbed_one(options: dict[str, Any]) -> None:
    run = make(**options)
    train(*run, steps=4)
    saved = copy.deepcopy((get_state_dict(run[0], run[1]), run[2].state_dict()))
    train(*run, first=4, steps=5)
    resumed = make(**options)
    resumed[2].load_state_dict(saved[1])
    (model_state, optimizer_state), _ = saved
    set_state_dict(resumed[0], resumed[1], model_state_dict=model_state, optim_state_dict=optimizer_state)
    train(*resumed, first=4, steps=5)
    assert resumed[2].num_steps == 9
    assert_same(snapshot(resumed[0], resumed[2]), snapshot(run[0], run[2]))
    for mine, other in zip(resumed[0].parameters(), run[0].parameters(), strict=True):
        assert_same(dict(resumed[1].state[mine]), dict(run[1].state[other]))


def test_a_first_step_at_rate_0_is_a_training_step() -> None:
    """A warm-up begins so; what tells it from a step that only makes state are its gradients."""
    model, optimizer, manager = make()
    optimizer.param_groups[0]["lr"] = 0.0
    train(model, optimizer, manager)
    assert manager.num_steps == 1
    assert all(state["step"] == 1 for state in optimizer.state.values())

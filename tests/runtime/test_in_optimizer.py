"""The manager's state travels in that of the optimizer, in one value that is there from the first step on."""

import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

import smet_compile as smet
from tests.support.small_models import two_layers

STEPS, EVERY, HALF = 24, 4, 10
Run = tuple[nn.Module, Any, smet.TopologyManager]
pytestmark = pytest.mark.filterwarnings("ignore:TopologyManager. 3.weight")


def active(model: nn.Module) -> Any:
    return smet.ActiveAdamW(model, 1e-2, warmup_steps=3)


def momentum(model: nn.Module) -> Any:
    return torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9)


def begin(make: Any = active, **options: Any) -> Run:
    torch.manual_seed(0)
    model = smet.sparsify(two_layers(), 0.4)
    optimizer = make(model)
    given = {"total_steps": STEPS, "every": EVERY, "schedule": "cosine", "grow": "gradient"} | options
    return model, optimizer, smet.TopologyManager(model, optimizer, **given)


def go(run: Run, steps: range) -> None:
    model, optimizer, _ = run
    for step in steps:
        x = torch.randn(5, 12, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_alike(run: Run, other: Run) -> None:
    assert all(torch.equal(tensor, other[0].state_dict()[name]) for name, tensor in run[0].state_dict().items())
    assert [event.to_dict() for event in run[2].history] == [event.to_dict() for event in other[2].history]
    assert run[2].num_steps == other[2].num_steps == STEPS and len(run[2].history) == 4


def written(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


@pytest.mark.parametrize("make", [active, momentum])
@pytest.mark.parametrize("grow", ["gradient", "momentum"])
def test_whoever_saves_the_optimizer_saves_the_manager(make: Any, grow: str) -> None:
    whole, half = begin(make, grow=grow), begin(make, grow=grow)
    go(whole, range(STEPS))
    go(half, range(HALF))
    model, optimizer = written((half[0].state_dict(), half[1].state_dict()))
    resumed = begin(make, grow=grow)
    resumed[0].load_state_dict(model)
    resumed[1].load_state_dict(optimizer)
    go(resumed, range(HALF, STEPS))
    assert_alike(resumed, whole)


def test_it_is_one_value_of_one_kind_from_the_first_step_on() -> None:
    run = begin()
    kinds = set()
    for step in range(2 * EVERY + 1):
        groups = run[1].state_dict()["param_groups"]
        kinds.add(tuple((key, type(value)) for group in groups for key, value in group.items()))
        assert groups[0]["topology_manager"] == run[1].state_dict()["param_groups"][0]["topology_manager"]
        go(run, range(step, step + 1))
    assert len(kinds) == 1
    assert "topology_manager" not in run[1].param_groups[0]


@pytest.mark.parametrize(("half_way", "grow"), [(HALF, "random"), (HALF + 1, "gradient"), (HALF + 1, "momentum")])
@pytest.mark.parametrize("make", [active, momentum])
@pytest.mark.filterwarnings("ignore:.*process group.*:UserWarning", "ignore:.*torch.distributed.*:UserWarning")
def test_torchs_distributed_checkpoint_brings_it(make: Any, half_way: int, grow: str, tmp_path: Path) -> None:
    whole, half = begin(make, grow=grow), begin(make, grow=grow)
    go(whole, range(STEPS))
    go(half, range(half_way))
    model, optimizer = get_state_dict(half[0], half[1])
    dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=tmp_path)
    resumed = begin(make, grow=grow)
    model, optimizer = get_state_dict(resumed[0], resumed[1])
    dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=tmp_path)
    set_state_dict(resumed[0], resumed[1], model_state_dict=model, optim_state_dict=optimizer)
    go(resumed, range(half_way, STEPS))
    assert_alike(resumed, whole)


def test_a_flattened_state_dict_does_not_bring_it_and_says_so() -> None:
    half, resumed = begin(), begin()
    go(half, range(HALF))
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    model, optimizer = get_state_dict(half[0], half[1], options=flat)
    with pytest.warns(UserWarning, match=r"expected its state in that of the optimizer, got none.*flattened"):
        set_state_dict(resumed[0], resumed[1], model_state_dict=model, optim_state_dict=optimizer, options=flat)
    resumed[2].load_state_dict(half[2].state_dict())
    assert resumed[2].num_steps == HALF


@pytest.mark.parametrize("make", [active, momentum])
def test_an_optimizer_may_be_loaded_before_it_has_a_manager(make: Any) -> None:
    whole, half = begin(make), begin(make)
    go(whole, range(STEPS))
    go(half, range(HALF))
    torch.manual_seed(0)
    model = smet.sparsify(two_layers(), 0.4)
    optimizer = make(model)
    model.load_state_dict(half[0].state_dict())
    optimizer.load_state_dict(half[1].state_dict())
    options: Any = {"total_steps": STEPS, "every": EVERY, "schedule": "cosine", "grow": "gradient"}
    resumed = model, optimizer, smet.TopologyManager(model, optimizer, **options)
    assert resumed[2].num_steps == HALF
    go(resumed, range(HALF, STEPS))
    assert_alike(resumed, whole)


def test_another_setting_is_an_error_that_names_it_or_is_overridden() -> None:
    half = begin()
    go(half, range(HALF))
    state = half[1].state_dict()
    other = begin(total_steps=40)
    before = {name: tensor.clone() for name, tensor in other[0].state_dict().items()}
    with pytest.raises(ValueError, match=r'total_steps: expected 40 as in this manager, got 24 .*"total_steps"'):
        other[1].load_state_dict(state)
    assert not other[1].state and other[2].num_steps == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in other[0].state_dict().items())
    longer = begin(total_steps=40, override=["total_steps"])
    longer[0].load_state_dict(half[0].state_dict())
    longer[1].load_state_dict(state)
    assert longer[2].num_steps == HALF and longer[2].settings["total_steps"] == 40
    with pytest.raises(ValueError, match=r"override: expected names of settings"):
        begin(override=["density"])


@pytest.mark.parametrize("make", [active, momentum])
def test_a_state_without_it_loads_with_a_warning(make: Any) -> None:
    old, new = begin(make, auto_step=False), begin(make)
    for step in range(3):
        go(old, range(step, step + 1))
        old[2].step()
    state = old[1].state_dict()
    assert "topology_manager" not in state["param_groups"][0]
    with pytest.warns(UserWarning, match=r"got none, so its steps and history are those that it had; load"):
        new[1].load_state_dict(state)
    assert new[2].num_steps == 0


@pytest.mark.parametrize("change", [3, b"", b"PK", lambda state: state[:-1], lambda state: state[:-1] + b"\x07"])
def test_other_values_are_refused_before_anything_changes(change: Any) -> None:
    half, other = begin(), begin()
    go(half, range(HALF))
    state = half[1].state_dict()
    group = state["param_groups"][0]
    group["topology_manager"] = change(group["topology_manager"]) if callable(change) else change
    with pytest.raises(ValueError, match="topology_manager: "):
        other[1].load_state_dict(state)
    assert not other[1].state and other[2].num_steps == 0


def test_our_own_checkpoint_holds_it_once(tmp_path: Path) -> None:
    whole, half, resumed = begin(), begin(), begin()
    go(whole, range(STEPS))
    go(half, range(HALF))
    smet.save_checkpoint(tmp_path / "state", *half)
    assert (tmp_path / "state").read_bytes().count(b"num_postponed") == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        smet.load_checkpoint(tmp_path / "state", *resumed)
    go(resumed, range(HALF, STEPS))
    assert_alike(resumed, whole)


def test_our_own_checkpoint_finds_it(tmp_path: Path) -> None:
    whole, half, resumed, longer = begin(), begin(), begin(), begin(total_steps=40)
    go(whole, range(STEPS))
    go(half, range(HALF))
    smet.save_checkpoint(tmp_path / "state", *half[:2])
    smet.load_checkpoint(tmp_path / "state", *resumed[:2])
    go(resumed, range(HALF, STEPS))
    assert_alike(resumed, whole)
    with pytest.raises(ValueError, match="total_steps: expected 40 as in this manager, got 24"):
        smet.load_checkpoint(tmp_path / "state", *longer[:2])
    smet.load_checkpoint(tmp_path / "state", longer[0])
    assert longer[2].num_steps == 0
    plain = begin(auto_step=False)
    smet.save_checkpoint(tmp_path / "without", *plain[:2])
    smet.load_checkpoint(tmp_path / "without", *resumed[:2])
    assert resumed[2].num_steps == STEPS


def in_two_parts() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"enc": smet.sparsify(two_layers(), 0.4), "dec": smet.sparsify(two_layers(), 0.4)})


def of_part(part: nn.Module, optimizer: Any, **options: Any) -> smet.TopologyManager:
    return smet.TopologyManager(part, optimizer, total_steps=STEPS, every=EVERY, **options)


def test_an_optimizer_carries_one_manager(tmp_path: Path) -> None:
    """The state of a second one, of other weights, would take the place of the first one's."""
    model = in_two_parts()
    optimizer = active(model)
    manager = of_part(model["enc"], optimizer)
    state = optimizer.state_dict()["param_groups"][0]["topology_manager"]
    with pytest.raises(
        ValueError, match=r"0\.weight: expected an optimizer without another manager, got one \(ActiveAdamW"
    ):
        of_part(model["dec"], optimizer)
    assert optimizer.state_dict()["param_groups"][0]["topology_manager"] == state and manager.auto_step
    assert not of_part(model["dec"], optimizer, auto_step=False).auto_step
    with pytest.warns(UserWarning, match="another manager, made before, which no longer steps by itself"):
        whole = of_part(model, optimizer)
    smet.save_checkpoint(tmp_path / "state", model, optimizer)
    assert whole.auto_step and not manager.auto_step


def test_a_checkpoint_of_two_managers_is_refused_unless_it_is_of_one_part(tmp_path: Path) -> None:
    model, other = in_two_parts(), in_two_parts()
    runs = {name: (part, active(part)) for name, part in model.items()}
    managers = {name: of_part(*run) for name, run in runs.items()}
    optimizers: Any = [optimizer for _, optimizer in runs.values()]
    with pytest.raises(ValueError, match=r"manager: expected one for the whole model.*got 2 \(enc\.0\.weight and dec"):
        smet.save_checkpoint(tmp_path / "whole", model, optimizers)
    assert not (tmp_path / "whole").exists()
    for name, (part, optimizer) in runs.items():
        go((part, optimizer, managers[name]), range(HALF))
        smet.save_checkpoint(tmp_path / name, part, optimizer)
        run = other[name], active(other[name])
        manager = of_part(*run)
        smet.load_checkpoint(tmp_path / name, *run)
        assert manager.num_steps == HALF


def test_a_dense_optimizer_takes_the_state_of_a_sparse_one() -> None:
    """One can leave: torch's optimizer loads what is for it, and steps."""
    run = begin(momentum, schedule="none")
    go(run, range(3))
    state = run[1].state_dict()
    sizes: list[Tensor] = [p.detach().clone().requires_grad_() for p in run[0].parameters()]
    plain = torch.optim.SGD(sizes, 1e-2, momentum=0.9)
    plain.load_state_dict(state)
    sum(p.square().sum() for p in sizes).backward()
    plain.step()
    assert set(plain.state[sizes[0]]) == {"momentum_buffer"}


def test_a_state_that_was_trained_on_without_a_manager_is_not_handed_on() -> None:
    run = begin()
    go(run, range(HALF))
    saved = written((run[0].state_dict(), run[1].state_dict()))
    torch.manual_seed(0)
    model = smet.sparsify(two_layers(), 0.4)
    alone = active(model)
    model.load_state_dict(saved[0])
    alone.load_state_dict(saved[1])
    assert "topology_manager" in alone.state_dict()["param_groups"][0]
    go((model, alone, run[2]), range(3))
    later = begin()
    with pytest.warns(UserWarning, match="expected its state in that of the optimizer, got none"):
        later[1].load_state_dict(written(alone.state_dict()))
    assert later[2].num_steps == 0


@pytest.mark.parametrize("make", [active, momentum])
def test_a_manager_that_cannot_go_on_with_a_loaded_state_leaves_it_for_the_next(make: Any) -> None:
    """The one that the error advises goes on as one does that was made before the state was loaded."""
    run = begin(make)
    go(run, range(HALF))
    later = begin(make, every=3, override=("every",))
    torch.manual_seed(0)
    model = smet.sparsify(two_layers(), 0.4)
    optimizer = make(model)
    for each in (later, (model, optimizer)):
        each[0].load_state_dict(run[0].state_dict())
        each[1].load_state_dict(written(run[1].state_dict()))
    options = {"total_steps": STEPS, "every": 3, "schedule": "cosine", "grow": "gradient"}
    with pytest.raises(ValueError, match="every: expected 3"):
        smet.TopologyManager(model, optimizer, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        manager = smet.TopologyManager(model, optimizer, override=("every",), **options)
    for each in (later, (model, optimizer, manager)):
        go(each, range(HALF, STEPS))
    assert manager.num_steps == STEPS and [event.step for event in manager.history][:2] == [4, 8]
    assert [event.to_dict() for event in manager.history] == [event.to_dict() for event in later[2].history]
    assert all(torch.equal(tensor, later[0].state_dict()[name]) for name, tensor in model.state_dict().items())

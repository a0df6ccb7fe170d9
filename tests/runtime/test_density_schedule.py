"""Which density schedules there are, and which are refused; checkpoints of every stage."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import smet_compile as smet
from smet_compile.ops import find_sites
from smet_compile.runtime import checkpoint_file
from tests.runtime.setting import make
from tests.support.small_models import two_layers
from tests.support.snapshots import assert_same, snapshot
from tests.support.states import Unchanged
from tests.support.training import loss_on, train

STAGES = [(3, 0.5), (6, 0.2), (9, 0.8)]


def test_cubic_by_hand() -> None:
    """The first of two stages from 1 to 0.2 leaves an eighth of the way."""
    assert smet.cubic_density(1.0, 0.2, end=100, num_stages=2) == [(50, pytest.approx(0.3)), (100, 0.2)]
    upwards = smet.cubic_density(0.25, 1.0, begin=10, end=40, num_stages=3)
    assert [step for step, _ in upwards] == [20, 30, 40]
    assert [density for _, density in upwards] == pytest.approx([1 - 0.75 * 8 / 27, 1 - 0.75 / 27, 1.0])
    assert len(smet.cubic_density(1.0, 0.1, end=1000)) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first": 0.0}, "first"),
        ({"last": 1.5}, "last"),
        ({"last": 1.0}, "another density than first"),
        ({"begin": -1}, "begin"),
        ({"num_stages": 0}, "num_stages"),
        ({"end": 4}, "5 stages need as many steps"),
        ({"begin": 96}, "5 stages need as many steps"),
    ],
    ids=str,
)
def test_no_cubic_schedule(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        smet.cubic_density(**({"first": 1.0, "last": 0.2, "end": 100} | options))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], r"a list of \(step, density\) pairs"),
        ("cubic", r"a list of \(step, density\) pairs"),
        ({10: 0.5}, r"a list of \(step, density\) pairs"),
        ([10, 0.5], r"density_schedule\[0\]: expected a pair"),
        ([(10, 0.5, 1)], r"density_schedule\[0\]: expected a pair"),
        ([(10.0, 0.5)], r"density_schedule\[0\]: step"),
        ([(0, 0.5)], r"density_schedule\[0\]: step"),
        ([(20, 0.5), (10, 0.3)], r"a step after 20, got 10"),
        ([(20, 0.5), (20, 0.3)], r"a step after 20, got 20"),
        ([(101, 0.5)], r"at most 100, got 101"),
        ([(10, 0.0)], r"density_schedule\[0\]"),
        ([(10, 1.1)], r"density_schedule\[0\]"),
        ([(10, float("nan"))], r"density_schedule\[0\]"),
        ([(10, 1.0)], "stages that change the model, got a density of 1 at step 10"),
        ([(10, 0.5), (20, 0.5)], r"stages that change the model, got a density of 0\.5 at step 20"),
        ([(10, 0.5), (20, 0.5001)], "stages that change the model"),
    ],
    ids=str,
)
def test_no_density_schedule(stages: Any, message: str) -> None:
    model = smet.sparsify(two_layers(), 1.0, dense_as_compact=True)
    optimizer = smet.ActiveAdamW(model)
    with Unchanged(model, optimizer), pytest.raises(ValueError, match=message):
        smet.TopologyManager(model, optimizer, total_steps=100, density_schedule=stages)


def test_a_model_without_compact_weights() -> None:
    model = smet.sparsify(two_layers(), 1.0)
    with pytest.raises(ValueError, match="dense_as_compact=True"):
        smet.TopologyManager(model, smet.ActiveAdamW(model), total_steps=100, density_schedule=STAGES)


def test_patterns_that_fix_the_density_or_the_rows() -> None:
    model = smet.sparsify(two_layers(), include="0.weight", pattern="2:4")
    with pytest.raises(ValueError, match=r'0\.weight: expected a pattern that leaves the density free, got "2:4"'):
        smet.TopologyManager(model, smet.ActiveAdamW(model), total_steps=100, density_schedule=STAGES)
    model = smet.sparsify(two_layers(), 0.5, pattern="fan_in")
    with pytest.raises(ValueError, match=r"at least one active block in each of \d+ rows"):
        smet.TopologyManager(model, smet.ActiveAdamW(model), total_steps=100, density_schedule=[(9, 0.02)])
    with pytest.raises(ValueError, match=r"2:4"):
        smet.sparsify(two_layers(), rules={"*": 1.0}, include="0.weight", pattern="2:4", dense_as_compact=True)


@pytest.fixture
def one_rank(tmp_path: Path) -> Any:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_data_parallelism_is_refused(one_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = smet.sparsify(two_layers(), 1.0, dense_as_compact=True)
    optimizer = smet.ActiveAdamW(model)
    wrapped = DistributedDataParallel(model)
    with pytest.raises(ValueError, match="without data parallelism, got DistributedDataParallel"):
        smet.TopologyManager(wrapped, optimizer, total_steps=100, density_schedule=STAGES)
    manager = smet.TopologyManager(model, optimizer, auto_step=False, total_steps=100, density_schedule=STAGES)
    train(model, optimizer, manager, steps=2)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    loss_on(model, 2).backward()
    optimizer.step()
    with pytest.raises(ValueError, match="without data parallelism, got 2 ranks"):
        manager.step()
    assert [site.density for site in find_sites(model).values()] == [1.0, 1.0]


@pytest.mark.parametrize("block_shape", [1, (1, 4), (4, 4), (20, 12)], ids=str)
def test_a_dense_model_in_compact_form_is_the_dense_model(block_shape: Any) -> None:
    plain, model = two_layers(), two_layers()
    model.load_state_dict(plain.state_dict())
    smet.sparsify(model, 1.0, block_shape=block_shape, dense_as_compact=True)
    assert [site.density for site in find_sites(model).values()] == [1.0, 1.0]
    for module in (0, 3):
        assert torch.equal(model[module].weight, plain[module].weight)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), steps=3)
    train(plain, torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9), steps=3)
    for module in (0, 3):
        torch.testing.assert_close(model[module].weight.as_subclass(torch.Tensor), plain[module].weight.detach())


def test_stacked_weights_in_one_block_each_train() -> None:
    """Values and dense weight have one shape, so moments of that shape are no sign of an optimizer from before."""

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up_proj = nn.Parameter(torch.randn(3, 4, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.einsum("ti,sci->tc", x, self.up_proj)

    model = smet.sparsify(Stack(), 1.0, include="up_proj", block_shape=(4, 5), dense_as_compact=True)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        model(torch.randn(2, 5)).sum().backward()
        optimizer.step()
    assert find_sites(model)["up_proj"].values.shape == (3, 4, 5)


def active(model: nn.Module) -> Any:
    return smet.ActiveAdamW(model, lr=1e-2, warmup_steps=5)


def of_torch(model: nn.Module) -> Any:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def fresh(density: float = 1.0, stages: Any = STAGES, make: Any = active, **options: Any) -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    model = smet.sparsify(two_layers(), density, block_shape=(1, 4), dense_as_compact=True)
    optimizer = make(model)
    given = {"total_steps": 40, "every": 4, "density_schedule": stages} | options
    return model, optimizer, smet.TopologyManager(model, optimizer, **given)


@pytest.mark.parametrize("num_steps", [2, 3, 5, 7, 9, 10])
def test_any_stage_resumes_in_any_other(num_steps: int, tmp_path: Path) -> None:
    """Into a fresh run, and into one that has gone on, or not so far, in the same process."""
    expected, path = fresh(), tmp_path / "checkpoint"
    train(*expected, steps=num_steps)
    smet.save_checkpoint(path, *expected)
    losses = train(*expected, first=num_steps, steps=6)
    for steps_before in (0, 4, 12):
        run = fresh()
        train(*run, steps=steps_before)
        smet.load_checkpoint(path, *run)
        assert train(*run, first=num_steps, steps=6) == losses
        assert_same(snapshot(*run), snapshot(*expected))
        assert run[2].history == expected[2].history


@pytest.mark.parametrize("optimizer", [active, of_torch])
@pytest.mark.parametrize("num_steps", [2, 3, 7, 10])
def test_state_dicts_of_any_stage_resume_in_any_other(num_steps: int, optimizer: Any) -> None:
    """At the end the weights are loaded alone, and the run goes on."""
    expected = fresh(make=optimizer)
    train(*expected, steps=num_steps)
    weights, state = (copy.deepcopy(part.state_dict()) for part in expected[:2])
    losses = train(*expected, first=num_steps, steps=6)
    for steps_before in (0, 4, 12):
        run = fresh(make=optimizer)
        train(*run, steps=steps_before)
        run[0].load_state_dict(weights)
        run[1].load_state_dict(copy.deepcopy(state))
        assert train(*run, first=num_steps, steps=6) == losses
        assert_same(snapshot(*run), snapshot(*expected))
        assert run[2].history == expected[2].history
        run[0].load_state_dict(weights)
        assert_same(dict(run[0].state_dict()), dict(weights))
        train(*run, steps=2)


def test_a_state_dict_of_another_stage_is_refused_without_a_schedule() -> None:
    run, other = fresh(), fresh(stages=None, schedule="none")
    train(*run, steps=4)
    with pytest.raises(RuntimeError, match=r"0\.weight: expected values of shape .* sparsify with the same"):
        other[0].load_state_dict(run[0].state_dict())


def test_other_numbers_of_blocks_are_refused_without_a_schedule(tmp_path: Path) -> None:
    run, path = fresh(), tmp_path / "checkpoint"
    train(*run, steps=7)
    smet.save_checkpoint(path, *run)
    other = fresh(0.5, stages=None)
    with Unchanged(*other), pytest.raises(ValueError, match=r"0\.weight|parametrizations\.weight"):
        smet.load_checkpoint(path, *other, override=("density_schedule",))
    with Unchanged(*other[:2]), pytest.raises(ValueError, match="another model, density or dtype"):
        smet.load_checkpoint(path, *other[:2])


def test_a_run_that_began_otherwise_is_refused(tmp_path: Path) -> None:
    run, path = fresh(), tmp_path / "checkpoint"
    train(*run, steps=4)
    smet.save_checkpoint(path, *run)
    other = fresh(stages=[(3, 0.4)])
    with Unchanged(*other), pytest.raises(ValueError, match="density_schedule: expected"):
        smet.load_checkpoint(path, *other)
    sparser = fresh(0.9)
    with Unchanged(*sparser), pytest.raises(ValueError, match="at the start by this density_schedule"):
        smet.load_checkpoint(path, *sparser)


def test_a_schedule_may_be_replaced(tmp_path: Path) -> None:
    """A stage that should be over by then is due at the next step."""
    run, path = fresh(), tmp_path / "checkpoint"
    train(*run, steps=4)
    smet.save_checkpoint(path, *run)
    for stages, due in (([(3, 0.5), (20, 0.1)], 20), ([(4, 0.3)], 5)):
        other = fresh(stages=stages, schedule="none")
        smet.load_checkpoint(path, *other, override=("density_schedule", "schedule"))
        assert other[2].next_update == due
        train(*other, first=4, steps=due - 4)
        assert (other[2].history[-1].step, other[2].history[-1].density) == (due, stages[-1][1])


def alter(path: Path, change: Any) -> None:
    saved = checkpoint_file.read(path)
    change(saved)
    checkpoint_file.write(path, saved)


def one_block_less(saved: Any) -> None:
    bits = saved["model"]["0.parametrizations.weight.0.topology"]
    at = int(bits.nonzero()[0])
    bits[at] &= bits[at] - 1


@pytest.mark.parametrize(
    "change",
    [
        one_block_less,
        lambda saved: saved["model"]["0.parametrizations.weight.0.topology"].zero_(),
        lambda saved: saved["optimizer"]["state"]["state"][0]["exp_avg"].resize_(3, 1, 4),
        lambda saved: saved["manager"]["history"][0].update(density=None),
        lambda saved: saved["manager"]["history"][0]["sites"]["0.weight"].update(num_active=7),
        lambda saved: saved["manager"]["history"][0]["sites"]["0.weight"].update(num_before=7),
        lambda saved: saved["manager"]["history"].clear(),
        lambda saved: saved["manager"].update(num_steps=1),
        lambda saved: saved.update(manager=None),
    ],
    ids=range(9),
)
def test_a_checkpoint_that_was_altered_changes_nothing(change: Any, tmp_path: Path) -> None:
    run, path = fresh(), tmp_path / "checkpoint"
    train(*run, steps=4)
    smet.save_checkpoint(path, *run)
    alter(path, change)
    other, twin = fresh(), fresh()
    for each in (other, twin):
        train(*each, steps=1)
        loss_on(each[0], 1).backward()
    gradients = [parameter.grad.clone() for parameter in other[0].parameters()]
    with Unchanged(*other), pytest.raises(ValueError, match="checkpoint"):
        smet.load_checkpoint(path, *other)
    assert_same([parameter.grad for parameter in other[0].parameters()], gradients)
    for each in (other, twin):
        each[1].zero_grad()
    assert train(*other, first=1, steps=5) == train(*twin, first=1, steps=5)


def test_settings_hold_the_schedule() -> None:
    assert fresh()[2].settings["density_schedule"] == [[3, 0.5], [6, 0.2], [9, 0.8]]
    assert make()[2].settings["density_schedule"] is None


def test_slabs_are_refused_at_the_start() -> None:
    model = smet.sparsify(two_layers(), 0.5, slabs={"0": (4, 0)})
    optimizer = smet.ActiveAdamW(model, 1e-2)
    with pytest.raises(ValueError, match=r"0\.weight: expected a weight without slabs, got 4"):
        smet.TopologyManager(model, optimizer, total_steps=20, density_schedule=[(3, 0.2)])


@pytest.mark.parametrize("refused", [[(3, 0.2)], None])
def test_a_refused_manager_does_not_decide_which_states_are_taken(refused: Any) -> None:
    model, later = (smet.sparsify(two_layers(), density) for density in (0.5, 0.2))
    kept = None
    if refused is None:
        kept = smet.TopologyManager(model, smet.ActiveAdamW(model, 1e-2), total_steps=20, density_schedule=[(3, 0.2)])
    wrong = torch.optim.AdamW([nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match="expected the optimizer to hold"):
        smet.TopologyManager(model, wrong, total_steps=20, density_schedule=refused)
    if kept is None:
        with pytest.raises(RuntimeError, match=r"expected values of shape|size mismatch"):
            model.load_state_dict(later.state_dict())
    else:
        model.load_state_dict(later.state_dict())
        assert find_sites(model)["0.weight"].num_active == find_sites(later)["0.weight"].num_active

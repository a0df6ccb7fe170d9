"""Growth by gradient (RigL): the inactive blocks of largest mean |dense gradient|, uncorrected."""

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import smet_compile as smet
from smet_compile.ops import find_sites
from smet_compile.runtime import update
from tests.ops.call_forms import ReadTwice
from tests.support.masked import fill_masked, grids_of, masks_of
from tests.support.small_models import two_layers
from tests.support.snapshots import assert_same, snapshot
from tests.support.training import loss_on, train
from tests.support.weight_watch import WeightSized, dense_sizes


def make(block_shape: Any = 1, every: int = 3, model: nn.Module | None = None) -> tuple[nn.Module, ...]:
    sparse = two_layers() if model is None else model
    plain = copy.deepcopy(sparse)
    smet.sparsify(sparse, density=0.4, block_shape=block_shape)
    optimizer = smet.ActiveAdamW(sparse, lr=1e-2)
    options = {"drop_fraction": 0.3, "schedule": "constant", "grow": "gradient"}
    return (
        sparse,
        plain,
        optimizer,
        smet.TopologyManager(sparse, optimizer, total_steps=1000, every=every, **options),
    )


def best_inactive(sparse: nn.Module, plain: nn.Module, loss: Tensor) -> dict[str, list[int]]:
    """Inactive blocks by falling mean |gradient| of the dense model."""
    names = list(find_sites(sparse))
    grads = torch.autograd.grad(loss, [plain.get_parameter(name) for name in names])
    masks, grids = masks_of(sparse), grids_of(sparse)
    best = {}
    for name, grad in zip(names, grads, strict=True):
        scores = grids[name].mean(grad.abs()).masked_fill(masks[name], -1.0)
        best[name] = scores.argsort(descending=True).tolist()
    return best


def assert_grown(before: dict[str, Tensor], after: dict[str, Tensor], best: dict[str, list[int]]) -> None:
    for name in before:
        grown = (after[name] & ~before[name]).nonzero().flatten().tolist()
        assert grown and grown == sorted(best[name][: len(grown)]), name


class Branches(nn.Module):
    """Reads each of two layers in a branch, and one outside."""

    def __init__(self, chooses: Any) -> None:
        super().__init__()
        self.first, self.left, self.right = (nn.Linear(8, 8) for _ in range(3))
        self.chooses = chooses

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.chooses(
            x.sum() > 0, lambda y: self.left(y).tanh(), lambda y: self.right(y).sin(), (self.first(x),)
        )
        return result


def in_python(where: Tensor, left: Any, right: Any, inputs: tuple[Tensor]) -> Tensor:
    result: Tensor = (left if where else right)(*inputs)
    return result


def test_a_compiled_branch_is_refused_at_the_first_step() -> None:
    sparse, _, optimizer, manager = make(every=4, model=Branches(torch.cond))
    for call in (torch.compile(sparse), torch.compile(sparse, backend="aot_eager", fullgraph=True)):
        with pytest.raises(ValueError, match=r'^left\.weight: expected .* inside torch\.cond; .*grow="random"'):
            call(torch.randn(3, 8))
        with torch.no_grad():  # without a gradient there is nothing to collect
            call(torch.randn(3, 8))
    assert manager.num_steps == 0
    step = smet.compile_train_step(sparse, optimizer, lambda model, x: model(x).square().mean())
    with pytest.raises(ValueError, match=r"^left\.weight: expected .* inside torch\.cond"):
        step(torch.randn(3, 8))
    assert not find_sites(sparse)["first.weight"].compact.update_sink
    assert find_sites(sparse)["first.weight"].compact.is_collected
    del manager, step, optimizer, call
    gc.collect()
    torch.compile(sparse)(torch.randn(3, 8)).sum().backward()


def test_a_branch_in_eager_mode_grows_by_gradient() -> None:
    runs = []
    for chooses in (torch.cond, in_python):
        torch.manual_seed(0)
        sparse, _, optimizer, manager = make(model=Branches(chooses))
        for _ in range(7):
            sparse(torch.randn(3, 8)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert len(manager.history) == 2
        runs.append(masks_of(sparse))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.parametrize("block_shape", [1, (1, 4), (4, 4)], ids=str)
def test_grows_where_the_dense_gradient_is_largest(block_shape: Any) -> None:
    sparse, plain, optimizer, manager = make(block_shape)
    for step in range(9):
        fill_masked(plain, sparse)
        before, best = masks_of(sparse), best_inactive(sparse, plain, loss_on(plain, step))
        loss_on(sparse, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        if manager.step():
            assert_grown(before, masks_of(sparse), best)
    assert len(manager.history) == 3


@pytest.fixture
def all_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the gradients of all inactive blocks, not only of those that are among the best at each backward."""
    monkeypatch.setattr(update, "_KEPT_PER_GROWN", 1000)


@pytest.mark.usefixtures("all_are_kept")
def test_micro_batches_add_up() -> None:
    sparse, plain, optimizer, manager = make(every=1)
    fill_masked(plain, sparse)
    loss = loss_on(plain, 0) + loss_on(plain, 1) + loss_on(plain, 2)
    before, best = masks_of(sparse), best_inactive(sparse, plain, loss)
    for step in range(3):
        loss_on(sparse, step).backward()
    optimizer.step()
    assert manager.step()
    assert_grown(before, masks_of(sparse), best)


def test_clipping_and_correction_do_not_matter() -> None:
    sparse, plain, optimizer, manager = make(every=1)
    fill_masked(plain, sparse)
    before, best = masks_of(sparse), best_inactive(sparse, plain, loss_on(plain, 0))
    loss_on(sparse, 0).backward()
    torch.nn.utils.clip_grad_norm_(sparse.parameters(), 1e-4)
    optimizer.step()
    manager.step()
    assert_grown(before, masks_of(sparse), best)


def test_a_postponed_update_uses_the_gradient_of_its_own_step() -> None:
    sparse, plain, optimizer, manager = make(every=2)
    for step in range(3):
        fill_masked(plain, sparse)
        before, best = masks_of(sparse), best_inactive(sparse, plain, loss_on(plain, step))
        loss_on(sparse, step).backward()
        if step == 1:
            sparse[0].bias.grad[0] = torch.nan
        optimizer.step()
        optimizer.zero_grad()
        manager.step()
    assert [event.step for event in manager.history] == [3]
    assert_grown(before, masks_of(sparse), best)


@pytest.mark.usefixtures("all_are_kept")
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non_reentrant", "reentrant"])
def test_under_checkpointing(use_reentrant: bool) -> None:
    """Two micro-batches; each layer is run twice."""
    sparse, plain, optimizer, manager = make(every=1)
    fill_masked(plain, sparse)
    inputs = [torch.randn(3, 12, requires_grad=use_reentrant) for _ in range(2)]
    before, best = masks_of(sparse), best_inactive(sparse, plain, sum((plain(x) ** 2).sum() for x in inputs))
    for x in inputs:
        (checkpoint(sparse, x, use_reentrant=use_reentrant) ** 2).sum().backward()
    optimizer.step()
    assert manager.step()
    assert_grown(before, masks_of(sparse), best)


@pytest.mark.usefixtures("all_are_kept")
@pytest.mark.parametrize("num_micro_batches", [1, 2])
def test_a_weight_read_twice_grows_by_the_whole_gradient(num_micro_batches: int) -> None:
    sparse, plain, optimizer, manager = make(every=1, model=nn.Sequential(ReadTwice(12, 7)))
    fill_masked(plain, sparse)
    loss = sum(loss_on(plain, step) for step in range(num_micro_batches))
    before, best = masks_of(sparse), best_inactive(sparse, plain, loss)
    for step in range(num_micro_batches):
        loss_on(sparse, step).backward()
    optimizer.step()
    assert manager.step()
    assert_grown(before, masks_of(sparse), best)


def num_alive_at_peak(num_layers: int) -> int:
    """Tensors of a weight's size in backward."""
    sparse, _, _, _ = make(every=1, model=nn.Sequential(*(nn.Linear(12 + i, 13 + i) for i in range(num_layers))))
    loss = sparse(torch.randn(3, 12)).square().mean()
    alive = [0]

    class Watch(WeightSized):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = super().__torch_dispatch__(func, types, args, kwargs)
            alive.append(self.num_alive())
            return out

    with Watch(dense_sizes(sparse)):
        loss.backward()
    return max(alive)


def test_one_dense_gradient_at_a_time() -> None:
    assert num_alive_at_peak(6) == num_alive_at_peak(2)


def test_no_dense_gradient_outlives_backward() -> None:
    """The gradients of twice as many inactive blocks as may grow are kept, no more."""

    sparse, _, _, _ = make(every=1)
    kept: list[StorageWeakRef] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.numel() in (240, 140):
                kept.append(StorageWeakRef(out.untyped_storage()))
            return out

    with Watch():
        loss_on(sparse, 0).backward()
    assert kept and all(storage.expired() for storage in kept)


@pytest.mark.parametrize(
    "policies", [{"grow": "momentum"}, {"grow": "gradient", "drop": "saliency", "window": 4}], ids=str
)
@pytest.mark.parametrize("num_steps", [3, 10, 13])
def test_a_copy_has_what_was_collected(num_steps: int, policies: dict[str, Any]) -> None:
    """The run is copied before the window of the update after step 12 is open, in it, and after that update."""
    torch.manual_seed(0)
    model = smet.sparsify(two_layers(), 0.4)
    optimizer = smet.ActiveAdamW(model, lr=1e-2)
    manager = smet.TopologyManager(model, optimizer, total_steps=1000, every=12, min_age=0, **policies)
    run = model, optimizer, manager
    train(model, optimizer, steps=num_steps)
    copied = copy.deepcopy(run)
    for each in (run, copied):
        train(each[0], each[1], first=num_steps, steps=26 - num_steps)
    assert [event.step for event in copied[2].history] == [12, 24]
    assert_same(snapshot(*copied), snapshot(*run))

"""Keeping values instead of dense weights changes nothing else: checks, errors, contexts, gradients."""

import copy

import pytest
import torch
from torch import Tensor, nn

import smet_compile as smet
from smet_compile.ops import find_sites
from tests.support.masked import fill_masked, masked_gradients, parameter_of
from tests.support.small_models import chain
from tests.support.snapshots import same_bits
from tests.support.weight_watch import WeightSized, dense_sizes

pytestmark = pytest.mark.usefixtures("unpacked")


def test_a_frozen_site_keeps_nothing_and_passes_the_gradient_on() -> None:
    sparse = chain()
    sparse[2].weight.requires_grad_(False)
    plain = copy.deepcopy(sparse)
    smet.sparsify(sparse, density=0.5)
    fill_masked(plain, sparse)
    x = torch.randn(5, 23)
    with WeightSized(dense_sizes(sparse)) as seen:
        loss = sparse(x).square().mean()
    assert seen.storages and seen.num_alive() == 0
    loss.backward()
    plain(x).square().mean().backward()
    assert find_sites(sparse)["2.weight"].values.grad is None
    for name in ("0.weight", "0.bias", "4.weight", "4.bias"):
        assert same_bits(parameter_of(sparse, name).grad, masked_gradients(plain, sparse)[name]), name


@pytest.mark.parametrize("name", ["0.weight", "2.weight"])
def test_a_change_of_the_values_before_backward_is_noticed(name: str) -> None:
    """Plain autograd refuses to go back through a weight that was changed in place; so do we.

    The first layer's backward needs no weight, since its input needs no gradient, but it packs by the topology.
    """
    sparse = smet.sparsify(chain(), density=0.5)
    loss = sparse(torch.randn(5, 23)).square().mean()
    with torch.no_grad():
        find_sites(sparse)[name].values.mul_(2)
    with pytest.raises(RuntimeError, match="changed between its forward and its backward"):
        loss.backward()


@pytest.mark.parametrize("block_shape", [1, (4, 4)], ids=str)
def test_buffers_rewritten_with_what_they_hold_are_no_change(block_shape: int | tuple[int, int]) -> None:
    """DistributedDataParallel copies rank 0's buffers into every rank's in each forward."""
    sparse = chain()
    plain = copy.deepcopy(sparse)
    smet.sparsify(sparse, density=0.5, block_shape=block_shape)
    fill_masked(plain, sparse)
    x = torch.randn(5, 23, requires_grad=True)
    plain_x = x.detach().clone().requires_grad_()
    loss = sparse(x).square().mean()
    for buffer in sparse.buffers():
        buffer.copy_(buffer.clone())
    loss.backward()
    plain(plain_x).square().mean().backward()
    assert same_bits(x.grad, plain_x.grad)
    for name, expected in masked_gradients(plain, sparse).items():
        assert same_bits(parameter_of(sparse, name).grad, expected), name


class Teacher(nn.Module):
    """Runs a part of the model in inference mode within a training forward."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = nn.Linear(23, 23), nn.Linear(23, 23)

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            target = self.teacher(x)
        return self.student(x) - target.clone()


def test_inference_mode_within_a_forward() -> None:
    model = smet.sparsify(Teacher(), density=0.5)
    model(torch.randn(5, 23)).square().mean().backward()
    assert find_sites(model)["student.weight"].values.grad is not None
    assert find_sites(model)["teacher.weight"].values.grad is None


class Raises(nn.Module):
    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.inner = nn.Linear(23, 23)
        self.error: type[BaseException] | None = error

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        if self.error is not None:
            raise self.error
        return x


def hooks_in_force() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_forward_that_raises_leaves_no_hooks_behind(error: type[BaseException]) -> None:
    """torch calls hooks for every Exception; after a KeyboardInterrupt the frames of the forward are waited for."""
    model = smet.sparsify(Raises(error), density=0.5)
    x = torch.randn(5, 23)
    with pytest.raises(error):
        model(x)
    assert not hooks_in_force()
    model.error = None
    with WeightSized(dense_sizes(model)) as seen:
        loss = model(x).square().mean()
    assert seen.num_alive() == 0
    assert not hooks_in_force()
    loss.backward()


def test_hooks_left_by_an_interrupt_do_no_harm() -> None:
    """A traceback that is kept keeps the frames of the forward, and with them its hooks, until the next forward."""
    sparse = smet.sparsify(Raises(KeyboardInterrupt), density=0.5)
    plain, x = chain(), torch.randn(5, 23)
    plain(x).exp().mean().backward()
    expected = [p.grad.clone() for p in plain.parameters()]
    plain.zero_grad()
    with pytest.raises(KeyboardInterrupt) as kept:
        sparse(x)
    assert hooks_in_force()
    plain(x).exp().mean().backward()
    assert all(same_bits(p.grad, e) for p, e in zip(plain.parameters(), expected, strict=True))
    sparse.error = None
    sparse(x)
    assert kept.value is not None and not hooks_in_force()


def test_forward_inside_another_hook_context() -> None:
    sparse = smet.sparsify(chain(), density=0.5)
    x = torch.randn(5, 23)
    sparse(x).square().mean().backward()
    expected = [p.grad.clone() for p in sparse.parameters()]
    sparse.zero_grad()
    with torch.autograd.graph.save_on_cpu():
        sparse(x).square().mean().backward()
    assert all(same_bits(p.grad, e) for p, e in zip(sparse.parameters(), expected, strict=True))


def test_many_sites_of_one_size_do_not_mix() -> None:
    """The allocator reuses addresses within a forward: each backward must unpack its own weight."""
    sparse = nn.Sequential(*[layer for _ in range(20) for layer in (nn.Linear(32, 32), nn.Tanh())])
    plain = copy.deepcopy(sparse)
    smet.sparsify(sparse, density=0.5)
    fill_masked(plain, sparse)
    for _ in range(3):
        x = torch.randn(4, 32)
        sparse(x).sum().backward()
        plain(x).sum().backward()
    for name, expected in masked_gradients(plain, sparse).items():
        assert same_bits(parameter_of(sparse, name).grad, expected), name


def test_a_frozen_model_and_no_grad_still_work() -> None:
    sparse = smet.sparsify(chain(), density=0.5).requires_grad_(False)
    x = torch.randn(5, 23, requires_grad=True)
    sparse(x).sum().backward()
    with torch.no_grad():
        assert sparse(x).shape == (5, 23)
    with torch.inference_mode():
        assert sparse(x).shape == (5, 23)

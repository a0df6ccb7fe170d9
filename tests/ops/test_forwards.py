"""However forwards are nested, broken off or run side by side: no dense weight is kept, and no hooks are left."""

import contextlib
import copy
import gc
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import smet_compile as smet
from smet_compile.ops import find_sites, saved_weights
from tests.support.masked import fill_masked, masked_gradients, parameter_of
from tests.support.snapshots import same_bits
from tests.support.weight_watch import WeightSized, dense_sizes

SIZE = 23
Call = Callable[[nn.Module, Tensor], Tensor]


def directly(module: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = module(x)
    return result


def not_reentrant(module: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = checkpoint(module, x, use_reentrant=False)
    return result


def reentrant(module: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = checkpoint(module, x, use_reentrant=True)
    return result


class Owner(nn.Module):
    """Reads a weight of its own before and after its child, which is an owner too. ``fails``: an error of the child's
    that it catches."""

    def __init__(self, depth: int, call: Call = directly, fails: type[BaseException] | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(SIZE, SIZE) / SIZE**0.5)
        self.child = nn.Linear(SIZE, SIZE) if depth == 0 else Owner(depth - 1, call, fails)
        self.call, self.fails = call, fails

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x @ self.weight)
        x = self.call(self.child, x)
        if self.fails is not None:
            broken_off(self.child, self.fails)
        return torch.tanh(x) @ self.weight.t()


def broken_off(module: nn.Module, error: type[BaseException]) -> None:
    """Runs a forward that reads the weight and raises, and catches the error."""

    def read_and_raise(module: nn.Module, args: Any) -> None:
        module.weight.sum()
        raise error

    handle = module.register_forward_pre_hook(read_and_raise)
    with contextlib.suppress(error):
        module(torch.zeros(1, SIZE))
    handle.remove()


def hooks_in_force() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


@pytest.fixture(autouse=True)
def no_hooks_are_left() -> Iterator[None]:
    assert not hooks_in_force()
    yield
    assert not hooks_in_force()


def sparse_and_plain(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    plain = copy.deepcopy(model)
    smet.sparsify(model, density=0.5, include="*weight")
    fill_masked(plain, model)
    return model, plain


def check(model: nn.Module, call: Call = directly) -> None:
    """Checks that no dense weight outlives the forward, and that gradients are those of the dense twin."""
    sparse, plain = sparse_and_plain(model)
    x = torch.randn(5, SIZE, requires_grad=True)
    with WeightSized(dense_sizes(sparse)) as seen:
        loss = call(sparse, x).square().mean()
    assert seen.storages and seen.num_alive() == 0, f"{seen.num_alive()} of {len(seen.storages)} still alive"
    assert not hooks_in_force()
    loss.backward()
    call(plain, x.detach().requires_grad_()).square().mean().backward()
    for name, expected in masked_gradients(plain, sparse).items():
        grad = parameter_of(sparse, name).grad
        assert grad is not None and expected is not None and same_bits(grad, expected), name


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("inner", [directly, not_reentrant, reentrant])
@pytest.mark.parametrize("outer", [directly, not_reentrant, reentrant])
@pytest.mark.parametrize("depth", [0, 3])
def test_an_owner_of_owners(depth: int, outer: Call, inner: Call) -> None:
    """It is the whole model, called or checkpointed, or a submodule of one."""
    check(Owner(depth, inner), outer)
    check(nn.Sequential(Owner(depth, inner), nn.Tanh(), Owner(depth, inner)), outer)


@pytest.mark.parametrize("outer", [directly, not_reentrant])
def test_a_part_of_the_model_alone(outer: Call) -> None:
    """The call goes past the model, whose hooks are then not in force: those of the owner are."""
    model, plain = sparse_and_plain(nn.Sequential(Owner(2), nn.Linear(SIZE, SIZE)))
    x = torch.randn(5, SIZE, requires_grad=True)
    with WeightSized(dense_sizes(model)) as seen:
        loss = outer(model[0], x).square().mean()
    assert len(seen.storages) >= 7 and seen.num_alive() == 0
    loss.backward()
    outer(plain[0], x.detach().requires_grad_()).square().mean().backward()
    for name in ("0.weight", "0.child.weight", "0.child.child.weight"):
        assert same_bits(find_sites(model)[name].values.grad, masked_gradients(plain, model)[name]), name


def test_one_weight_at_a_time_in_the_backward_of_a_checkpointed_owner() -> None:
    """The only dense weight alive is the one that the last product reads for its backward, in the segment run again."""
    model = smet.sparsify(Owner(3), density=0.5, include="*weight")
    alive: list[set[int]] = []
    with WeightSized(dense_sizes(model)) as seen:
        for module in model.modules():
            if isinstance(module, Owner):
                module.register_forward_hook(
                    lambda *_: alive.append({each.cdata for each in seen.storages if not each.expired()})
                )
        not_reentrant(model, torch.randn(5, SIZE, requires_grad=True)).square().mean().backward()
    assert [len(storages) for storages in alive] == [0, 0, 0, 0, 1, 1, 1] and len(set.union(*alive)) == 1


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("depth", [0, 3])
def test_a_child_that_raises_and_a_parent_that_goes_on(depth: int, error: type[BaseException]) -> None:
    check(Owner(depth, fails=error))


class Deep(nn.Module):
    """Is a chain of owners of weights, any of which may raise ``error``."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(SIZE, SIZE))
        self.error: type[BaseException] | None = None
        self.child = Deep(depth - 1) if depth else None

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.weight
        if self.child is not None:
            x = self.child(x)
        if self.error is not None:
            raise self.error
        return torch.tanh(x) @ self.weight


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_an_interrupt_at_any_depth_leaves_no_hooks(depth: int, error: type[BaseException]) -> None:
    """They are gone once the error is handled or, where a traceback keeps the frames, once the next forward begins."""
    model = smet.sparsify(Deep(3), density=0.5, include="*weight")
    x = torch.randn(5, SIZE)
    broken = [each for each in model.modules() if isinstance(each, Deep)][depth]
    for keeps in (False, True, False):
        broken.error, kept = error, None
        try:
            model(x)
        except error as raised:
            kept = raised if keeps else None
        assert not hooks_in_force() or (keeps and error is not ValueError)
        broken.error = None
        with WeightSized(dense_sizes(model)) as seen:
            loss = model(x).square().mean()
        assert seen.num_alive() == 0 and not hooks_in_force()
        loss.backward()
        del kept


def test_torch_names_the_function_that_calls_hooks_as_it_did() -> None:
    """torch must keep that name, by which an interrupt is noticed at once and not in the next forward."""
    seen: list[Any] = []
    module = nn.Linear(2, 2)
    module.register_forward_pre_hook(lambda *_: seen.append(saved_weights._object_of_call(sys._getframe(1))))
    module(torch.zeros(1, 2))
    assert callable(seen[0])


def test_hooks_of_a_user_above_those_left_by_an_interrupt_stay() -> None:
    """A traceback keeps ours below; a forward under the user's hooks ends ours no earlier than it may."""
    model = smet.sparsify(Deep(1), density=0.5, include="*weight")
    x, packed = torch.randn(5, SIZE), []
    model.error = KeyboardInterrupt
    try:
        model(x)
    except KeyboardInterrupt as error:
        kept: Any = error
    model.error = None

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor

    for _ in range(2):
        packed.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            with WeightSized(dense_sizes(model)) as seen:
                loss = model(x).square().mean()
            assert packed and seen.num_alive() == 0
            kept = None  # frees the frames, while the user's hooks are above ours
            assert torch._C._autograd._top_saved_tensors_default_hooks(False)[0] is pack
        loss.backward()
        model(x)
        assert not hooks_in_force()
    assert kept is None


class Generator(nn.Module):
    """Its forward yields, so it runs when somebody asks for what it yields."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(SIZE, SIZE) for _ in range(3)])

    def forward(self, x: Tensor) -> Iterator[Tensor]:
        for layer in self.layers:
            x = torch.tanh(layer(x))
            yield x


class Consumer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator, self.last = Generator(), nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        for each in self.generator(x):
            x = x + self.last(each)
        return x


def test_a_forward_that_yields() -> None:
    check(Consumer())
    model = smet.sparsify(Generator(), density=0.5)
    first = model(torch.randn(5, SIZE))
    second = model(torch.randn(5, SIZE))
    with WeightSized(dense_sizes(model)) as seen:
        outputs = [each for pair in zip(first, second, strict=True) for each in pair]
    assert len(seen.storages) >= 6 and seen.num_alive() == 0
    sum(each.sum() for each in outputs).backward()
    unfinished = model(torch.randn(5, SIZE))
    next(unfinished)
    del unfinished
    assert not hooks_in_force()


def test_two_threads_each_in_a_forward() -> None:
    """They take turns inside: each has its own hooks, and an interrupt in one leaves the other's alone."""
    model, plain = sparse_and_plain(Owner(1))
    turns, errors, kept = threading.Barrier(2), [], []

    class Turn(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            turns.wait(20)
            return x

    def run(number: int) -> None:
        try:
            inputs = torch.randn(5, SIZE, generator=torch.Generator().manual_seed(number))
            results = []
            for each in (model, plain):
                own = copy.deepcopy(each)
                own.child = nn.Sequential(Turn(), own.child, Turn())
                x = inputs.clone().requires_grad_()
                with WeightSized(dense_sizes(model)) as seen:
                    loss = own(x).square().mean()
                assert each is plain or (len(seen.storages) >= 3 and seen.num_alive() == 0)
                loss.backward()
                results.append(x.grad)
            assert same_bits(*results) and not hooks_in_force()
            if number == 0:
                broken = smet.sparsify(Deep(0), density=0.5, include="*")
                broken.error = KeyboardInterrupt
                try:
                    broken(inputs)
                except KeyboardInterrupt as error:
                    kept.append(error)  # freed by the other thread, which has hooks of its own
            turns.wait(20)
            if number == 1:
                with torch.autograd.graph.save_on_cpu():
                    top = torch._C._autograd._top_saved_tensors_default_hooks(False)
                    kept.clear()
                    gc.collect()
                    assert torch._C._autograd._top_saved_tensors_default_hooks(False) == top
            turns.wait(20)
            if number == 0:
                model(inputs)
                assert not hooks_in_force()
        except BaseException as error:
            errors.append(error)
            turns.abort()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []

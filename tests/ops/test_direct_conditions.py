"""Modules multiply with their values only where nobody has to see the unpacked weight; elsewhere all is as before."""

import copy
import types
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import smet_compile as smet
from smet_compile.ops import direct, find_sites
from tests.support.training import train


class Doubled(nn.Linear):
    """Has a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, 2 * self.weight, self.bias)


class Inherits(nn.Linear):
    """Has the forward of ``nn.Linear``."""


class Scaled(nn.Module):
    def forward(self, dense: Tensor) -> Tensor:
        return 3 * dense


class SeesFunctions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class SeesOps(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


def compact(dense: nn.Module | None = None) -> nn.Module:
    return smet.sparsify(nn.Sequential(dense or nn.Linear(23, 29)).double(), density=0.5, block_shape=(4, 4))


def tokens() -> Tensor:
    return torch.randn(5, 23, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def with_own_forward(model: nn.Module) -> None:
    model[0].forward = types.MethodType(lambda self, x: F.linear(x, self.weight, self.bias), model[0])


def with_another_parametrization(model: nn.Module) -> None:
    parametrize.register_parametrization(model[0], "weight", Scaled(), unsafe=True)


def with_a_hook(model: nn.Module) -> None:
    model[0].parametrizations.weight.register_forward_hook(lambda module, args, out: 5 * out)


CHANGES = {"forward": with_own_forward, "parametrization": with_another_parametrization, "hook": with_a_hook}
CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "function mode": SeesFunctions,
    "cached parametrizations": parametrize.cached,
    "forward-mode AD": torch.autograd.forward_ad.dual_level,
    "switched off": direct.unpacked,
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_a_changed_module_reads_its_weight(change: str, reads: list[str]) -> None:
    model = compact()
    CHANGES[change](model)
    reads.clear()  # a further parametrization is tried on what is read
    out = model(tokens())
    assert reads == ["0.weight"]
    torch.testing.assert_close(out, F.linear(tokens(), model[0].weight, model[0].bias))


def test_a_subclass_multiplies_directly_if_its_forward_is_inherited(reads: list[str]) -> None:
    model = compact(Inherits(23, 29))
    model(tokens())
    assert not reads
    doubled = compact(Doubled(23, 29))
    out = doubled(tokens())
    assert reads == ["0.weight"]
    torch.testing.assert_close(out, F.linear(tokens(), 2 * doubled[0].weight, doubled[0].bias))


@pytest.mark.parametrize("name", list(CONTEXTS))
def test_a_context_that_has_to_see_the_weight(name: str, reads: list[str]) -> None:
    model = compact()
    with CONTEXTS[name]():
        out = model(tokens())
    assert reads == ["0.weight"]
    torch.testing.assert_close(out, model(tokens()))
    assert len(reads) == 1


def test_a_default_device_is_no_reason(reads: list[str]) -> None:
    with torch.device("cpu"):
        compact()(tokens())
    assert not reads


def test_patched_functions_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = compact(), tokens()
    linear, forward = F.linear, nn.Linear.forward
    out = model(x)
    with monkeypatch.context() as patch:
        patch.setattr(F, "linear", lambda *args: 2 * linear(*args))
        torch.testing.assert_close(model(x), 2 * out)
    with monkeypatch.context() as patch:
        patch.setattr(nn.Linear, "forward", lambda self, input: 3 * forward(self, input))
        torch.testing.assert_close(model(x), 3 * out)
    torch.testing.assert_close(model(x), out)


def test_transforms_of_functions(reads: list[str]) -> None:
    model, x = compact().requires_grad_(False), tokens()
    torch.testing.assert_close(torch.func.vmap(model)(x), model(x))
    jacobian = torch.func.vmap(torch.func.jacrev(model))(x)
    torch.testing.assert_close(jacobian, model[0].weight.expand(5, 29, 23))
    assert len(reads) == 3


def test_forward_mode() -> None:
    model, x, tangent = compact(), tokens(), tokens().flip(0)
    with torch.autograd.forward_ad.dual_level():
        out = model(torch.autograd.forward_ad.make_dual(x, tangent))
        found = torch.autograd.forward_ad.unpack_dual(out).tangent
    torch.testing.assert_close(found, F.linear(tangent, model[0].weight))


class Breaks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(23, 29), nn.Linear(29, 23)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        torch._dynamo.graph_break()
        return self.second(x)


@pytest.mark.parametrize("what", ["forward", "step", "backward"])
def test_a_compiled_call_that_breaks_into_several_graphs(what: str) -> None:
    torch._dynamo.reset()
    model, x = compact(Breaks()), tokens().requires_grad_()
    forward = torch.compiler.disable(model) if what == "backward" else model

    def step(x: Tensor) -> None:
        forward(x).square().sum().backward()

    leaves = [x, *model.parameters()]
    step(x)
    expected = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    if what == "forward":
        torch.compile(model, backend="aot_eager")(x).square().sum().backward()
    else:
        torch.compile(step, backend="aot_eager")(x)
    for leaf, grad in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, grad)


def test_a_traced_module_contains_the_unpacked_product() -> None:
    model, x = compact(), tokens()
    traced = torch.jit.trace(model, x)
    assert "aten::linear" in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), model(x))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(5, 22, dtype=torch.float64), "cannot be multiplied"),
        (torch.randn(5, 23), "same dtype"),
        (torch.randn((), dtype=torch.float64), "0D"),
        (torch.randn(5, 23, dtype=torch.float64, device="meta"), "meta"),
    ],
    ids=["width", "dtype", "no dimension", "device"],
)
def test_errors_are_those_of_torch(x: Tensor, message: str) -> None:
    with pytest.raises((RuntimeError, NotImplementedError), match=message):
        compact()(x)


def test_sparse_tokens(reads: list[str]) -> None:
    model, x = compact(nn.Linear(23, 29, bias=False)), tokens().relu()
    torch.testing.assert_close(model(x.to_sparse()).to_dense(), model(x))
    assert len(reads) == 1


def test_a_dispatch_mode_sees_the_ops_of_the_unpacked_product(reads: list[str]) -> None:
    model, seen = compact(), SeesOps()
    with seen:
        model(tokens()).sum().backward()
    assert not reads
    assert [name for name in seen.names if "smet" in name] == ["smet.unpack", "smet.pack"]
    assert "aten.addmm" in seen.names and "aten.mm" in seen.names
    dense, expected = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with dense:
        model(tokens()).sum().backward()
    with expected, direct.unpacked():
        model(tokens()).sum().backward()
    assert dense.get_total_flops() == expected.get_total_flops() > 0


def test_a_checkpointed_forward_in_a_dispatch_mode_and_a_backward_outside() -> None:
    """Both save the same tensors, else the checkpoint would raise."""
    model, x = compact(), tokens()
    with SeesOps():
        out = checkpoint(model, x, use_reentrant=False)
    out.sum().backward()
    grad = find_sites(model)["0.weight"].values.grad
    with direct.unpacked():
        model.zero_grad()
        model(x).sum().backward()
    torch.testing.assert_close(grad, find_sites(model)["0.weight"].values.grad)


def test_the_environment(monkeypatch: pytest.MonkeyPatch, reads: list[str]) -> None:
    model = compact()
    monkeypatch.setenv("SMET_COMPILE_EAGER", "unpack")
    model(tokens())
    assert len(reads) == 1
    monkeypatch.setenv("SMET_COMPILE_EAGER", "")
    model(tokens())
    assert len(reads) == 1
    monkeypatch.setenv("SMET_COMPILE_EAGER", "packed")
    with pytest.raises(ValueError, match="SMET_COMPILE_EAGER: expected unpack, got 'packed'"):
        model(tokens())


@pytest.mark.parametrize(("kernel", "num_reads"), [("reference", 0), ("torch", 0), (None, 1)])
def test_where_torch_multiplies_best_the_weight_is_unpacked_unless_a_kernel_is_forced(
    kernel: str | None, num_reads: int, monkeypatch: pytest.MonkeyPatch, reads: list[str]
) -> None:
    if kernel is not None:
        monkeypatch.setenv("SMET_COMPILE_KERNEL", kernel)
    model = compact().to(torch.complex128 if kernel is None else torch.float64)
    x = tokens().to(model[0].bias.dtype)
    out = model(x)
    assert len(reads) == num_reads
    torch.testing.assert_close(out, F.linear(x, model[0].weight, model[0].bias))


def test_a_policy_that_collects_the_dense_gradient_gets_it(reads: list[str]) -> None:
    runs = []
    for context in (nullcontext(), direct.unpacked()):
        torch.manual_seed(0)
        model = smet.sparsify(nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 7)).double(), density=0.5)
        optimizer = smet.ActiveAdamW(model)
        manager = smet.TopologyManager(model, optimizer, total_steps=100, every=4, grow="gradient")
        with context:
            train(model, optimizer, manager, steps=8)
        runs.append(model)
        assert manager.history
    assert 0 < len(reads) < 2 * 2 * 8
    for one, other in zip(runs[0].state_dict().values(), runs[1].state_dict().values(), strict=True):
        torch.testing.assert_close(one, other)


def test_updates_in_backward_in_eager_mode() -> None:
    """A step that is not compiled, as in a debugger, opens update sinks too."""
    runs = []
    for context in (nullcontext(), direct.unpacked()):
        torch.manual_seed(0)
        model = compact()
        step = smet.compile_train_step(model, smet.ActiveAdamW(model), lambda model, x: model(x).square().sum())
        with context, torch.compiler.set_stance("force_eager"):
            for _ in range(3):
                step(tokens())
        assert find_sites(model)["0.weight"].values.grad is None
        runs.append(model)
    for one, other in zip(runs[0].parameters(), runs[1].parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_hooks_that_keep_values_are_in_force_while_a_weight_is_read() -> None:
    model = compact()
    del model._forward_pre_hooks, model._forward_hooks
    model._forward_pre_hooks, model._forward_hooks = {}, {}
    shapes: list[Any] = []
    x = tokens().requires_grad_()
    with (
        direct.unpacked(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t.shape) or t, lambda t: t),
    ):
        out = model(x)
    assert (29, 23) not in [tuple(shape) for shape in shapes]
    out.sum().backward()


def test_a_copy_after_the_parametrization_was_removed() -> None:
    model, x = compact(), tokens()
    twin = copy.deepcopy(model)
    out = model(x)
    parametrize.remove_parametrizations(twin[0], "weight")
    torch.testing.assert_close(twin(x), out)

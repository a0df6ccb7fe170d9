"""In eager mode a linear layer multiplies with its values: the numbers of the unpacked product, up to rounding."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import smet_compile as smet
from smet_compile.ops import direct, find_sites
from tests.support.masked import fill_masked, masked_gradients, parameter_of
from tests.support.small_models import chain

BLOCKS = (1, (1, 16), (4, 4), 16)
VALUES = "0.parametrizations.weight.original"


def layer(kind: str = "linear", bias: bool = True, block_shape: Any = (4, 4), dtype: Any = torch.float64) -> nn.Module:
    """Returns one compact layer from 23 to 29 features in a model."""
    dense: nn.Module = nn.Linear(23, 29, bias=bias) if kind == "linear" else Conv1D(29, 23)
    return smet.sparsify(nn.Sequential(dense).to(dtype), density=0.5, block_shape=block_shape)


def results(model: nn.Module, x: Tensor) -> list[Tensor | None]:
    """Returns the output of one step and the gradients of input and parameters."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    out = model(x)
    torch.tanh(out.float()).sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in model.parameters())]


def assert_close(got: list[Tensor | None], expected: list[Tensor | None]) -> None:
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block_shape", BLOCKS, ids=str)
@pytest.mark.parametrize("kind", ["linear", "linear without bias", "conv1d"])
def test_equal_to_the_unpacked_product(kind: str, block_shape: Any, dtype: torch.dtype, reads: list[str]) -> None:
    model = layer(kind.split()[0], kind != "linear without bias", block_shape, dtype)
    shapes = [(5, 23), (2, 5, 23), (2, 1, 3, 23), (0, 23), (2, 0, 23)] + [(23,)] * (kind != "conv1d")
    for shape in shapes:
        x = torch.randn(shape, dtype=dtype)
        found = results(model, x)
        assert not reads
        with direct.unpacked():
            expected = results(model, x)
        assert reads.pop() == "0.weight" and not reads
        assert_close(found, expected)


@given(
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(0, 9)),
    block_shape=st.sampled_from([1, (1, 3), (2, 5), 4, 7]),
    density=st.floats(0.05, 0.9),
    bias=st.booleans(),
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_equal_to_a_dense_twin(sizes: tuple[int, int, int], block_shape: Any, density: float, bias: bool) -> None:
    num_inputs, num_outputs, num_tokens = sizes
    plain = nn.Sequential(nn.Linear(num_inputs, num_outputs, bias=bias)).double()
    sparse = copy.deepcopy(plain)
    try:
        smet.sparsify(sparse, density=density, block_shape=block_shape)
    except ValueError:  # every block is kept
        return
    fill_masked(plain, sparse)
    x = torch.randn(num_tokens, num_inputs, dtype=torch.float64)
    (out, x_grad, *_), (plain_out, plain_x_grad, *_) = results(sparse, x), results(plain, x)
    assert_close([out, x_grad], [plain_out, plain_x_grad])
    for name, expected in masked_gradients(plain, sparse).items():
        torch.testing.assert_close(parameter_of(sparse, name).grad, expected)


def odd_inputs() -> dict[str, Tensor]:
    return {
        "every other column": torch.randn(6, 46, dtype=torch.float64)[:, ::2],
        "transposed": torch.randn(23, 6, dtype=torch.float64).t(),
        "one row for all": torch.randn(1, 23, dtype=torch.float64).expand(6, 23),
        "permuted": torch.randn(3, 23, 2, dtype=torch.float64).permute(2, 0, 1),
        "negated lazily": torch.randn(6, 23, dtype=torch.complex128).conj().imag,
    }


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "of the same gradient everywhere": lambda out: out.sum(),
    "of a transposed gradient": lambda out: torch.tanh(out.mT.contiguous()).sum(),
    "of every other output": lambda out: out[..., ::2].square().sum(),
    "of a negated gradient": lambda out: torch.complex(out, out).conj().imag.square().sum(),
}


@pytest.mark.parametrize("loss", list(LOSSES))
@pytest.mark.parametrize("name", list(odd_inputs()))
def test_inputs_and_gradients_of_any_strides(name: str, loss: str) -> None:
    model, x = layer(), odd_inputs()[name].detach().requires_grad_()
    leaves = [x, *model.parameters()]
    found = torch.autograd.grad(LOSSES[loss](model(x)), leaves)
    with direct.unpacked():
        expected = torch.autograd.grad(LOSSES[loss](model(x)), leaves)
    assert_close(list(found), list(expected))


@pytest.mark.parametrize("block_shape", [1, (4, 4)], ids=str)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_gradients_of_gradients(kind: str, block_shape: Any) -> None:
    model = layer(kind, block_shape=block_shape)
    inputs = [torch.randn(2, 23, dtype=torch.float64), *(p.detach() for p in model.parameters())]
    names = [name for name, _ in model.named_parameters()]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        out: Tensor = functional_call(model, dict(zip(names, parameters, strict=True)), (x,))
        return out[:, ::7]

    inputs = [each.requires_grad_() for each in inputs]
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_gradients_in_batches() -> None:
    model, x = layer(), torch.randn(3, 23, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian
    torch.testing.assert_close(jacobian(model, x, vectorize=True), jacobian(model, x))


def saved_shapes(call: Callable[[], object]) -> list[tuple[int, ...]]:
    """Returns the shapes of all tensors that autograd saves, beside our own hooks, during ``call``."""
    shapes: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return shapes


def test_what_is_saved_is_the_input_where_the_values_have_a_gradient() -> None:
    model, x = layer(), torch.randn(5, 23, dtype=torch.float64)
    assert saved_shapes(lambda: model(x)) == [(5, 23)]
    assert saved_shapes(lambda: model(x.requires_grad_())) == [(5, 23)]
    find_sites(model)["0.weight"].values.requires_grad_(False)
    assert saved_shapes(lambda: model(x)) == []
    model.requires_grad_(False)
    assert saved_shapes(lambda: model(x)) == []


def test_only_what_is_needed_is_computed() -> None:
    model, x = layer(), torch.randn(5, 23, dtype=torch.float64, requires_grad=True)
    values = find_sites(model)["0.weight"].values.requires_grad_(False)
    model(x).sum().backward()
    assert values.grad is None and x.grad is not None and model[0].bias.grad is not None
    values.requires_grad_(True)
    x = x.detach()
    model(x).sum().backward()
    assert values.grad is not None and x.grad is None
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            out = model(x)
        assert out.grad_fn is None and out.is_inference() == isinstance(context, torch.inference_mode)


@pytest.mark.parametrize("block_shape", BLOCKS, ids=str)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_autocast(kind: str, block_shape: Any, reads: list[str]) -> None:
    model = layer(kind, block_shape=block_shape, dtype=torch.float32)
    x, found = torch.randn(4, 6, 23), []
    for context in (nullcontext(), direct.unpacked()):
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        with context, torch.autocast("cpu", torch.bfloat16):
            out = model(leaf)
        torch.tanh(out.float()).sum().backward()
        grads = [leaf.grad, *(p.grad for p in model.parameters())]
        assert out.dtype == torch.bfloat16 and {grad.dtype for grad in grads} == {torch.float32}
        found.append([out, *(grad.bfloat16() for grad in grads)])
    assert len(reads) == 1
    assert_close(*found)


def test_gradients_of_gradients_in_autocast() -> None:
    model, x, found = layer(dtype=torch.float32), torch.randn(5, 23, requires_grad=True), []
    for context in (nullcontext(), direct.unpacked()):
        with context, torch.autocast("cpu", torch.bfloat16):
            out = torch.tanh(model(x)).sum()
        (grad,) = torch.autograd.grad(out, x, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), list(model.parameters())))
    assert_close(*([grad.bfloat16() for grad in grads] for grads in found))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    model = smet.sparsify(chain().double(), density=0.5)
    x = torch.randn(5, 23, dtype=torch.float64)

    def checkpointed(x: Tensor) -> Any:
        return checkpoint(model, x, use_reentrant=use_reentrant)

    model.zero_grad()
    leaf = x.clone().requires_grad_()
    checkpointed(leaf).square().sum().backward()
    found = [leaf.grad, *(p.grad for p in model.parameters())]
    model.zero_grad()
    other = x.clone().requires_grad_()
    model(other).square().sum().backward()
    assert_close(found, [other.grad, *(p.grad for p in model.parameters())])


def test_tied_values_and_a_weight_that_is_read_elsewhere_too() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(23, 23), nn.Linear(23, 23)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(torch.tanh(self.one(x))) @ self.one.weight + self.one.weight.square().sum()

    model = smet.sparsify(Tied().double(), density=0.5)
    model.two.load_state_dict(model.one.state_dict())
    model.two.parametrizations.weight.original = model.one.parametrizations.weight.original
    x = torch.randn(5, 23, dtype=torch.float64)
    found = results(model, x)
    with direct.unpacked():
        assert_close(found, results(model, x))


def test_hooks_of_modules_and_parameters() -> None:
    model, x = layer(), torch.randn(5, 23, dtype=torch.float64, requires_grad=True)
    values, calls = find_sites(model)["0.weight"].values, []
    model[0].register_forward_pre_hook(lambda module, args: (2 * args[0],))
    model[0].register_forward_hook(lambda module, args, out: 3 * out)
    model[0].register_full_backward_pre_hook(lambda module, grads: (5 * grads[0],))
    model[0].register_full_backward_hook(lambda module, grads, out_grads: (7 * grads[0],))
    values.register_hook(lambda grad: 11 * grad)
    values.register_post_accumulate_grad_hook(lambda parameter: calls.append(parameter.grad.clone()))
    found = results(model, x)
    with direct.unpacked():
        assert_close(found, results(model, x))
    assert len(calls) == 2 and torch.equal(calls[0], found[3])


def test_the_output_may_be_changed_in_place() -> None:
    """So does ``nn.ReLU(inplace=True)``; a view would not allow it."""
    model = nn.Sequential(layer()[0], nn.ReLU(inplace=True))
    x = torch.randn(2, 5, 23, dtype=torch.float64)
    found = results(model, x)
    with direct.unpacked():
        assert_close(found, results(model, x))


def test_a_change_of_the_values_before_backward_is_noticed() -> None:
    model = layer()
    out = model(torch.randn(5, 23, dtype=torch.float64))
    with torch.no_grad():
        find_sites(model)["0.weight"].values.mul_(2)
    with pytest.raises(RuntimeError, match="changed between its forward and its backward"):
        out.sum().backward()


def test_a_change_of_the_input_before_backward_is_noticed() -> None:
    model, x = layer(), torch.randn(5, 23, dtype=torch.float64)
    out = model(x)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_what_is_written_into_a_read_that_is_alive_is_seen() -> None:
    model, x = layer(bias=False), torch.randn(5, 23, dtype=torch.float64)
    before = model(x).detach()
    weight = model[0].weight
    with torch.no_grad():
        weight.mul_(2)
    torch.testing.assert_close(model(x), 2 * before)


def test_buffers_that_are_written_again_are_no_change() -> None:
    """DistributedDataParallel copies rank 0's buffers into every rank's in each forward."""
    model, x = layer(), torch.randn(5, 23, dtype=torch.float64, requires_grad=True)
    expected = results(model, x)
    model.zero_grad()
    leaf = x.detach().requires_grad_()
    out = model(leaf)
    for buffer in model.buffers():
        buffer.copy_(buffer.clone())
    torch.tanh(out.float()).sum().backward()
    assert_close([out.detach(), leaf.grad, *(p.grad for p in model.parameters())], expected)


def test_copies_and_exports() -> None:
    model, x = layer(), torch.randn(5, 23, dtype=torch.float64)
    twin = copy.deepcopy(model)
    assert_close(results(twin, x), results(model, x))
    assert type(smet.export_dense(model)[0]) is nn.Linear
    assert_close(results(twin, x), results(model, x))

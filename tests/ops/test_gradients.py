"""Random models in different call forms: outputs and all gradients are those of the masked dense model."""

import copy

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

import smet_compile as smet
from tests.ops.call_forms import FORMS, FormLinear, ReadTwice
from tests.support.blocks import Grid, round_half_up
from tests.support.masked import fill_masked, masked_gradients, parameter_of

CLOSE = {"atol": 1e-10, "rtol": 1e-10}

layers = st.tuples(st.sampled_from([*FORMS, "read_twice"]), st.integers(1, 20), st.booleans())
block_shapes = st.sampled_from([(1, 1), (1, 16), (4, 4), (16, 16), (3, 2)])


def make(num_inputs: int, specification: list[tuple[str, int, bool]]) -> nn.Sequential:
    modules: list[nn.Module] = []
    for form, size, bias in specification:
        if form == "read_twice":
            modules.append(ReadTwice(num_inputs, size, bias=bias))
        else:
            modules.append(FormLinear(num_inputs, size, form, bias))
        modules.append(nn.Tanh())
        num_inputs = size
    return nn.Sequential(*modules).double()


def leaves_some_out(layer: nn.Module, block_shape: tuple[int, int], density: float) -> bool:
    num_blocks = Grid(tuple(layer.weight.shape), block_shape).num_blocks
    return max(1, round_half_up(density * num_blocks)) < num_blocks


@given(
    st.integers(1, 20),
    st.lists(layers, min_size=1, max_size=3),
    block_shapes,
    st.floats(0.1, 0.95),
    st.sampled_from([(5,), (2, 3)]),
)
def test_gradients_of_random_models(
    num_inputs: int,
    specification: list[tuple[str, int, bool]],
    block_shape: tuple[int, int],
    density: float,
    batch_shape: tuple[int, ...],
) -> None:
    sparse = make(num_inputs, specification)
    plain = copy.deepcopy(sparse)
    assume(any(leaves_some_out(layer, block_shape, density) for layer in plain if hasattr(layer, "weight")))
    smet.sparsify(sparse, density=density, block_shape=block_shape)
    fill_masked(plain, sparse)
    x = torch.randn(*batch_shape, num_inputs, dtype=torch.float64, requires_grad=True)
    plain_x = x.detach().clone().requires_grad_()
    out, plain_out = sparse(x), plain(plain_x)
    out.square().sum().backward()
    plain_out.square().sum().backward()
    torch.testing.assert_close(out, plain_out, **CLOSE)
    torch.testing.assert_close(x.grad, plain_x.grad, **CLOSE)
    for name, expected in masked_gradients(plain, sparse).items():
        grad = parameter_of(sparse, name).grad
        torch.testing.assert_close(grad, expected, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def test_gradients_of_gradients_are_refused_or_right() -> None:
    """Unpack and pack are linear: differentiating twice gives what the dense model gives."""
    sparse = make(6, [("linear", 5, True)])
    plain = copy.deepcopy(sparse)
    smet.sparsify(sparse, density=0.5)
    fill_masked(plain, sparse)
    x = torch.randn(3, 6, dtype=torch.float64)
    values, weight = parameter_of(sparse, "0.weight"), plain[0].weight
    (grad,) = torch.autograd.grad(sparse(x).square().sum(), values, create_graph=True)
    grad.square().sum().backward()
    (plain_grad,) = torch.autograd.grad(plain(x).square().sum(), weight, create_graph=True)
    (plain_grad * (weight != 0)).square().sum().backward()
    torch.testing.assert_close(values.grad, masked_gradients(plain, sparse)["0.weight"], **CLOSE)

"""Modules of other libraries are left dense with a reason, or made sparse; they never raise an exception."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import smet_compile as smet
from smet_compile.ops import find_sites
from tests.support.states import Unchanged
from tests.support.training import train

SCRIPT = "a TorchScript module, whose weights are read inside compiled code"
LAZY = "not initialised yet: run a forward first"


class Raises(nn.Module):
    """Has properties that need what is not there yet."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)

    @property
    def experts(self) -> Any:
        raise RuntimeError("set up the cache first")

    num_experts = out_features = experts

    def get_output_embeddings(self) -> Any:
        raise RuntimeError("there is no head")

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y


class NoneAndOdd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)
        self.register_module("nothing", None)
        self.register_parameter("no_parameter", None)
        self.parametrizations = nn.Linear(12, 12)

    def named_children(self) -> Any:
        raise RuntimeError("not to be asked")

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(self.parametrizations(x))
        return y


class Cyclic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)
        self.again = self.linear
        self.linear.above = self

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.again(self.linear(x))
        return y


class KeepsAScriptFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.double = nn.Linear(12, 12), torch.jit.script(doubled)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.double(self.linear(x))
        return y


def doubled(x: Tensor) -> Tensor:
    return 2 * x


def linear() -> nn.Linear:
    return nn.Linear(12, 12)


def scripted() -> Any:
    return torch.jit.script(nn.Sequential(linear(), nn.Tanh()))


Case = tuple[Callable[[], nn.Module], int, dict[str, str]]
CASES: dict[str, Case] = {
    "script": (scripted, 0, {"0.0.weight": SCRIPT}),
    "traced": (lambda: torch.jit.trace(linear(), torch.zeros(1, 12)), 0, {"0.weight": SCRIPT}),  # type: ignore[return-value]
    "script_deep": (lambda: nn.Sequential(scripted(), linear()), 1, {"0.0.0.weight": SCRIPT}),
    "script_function": (KeepsAScriptFunction, 1, {}),
    "graph_module": (lambda: fx.symbolic_trace(nn.Sequential(linear(), nn.Tanh())), 1, {}),
    "exported": (
        lambda: torch.export.export(nn.Sequential(linear(), nn.Tanh()), (torch.zeros(9, 12),)).module(),
        0,
        {"0.0.weight": "not the weight of a linear layer"},
    ),
    "lazy": (lambda: nn.LazyLinear(12), 0, {"0.weight": LAZY}),
    "lazy_convolution": (lambda: nn.LazyConv1d(12, 1), 0, {"0.weight": LAZY}),
    "raises": (Raises, 1, {}),
    "none_and_odd": (NoneAndOdd, 2, {}),
    "cyclic": (Cyclic, 1, {}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.usefixtures("unpacked")
def test_beside_a_linear_layer(name: str) -> None:
    make, num_sites, dense = CASES[name]
    model = nn.Sequential(make(), nn.Linear(12, 7))
    smet.sparsify(model, density=0.5)
    assert len(find_sites(model)) == num_sites + 1
    found = smet.report(model)
    assert {row.name: row.reason for row in found.skipped} == dense and str(found)
    if "lazy" in name:
        with pytest.raises(ValueError, match=r"ActiveAdamW: 0\.weight is not initialised yet; run a forward first"):
            smet.ActiveAdamW(model)
        return
    optimizer = smet.ActiveAdamW(model)
    train(model, optimizer, smet.TopologyManager(model, optimizer, total_steps=100, every=1), steps=3)
    exported = smet.export_dense(model)
    x = torch.randn(9, 12)
    assert torch.equal(exported(x), model(x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name, (_, num_sites, _) in CASES.items() if num_sites == 0])
def test_alone(name: str) -> None:
    model = nn.Sequential(CASES[name][0]())
    with pytest.raises(ValueError, match="nothing to make sparse in 1 parameters"):
        smet.sparsify(model, density=0.5)
    assert smet.report(model).skipped


@pytest.mark.filterwarnings("ignore")
def test_a_quantized_layer_has_no_weights_to_choose() -> None:
    quantized = torch.ao.quantization.quantize_dynamic(nn.Sequential(linear()), {nn.Linear})
    model = smet.sparsify(nn.Sequential(quantized, nn.Linear(12, 7)), density=0.5)
    assert list(find_sites(model)) == ["1.weight"] and not smet.report(model).skipped


@pytest.mark.parametrize("block_shape", [(100_000, 1), 4096, (1, 10**6)], ids=str)
def test_blocks_far_larger_than_the_matrices_are_refused(block_shape: Any) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 4096 + 64))
    with Unchanged(model), pytest.raises(ValueError, match=r"block_shape: expected blocks that save memory.*bytes"):
        smet.sparsify(model, density=0.5, block_shape=block_shape)


def test_blocks_that_cost_more_memory_than_they_save_are_said() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 4))
    expected = r"more memory than dense ones: 1\.weight \(2,048 bytes in blocks of \(16, 16\), 1,024 dense\); take sm"
    with pytest.warns(UserWarning, match=expected):
        smet.sparsify(model, density=0.5, block_shape=16)


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(3, 12)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_complex_parameter_is_refused_by_name() -> None:
    model = smet.sparsify(nn.Sequential(linear()), density=0.5)
    model.register_parameter("phase", nn.Parameter(torch.zeros(3, dtype=torch.complex64)))
    with pytest.raises(ValueError, match=r"phase: expected a parameter of float64.*got torch\.complex64; train it by"):
        smet.ActiveAdamW(model)
    others = [parameter for parameter in model.parameters() if not parameter.is_complex()]
    step_of(model, smet.ActiveAdamW(others, model=model))
    model.phase.requires_grad_(False)
    step_of(model, smet.ActiveAdamW(model))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_a_parameter_without_gradient_is_left_out(dtype: torch.dtype) -> None:
    model = smet.sparsify(nn.Sequential(linear()), density=0.5)
    model.register_parameter("codes", nn.Parameter(torch.zeros(3).to(dtype), requires_grad=dtype.is_floating_point))
    optimizer = smet.ActiveAdamW(model)
    step_of(model, optimizer)
    assert model.codes not in optimizer.state


def test_a_gradient_of_a_dtype_that_is_not_trained() -> None:
    model = smet.sparsify(nn.Sequential(linear()), density=0.5)
    model[0].register_parameter("codes", nn.Parameter(torch.zeros(3).to(torch.float8_e4m3fn)))
    optimizer = smet.ActiveAdamW(model)
    model(torch.randn(2, 12)).sum().backward()
    model[0].codes.grad = torch.zeros(3).to(torch.float8_e4m3fn)
    with Unchanged(model, optimizer), pytest.raises(ValueError, match=r"0\.codes: expected a parameter of float64"):
        optimizer.step()


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_norm": 1.0}, "an embedding with max_norm, which"),
        ({"sparse": True}, "an embedding with sparse=True, whose"),
    ],
    ids=str,
)
def test_embeddings_whose_rows_cannot_be_compact(kind: Any, options: dict[str, Any], reason: str) -> None:
    model = nn.Sequential(kind(12, 12, **options), nn.Linear(12, 12))
    with Unchanged(model), pytest.raises(ValueError, match=rf"include: '0' matches 0\.weight, .*: {reason}"):
        smet.sparsify(model, density=0.5, include=["0", "1"])
    smet.sparsify(model, density=0.5)
    assert [row.reason.startswith(reason) for row in smet.report(model).skipped] == [True]

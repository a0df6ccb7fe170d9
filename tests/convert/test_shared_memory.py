"""Weights that lie in the same memory are tied, and stay dense; views side by side in one storage are not."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import smet_compile as smet
from smet_compile.ops import find_sites

pytestmark = pytest.mark.filterwarnings("ignore:sparsify. the model.s matrices as a whole have density")


def three_layers() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(3)))


def parameter(model: nn.Sequential, make: Callable[[Tensor], Tensor]) -> nn.Parameter:
    return nn.Parameter(make(model[0].weight.detach()))


def tie_transpose(model: nn.Sequential) -> None:
    model[1].weight = parameter(model, lambda weight: weight.t())


def tie_data(model: nn.Sequential) -> None:
    model[1].weight.data = model[0].weight.data


def tie_a_part(model: nn.Sequential) -> None:
    memory = torch.randn(12, 8)
    model[0].weight, model[1].weight = nn.Parameter(memory[:8]), nn.Parameter(memory[4:])


def tie_every_other_row(model: nn.Sequential) -> None:
    memory = torch.randn(16, 8)
    model[0].weight, model[1].weight = nn.Parameter(memory[::2]), nn.Parameter(memory[4:12])


def tie_another_dtype(model: nn.Sequential) -> None:
    model[0].weight = nn.Parameter(torch.randn(8, 8))
    model[1].weight = nn.Parameter(model[0].weight.detach().view(torch.bfloat16)[:, 5:])


def tie_expanded(model: nn.Sequential) -> None:
    model[1].weight = parameter(model, lambda weight: weight[:1].expand(8, 8))


def tie_a_bias(model: nn.Sequential) -> None:
    model[1] = nn.Linear(8, 8)
    model[1].bias = parameter(model, lambda weight: weight[3])


@pytest.mark.parametrize(
    "tie", [tie_transpose, tie_data, tie_a_part, tie_every_other_row, tie_another_dtype, tie_expanded, tie_a_bias]
)
def test_weights_that_overlap_in_memory_stay_dense(tie: Callable[[nn.Sequential], None]) -> None:
    model = three_layers()
    tie(model)
    smet.sparsify(model, density=0.5)
    skipped = {row.name: row.reason for row in smet.report(model).skipped}
    other = "1.bias" if tie is tie_a_bias else "1.weight"
    assert skipped["0.weight"] == f"tied to {other}"
    assert set(find_sites(model)) == ({"1.weight", "2.weight"} if tie is tie_a_bias else {"2.weight"})
    if tie is not tie_a_bias:
        assert skipped["1.weight"] == "tied to 0.weight"


def test_weights_that_share_memory_train_as_in_the_dense_model() -> None:
    model = three_layers()
    tie_transpose(model)
    smet.sparsify(model, density=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(6, 8)).square().mean().backward()
    optimizer.step()
    assert torch.equal(model[0].weight, model[1].weight.t())


def test_three_names_of_one_memory() -> None:
    model = three_layers()
    model[1].weight = model[0].weight
    model[2].weight = parameter(model, lambda weight: weight.t())
    smet.sparsify(model.append(nn.Linear(8, 8)), density=0.5)
    skipped = {row.name: row.reason for row in smet.report(model).skipped}
    assert skipped["0.weight"] == "tied to 1.weight, 2.weight"
    assert skipped["1.weight"] == "tied to 0.weight, 2.weight"
    assert skipped["2.weight"] == "tied to 0.weight, 1.weight"


def test_an_include_of_a_weight_that_shares_memory_is_refused() -> None:
    model = three_layers()
    tie_data(model)
    with pytest.raises(ValueError, match=r"0\.weight.*tied to 1\.weight"):
        smet.sparsify(model, density=0.5, include="0.weight")


@pytest.mark.parametrize("cut", [lambda m: (m[:8], m[8:]), lambda m: (m[::2], m[1::2])], ids=["apart", "in turns"])
def test_views_that_do_not_overlap_are_not_tied(cut: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    model = three_layers()
    one, other = cut(torch.randn(16, 8))
    model[0].weight, model[1].weight = nn.Parameter(one), nn.Parameter(other)
    smet.sparsify(model, density=0.5)
    assert set(find_sites(model)) == {"0.weight", "1.weight", "2.weight"}


def test_columns_of_one_matrix_are_not_tied() -> None:
    model = three_layers()
    one, other = torch.randn(8, 16).split(8, dim=1)
    model[0].weight, model[1].weight = nn.Parameter(one), nn.Parameter(other)
    smet.sparsify(model, density=0.5)
    assert set(find_sites(model)) == {"0.weight", "1.weight", "2.weight"}


def test_weights_without_memory_are_not_tied() -> None:
    with torch.device("meta"):
        model = three_layers()
    smet.sparsify(model, density=0.5)
    assert set(find_sites(model)) == {"0.weight", "1.weight", "2.weight"}

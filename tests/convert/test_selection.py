"""Linear weights become compact by default, and everything else stays dense with a reason."""

import warnings

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import smet_compile as smet
from smet_compile.ops import find_sites


class Zoo(nn.Module):
    """Has one of everything with two or more dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.conv1d_of_gpt2 = Conv1D(12, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.convolution = nn.Conv1d(8, 8, 3)
        self.embedding = nn.Embedding(10, 8)
        self.norm = nn.LayerNorm(8)
        self.position_embeddings = nn.Parameter(torch.zeros(1, 5, 8))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


DEFAULT = {
    "linear.weight",
    "conv1d_of_gpt2.weight",
    "attention.in_proj_weight",
    "attention.out_proj.weight",
}


def reasons(model: nn.Module) -> dict[str, str]:
    return {row.name: row.reason for row in smet.report(model).skipped}


def site_names(model: nn.Module) -> set[str]:
    return set(find_sites(model))


def test_default_sites() -> None:
    model = smet.sparsify(Zoo(), density=0.5)
    assert site_names(model) == DEFAULT
    skipped = reasons(model)
    for name in ("convolution.weight", "embedding.weight", "position_embeddings", "cls_token"):
        assert skipped[name], name
    assert not set(skipped) & DEFAULT


def test_include_is_the_whole_selection() -> None:
    model = smet.sparsify(Zoo(), density=0.5, include=["convolution", "embedding.weight", "position_embeddings"])
    assert site_names(model) == {"convolution.weight", "embedding.weight", "position_embeddings"}
    layouts = {name: site.layout for name, site in find_sites(model).items()}
    flat = layouts["convolution.weight"]
    assert (flat.num_matrices, flat.rows, flat.cols) == (1, 8, 24)
    stacked = layouts["position_embeddings"]
    assert (stacked.num_matrices, stacked.rows, stacked.cols) == (1, 5, 8)


def test_exclude_by_module_and_by_weight_name() -> None:
    model = smet.sparsify(Zoo(), density=0.5, exclude=["attention*", "linear.weight"])
    assert site_names(model) == {"conv1d_of_gpt2.weight"}


def test_separate_projections_of_attention() -> None:
    model = smet.sparsify(nn.Sequential(nn.MultiheadAttention(8, 2, kdim=4, vdim=6)), density=0.5)
    names = {"q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"}
    assert site_names(model) == {f"0.{name}" for name in names}


def test_tied_weights_stay_dense_with_a_reason() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    smet.sparsify(model, density=0.5)
    assert site_names(model) == {"1.weight"}
    assert "tied" in " ".join(reasons(model).values()).lower()
    assert model[2].weight is model[0].weight


def test_no_head_is_guessed_in_a_model_without_get_output_embeddings() -> None:
    model = nn.ModuleDict({"body": nn.Linear(8, 8), "lm_head": nn.Linear(8, 100)})
    assert site_names(smet.sparsify(model, density=0.5)) == {"body.weight", "lm_head.weight"}


def test_a_warning_when_much_stays_dense() -> None:
    model = nn.Sequential(nn.Embedding(1000, 8), nn.Linear(8, 8))
    with pytest.warns(UserWarning, match=r"density 0\.99, more than 1\.5 times the 0\.3 .*0\.weight"):
        smet.sparsify(model, density=0.3)


def test_a_warning_when_rows_of_blocks_must_be_empty() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 64))
    with pytest.warns(UserWarning, match=r"0\.weight \(3 blocks for 8 rows and 4 columns of blocks\): some") as caught:
        smet.sparsify(model, density=0.1, block_shape=8, rules={"1": 0.13})
    assert len(caught) == 1 and "1.weight" not in str(caught[0].message)  # it has 8 for 8 and 8


def test_no_warning_when_the_request_is_met() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        smet.sparsify(nn.Sequential(nn.Linear(30, 30), nn.LayerNorm(30)), density=0.3)


def test_returns_the_model_itself_and_reads_as_dense() -> None:
    model = nn.Sequential(nn.Linear(8, 6))
    assert smet.sparsify(model, density=0.5) is model
    weight = model[0].weight
    assert weight.shape == (6, 8) and int((weight != 0).sum()) == 24
    assert [tuple(p.shape) for p in model.parameters() if p.dim() != 1 or p.numel() != 6] == [(24,)]


def test_frozen_weights_stay_frozen() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    model[0].weight.requires_grad_(False)
    smet.sparsify(model, density=0.5)
    assert {n: s.values.requires_grad for n, s in find_sites(model).items()} == {
        "0.weight": False,
        "1.weight": True,
    }


class Holder(nn.Module):
    """Has a linear layer, so that something is sparse, and one parameter in a module with attributes."""

    def __init__(self, *shape: int, **attributes: object) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.weight = nn.Parameter(torch.randn(shape))
        for name, value in attributes.items():
            setattr(self, name, value)


class HolderOfExperts(Holder):
    pass


@pytest.mark.filterwarnings("ignore:sparsify. the model")
@pytest.mark.parametrize(
    "model",
    [
        Holder(1, 5, 8, use_experts=True),
        Holder(2, 5, 8, num_experts_per_tok=2),
        Holder(1, 5, 8, num_experts=1),
        Holder(3, 5, 8, num_experts=4),
        HolderOfExperts(1, 8, 8),
    ],
    ids=["use_experts", "experts_per_token", "one_expert", "other_number", "class_name_with_one"],
)
def test_no_stack_of_experts(model: nn.Module) -> None:
    """Position embeddings and the like stay dense, whatever the module says of experts."""
    assert site_names(smet.sparsify(model, density=0.5)) == {"linear.weight"}
    assert reasons(model)["weight"]


@pytest.mark.parametrize(
    "model",
    [*(Holder(3, 5, 8, **{name: 3}) for name in ("num_experts", "num_local_experts")), HolderOfExperts(3, 5, 8)],
    ids=["num_experts", "num_local_experts", "class_name"],
)
def test_stacks_of_experts(model: nn.Module) -> None:
    smet.sparsify(model, density=0.5)
    layout = find_sites(model)["weight"].layout
    assert (layout.num_matrices, layout.rows, layout.cols) == (3, 5, 8)

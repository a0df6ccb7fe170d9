"""export_dense(layout=...) gives tensors that torch's sparse products take, and computes what the dense copy does."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured

import smet_compile as smet
from tests.support.states import Unchanged


def net(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96, bias=bias), nn.GELU(), nn.Linear(96, 64, bias=bias))


def twos_and_fours() -> nn.Module:
    torch.manual_seed(0)
    return smet.sparsify(nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(128, 64)), pattern="2:4")


@pytest.mark.parametrize("shape", [(64,), (7, 64), (2, 3, 64)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize(("layout", "block_shape"), [("csr", 1), ("csr", (1, 8)), ("bsr", 16), ("bsr", 32)], ids=str)
def test_sparse_tensors(layout: Any, block_shape: Any, bias: bool, shape: tuple[int, ...]) -> None:
    model = smet.sparsify(net(bias), 0.3, block_shape=block_shape)
    with Unchanged(model):
        sparse = smet.export_dense(model, layout=layout)
    dense, x = smet.export_dense(model), torch.randn(shape)
    for name, weight in sparse.named_parameters():
        if name.endswith("weight"):
            assert weight.layout == {"csr": torch.sparse_csr, "bsr": torch.sparse_bsr}[layout], name
            assert not weight.requires_grad and torch.equal(weight.to_dense(), dense.get_parameter(name))
    torch.testing.assert_close(sparse(x), dense(x))
    assert list(sparse.state_dict()) == list(dense.state_dict())


@pytest.mark.filterwarnings("error")
def test_blocks_are_those_of_the_model() -> None:
    model = smet.sparsify(net(), 0.5, block_shape=16)
    active = {row.name: row.num_active for row in smet.report(model).sites}
    for name, weight in smet.export_dense(model, "bsr").named_parameters():
        if name in active:
            assert weight.values().shape == (active[name], 16, 16)


@pytest.mark.filterwarnings("error")
def test_2_4_on_the_cpu_is_dense_and_legal() -> None:
    model = twos_and_fours()
    dense, plain = smet.export_dense(model, layout="2:4"), smet.export_dense(model)
    for name, weight in dense.named_parameters():
        assert weight.layout == torch.strided and torch.equal(weight, plain.get_parameter(name))
        if name.endswith("weight"):
            assert weight.shape[0] % 32 == 0 and weight.shape[1] % 64 == 0
            assert (weight.view(-1, 4) != 0).sum(1).max() <= 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="semi-structured tensors exist on GPUs alone")
def test_2_4_on_a_gpu() -> None:
    model = twos_and_fours().to("cuda", torch.float16)
    sparse, dense = smet.export_dense(model, layout="2:4"), smet.export_dense(model)
    assert isinstance(sparse[0].weight, SparseSemiStructuredTensor)
    x = torch.randn(16, 64, device="cuda", dtype=torch.float16)
    torch.testing.assert_close(sparse[0](x), dense[0](x), rtol=1e-2, atol=1e-2)
    checked = smet.export_dense(twos_and_fours(), layout="2:4").to("cuda", torch.float16)
    for index in (0, 2):
        to_sparse_semi_structured(checked[index].weight.detach())
    with pytest.raises(ValueError, match=r"0\.weight: expected float16 or bfloat16"):
        smet.export_dense(twos_and_fours().cuda(), layout="2:4")


@pytest.mark.parametrize(
    ("model", "layout", "message"),
    [
        (lambda: smet.sparsify(net(), 0.3), "coo", r"layout: expected one of 2:4, bsr, csr, got 'coo'"),
        (lambda: smet.sparsify(net(), 0.3), 3, r"layout: expected one of 2:4, bsr, csr, got 3"),
        (lambda: smet.sparsify(net(), 0.3), "bsr", r'0\.weight: expected blocks for layout="bsr", got single weights'),
        (
            lambda: smet.sparsify(net(), 0.3, block_shape=(1, 8)),
            "bsr",
            r'0\.weight: expected square blocks for layout="bsr", got 1 x 8; pass layout="csr"',
        ),
        (
            lambda: smet.sparsify(net(), 0.3, block_shape=40),
            "bsr",
            r"0\.weight: expected blocks that divide the weight .* got 40 x 40 for 96 x 64; pass layout",
        ),
        (
            lambda: smet.sparsify(nn.Sequential(nn.Linear(64, 96)), 0.5),
            "2:4",
            r"0\.weight: expected at most 2 nonzero weights in every 4 .* got [34]; make the model sparse with",
        ),
        (
            lambda: smet.sparsify(nn.Sequential(nn.Linear(64, 16)), pattern="2:4"),
            "2:4",
            r'0\.weight: expected a multiple of 32 rows and of 64 columns for layout="2:4", got 16 x 64; leave',
        ),
        (
            lambda: smet.sparsify(nn.Sequential(nn.Conv1d(4, 4, 3)), 0.5, include="0"),
            "csr",
            r'export_dense: expected a compact weight in an nn\.Linear for layout="csr", got none',
        ),
    ],
)
def test_refused(model: Any, layout: Any, message: str) -> None:
    sparse = model()
    with Unchanged(sparse), pytest.raises(ValueError, match=message):
        smet.export_dense(sparse, layout)


class Scaled(nn.Linear):
    """Reads its weight in its own way, which a sparse tensor may not allow."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ (2 * self.weight.flip(0)).T


def test_what_no_linear_layer_reads_stays_dense() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "linear": nn.Linear(8, 8), "scaled": Scaled(8, 8)})
    smet.sparsify(model, 0.5)
    with pytest.warns(
        UserWarning, match=r"attention\.in_proj_weight, attention\.out_proj\.weight, scaled\.weight stay"
    ):
        sparse = smet.export_dense(model, layout="csr")
    layouts = {name: p.layout for name, p in sparse.named_parameters() if p.dim() > 1}
    assert [name for name, layout in layouts.items() if layout == torch.sparse_csr] == ["linear.weight"]
    x, dense = torch.randn(3, 8), smet.export_dense(model)
    assert torch.equal(sparse["scaled"](x), dense["scaled"](x))
    torch.testing.assert_close(sparse["attention"](x, x, x)[0], dense["attention"](x, x, x)[0])


def test_a_dense_baseline_and_16_bits_on_the_cpu_are_warned_of() -> None:
    with pytest.warns(UserWarning, match=r'export_dense: every weight stays dense with layout="csr", since none is'):
        smet.export_dense(smet.sparsify(net(), 1.0), layout="csr")
    with pytest.warns(UserWarning, match=r"export_dense: torch has no CPU product for 0\.weight in bsr and 16 bits"):
        sparse = smet.export_dense(smet.sparsify(net(), 0.5, block_shape=16).bfloat16(), layout="bsr")
    with pytest.raises(RuntimeError, match="BFloat16"):  # where this changes, the warning goes
        sparse(torch.ones(3, 64, dtype=torch.bfloat16))


def test_an_exported_copy_is_saved_and_loaded(tmp_path: Any) -> None:
    sparse, other = (smet.export_dense(smet.sparsify(net(), 0.3, seed=seed), layout="csr") for seed in (0, 1))
    torch.save(sparse.state_dict(), tmp_path / "a")
    x = torch.randn(3, 64)
    assert not torch.equal(other(x), sparse(x))
    other.load_state_dict(torch.load(tmp_path / "a"), assign=True)
    assert torch.equal(other(x), sparse(x))

"""export_dense makes a plain module with zeros where inactive; the sparse model stays usable."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import smet_compile as smet
from smet_compile.ops import find_sites
from tests.support.small_models import RaggedNet, two_layers
from tests.support.snapshots import same_bits, snapshot
from tests.support.states import Unchanged
from tests.support.training import train


@pytest.mark.parametrize("block_shape", [1, (1, 16), (16, 16)], ids=str)
@pytest.mark.usefixtures("unpacked")
def test_same_keys_shapes_and_outputs_as_a_model_never_sparsified(block_shape: int | tuple[int, int]) -> None:
    torch.manual_seed(1)
    plain = RaggedNet()
    sparse = smet.sparsify(RaggedNet(), density=0.4, block_shape=block_shape)
    with Unchanged(sparse):
        dense = smet.export_dense(sparse)
    shapes = {name: tuple(t.shape) for name, t in plain.state_dict().items()}
    assert {name: tuple(t.shape) for name, t in dense.state_dict().items()} == shapes
    assert [type(m) for m in dense.modules()] == [type(m) for m in plain.modules()]
    x = torch.randn(5, 50)
    assert same_bits(dense(x).detach(), sparse(x).detach())
    for name, site in find_sites(sparse).items():
        weight = dense.get_parameter(name)
        assert type(weight) is nn.Parameter
        assert int((weight != 0).sum()) <= int(site.values.numel())


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(8, 8),
        lambda: nn.MultiheadAttention(8, 2),
        lambda: nn.MultiheadAttention(8, 2, kdim=4, vdim=6),
        lambda: nn.TransformerEncoderLayer(8, 2, 16),
    ],
    ids=["linear", "attention", "separate_projections", "encoder_layer"],
)
def test_the_order_of_parameters_is_kept(make: Callable[[], nn.Module]) -> None:
    """The state of a plain optimizer is keyed by this order."""
    names = [name for name, _ in make().named_parameters()]
    dense = smet.export_dense(smet.sparsify(make(), density=0.5))
    assert [name for name, _ in dense.named_parameters()] == names


def test_no_trace_of_the_library() -> None:
    dense = smet.export_dense(smet.sparsify(two_layers(), density=0.4))
    for module in dense.modules():
        assert not type(module).__module__.startswith("smet_compile")
        assert not any("smet_compile" in str(getattr(hook, "__module__", "")) for hook in all_hooks(module))
        assert not [key for key in vars(module) if "smet" in key.lower()]


def all_hooks(module: nn.Module) -> list[object]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
    return [hook for kind in kinds for hook in getattr(module, kind, {}).values()]


def test_no_storage_is_shared_and_both_go_on() -> None:
    sparse = smet.sparsify(two_layers(), density=0.4)
    dense = smet.export_dense(sparse)
    held = {p.untyped_storage().data_ptr() for p in sparse.parameters()}
    assert not held & {p.untyped_storage().data_ptr() for p in dense.parameters()}
    before = snapshot(dense)[0]
    train(sparse, smet.ActiveAdamW(sparse, lr=1e-2), steps=2)
    assert all(same_bits(dense.state_dict()[key], before[key]) for key in before)
    train(dense, torch.optim.SGD(dense.parameters(), lr=0.1), steps=1)


def test_frozen_and_mode_are_kept() -> None:
    model = two_layers()
    model[0].weight.requires_grad_(False)
    smet.sparsify(model.eval(), density=0.4)
    dense = smet.export_dense(model)
    assert not dense[0].weight.requires_grad and dense[3].weight.requires_grad and not dense.training


@pytest.mark.usefixtures("unpacked")
def test_exported_model_can_be_made_sparse_again() -> None:
    sparse = smet.sparsify(two_layers(), density=0.4)
    again = smet.sparsify(smet.export_dense(sparse), density=0.4, select="magnitude")
    x = torch.randn(3, 12)
    assert same_bits(again(x).detach(), sparse(x).detach())

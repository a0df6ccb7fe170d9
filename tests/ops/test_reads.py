"""In-place changes of ``module.weight`` are kept, or an error or a warning says that they are not."""

import copy
import io
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import smet_compile as smet
from smet_compile.ops import find_sites, reads
from tests.support.small_models import sparse_layers
from tests.support.training import train

blocks = pytest.mark.parametrize("block", [1, (1, 4), (4, 4)], ids=str)


def halve_as_rwkv_does(layer: nn.Module) -> None:
    with torch.no_grad():
        layer.weight.div_(2)


def halve_data(layer: nn.Module) -> None:
    layer.weight.data /= 2


def halve_data_by_method(layer: nn.Module) -> None:
    layer.weight.data.mul_(0.5)


def halve_by_a_name(layer: nn.Module) -> None:
    weight = layer.weight.detach()
    weight *= 0.5


def halve_data_by_a_name(layer: nn.Module) -> None:
    data = layer.weight.data
    data.div_(2)


def halve_in_pieces(layer: nn.Module) -> None:
    with torch.no_grad():
        for row in layer.weight:
            row.mul_(0.5)


def halve_a_transpose(layer: nn.Module) -> None:
    layer.weight.detach().t().view(layer.in_features, layer.out_features).mul_(0.5)


def halve_by_replacing_data(layer: nn.Module) -> None:
    layer.weight.data = layer.weight.data * 0.5


def halve_in_inference_mode(layer: nn.Module) -> None:
    with torch.inference_mode():
        layer.weight.mul_(0.5)


def halve_by_index(layer: nn.Module) -> None:
    with torch.no_grad():
        layer.weight[:] = layer.weight * 0.5


HALVES = [
    halve_as_rwkv_does,
    halve_data,
    halve_data_by_method,
    halve_by_a_name,
    halve_data_by_a_name,
    halve_in_pieces,
    halve_a_transpose,
    halve_by_replacing_data,
    halve_in_inference_mode,
    halve_by_index,
]


@blocks
@pytest.mark.parametrize("halve", HALVES, ids=lambda function: function.__name__)
@pytest.mark.filterwarnings("error")
def test_a_change_that_keeps_zeros_is_kept(block: Any, halve: Callable[[nn.Module], None]) -> None:
    model = sparse_layers(block)
    site, before = find_sites(model)["0.weight"], model[0].weight.detach().clone()
    values, mask = site.values, site.mask()
    halve(model[0])
    assert torch.equal(model[0].weight, before / 2)
    assert find_sites(model)["0.weight"].values is values and torch.equal(site.mask(), mask)


@blocks
def test_initialisation_reaches_the_active_part_with_a_warning(block: Any) -> None:
    model = sparse_layers(block)
    site = find_sites(model)["0.weight"]
    active = (smet.export_dense(model)[0].weight != 0).clone()
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match=r"0\.weight: \d+ of the numbers written .* no block is active") as seen:
        nn.init.orthogonal_(model[0].weight)
    torch.manual_seed(1)
    expected = nn.init.orthogonal_(torch.empty(20, 12))
    assert torch.equal(model[0].weight, expected * active)
    assert seen[0].filename == __file__
    assert site.num_active == site.values.shape[0]


@pytest.mark.parametrize(
    "write",
    [
        lambda layer: layer.weight.data.normal_(0, 0.1),
        lambda layer: layer.weight.detach().add_(1),
        lambda layer: nn.init.constant_(layer.weight, 0.5),
        lambda layer: layer.reset_parameters(),
    ],
)
def test_no_such_write_is_lost_without_a_word(write: Callable[[nn.Module], object]) -> None:
    model = sparse_layers()
    before = model[0].weight.detach().clone()
    with pytest.warns(UserWarning, match=r"0\.weight"):
        write(model[0])
    assert not torch.equal(model[0].weight, before)


def test_a_warning_that_is_an_error_comes_at_the_next_use() -> None:
    model = sparse_layers()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nn.init.ones_(model[0].weight)
        with pytest.raises(UserWarning, match=r"0\.weight"):
            model(torch.ones(2, 12))
    assert set(model[0].weight.unique().tolist()) == {0.0, 1.0}


def test_a_read_that_is_still_held_is_kept_before_the_next_use() -> None:
    for use in (
        lambda model: model(torch.ones(2, 12)),
        lambda model: model.state_dict(),
        lambda model: smet.ActiveAdamW(model, lr=0.0).step(),
        lambda model: torch.optim.SGD(model.parameters(), lr=0.0).step(),
    ):
        model = sparse_layers()
        before = model[0].weight.detach().clone()
        held = model[0].weight
        with torch.no_grad():
            held.mul_(0.5)
        use(model)
        assert torch.equal(smet.export_dense(model)[0].weight, before / 2)


def test_export_and_copies_see_a_read_that_is_still_held() -> None:
    model = sparse_layers()
    before = model[0].weight.detach().clone()
    held = model[0].weight
    with torch.no_grad():
        held.mul_(0.5)
    assert torch.equal(smet.export_dense(model)[0].weight, before / 2)
    assert torch.equal(model[0].weight, before / 2)
    with torch.no_grad():
        held.mul_(0.5)
    copied = copy.deepcopy(model)
    assert torch.equal(copied[0].weight, before / 4) and torch.equal(model[0].weight, before / 4)


def test_weight_clipping_between_steps_equals_the_dense_twin() -> None:
    model = sparse_layers()
    mask = (model[0].weight != 0).clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(3):
        train(model, optimizer, first=step)
        unclipped = model[0].weight.detach().clone()
        weight = model[0].weight  # held through the next step, as a loop's variable is
        weight.data.clamp_(-0.05, 0.05)
        assert torch.equal(model[0].weight, unclipped.clamp(-0.05, 0.05) * mask)


def test_a_change_of_what_the_weight_was_is_refused_at_the_next_use() -> None:
    model = sparse_layers()
    held = model[0].weight
    train(model, torch.optim.SGD(model.parameters(), lr=0.5))
    values = find_sites(model)["0.weight"].values.detach().clone()
    with torch.no_grad():
        held.mul_(2)
    with pytest.raises(ValueError, match=r"0\.weight: .* changed in place after its values had moved on"):
        model(torch.ones(2, 12))
    assert torch.equal(find_sites(model)["0.weight"].values, values)
    model(torch.ones(2, 12))


def test_a_change_that_autograd_records_is_refused() -> None:
    model = sparse_layers()
    model[0].weight.mul_(2)
    with pytest.raises(ValueError, match=r"0\.weight: .* while gradients are recorded; .* torch\.no_grad"):
        model(torch.ones(2, 12))


def test_another_shape_is_refused() -> None:
    model = sparse_layers()
    with torch.no_grad():
        model[0].weight.t_()
    with pytest.raises(ValueError, match=r"0\.weight: .* got the shape \(12, 20\) in place"):
        model(torch.ones(2, 12))
    with pytest.raises(ValueError, match=r"0\.weight: expected data of torch\.float32, shape \(20, 12\)"):
        model[0].weight.data = torch.ones(12, 20)
    with pytest.raises(ValueError, match=r"0\.weight: expected data of torch\.float32.*got torch\.float64"):
        model[0].weight.data = torch.ones(20, 12, dtype=torch.float64)


@blocks
def test_data_that_no_active_blocks_hold_makes_every_block_active(block: Any) -> None:
    model = sparse_layers(block)
    merged = model[0].weight.detach() + torch.randn(20, 12)
    before = model[0].weight.detach().clone()
    with warnings.catch_warnings(), pytest.raises(UserWarning, match=r"0\.weight"):
        warnings.simplefilter("error")
        model[0].weight.data = merged
    assert torch.equal(model[0].weight, before) and find_sites(model)["0.weight"].density < 1
    train(model, torch.optim.SGD(model.parameters(), lr=0.0))  # gradients are there
    with pytest.warns(UserWarning, match=r"0\.weight: .* keeps every block from now on"):
        model[0].weight.data = merged
    assert torch.equal(model[0].weight, merged)
    assert find_sites(model)["0.weight"].density == 1.0 and find_sites(model)["3.weight"].density < 1
    assert torch.equal(smet.export_dense(model)[0].weight, merged)
    train(model, smet.ActiveAdamW(model, lr=1e-2), steps=2)


@blocks
def test_data_that_was_changed_in_place_is_kept_as_a_whole(block: Any) -> None:
    model = sparse_layers(block)
    expected = model[0].weight.detach() + 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model[0].weight.data += 1
    assert [str(each.message).count("keeps every block") for each in caught] == [1]
    assert torch.equal(model[0].weight, expected) and find_sites(model)["0.weight"].density == 1.0


def test_data_of_another_weight_that_was_changed_in_place() -> None:
    model, other = sparse_layers(), sparse_layers()
    expected = 2 * model[0].weight.detach()
    data = model[0].weight.data
    data *= 2
    other[0].weight.data = data
    assert torch.equal(model[0].weight, expected) and torch.equal(other[0].weight, expected)


def test_more_active_blocks_while_an_old_graph_is_alive() -> None:
    """The loss holds the node that accumulates the gradient, and that expects the shape from before."""
    model = sparse_layers()
    loss = model(torch.ones(2, 12)).sum()
    loss.backward()
    with pytest.warns(UserWarning, match="keeps every block"):
        model[0].weight.data = torch.randn(20, 12)
    model(torch.ones(2, 12)).sum().backward()
    assert loss.isfinite() and find_sites(model)["0.weight"].values.grad.shape == (240,)


@blocks
def test_a_parameter_is_assigned_as_a_tensor_is(block: Any) -> None:
    model = sparse_layers(block)
    twin = copy.deepcopy(model)
    new = torch.randn(20, 12)
    values = find_sites(model)["0.weight"].values
    model[0].weight = nn.Parameter(new)
    twin[0].weight = new
    active = twin[0].weight != 0
    assert torch.equal(model[0].weight, new * active) and torch.equal(model[0].weight, twin[0].weight)
    assert find_sites(model)["0.weight"].values is values and values.requires_grad
    model[0].bias = nn.Parameter(torch.zeros(20))
    assert isinstance(model[0].bias, nn.Parameter) and "bias" in model[0]._parameters
    for wrong in (nn.Parameter(torch.ones(3, 3)), torch.ones(12, 20)):
        with pytest.raises(ValueError, match=r"0\.weight: expected a weight of shape \(20, 12\), got"):
            model[0].weight = wrong


def test_the_projections_of_attention_are_assigned_too() -> None:
    model = smet.sparsify(nn.MultiheadAttention(8, 2), 0.5)
    model.in_proj_weight = nn.Parameter(torch.ones(24, 8))
    assert set(model.in_proj_weight.unique().tolist()) == {0.0, 1.0}


def test_a_read_is_a_tensor_as_any_other() -> None:
    model = sparse_layers()
    weight = model[0].weight
    assert isinstance(weight, Tensor) and not isinstance(weight, nn.Parameter)
    for derived in (weight * 1, weight.t(), weight[0], weight.to(torch.float64), weight.clone()):
        assert type(derived) is Tensor
    assert repr(weight).startswith("tensor(")
    file = io.BytesIO()
    torch.save({"weight": weight, "detached": weight.detach()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert type(loaded["weight"]) is Tensor and torch.equal(loaded["weight"], weight)
    with torch.no_grad():
        assert type(copy.deepcopy(model[0].weight)) is Tensor
    array = weight.detach().numpy()
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 0
    assert torch.equal(torch.from_numpy(array.copy()), weight)


def test_no_read_outlives_its_use() -> None:
    model = sparse_layers()
    before = set(reads._live)
    model(torch.ones(2, 12)).sum().backward()
    assert set(reads._live) == before


def test_reads_in_a_cache_are_kept_too() -> None:
    model = sparse_layers()
    before = model[0].weight.detach().clone()
    with parametrize.cached(), torch.no_grad():
        model[0].weight.mul_(0.5)
        assert torch.equal(model[0].weight, before / 2)
    assert torch.equal(model[0].weight, before / 2)


def test_a_parameter_made_of_a_read_is_one_of_its_own() -> None:
    model, other = sparse_layers(), nn.Linear(12, 20)
    before = model[0].weight.detach().clone()
    other.weight = nn.Parameter(model[0].weight.detach())
    assert type(other.weight) is nn.Parameter and type(other.weight.data) is Tensor
    other.load_state_dict({"weight": model[0].weight.detach(), "bias": other.bias.detach()}, assign=True)
    assert type(other.weight) is nn.Parameter and other.weight.requires_grad
    other(torch.ones(2, 12)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=1.0).step()
    other.weight.data.mul_(3)
    model(torch.ones(2, 12))
    assert torch.equal(model[0].weight, before) and not torch.equal(other.weight, before)


def test_nothing_is_printed_where_the_interpreter_ends() -> None:
    code = "import torch, smet_compile as s; m = s.sparsify(torch.nn.Linear(8, 8), 0.5); w = m.weight; d = w.detach()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")

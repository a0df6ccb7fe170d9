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
from smet_compile.tracing import Capture
from tests.support.small_models import two_layers
from tests.support.training import train

blocks = pytest.mark.parametrize("block", [1, (1, 4), (4, 4)], ids=str)


def sparse(block: int | tuple[int, int] = 1) -> nn.Module:
    torch.manual_seed(0)
    return smet.sparsify(two_layers(), 0.5, block_shape=block)


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
    model = sparse(block)
    site, before = find_sites(model)["0.weight"], model[0].weight.detach().clone()
    values, mask = site.values, site.mask()
    halve(model[0])
    assert torch.equal(model[0].weight, before / 2)
    assert find_sites(model)["0.weight"].values is values and torch.equal(site.mask(), mask)


@blocks
def test_initialisation_reaches_the_active_part_with_a_warning(block: Any) -> None:
    model = sparse(block)
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
    model = sparse()
    before = model[0].weight.detach().clone()
    with pytest.warns(UserWarning, match=r"0\.weight"):
        write(model[0])
    assert not torch.equal(model[0].weight, before)


def test_a_warning_that_is_an_error_comes_at_the_next_use() -> None:
    model = sparse()
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
        model = sparse()
        before = model[0].weight.detach().clone()
        held = model[0].weight
        with torch.no_grad():
            held.mul_(0.5)
        use(model)
        assert torch.equal(smet.export_dense(model)[0].weight, before / 2)


def test_export_and_copies_see_a_read_that_is_still_held() -> None:
    model = sparse()
    before = model[0].weight.detach().clone()
    held = model[0].weight
    with torch.no_grad():
        held.mul_(0.5)
    assert torch.equal(smet.export_dense(model)[0].weight, before / 2)
    assert torch.equal(model[0].weight, before / 2)


def test_weight_clipping_between_steps_equals_the_dense_twin() -> None:
    model = sparse()
    mask = (model[0].weight != 0).clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(3):
        train(model, optimizer, first=step)
        unclipped = model[0].weight.detach().clone()
        weight = model[0].weight  # held through the next step, as a loop's variable is
        weight.data.clamp_(-0.05, 0.05)
        assert torch.equal(model[0].weight, unclipped.clamp(-0.05, 0.05) * mask)


def test_a_change_of_what_the_weight_was_is_refused_at_the_next_use() -> None:
    model = sparse()
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
    model = sparse()
    model[0].weight.mul_(2)
    with pytest.raises(ValueError, match=r"0\.weight: .* while gradients are recorded; .* torch\.no_grad"):
        model(torch.ones(2, 12))


def test_another_shape_is_refused() -> None:
    model = sparse()
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
    model = sparse(block)
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


def test_more_active_blocks_while_an_old_graph_is_alive() -> None:
    """The loss holds the node that accumulates the gradient, and that expects the shape from before."""
    model = sparse()
    loss = model(torch.ones(2, 12)).sum()
    loss.backward()
    with pytest.warns(UserWarning, match="keeps every block"):
        model[0].weight.data = torch.randn(20, 12)
    model(torch.ones(2, 12)).sum().backward()
    assert loss.isfinite() and find_sites(model)["0.weight"].values.grad.shape == (240,)


@blocks
def test_a_parameter_is_assigned_as_a_tensor_is(block: Any) -> None:
    model = sparse(block)
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
    model = sparse()
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
    model = sparse()
    before = set(reads._live)
    model(torch.ones(2, 12)).sum().backward()
    assert set(reads._live) == before


def test_reads_in_a_cache_are_kept_too() -> None:
    model = sparse()
    before = model[0].weight.detach().clone()
    with parametrize.cached(), torch.no_grad():
        model[0].weight.mul_(0.5)
        assert torch.equal(model[0].weight, before / 2)
    assert torch.equal(model[0].weight, before / 2)


def test_a_parameter_made_of_a_read_is_one_of_its_own() -> None:
    model, other = sparse(), nn.Linear(12, 20)
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


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_read_goes_into_a_compiled_function(backend: str) -> None:
    model, x = sparse(), torch.randn(4, 12)
    compiled = torch.compile(lambda weight, x: x @ weight.t() * 2, backend=backend, fullgraph=True)
    compiled(model[0].weight, x).sum().backward()
    compact = find_sites(model)["0.weight"].values
    got, compact.grad = compact.grad, None
    (x @ model[0].weight.t() * 2).sum().backward()
    assert got is not None and compact.grad is not None
    torch.testing.assert_close(got, compact.grad)


def freeze_by_method(layer: nn.Module, is_trained: bool) -> None:
    layer.weight.requires_grad_(is_trained)


def freeze_by_attribute(layer: nn.Module, is_trained: bool) -> None:
    layer.weight.requires_grad = is_trained


@torch.no_grad()
def freeze_without_gradients(layer: nn.Module, is_trained: bool) -> None:
    layer.weight.requires_grad_(is_trained)


@pytest.mark.parametrize("freeze", [freeze_by_method, freeze_by_attribute, freeze_without_gradients])
def test_a_weight_is_frozen_and_trained_again_as_a_parameter_is(freeze: Callable[[nn.Module, bool], None]) -> None:
    model = sparse()
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, twin)]
    for is_trained in (True, False, False, True):
        freeze(model[0], is_trained)
        assert model[0].weight.requires_grad is is_trained
        twin[0].parametrizations.weight.original.requires_grad_(is_trained)
        losses = [train(each, optimizer) for each, optimizer in zip((model, twin), optimizers, strict=True)]
        assert losses[0] == losses[1]
        assert torch.equal(model[0].weight, twin[0].weight)
    assert model[0].parametrizations.weight.original.requires_grad


def test_freezing_changes_later_reads_and_no_graph_that_is_there() -> None:
    layer = sparse()[0]
    values, read = layer.parametrizations.weight.original, layer.weight
    loss = read.square().sum()
    assert read.requires_grad_(False) is read and read.requires_grad and not layer.weight.requires_grad
    assert layer.weight.requires_grad_().requires_grad is False and layer.weight.requires_grad
    loss.backward()
    assert torch.equal(values.grad, 2 * values)
    leaf = layer.weight.detach().requires_grad_()
    (3 * leaf).sum().backward()
    assert torch.equal(leaf.grad, torch.full_like(leaf, 3)) and torch.equal(values.grad, 2 * values)
    leaf.grad = None
    leaf.requires_grad = False
    assert leaf.grad is None and not leaf.requires_grad and layer.weight.requires_grad


def test_a_gradient_that_is_given_to_a_read_is_refused() -> None:
    model = sparse()
    for given in (torch.ones_like(model[0].weight), None):
        with pytest.raises(
            ValueError, match=r"0.weight: .* set that of the values, 0.parametrizations.weight.original.g"
        ):
            model[0].weight.grad = given
    layer = smet.sparsify(nn.Linear(12, 7), density=0.5)
    with pytest.raises(ValueError, match=r"values, parametrizations.weight.original.grad$"):
        layer.weight.grad = torch.ones(7, 12)
    kept = layer.weight
    kept.retain_grad()
    kept.sum().backward()
    assert torch.equal(kept.grad, torch.ones(7, 12))
    kept.grad = None
    assert kept.grad is None


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_frozen_read_goes_into_a_compiled_function(backend: str) -> None:
    layer = sparse()[0]
    layer.weight.requires_grad_(False)
    double = torch.compile(lambda weight: 2 * weight, backend=backend, fullgraph=True)
    for is_trained in (False, True):
        layer.weight.requires_grad_(is_trained)
        result = double(layer.weight)
        assert result.requires_grad is is_trained and torch.equal(result, 2 * layer.weight)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_compiled_forward_sees_a_change_of_a_read_that_is_still_held(backend: str) -> None:
    model, x = sparse(), torch.randn(3, 12)
    compiled = torch.compile(model, backend=backend)
    compiled(x).sum().backward()
    for layer in (model[0], model[3]):
        held = layer.weight  # the last one outlives the loop
        with torch.no_grad():
            held.clamp_(-0.01, 0.01)
    values = model[3].parametrizations.weight.original
    actual = compiled(x)
    assert values.abs().max() <= 0.01 and held.shape == (7, 20)
    assert torch.allclose(actual, model(x))
    actual.sum().backward()


def test_a_compiled_forward_raises_where_a_change_cannot_be_kept() -> None:
    model, x = sparse(), torch.randn(3, 12)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(x)
    held = model[3].weight
    held.mul_(2)
    with pytest.raises(ValueError, match="was changed in place while gradients are recorded"):
        compiled(x)
    assert held.shape == (7, 20)


def test_a_compiled_forward_in_another_dtype_raises_once_and_keeps_the_change() -> None:
    model, x = sparse(), torch.randn(3, 12)
    compiled = torch.compile(model, backend=Capture())
    with torch.autocast("cpu", torch.bfloat16):
        compiled(x)
        held = model[3].weight
        with torch.no_grad():
            held.zero_()
        with pytest.raises(ValueError, match="call the function again"):
            compiled(x)
        assert torch.equal(compiled(x).float(), model[3].bias.bfloat16().float().expand(3, -1))


def test_a_change_after_the_compiled_forward_waits_for_the_next_use() -> None:
    model, x = sparse(), torch.randn(3, 12)
    loss = torch.compile(model, backend=Capture())(x).square().sum()
    before = model[3].parametrizations.weight.original.detach().clone()
    held = model[3].weight
    with torch.no_grad():
        held.zero_()
    loss.backward()
    assert torch.equal(model[3].parametrizations.weight.original, before)
    assert (model(x) == model[3].bias).all()


def test_a_constraint_in_the_forward_of_its_own_module_is_kept() -> None:
    class Constrained(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.3)
            return super().forward(x)

    torch.manual_seed(0)
    model = smet.sparsify(nn.Sequential(Constrained(12, 20), nn.Linear(20, 7)), 0.5)
    before = model[0].weight.detach().clone()
    model(torch.ones(2, 12)).sum().backward()
    torch.testing.assert_close(model[0].weight.detach(), torch.renorm(before, p=2, dim=0, maxnorm=0.3))
    assert float(model[0].weight.detach().norm(dim=1).max()) <= 0.3 + 1e-6


def test_nothing_is_printed_where_the_interpreter_ends() -> None:
    code = "import torch, smet_compile as s; m = s.sparsify(torch.nn.Linear(8, 8), 0.5); w = m.weight; d = w.detach()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")

"""``correct_gradients`` decides by optimizer, pattern and kind of layer, says why, and refuses misuse."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import smet_compile as smet
from smet_compile.ops import find_sites
from smet_compile.ops.row_scale import block_factors
from tests.correction.networks import Net, images, loss_of, sparse_net

CORRECTED = ("conv.weight", "point.weight", "linear.weight")
CORRECTED_TEXT = "corrected: batch norm alone reads its output"


def sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def scaled(model: nn.Module) -> set[str]:
    return {name for name, site in find_sites(model).items() if site.compact.scales_rows}


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.depth, self.norm = nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8)
        self.point, self.norm2 = nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.point(self.norm(self.depth(x)).relu())).relu()


class LooksAtData(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if float(x.sum()) < 1e9 else x


def test_every_site_has_its_reason() -> None:
    model = sparse_net()
    result = smet.correct_gradients(model, sgd(model), images())
    assert result.corrected == CORRECTED
    assert dict(result.sites) == {name: CORRECTED_TEXT for name in CORRECTED} | {
        "head.weight": "not corrected: its output is returned by the model without batch norm"
    }
    assert str(result).splitlines()[0] == f"conv.weight    {CORRECTED_TEXT}"
    assert str(result).endswith("3 of 4 sites are corrected")


def test_report_lists_it_only_where_it_was_asked_for() -> None:
    model = sparse_net()
    assert "batch norm" not in str(smet.report(model))
    result = smet.correct_gradients(model, sgd(model), images())
    report = smet.report(model)
    assert {site.name: site.correction for site in report.sites} == dict(result.sites)
    assert f"gradients, for batch norm:\n  conv.weight    {CORRECTED_TEXT}\n" in str(report)
    assert report.to_dict()["sites"][0]["correction"] == CORRECTED_TEXT


def test_nothing_else_changes() -> None:
    model = sparse_net()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    smet.correct_gradients(model, sgd(model), images())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "make",
    [
        lambda model: smet.ActiveAdamW(model),
        lambda model: smet.ActiveLion(model),
        lambda model: smet.ActiveScale(model),
        lambda model: torch.optim.AdamW(model.parameters()),
        lambda model: torch.optim.RMSprop(model.parameters()),
    ],
    ids=["ActiveAdamW", "ActiveLion", "ActiveScale", "AdamW", "RMSprop"],
)
def test_rules_that_cancel_the_factor(make: Any) -> None:
    model = sparse_net()
    optimizer = make(model)
    name = type(optimizer).__name__
    with pytest.warns(
        UserWarning, match=rf"{name} divides by the size of the gradient.* so 3 sites .*scale_steps=True"
    ):
        result = smet.correct_gradients(model, optimizer, images())
    assert result.corrected == () and not scaled(model)
    assert result.sites["conv.weight"] == f"not corrected: {name} cancels a factor that stays the same"


def test_a_factor_cancels_under_adam_and_moves_under_sgd() -> None:
    """Shows why: 50 steps with the factor, beside 50 without, as a part of the movement."""
    moved = {}
    for name, make in (("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)):
        ends = []
        for corrects in (False, True):
            torch.manual_seed(0)
            model = sparse_net()
            start = find_sites(model)["conv.weight"].values.detach().clone()
            find_sites(model)["conv.weight"].compact.scales_rows = corrects
            optimizer = make(model.parameters(), lr=1e-3)
            for _ in range(50):
                loss_of(model, images()).backward()
                optimizer.step()
                optimizer.zero_grad()
            ends.append(find_sites(model)["conv.weight"].values.detach() - start)
        moved[name] = ((ends[1] - ends[0]).norm() / ends[0].norm()).item()
    assert moved["adam"] < 1e-3 and moved["sgd"] > 1e-2, moved


@pytest.mark.parametrize("kind", ["active", "torch"])
def test_scaled_steps_under_adam(kind: str) -> None:
    model = sparse_net()

    def make(each: nn.Module) -> Optimizer:
        if kind == "active":
            return smet.ActiveAdamW(each, lr=1e-2, weight_decay=0.1)
        return torch.optim.AdamW(each.parameters(), lr=1e-2)

    twin = copy.deepcopy(model)
    optimizer, twin_optimizer = make(model), make(twin)
    result = smet.correct_gradients(model, optimizer, images(), scale_steps=True)
    assert result.corrected == CORRECTED and not scaled(model)
    assert result.sites["conv.weight"] == "its steps are scaled after Adam's direction, which is not SparseOpt's"
    for each, own in ((model, optimizer), (twin, twin_optimizer)):
        loss_of(each, images()).backward()
        own.step()
    for name, site in find_sites(model).items():
        start, plain = sparse_start(name), find_sites(twin)[name].values
        factor = block_factors(site.compact.active, torch.float64) if name in CORRECTED else 1.0
        torch.testing.assert_close(site.values, start + factor * (plain - start), rtol=1e-12, atol=1e-13)
    smet.compile_train_step(model, optimizer, loss_of)
    assert not smet.compile_train_step(model, optimizer, loss_of).fused, "gradients are kept until optimizer.step()"
    with pytest.warns(UserWarning, match="divides by the size"):
        smet.correct_gradients(model, optimizer, images())
    assert smet.compile_train_step(model, optimizer, loss_of).fused, "a second call decides anew"


@pytest.mark.parametrize("options", [{}, {"density_schedule": [(3, 0.2)]}], ids=str)
def test_steps_are_scaled_before_the_topology_changes(options: dict[str, Any]) -> None:
    """A manager that was made first acts after the scaling, as one that was made after it does."""
    found = []
    for manager_first in (True, False):
        torch.manual_seed(0)
        model = sparse_net()
        optimizer = smet.ActiveAdamW(model, lr=1e-2)
        order = [
            lambda model=model, optimizer=optimizer: smet.TopologyManager(
                model, optimizer, total_steps=20, every=3, **options
            ),
            lambda model=model, optimizer=optimizer: smet.correct_gradients(
                model, optimizer, images(), scale_steps=True
            ),
        ]
        kept = [make() for make in (order if manager_first else order[::-1])]
        for _ in range(4):
            loss_of(model, images()).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert kept
        found.append(model.state_dict())
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name


def test_scaled_steps_keep_their_mean_in_bf16() -> None:
    """A step is one last bit or none, so a factor has to change how often; rounding to the nearest undid it."""

    def norm_of(width: int = 256) -> nn.Module:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(width, width, bias=False), nn.BatchNorm1d(width))
        return smet.sparsify(net, 0.1).bfloat16()

    x = torch.randn(32, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    moves = {}
    for is_scaled in (True, False):
        model = norm_of()
        optimizer = smet.ActiveAdamW(model, lr=2e-4, warmup_steps=0)
        if is_scaled:
            smet.correct_gradients(model, optimizer, x, scale_steps=True)
        site = find_sites(model)["0.weight"]
        before = site.values.detach().double()
        model(x).float().square().mul(torch.linspace(0, 1, 256)).sum().backward()
        optimizer.step()
        moves[is_scaled] = (site.values.detach().double() - before).abs()
    factors = block_factors(site.compact.active, torch.float64)
    for few in (True, False):
        rows = factors < 0.9 if few else factors > 1.1
        found, expected = (moves[True][rows].sum() / moves[False][rows].sum()).item(), factors[rows].mean().item()
        assert found == pytest.approx(expected, abs=0.06), (found, expected)


def sparse_start(name: str) -> Tensor:
    torch.manual_seed(0)
    return find_sites(sparse_net())[name].values.detach()


def test_scale_steps_needs_a_rule_that_cancels() -> None:
    model = sparse_net()
    with pytest.raises(
        ValueError, match="scale_steps: expected an optimizer that cancels the correction, such as Adam"
    ):
        smet.correct_gradients(model, sgd(model), images(), scale_steps=True)
    assert not scaled(model) and find_sites(model)["conv.weight"].compact.correction is None


def test_scaled_steps_need_a_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smet_compile.correction.has_shards", lambda model: True)
    model = sparse_net()
    with pytest.raises(ValueError, match="scale_steps: expected a whole model, got one that fully_shard has cut"):
        smet.correct_gradients(model, smet.ActiveAdamW(model), images(), scale_steps=True)


@pytest.mark.parametrize("pattern", ["2:4", "fan_in"])
def test_equal_fan_in_is_said_once(pattern: str) -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 4))
    smet.sparsify(model, 0.5, pattern=pattern)
    with pytest.warns(UserWarning, match="the 1 sites that feed batch norm have equal fan-in.*factor is 1") as caught:
        result = smet.correct_gradients(model, sgd(model), torch.randn(5, 8))
    assert len(caught) == 1 and result.corrected == ()
    assert result.sites["0.weight"] == "not corrected: its pattern has equal fan-in, so that every factor is 1"


def test_free_weights_with_equal_fan_in_for_now_are_corrected() -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 4))
    smet.sparsify(model, masks={"0.weight": torch.eye(12, 8).bool() | (torch.arange(8) == 0)})
    assert smet.correct_gradients(model, sgd(model), torch.randn(5, 8)).corrected == ("0.weight",)


def test_depthwise_convolutions() -> None:
    model = smet.sparsify(Depthwise(), 0.5, include=["depth*", "point*"])
    x = torch.randn(4, 8, 6, 6)
    result = smet.correct_gradients(model, sgd(model), x)
    assert result.corrected == ("point.weight",) and "depthwise=True includes it" in result.sites["depth.weight"]
    assert smet.correct_gradients(model, sgd(model), x, depthwise=True).corrected == ("depth.weight", "point.weight")


def test_several_optimizers() -> None:
    model = sparse_net()
    head = {id(p) for p in model.head.parameters()} | {id(p) for p in model.conv.parameters()}
    first = torch.optim.SGD([p for p in model.parameters() if id(p) not in head], lr=0.1)
    second = torch.optim.Adam([p for p in model.parameters() if id(p) in head])
    with pytest.warns(UserWarning, match="Adam divides by the size of the gradient.* so 1 sites"):
        result = smet.correct_gradients(model, [first, second], images())
    assert result.corrected == ("point.weight", "linear.weight")
    alone = smet.correct_gradients(model, first, images())
    assert alone.sites["conv.weight"] == "not corrected: no optimizer that was given holds it"


def test_a_model_without_batch_norm() -> None:
    model = smet.sparsify(nn.Sequential(nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 4)), 0.5)
    with pytest.raises(ValueError, match="expected a model with batch norm, got one without; train it as it is"):
        smet.correct_gradients(model, sgd(model), torch.randn(5, 8))
    with (
        pytest.raises(ValueError, match="expected a model with batch norm"),
        pytest.warns(UserWarning, match="recorded"),
    ):
        smet.correct_gradients(model, sgd(model))


def test_evaluation_mode() -> None:
    model = sparse_net().eval()
    with pytest.raises(ValueError, match=r"in training mode, got all of it in evaluation mode; call model\.train\(\)"):
        smet.correct_gradients(model, sgd(model), images())
    model.train().norm.eval()
    result = smet.correct_gradients(model, sgd(model), images())
    assert result.sites["conv.weight"] == "not corrected: its output reaches a batch norm that is in evaluation mode"


@pytest.mark.parametrize(
    "example",
    [torch.zeros(9, 4, 7, 7), torch.zeros(1, 3, 3, 3), "text"],
    ids=["channels", "too small", "text"],
)
def test_an_example_that_does_not_fit(example: Any) -> None:
    model = sparse_net()
    with pytest.raises(ValueError, match="example: expected arguments that the model's forward takes, got an error"):
        smet.correct_gradients(model, sgd(model), example)
    assert not scaled(model)


def test_without_an_example_the_order_of_modules_decides() -> None:
    model = sparse_net()
    with pytest.warns(UserWarning, match=r"could not be recorded \(no example was given\), so the order of modules"):
        result = smet.correct_gradients(model, sgd(model))
    assert result.corrected == CORRECTED
    assert result.sites["conv.weight"] == f"{CORRECTED_TEXT} (judged by the order of modules, not by a forward)"
    assert "not by a forward" in result.sites["head.weight"]
    model.norm.eval()
    with pytest.warns(UserWarning, match="order of modules"):
        assert smet.correct_gradients(model, sgd(model)).corrected == CORRECTED[1:]


def test_a_model_that_cannot_be_recorded() -> None:
    with torch.device("meta"):
        model = smet.sparsify(LooksAtData(), 0.4, include=["conv.weight", "point.weight"])
    with pytest.warns(
        UserWarning, match=r"cannot run without data .* on the meta device there are none\), so the order"
    ):
        result = smet.correct_gradients(model, sgd(model), torch.empty(9, 3, 7, 7, device="meta"))
    assert result.corrected == CORRECTED[:2]


class NoModes(Net):
    """Runs only where no mode looks on, as code does that reads memory by address."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.utils._python_dispatch._get_current_dispatch_mode_stack():
            raise RuntimeError("somebody looks on")
        return super().forward(x)


def test_a_forward_that_bears_no_observer() -> None:
    model = smet.sparsify(NoModes(), 0.4, include=["conv.weight"])
    with pytest.warns(UserWarning, match=r"could not be recorded \(somebody looks on\), so the order of modules"):
        assert smet.correct_gradients(model, sgd(model), images().float()).corrected == ("conv.weight",)


def test_sync_batch_norm_without_a_process_group() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(sparse_net())
    with pytest.warns(UserWarning, match="SyncBatchNorm and there is no process group.*init_process_group first"):
        assert smet.correct_gradients(model, sgd(model), images()).corrected == CORRECTED


def test_lazy_batch_norm() -> None:
    model = smet.sparsify(nn.Sequential(nn.Linear(8, 12), nn.LazyBatchNorm1d()), 0.5)
    with pytest.raises(ValueError, match=r"correct_gradients: 1\.weight is not initialised yet; run a forward first"):
        smet.correct_gradients(model, torch.optim.SGD(model[0].parameters(), lr=0.1), torch.randn(5, 8))


def test_other_bad_input() -> None:
    model = sparse_net()
    with pytest.raises(ValueError, match="optimizer: expected"):
        smet.correct_gradients(model, "sgd", images())
    with pytest.raises(ValueError, match="expected a model with compact weights, got one with none"):
        smet.correct_gradients(Net(), sgd(model), images())
    with pytest.raises(ValueError, match="correct_gradients"):
        smet.correct_gradients(images(), sgd(model), images())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="depthwise"):
        smet.correct_gradients(model, sgd(model), images(), depthwise="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, lambda model: torch.compile(nn.DataParallel(model))])
def test_wrapped_models(wrap: Any) -> None:
    model = sparse_net()
    assert smet.correct_gradients(wrap(model), sgd(model), images()).corrected == CORRECTED
    assert scaled(model) == set(CORRECTED)


@pytest.mark.filterwarnings("error")
def test_a_dense_baseline() -> None:
    model = smet.sparsify(Net().double(), density=1.0)
    result = smet.correct_gradients(model, sgd(model), images())
    assert result.corrected == () and str(result) == "0 of 0 sites are corrected"

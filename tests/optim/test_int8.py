"""With moment_dtype="int8" moments take a byte each, scales stay in place, and all else works as with fp32."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smet_compile as smet
from smet_compile.ops import find_sites
from smet_compile.ops.kernels.native.build import library
from smet_compile.ops.law import SIGNED_CODES, UNSIGNED_CODES, decode
from tests.support.scratch import Scratch
from tests.support.slope import Slope, step_on
from tests.support.small_models import two_layers
from tests.support.snapshots import assert_same, same_bits, snapshot
from tests.support.training import train

block_shapes = pytest.mark.parametrize("block_shape", [1, (1, 4), (4, 3)], ids=str)


def make(
    block_shape: Any = 1, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[nn.Module, smet.ActiveAdamW]:
    torch.manual_seed(0)
    model = smet.sparsify(two_layers().to(dtype), density=0.5, block_shape=block_shape)
    return model, smet.ActiveAdamW(model, **{"lr": 1e-2, "warmup_steps": 3, "moment_dtype": "int8", **options})


@pytest.mark.parametrize("block_shape", [1, (1, 4), 16], ids=str)
def test_two_bytes_a_weight_and_two_scales_a_group(block_shape: Any) -> None:
    model = smet.sparsify(Slope(200, 300), density=0.25, block_shape=block_shape)
    optimizer = smet.ActiveAdamW(model, moment_dtype="int8")
    step_on(model, optimizer)
    site = find_sites(model)["weight"]
    state = optimizer.state[site.values]
    moments = sum(state[key].nbytes for key in ("exp_avg", "exp_avg_sq"))
    assert moments == 2 * site.values.numel()
    assert state["scales"].nbytes == 8 * site.layout.num_groups
    assert site.layout.num_groups == (13 * 19 if block_shape == 16 else -(-200 * 300 // 1024))


def test_plain_parameters_have_a_scale_for_1024_entries() -> None:
    model = smet.sparsify(nn.ModuleList([nn.Linear(8, 8), nn.Linear(50, 41)]), density=0.5, include="0")
    optimizer = smet.ActiveAdamW(model, moment_dtype="int8")
    (model[0].weight.sum() + model[1].weight.square().sum() + model[1].bias.sum()).backward()
    optimizer.step()
    assert optimizer.state[model[1].weight]["scales"].shape == (2, 3)
    assert optimizer.state[model[1].bias]["scales"].shape == (2, 1)
    assert optimizer.state[model[1].weight]["exp_avg"].dtype == torch.uint8


def test_fp64_weights_keep_fp64_moments() -> None:
    model, optimizer = make(dtype=torch.float64)
    train(model, optimizer)
    for state in optimizer.state.values():
        assert state["exp_avg"].dtype == torch.float64 and "scales" not in state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@block_shapes
def test_its_moments_are_those_of_fp32_but_for_their_rounding(block_shape: Any, dtype: torch.dtype) -> None:
    """After one step they are within half a unit of the last place, or a whole one with noise."""
    for stochastic, fraction in ((False, 1 / 16), (True, 1 / 8)):
        model, optimizer = make(block_shape, dtype, stochastic_rounding=stochastic)
        exact, other = make(block_shape, dtype, moment_dtype=None)
        train(model, optimizer), train(exact, other)
        for p, q in zip(find_sites(model).values(), find_sites(exact).values(), strict=True):
            state, expected = optimizer.state[p.values], other.state[q.values]
            scale = state["scales"].amax(1)
            for key, kind, largest in (
                ("exp_avg", SIGNED_CODES, scale[0]),
                ("exp_avg_sq", UNSIGNED_CODES, scale[1]),
            ):
                if p.layout.tiles:
                    positions = p.compact.mask().nonzero().squeeze(1)
                    largest = state["scales"][0 if kind.signed else 1][positions].view(-1, 1, 1)
                got = decode(state[key], largest, kind)
                error = (got - expected[key]).abs()
                assert bool((error <= fraction * expected[key].abs() + kind.smallest * largest).all())
                assert bool((error > 0).any())


@block_shapes
def test_a_topology_change_moves_codes_and_leaves_scales(block_shape: Any) -> None:
    model, optimizer = make(block_shape)
    manager = smet.TopologyManager(
        model, optimizer, auto_step=False, total_steps=100, every=4, drop_fraction=0.4, schedule="cosine"
    )
    train(model, optimizer, manager, steps=3)
    (model(torch.randn(9, 12)) ** 2).mean().backward()
    optimizer.step()
    sites = find_sites(model)
    before = {name: (s.compact.mask(), copy.deepcopy(dict(optimizer.state[s.values]))) for name, s in sites.items()}
    optimizer.zero_grad()
    assert manager.step() is not None
    for name, site in sites.items():
        mask, old = before[name]
        now, state = site.compact.mask(), optimizer.state[site.values]
        stayed, grown = (mask & now), (now & ~mask)
        assert bool(grown.any()) and bool(stayed.any())
        assert same_bits(state["scales"], old["scales"])
        for key in ("exp_avg", "exp_avg_sq"):
            assert same_bits(state[key][mask[now]], old[key][now[mask]])
            assert not state[key][grown[now]].any()


def test_a_state_goes_through_copies_and_files() -> None:
    model, optimizer = make()
    train(model, optimizer, steps=3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other, other_optimizer = make()
    other.load_state_dict(model.state_dict())
    other_optimizer.load_state_dict(torch.load(file, weights_only=True))
    copied, copied_optimizer = copy.deepcopy((model, optimizer))
    losses = train(model, optimizer, first=3, steps=3)
    for each, its_optimizer in ((other, other_optimizer), (copied, copied_optimizer)):
        assert train(each, its_optimizer, first=3, steps=3) == losses
        assert_same(snapshot(each, its_optimizer), snapshot(model, optimizer))


def test_second_moments_decay() -> None:
    """Rounded to nearest, 0.999 v would stay v under a scale that stays; with noise 500 steps leave 0.999^500 = 0.61.

    Some gradients stay, and hold the scales of all groups.
    """
    torch.manual_seed(0)
    model = smet.sparsify(Slope(128, 128, torch.rand(128, 128) + 0.5), density=0.5)
    optimizer = smet.ActiveAdamW(model, moment_dtype="int8", lr=0.0)
    step_on(model, optimizer)
    values = find_sites(model)["weight"].values
    start = second_moment(optimizer, values)
    model.slope[:, 1:].zero_()
    decays = find_sites(model)["weight"].compact.mask().nonzero().squeeze(1) % 128 > 0
    for _ in range(500):
        step_on(model, optimizer)
    ratio = (second_moment(optimizer, values) / start)[decays]
    assert ratio.std() > 0.01
    assert abs(ratio.mean() - 0.999**500) < 5 * ratio.std() / ratio.numel() ** 0.5
    assert not (optimizer.state[values]["exp_avg_sq"] == 0).any()


def second_moment(optimizer: smet.ActiveAdamW, values: Tensor) -> Tensor:
    """Returns the second moment of single weights, of which 1024 dense positions share a scale."""
    state = optimizer.state[values]
    positions = find_sites(optimizer._model)["weight"].compact.mask().nonzero().squeeze(1)
    return decode(state["exp_avg_sq"], state["scales"][1][positions // 1024], UNSIGNED_CODES).double()


@pytest.mark.parametrize("kernel", ["torch", "cpu_adamw"])
@pytest.mark.parametrize("block_shape", [1, (1, 16), 16], ids=str)
def test_a_step_makes_little_on_the_side(block_shape: Any, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its temporary tensors do not grow with the weight: no list of positions, no decoded moments of all of it."""
    if kernel == "cpu_adamw" and library("adamw") is None:
        pytest.skip("there is no compiler")
    monkeypatch.setenv("SMET_COMPILE_KERNEL", kernel)
    peaks = []
    for rows in (512, 2048):
        model = smet.sparsify(Slope(rows, 1024), density=0.5, block_shape=block_shape)
        optimizer = smet.ActiveAdamW(model, moment_dtype="int8")
        step_on(model, optimizer)
        model().backward()
        with Scratch() as scratch:
            optimizer.step()
        peaks.append(scratch.peak_bytes)
    assert peaks[1] <= 1.1 * peaks[0]
    assert (min(peaks) > 0) == (kernel == "torch")


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "fp32": ({"moment_dtype": None}, r"expected exp_avg of torch\.uint8 .*got torch\.float32.*same moment_dtype"),
    "tiles": ({"block_shape": (4, 4)}, r"0\.weight: expected exp_avg of torch\.uint8 and shape"),
}


@pytest.mark.parametrize("name", BAD)
def test_other_states_are_refused(name: str) -> None:
    options, match = BAD[name]
    model, optimizer = make(**options)
    train(model, optimizer)
    with pytest.raises(ValueError, match=match):
        make()[1].load_state_dict(optimizer.state_dict())


def test_scales_of_other_groups_are_refused() -> None:
    model, optimizer = make()
    train(model, optimizer)
    state = optimizer.state_dict()
    state["state"][0]["scales"] = torch.zeros(2, 7)
    with pytest.raises(ValueError, match=r"expected scales of torch\.float32 and shape \(2, 1\), got .*\(2, 7\)"):
        make()[1].load_state_dict(state)
    del state["state"][0]["scales"]
    with pytest.raises(ValueError, match=r"expected a state of .*scales"):
        make()[1].load_state_dict(state)

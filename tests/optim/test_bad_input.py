from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import smet_compile as smet
from tests.support.small_models import two_layers
from tests.support.states import Unchanged
from tests.support.training import train


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lr", -1.0),
        ("lr", float("nan")),
        ("betas", (1.0, 0.999)),
        ("betas", (0.9, -0.1)),
        ("eps", -1e-8),
        ("weight_decay", -0.1),
        ("warmup_steps", -1),
        ("warmup_steps", 1.5),
        ("warmup_steps", float("inf")),
        ("warmup_steps", True),
        ("initial_warmup_steps", -1),
        ("initial_warmup_steps", 0.5),
        ("initial_warmup_steps", "x"),
        ("initial_warmup_steps", 2**60),
        ("lr", float("inf")),
        ("lr", None),
        ("lr", "0.1"),
        ("lr", torch.tensor([0.1, 0.2])),
        ("lr", torch.tensor([0.1])),
        ("lr", torch.tensor(float("nan"))),
        ("lr", torch.tensor(0.1j)),
        ("eps", float("inf")),
        ("weight_decay", float("inf")),
        ("weight_decay", float("nan")),
        ("lr_density_exponent", float("nan")),
        ("lr_density_exponent", float("inf")),
        ("lr_density_exponent", "x"),
        ("lr_density_exponent", 1e6),
        ("betas", (0.9,)),
        ("betas", (0.9, 0.99, 0.999)),
        ("betas", ()),
        ("betas", 0.9),
        ("betas", {0.9, 0.99}),
        ("betas", ("0.9", 0.99)),
        ("stochastic_rounding", 0),
        ("seed", 1.5),
        ("seed", None),
        ("seed", 2**64),
        ("moment_dtype", torch.ones(2)),
        ("moment_dtype", torch.int8),
        ("moment_dtype", "int4"),
    ],
    ids=str,
)
def test_options_out_of_range(option: str, value: object) -> None:
    model = smet.sparsify(two_layers(), density=0.5)
    with pytest.raises(ValueError, match="beta" if option == "betas" else option):
        smet.ActiveAdamW(model, **{option: value})


@pytest.mark.parametrize(
    ("option", "value"),
    [("lr", float("nan")), ("betas", (0.9,)), ("initial_warmup_steps", 2.0), ("eps", True)],
    ids=str,
)
def test_options_of_a_group_out_of_range(option: str, value: object) -> None:
    model = smet.sparsify(two_layers(), density=0.5)
    first, *others = model.parameters()
    optimizer = smet.ActiveAdamW(others, model=model)
    with Unchanged(model, optimizer), pytest.raises(ValueError, match=option):
        optimizer.add_param_group({"params": [first], option: value})


@pytest.mark.parametrize("weight_decay", [float("nan"), float("inf"), -1, "x", None, True], ids=str)
def test_decay_groups(weight_decay: Any) -> None:
    with pytest.raises(ValueError, match="weight_decay: expected a finite number of at least 0"):
        smet.decay_groups(two_layers(), weight_decay)
    with pytest.raises(ValueError, match=r"decay_groups: expected a model \(torch.nn.Module\), got 3"):
        smet.decay_groups(3, 0.1)  # type: ignore[arg-type]


@pytest.mark.parametrize("option", ["warmup_steps", "initial_warmup_steps"])
def test_a_warmup_where_blocks_have_no_age(option: str) -> None:
    model = smet.sparsify(two_layers(), density=0.5)
    optimizer = smet.ActiveSGD(model, warmup_steps=0)
    train(model, optimizer, steps=1)
    optimizer.param_groups[0][option] = 5
    model(torch.randn(2, 12)).sum().backward()
    with (
        Unchanged(model, optimizer),
        pytest.raises(ValueError, match="expected warmup_steps and initial_warmup_steps of 0"),
    ):
        optimizer.step()


def test_param_groups_need_the_model() -> None:
    model = smet.sparsify(two_layers(), density=0.5)
    with pytest.raises(ValueError, match="model"):
        smet.ActiveAdamW([{"params": list(model.parameters())}])


def test_a_state_of_another_model() -> None:
    model = smet.sparsify(two_layers(), density=0.5)
    other = smet.sparsify(nn.Sequential(nn.Linear(12, 20)), density=0.5)
    optimizer = smet.ActiveAdamW(model)
    with pytest.raises(ValueError, match=r"(?i)param"):
        optimizer.load_state_dict(smet.ActiveAdamW(other).state_dict())


def test_a_sparse_gradient() -> None:
    """A sparse gradient in the last parameter is refused before any other parameter is moved."""
    model = nn.ModuleList([nn.Linear(6, 6), nn.LayerNorm(6), nn.Embedding(5, 6, sparse=True)])
    smet.sparsify(model, density=0.5, include="0")
    optimizer = smet.ActiveAdamW(model)
    model[1](model[0](model[2](torch.arange(4)))).square().sum().backward()
    with Unchanged(model, optimizer), pytest.raises(ValueError, match=r"2\.weight.*sparse"):
        optimizer.step()


def state_of(make: Callable[[nn.Module], torch.optim.Optimizer]) -> dict[str, Any]:
    model = smet.sparsify(two_layers(), density=0.5)
    optimizer = make(model)
    train(model, optimizer, steps=2)
    return optimizer.state_dict()


def of_torch(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters())


def without_warmup() -> dict[str, Any]:
    state = state_of(smet.ActiveAdamW)
    for group in state["param_groups"]:
        del group["warmup_steps"]
    return state


BAD_STATES: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "of_torch": (lambda: state_of(of_torch), "param_groups.*ActiveAdamW"),
    "of_torch_in_our_groups": (
        lambda: state_of(smet.ActiveAdamW) | {"state": state_of(of_torch)["state"]},
        r"0\.(weight|bias): expected a state of .*same optimizer",
    ),
    "other_moment_dtype": (
        lambda: state_of(lambda model: smet.ActiveAdamW(model, moment_dtype=torch.bfloat16)),
        r"0\.(weight|bias): expected exp_avg of torch\.float32.*got torch\.bfloat16",
    ),
    "eight_bits": (
        lambda: state_of(lambda model: smet.ActiveAdamW(model, moment_dtype="int8")),
        r"0\.(weight|bias): expected exp_avg of torch\.float32.*got torch\.uint8.*same moment_dtype",
    ),
    "without_warmup_steps": (without_warmup, "param_groups.*warmup_steps"),
}


@pytest.mark.parametrize("name", list(BAD_STATES))
def test_a_state_that_is_not_ours_is_refused_when_loaded(name: str) -> None:
    make_state, match = BAD_STATES[name]
    model = smet.sparsify(two_layers(), density=0.5)
    optimizer = smet.ActiveAdamW(model)
    train(model, optimizer, steps=2)
    with Unchanged(model, optimizer), pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(make_state())


@pytest.mark.parametrize("moment_dtype", [None, "int8"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_model_that_was_converted_after_the_first_step(moment_dtype: Any, fused: bool) -> None:
    model = smet.sparsify(two_layers(), density=0.5)
    optimizer = smet.ActiveAdamW(model, moment_dtype=moment_dtype)
    step = smet.compile_train_step(model, optimizer, lambda model, x: model(x).square().mean())

    def make_step(x: torch.Tensor) -> None:
        if fused:
            step(x)
        else:
            model(x).square().mean().backward()
            optimizer.step()

    x = torch.randn(3, model[0].in_features)
    with torch.compiler.set_stance("force_eager"):
        make_step(x)
        model.double()
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        with pytest.raises(ValueError, match=r"^\d\.\w+: expected exp_avg of .*64 .* converted after .* anew$"):
            make_step(x.double())
        assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
        model.float()
        optimizer.zero_grad()
        make_step(x)
        assert int(optimizer.state[model[0].bias]["step"]) == 2


@pytest.mark.parametrize(
    ("make_params", "got"), [(list, "an empty list"), (lambda: list(two_layers().parameters()), "parameters alone")]
)
def test_parameters_without_a_model_are_named(make_params: Callable[[], list[Any]], got: str) -> None:
    with pytest.raises(ValueError, match=f"ActiveAdamW: expected a model, or .*, got {got}; pass"):
        smet.ActiveAdamW(make_params())


@pytest.mark.parametrize("option", ["amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused"])
def test_an_option_of_torch_alone_is_to_be_left_out(option: str) -> None:
    with pytest.raises(TypeError, match=rf"ActiveAdamW: got {option}=\w+, an option of torch.optim .*; leave it out"):
        smet.ActiveAdamW(two_layers(), **{option: True})

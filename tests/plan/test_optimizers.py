"""Planned moments of each optimizer equal counts by hand: AdamW has two everywhere, Lion and SGD one, SCALE few."""

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import smet_compile as smet
from smet_compile.optim import OPTIMIZERS
from smet_compile.optim.parameters import find_output_head
from smet_compile.plan.stored import Recipe, Stored, bytes_of, state_slots
from tests.models.classes import SMALL

COMPACT, DENSE, HEAD, VECTORS = 256, 32 * 16, 8 * 32, 32 + 32 + 8
"""``Net`` stores so many entries at density 0.25 in ``body``, ``side``, ``head`` and the three biases."""
ENTRIES = COMPACT + DENSE + HEAD + VECTORS
VALUES = {
    "adamw": 2 * ENTRIES,
    "lion": ENTRIES,
    "sgd": ENTRIES,
    "scale": HEAD + 2 * VECTORS,
}
SCALES = {"adamw": 2 * 6, "lion": 6, "sgd": 6, "scale": 1 + 2 * 3}
"""Each of the six parameters has one group of up to 1024 entries, and so one scale for each slot."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(32, 32)
        self.side = nn.Linear(16, 32)
        self.head = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.body(x) + self.side(x[:, :16]))
        return y


def net_plan(model: nn.Module | None = None, **options: Any) -> smet.Plan:
    selection = {"density": 0.25, "include": ["body"]} if model is None else {}
    return smet.plan(
        Net() if model is None else model,
        batch=2,
        compiled=False,
        inputs=lambda batch, sequence: torch.zeros(batch, 32),
        loss_fn=lambda model, x: model(x).square().mean(),
        **(selection | options),
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_moments_by_hand(optimizer: str) -> None:
    assert net_plan(optimizer=optimizer).sparse.stored["moments"] == 4 * VALUES[optimizer]
    assert net_plan(optimizer=optimizer, moment_dtype="bfloat16").sparse.stored["moments"] == 2 * VALUES[optimizer]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_moments_of_8_bits_have_a_scale_for_each_slot(optimizer: str) -> None:
    moments = net_plan(optimizer=optimizer, moment_dtype="int8").sparse.stored["moments"]
    assert moments == VALUES[optimizer] + 4 * SCALES[optimizer]


@pytest.mark.parametrize("moment_dtype", ["float32", "int8"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_formulas_agree(optimizer: str, moment_dtype: Any) -> None:
    plan = net_plan(optimizer=optimizer, moment_dtype=moment_dtype)
    assert abs(formula_value(plan, "moments") - plan.sparse.stored["moments"]) <= plan.rounding_bytes
    assert formula_value(plan, "weights") == plan.sparse.stored["weights"]


def formula_value(plan: smet.Plan, kind: str) -> float:
    values = {symbol: plan.symbols.get(symbol, plan.density) for symbol in plan.formulas[kind].free_symbols}
    return float(plan.formulas[kind].subs(values))


def test_symbols_name_the_weights_with_one_and_two_slots() -> None:
    plan = net_plan(optimizer="scale")
    assert str(plan.formulas["moments"]) == "4*n_dense_1_slot + 8*n_dense_2_slots"
    counts = {str(symbol): count for symbol, count in plan.symbols.items()}
    assert (counts["n_dense_1_slot"], counts["n_dense_2_slots"]) == (HEAD, VECTORS)
    assert str(net_plan(optimizer="lion").formulas["moments"]) == "4*d*n_sparse + 4*n_dense"


def test_all_else_that_is_stored_is_the_same() -> None:
    """The dense training in the plan is AdamW's always."""
    plans = [net_plan(optimizer=optimizer) for optimizer in OPTIMIZERS]
    for plan in plans[1:]:
        others = {"moments": 0, "ages": 0}
        assert plan.sparse.stored | others == plans[0].sparse.stored | others
        is_scale = "optimizer scale" in plan.title  # it needs no ages without warm-up
        assert (plan.sparse.stored["ages"] < plans[0].sparse.stored["ages"]) == is_scale
        assert plan.dense == plans[0].dense


def test_the_title_names_the_optimizer_unless_it_is_adamw() -> None:
    assert "float32, moments float32; eager" in net_plan().title
    assert "float32, optimizer lion, moments float32; eager" in net_plan(optimizer="lion").title


def test_fewer_moments_leave_room_for_more_density() -> None:
    found = {name: net_plan(density=None, fits="23kB", optimizer=name).density for name in ("adamw", "lion", "scale")}
    assert found["adamw"] < found["lion"] < found["scale"]


@pytest.mark.parametrize("optimizer", ["adam", "AdamW", None, 3, ["lion"]], ids=str)
def test_an_unknown_optimizer_is_refused(optimizer: Any) -> None:
    with pytest.raises(ValueError, match="optimizer: expected one of adamw, lion, sgd, scale, got"):
        net_plan(optimizer=optimizer)


def test_dense_training_by_torch_has_two_moments_in_the_dtype_of_the_weights() -> None:
    recipe = Recipe("int8", fused_update=False, by_torch=True)
    assert bytes_of(Stored("bias", 10, torch.bfloat16, is_vector=True), recipe)["moments"] == 2 * 10 * 2


def test_a_frozen_parameter_has_no_slot() -> None:
    frozen = Stored("weight", 10, torch.float32, trained=False)
    assert all(Recipe(optimizer=each).slots(frozen) == 0 for each in OPTIMIZERS)


def test_formulas_leave_frozen_compact_weights_out() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    smet.sparsify(model, 0.25)
    model[0].requires_grad_(False)
    for optimizer, slots in (("adamw", 2), ("lion", 1)):
        plan = net_plan(model, optimizer=optimizer)
        assert plan.sparse.stored["moments"] == 4 * slots * (256 + 32)
        for kind in ("weights", "gradients", "moments"):
            assert formula_value(plan, kind) == plan.sparse.stored[kind]


def slots_by_name(model: nn.Module) -> dict[str, int]:
    head = find_output_head(model)
    return {
        name: state_slots("scale", Stored(name, each.numel(), each.dtype, None, 0, True, each.dim() < 2, each is head))
        for name, each in model.named_parameters()
    }


def test_scale_has_slots_for_the_head_and_for_vectors() -> None:
    assert slots_by_name(Net()) == {
        "body.weight": 0, "body.bias": 2, "side.weight": 0, "side.bias": 2, "head.weight": 1, "head.bias": 2,
    }  # fmt: skip


def test_the_head_is_the_one_that_the_model_names() -> None:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL))
    model.register_module("after", nn.Linear(4, 4))
    assert find_output_head(model) is model.lm_head.weight
    assert find_output_head(nn.Sequential(model, nn.Linear(4, 4))) is model.lm_head.weight
    tied = hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, tie_word_embeddings=True))
    assert find_output_head(tied) is tied.get_input_embeddings().weight


def test_a_compact_head_that_the_model_names_is_the_head() -> None:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL))
    smet.sparsify(model, 0.5, include=["lm_head"])
    head: Any = model.lm_head
    assert find_output_head(model) is head.parametrizations.weight.original


def test_else_the_head_is_the_last_matrix() -> None:
    model: Any = Net()
    assert find_output_head(model) is model.head.weight
    smet.sparsify(model, 0.5, include=["head"])
    assert find_output_head(model) is model.head.parametrizations.weight.original
    assert find_output_head(nn.LayerNorm(8)) is None


def test_the_head_of_a_model_that_cannot_name_it_is_its_last_matrix() -> None:
    class Odd(Net):
        def get_output_embeddings(self) -> nn.Module:
            raise RuntimeError("there is no head")

    model = Odd()
    assert find_output_head(model) is model.head.weight

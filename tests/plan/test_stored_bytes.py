"""Planned bytes of what is stored equal, kind by kind, those of the tensors after a real step."""

from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import smet_compile as smet
from tests.models.classes import REAL_MODELS, SMALL
from tests.plan.measured import Gradients, bytes_by_kind, eager_step, make

FP32, BF16 = torch.float32, torch.bfloat16
ON_PIXELS = {
    "inputs": lambda batch, sequence: {
        "pixel_values": torch.zeros(batch, 3, 8, 8),
        "labels": torch.zeros(batch, dtype=torch.int64),
    }
}


def wide() -> nn.Module:
    """Has weights of several tiles of 64, some of which hang over the edge."""
    config = SMALL | {"hidden_size": 160, "num_hidden_layers": 1, "intermediate_size": 203}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**config))


def planned(model: nn.Module, name: str, **options: Any) -> smet.Plan:
    options = {"compiled": False} | options
    if name == "vit":
        dtype = next(model.parameters()).dtype
        pixels = ON_PIXELS["inputs"]
        return smet.plan(
            model, batch=2, inputs=lambda b, s: pixels(b, s) | {"pixel_values": torch.zeros(b, 3, 8, 8, dtype=dtype)},
            **options,
        )  # fmt: skip
    return smet.plan(model, batch=2, sequence=10, **options)


def stored(model: nn.Module, name: str, optimizer: torch.optim.Optimizer) -> Any:
    """Returns the bytes that are stored after one eager step."""
    dtype, gradients = next(model.parameters()).dtype, Gradients(optimizer)
    batch = REAL_MODELS[name].batch()
    eager_step(model, optimizer, {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()})
    return bytes_by_kind(model, optimizer, gradients.of)


@pytest.mark.parametrize(
    ("name", "block_shape", "dtype"),
    [
        ("llama", 1, FP32),
        ("gpt2", (1, 16), BF16),
        ("bert", 16, FP32),
        ("vit", (1, 16), FP32),
        pytest.param("t5", 1, BF16, marks=pytest.mark.slow),
        ("mixtral", 16, FP32),
    ],
    ids=str,
)
def test_stored_bytes_of_real_models(name: str, block_shape: Any, dtype: torch.dtype) -> None:
    model = make(REAL_MODELS[name].make, dtype, None)
    plan = planned(model, name, density=0.4, block_shape=block_shape)
    smet.sparsify(model, 0.4, block_shape=block_shape)
    assert plan.sparse.stored == stored(model, name, smet.ActiveAdamW(model))
    assert plan.sparse.stored["index"] > 0


@pytest.mark.parametrize(("name", "dtype"), [("llama", FP32), ("gpt2", BF16)], ids=str)
def test_stored_bytes_of_dense_training(name: str, dtype: torch.dtype) -> None:
    model = make(REAL_MODELS[name].make, dtype, None)
    plan = planned(model, name, density=1)
    assert plan.dense.stored == stored(model, name, torch.optim.AdamW(model.parameters(), fused=True))
    model = make(REAL_MODELS[name].make, dtype, None)
    assert plan.sparse.stored == stored(model, name, smet.ActiveAdamW(model))


@pytest.mark.parametrize(
    ("block_shape", "moment_dtype"),
    [(1, "int8"), ((1, 16), BF16), ((1, 16), "int8"), (16, None), (64, "int8")],
    ids=str,
)
def test_moments_of_every_dtype(block_shape: Any, moment_dtype: Any) -> None:
    model = make(wide, BF16, None)
    plan = planned(model, "llama", density=0.4, block_shape=block_shape, moment_dtype=moment_dtype)
    smet.sparsify(model, 0.4, block_shape=block_shape)
    assert plan.sparse.stored == stored(model, "llama", smet.ActiveAdamW(model, moment_dtype=moment_dtype))


@pytest.mark.parametrize(
    "options",
    [
        {"distribution": "erk"},
        {"rules": {"*.q_proj": 0.1, "*.down_proj": 1}},
        {"exclude": "*gate_proj*", "distribution": "er"},
        {"include": ["*embed_tokens*", "*_proj*"]},
    ],
    ids=str,
)
def test_stored_bytes_of_every_selection(options: dict[str, Any]) -> None:
    model = make(wide, FP32, None)
    plan = planned(model, "llama", density=0.4, block_shape=16, **options)
    smet.sparsify(model, 0.4, block_shape=16, **options)
    assert plan.sparse.stored == stored(model, "llama", smet.ActiveAdamW(model))


def test_frozen_parameters_have_neither_gradient_nor_moments() -> None:
    model = make(wide, FP32, None)
    model.get_input_embeddings().requires_grad_(False)  # type: ignore[operator]
    model.model.layers[0].mlp.requires_grad_(False)
    plan = planned(model, "llama", density=0.4)
    smet.sparsify(model, 0.4)
    assert plan.sparse.stored == stored(model, "llama", smet.ActiveAdamW(model))


@pytest.mark.parametrize(
    ("block_shape", "moment_dtype", "options"),
    [
        (1, "int8", {}),
        ((1, 16), None, {}),
        (16, "int8", {"distribution": "erk"}),
        (16, None, {"rules": {"*.q_proj": 0.1}}),
        (64, "int8", {}),
    ],
    ids=str,
)
def test_formulas_differ_by_rounding_alone(block_shape: Any, options: dict[str, Any], moment_dtype: Any) -> None:
    plan = planned(
        make(wide, BF16, None), "llama", density=0.37, block_shape=block_shape, moment_dtype=moment_dtype, **options
    )
    values = {**plan.symbols, "d": plan.density, "b": plan.batch, "s": plan.sequence}
    by_name = {symbol: values.get(symbol, values.get(str(symbol))) for kind in plan.sparse.stored
               for symbol in plan.formulas[kind].free_symbols}  # fmt: skip
    differences = {kind: plan.formulas[kind].subs(by_name) - exact for kind, exact in plan.sparse.stored.items()}
    assert sum(map(abs, differences.values())) <= plan.rounding_bytes
    assert plan.rounding_bytes < 0.3 * plan.sparse.persistent


def test_a_compact_model_is_planned_as_it_is_and_left_unchanged() -> None:
    model = make(wide, FP32, 0.5, block_shape=16)
    before, kinds = {k: v.clone() for k, v in model.state_dict().items()}, [type(m) for m in model.modules()]
    model.eval()
    plan = planned(model, "llama")
    after = model.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
    assert [type(m) for m in model.modules()] == kinds and not model.training
    assert plan.sparse.stored == stored(model.train(), "llama", smet.ActiveAdamW(model))

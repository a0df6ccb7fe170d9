"""The ratio of dense to sparse operations follows the bounds that are known for the presets at sequence 256."""

from typing import Any

import pytest

import smet_compile as smet
from smet_compile.ops import direct
from smet_compile.plan.formulas import symbols

BOUNDS = {"130m": (1.61, 2.32, 3.16), "7b": (1.95, 3.72, 8.18)}


@pytest.mark.parametrize("preset", BOUNDS)
def test_operations_agree_with_the_bounds(preset: str) -> None:
    """The bounds count only what attention needs: half of the square, and four products of it in backward. A plan
    counts what kernels with a mask do: all of the square, and five products, because scores are made again."""
    d, b, s, _ = symbols()
    plan = smet.plan(preset, 0.5, batch=1, sequence=256, compiled=False)
    operations = plan.formulas["operations"].subs(b, 1).expand()
    needed = (operations - operations.coeff(s, 2) * s**2 * 4 / 7).subs(s, 256)
    for density, bound in zip((0.5, 0.25, 0.1), BOUNDS[preset], strict=True):
        assert float(needed.subs(d, 1) / needed.subs(d, density)) == pytest.approx(bound, abs=0.01)
    assert plan.dense.operations == pytest.approx(float(operations.subs({s: 256, d: 1})))


def test_operations_are_those_counted_by_hand() -> None:
    """Each weight and token takes six. Attention takes two products of s x s x 32 in forward and five in backward, in
    each of two layers."""
    d, b, s, _ = symbols()
    plan = smet.plan("nano", 0.25, block_shape=8, batch=2, sequence=32, compiled=False, vocabulary=64)
    sparse, head = 2 * (4 * 32 * 32 + 3 * 32 * 88), 64 * 32
    expected = 6 * b * s * (sparse * d + head) + 2 * (2 + 5) * 2 * 32 * b * s**2
    rest = (plan.formulas["operations"] - expected).expand()
    assert rest.coeff(d) == rest.coeff(s, 2) == 0
    assert abs(rest.subs({b: 2, s: 32})) < 1e-3 * plan.sparse.operations, "rotary angles"


def test_an_eager_step_multiplies_directly() -> None:
    """So it takes as many operations as one that unpacks its weights, and less memory."""
    options: dict[str, Any] = {"block_shape": 8, "batch": 1, "sequence": 4, "compiled": False, "vocabulary": 64}
    plan = smet.plan("nano", 0.25, **options).sparse
    with direct.unpacked():
        unpacked = smet.plan("nano", 0.25, **options).sparse
    assert plan.operations == unpacked.operations
    assert plan.peak < unpacked.peak


@pytest.mark.parametrize("compiled", [False, True])
def test_experts_multiply_the_tokens_that_come_to_them(compiled: bool) -> None:
    """A token is multiplied by the three matrices of two experts of four, in each of two layers."""
    transformers = pytest.importorskip("transformers")
    hidden, inner, tokens, words = 32, 48, 2 * 16, 64
    config = transformers.MixtralConfig(
        vocab_size=words, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, num_local_experts=4, num_experts_per_tok=2, experts_implementation="grouped_mm",
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    plan = smet.plan(model, 0.25, block_shape=8, batch=2, sequence=16, compiled=compiled)
    layers = 6 * tokens * 2 * (4 * hidden**2 + 2 * 3 * hidden * inner)
    others = 6 * tokens * (2 * 4 * hidden + words * hidden) + 2 * (2 + 5) * 2 * hidden * 2 * 16**2
    rotary = pytest.approx(0, abs=1000)
    assert plan.dense.operations - (layers + others) == rotary
    assert plan.sparse.operations - (layers / 4 + others) == rotary

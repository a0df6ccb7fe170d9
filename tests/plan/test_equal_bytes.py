"""``plan`` finds the dense model of as many bytes, and says on which side a run is."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smet_compile as smet
from smet_compile.format import Layout
from smet_compile.ops.kernels.triton import supports
from smet_compile.plan.equal_bytes import ByWidth, EqualBytes, Operations, count_text
from smet_compile.plan.stored import resident_bytes

SETTING: dict[str, Any] = {"batch": 2, "sequence": 32, "compiled": False, "vocabulary": 256}
WIDTH, WORDS = 64, 100


class Small(nn.Module):
    """Has layers of one width between an embedding and a head, and no attention."""

    def __init__(self, width: int, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, width)
        self.layers = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(3)))
        self.head = nn.Linear(width, WORDS, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.layers(self.embedding(tokens)))
        return out

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def planned(density: float | None = 0.25, block_shape: int = 8, width: int = WIDTH, **options: Any) -> EqualBytes:
    model = options.pop("model", None) or Small(width)
    found = smet.plan(
        model, density, block_shape=block_shape, exclude="head",
        inputs=lambda batch, sequence: torch.zeros(batch, sequence, dtype=torch.int64),
        loss_fn=lambda model, tokens: model(tokens).square().mean(), batch=4, sequence=16,
        **{"compiled": False, "tokens": 1e6, **options},
    ).equal_bytes  # fmt: skip
    assert found is not None
    return found


def test_a_width_is_found_from_an_amount() -> None:
    amount = ByWidth(squared=3.0, linear=5.0)
    assert amount.at(2) == 3 * 4 + 5 * 2
    assert amount.width_of(amount.at(0.37)) == pytest.approx(0.37)
    assert ByWidth(3.0, 0.0).width_of(12) == 2 and ByWidth(0.0, 5.0).width_of(10) == 2


def test_the_dense_model_has_as_many_bytes_by_hand() -> None:
    """fp32 with gradients takes 16 bytes a weight, and 16 bytes of counts a parameter."""
    in_layers, around = 3 * WIDTH**2, 2 * WORDS * WIDTH
    found = planned()
    one, width = found.advantage, found.width
    values = 16 * (in_layers / 4 + around)
    assert values < found.num_bytes < 1.05 * values, "index, ages and counts"
    counts = 16 * (3 * width**2 + 2 * width)
    assert 16 * (in_layers * width**2 + around * width) + counts == pytest.approx(found.num_bytes)
    assert (one.num_weights, one.density) == (in_layers + around / 2, 0.25), "the head is not counted"
    assert one.dense_weights == pytest.approx(in_layers * width**2 + around / 2 * width)


def test_operations_by_hand() -> None:
    """Six for each weight and token: in layers, of which a quarter is active, and in the head."""
    tokens, found = 4 * 16, planned()
    layers, head = 6 * tokens * 3 * WIDTH**2, 6 * tokens * WORDS * WIDTH
    counted = found.operations
    assert (counted.compact, counted.others, counted.twin) == (layers / 4, head, layers + head)
    assert counted.dense == pytest.approx(layers * found.width**2 + head * found.width)


def test_the_time_of_tiles_and_of_single_weights() -> None:
    layers, head = 3 * WIDTH**2, WORDS * WIDTH
    tiles, single = planned(block_shape=16), planned(block_shape=1)
    dense = layers * tiles.width**2 + head * tiles.width
    assert tiles.blocks == "tiles" and tiles.sparse_efficiency == 0.5
    assert tiles.advantage.time_ratio == pytest.approx((layers / 4 / 0.5 + head) / dense)
    faster = planned(block_shape=16, sparse_efficiency=0.9)
    assert faster.advantage.time_ratio == pytest.approx((layers / 4 / 0.9 + head) / dense)
    dense = layers * single.width**2 + head * single.width
    assert single.blocks == "single weights" and single.sparse_efficiency is None
    assert single.advantage.time_ratio == pytest.approx((layers + head) / dense)
    assert planned(block_shape=1, sparse_efficiency=0.5).advantage.time_ratio < single.advantage.time_ratio
    narrow = planned(block_shape=8)
    assert narrow.blocks == "tiles" and narrow.sparse_efficiency is None, "no kernel multiplies them as tiles"


def test_the_assumed_speed_of_tiles_is_that_by_which_kernels_are_chosen() -> None:
    """So the plan and the choice of kernels cannot contradict each other."""
    for block_shape, dtype, expected in ((64, "bfloat16", 0.4), ((128, 256), "bfloat16", 0.55), (64, "float32", 0.5)):
        model = smet.plan("60m", 0.25, block_shape=block_shape, dtype=dtype, batch=1, compiled=False, tokens=1e9)
        assert model.equal_bytes is not None and model.equal_bytes.sparse_efficiency == expected
        layout, stored = Layout.of((512, 512), (64, 64) if block_shape == 64 else (128, 256)), getattr(torch, dtype)
        assert supports.tiles_are_profitable(stored, layout, expected - 0.01)
        assert not supports.tiles_are_profitable(stored, layout, expected)


def test_sparse_products_are_never_slower_than_those_of_the_twin() -> None:
    counted = Operations(compact=25, others=10, twin=110, dense=50)
    assert [counted.time_ratio(each) for each in (0.5, 0.1, None)] == [60 / 50, 110 / 50, 110 / 50]
    assert counted.efficiency_of(60 / 50) == pytest.approx(0.5)
    assert counted.efficiency_of(110 / 50) == 0, "the twin's products are fast enough"
    assert counted.efficiency_of(10 / 50) == math.inf, "all else takes that long"


def test_the_efficiency_that_breaks_even_does() -> None:
    """After few tokens, so that dense is ahead with slow tiles and sparse is with fast ones."""
    model = Small(4096)
    found = planned(0.25, 64, model=model.to("meta"), tokens=1e8)
    efficiency = found.break_even_efficiency
    assert found.at(1e8, efficiency).advantage.at_equal_time == pytest.approx(0, abs=1e-9)
    assert found.at(1e8, 1.2 * efficiency).advantage.at_equal_time > 0
    assert found.at(1e8, 0.8 * efficiency).advantage.at_equal_time < 0


def test_other_tokens_and_efficiencies_need_no_other_plan() -> None:
    found = planned().at(3e7, 0.9)
    assert found == planned(tokens=3e7, sparse_efficiency=0.9)
    assert planned().at(3e7) == planned(tokens=3e7)
    with pytest.raises(ValueError, match="sparse_efficiency: expected a number in"):
        found.at(3e7, 0)


def test_the_index_and_ages_of_single_weights_count() -> None:
    tiles, single = planned(), planned(block_shape=1)
    assert single.num_bytes > tiles.num_bytes and single.width > tiles.width
    assert single.advantage.at_equal_tokens < tiles.advantage.at_equal_tokens


@pytest.mark.parametrize(
    "recipe", [{"moment_dtype": "int8"}, {"optimizer": "lion"}, {"dtype": "bfloat16"}, {"optimizer": "sgd"}], ids=str
)
def test_both_models_have_one_recipe(recipe: dict[str, Any]) -> None:
    """So hardly anything but the sizes of lists and ages depends on it."""
    found = planned(**recipe)
    assert found.num_bytes < planned().num_bytes
    assert found.width == pytest.approx(planned().width, rel=0.02)


def test_no_gradient_counts_where_updates_in_backward_use_it_up() -> None:
    model = Small(WIDTH)
    fused = planned(model=model, compiled=True)
    kept = planned(model=model, compiled=True, fused_update=False)
    assert kept.num_bytes - fused.num_bytes == 4 * 3 * WIDTH**2 // 4
    in_layers, around, width = 3 * WIDTH**2, 2 * WORDS * WIDTH, fused.width
    counts = 16 * (3 * width**2 + 2 * width)
    assert 12 * in_layers * width**2 + 16 * around * width + counts == pytest.approx(fused.num_bytes)


def test_a_tied_head_is_an_embedding_and_multiplies() -> None:
    found = planned(model=Small(WIDTH, tied=True))
    assert found.advantage.num_weights == 3 * WIDTH**2 + WORDS * WIDTH
    assert found.operations.others == 6 * 4 * 16 * WORDS * WIDTH


def test_layers_that_stay_dense_raise_the_density() -> None:
    found = planned(rules={"layers.0": 1.0})
    assert found.advantage.density == pytest.approx((1 + 0.25 + 0.25) / 3)


def test_attention_grows_with_the_width() -> None:
    """Planned at half the width: as many layers, heads of the same size, half of the features between."""
    transformers = pytest.importorskip("transformers")

    def llama(hidden: int) -> nn.Module:
        with torch.device("meta"):
            return transformers.LlamaForCausalLM(
                transformers.LlamaConfig(
                    vocab_size=96, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2,
                    num_attention_heads=hidden // 16, use_cache=False,
                )
            )  # fmt: skip

    setting = {"block_shape": 8, "batch": 2, "sequence": 64, "compiled": False, "tokens": 1e6}
    found = smet.plan(llama(128), 0.25, **setting).equal_bytes
    narrow = smet.plan(llama(64), 0.25, **setting).equal_bytes
    assert found is not None and narrow is not None
    counted = found.operations
    at_width = _at_width_of(found, counted)
    assert at_width(0.5) == pytest.approx(narrow.operations.twin, rel=1e-3)
    assert at_width(1.0) == pytest.approx(counted.twin)


def _at_width_of(found: EqualBytes, counted: Operations) -> Any:
    """Solves for both terms from the operations at width 1 and at that of the dense model."""
    width = found.width
    squared = (counted.dense - counted.twin * width) / (width**2 - width)
    return lambda at: squared * at**2 + (counted.twin - squared) * at


def test_what_lies_outside_the_fit_is_named() -> None:
    found = planned()
    assert [each.split(":")[0] for each in found.outside_fit] == ["weights", "tokens"]
    assert "fitted from 27M to 1.99B" in found.outside_fit[0]
    inside = smet.plan("130m", 0.25, block_shape=64, batch=1, compiled=False, tokens=2e9).equal_bytes
    assert inside is not None and inside.outside_fit == []
    thin = smet.plan("130m", 0.05, block_shape=64, batch=1, compiled=False, tokens=2e9).equal_bytes
    assert thin is not None and any(each.startswith("density: 0.049") for each in thin.outside_fit)
    frozen = Small(WIDTH)
    frozen.embedding.weight.requires_grad_(False)
    assert planned(model=frozen).outside_fit[-1] == "weights that are not trained"


def test_a_mixture_of_experts_lies_outside_the_fit() -> None:
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(
            transformers.MixtralConfig(
                vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, num_local_experts=4,
            )
        )  # fmt: skip
    plan = smet.plan(model, 0.25, block_shape=16, batch=2, sequence=32, compiled=False, tokens=1e9)
    assert plan.equal_bytes is not None and "a mixture of experts" in plan.equal_bytes.outside_fit
    assert "; a mixture of experts" in plan.equal_bytes_table()


def test_the_plan_prints_it_only_when_asked() -> None:
    silent = smet.plan("nano", 0.25, block_shape=8, **SETTING)
    assert silent.equal_bytes is None and silent.equal_bytes_table() == "" and "as many bytes" not in str(silent)
    asked = smet.plan("nano", 0.25, block_shape=8, tokens=1e9, **SETTING)
    assert str(asked) == f"{silent}\n\n{asked.equal_bytes_table()}"
    assert asked.equal_bytes_table() in asked._repr_html_()
    assert len(asked.to_pandas()) == len(silent.to_pandas())


def test_the_lines_say_the_side_and_what_is_assumed() -> None:
    options: dict[str, Any] = {"batch": 1, "compiled": False, "tokens": 8e9, "sparse_efficiency": 0.7}
    table = smet.plan("1b", 0.25, block_shape=64, **options).equal_bytes_table().splitlines()
    assert "times as wide" in table[0] and table[0].endswith("weights for 1.27B at density 0.25")
    assert table[2].split()[:2] == ["equal", "tokens"] and table[2].endswith("sparse is ahead")
    assert table[3].split()[:2] == ["equal", "time"] and table[3].endswith("too close to tell")
    assert any(line.startswith("to the loss of the sparse model: the dense one takes 1.") for line in table)
    assert any(line.startswith("tiles have to keep 0.") for line in table)
    assumed = " ".join(line for line in table if line.startswith("assumed: "))
    for part in ("2606.01155", "single weights", "tiles learn like", "at 0.7 of", "activations are not counted"):
        assert part in assumed
    assert any(line.startswith("uncertain: ") and "0.03" in line for line in table)


def test_small_models_with_many_words_are_on_the_dense_side() -> None:
    plan = smet.plan("60m", 0.1, batch=1, compiled=False, tokens=2e9)
    assert plan.equal_bytes is not None and plan.equal_bytes.advantage.at_equal_tokens < -0.03
    assert "equal tokens" in plan.equal_bytes_table() and "dense is ahead" in plan.equal_bytes_table()
    assert "tiles" not in plan.equal_bytes_table()


def test_a_dense_model_has_nothing_to_compare() -> None:
    plan = smet.plan("nano", 1.0, block_shape=8, tokens=1e9, **SETTING)
    assert plan.equal_bytes is None and any("no weight is sparse" in warning for warning in plan.warnings)


def test_a_compact_model_is_compared_as_it_is() -> None:
    with pytest.warns(UserWarning, match="the model's matrices as a whole"):
        model = smet.sparsify(Small(WIDTH), 0.25, block_shape=8, exclude="head")
    found = smet.plan(
        model, inputs=lambda batch, sequence: torch.zeros(batch, sequence, dtype=torch.int64),
        loss_fn=lambda model, tokens: model(tokens).square().mean(),
        batch=4, sequence=16, compiled=False, tokens=1e6,
    )  # fmt: skip
    assert found.equal_bytes == planned()
    assert found.equal_bytes is not None
    assert found.equal_bytes.num_bytes == sum(found.sparse.stored.values()) >= resident_bytes(found.sparse.stored)


@pytest.mark.parametrize(
    ("number", "text"), [(1.34e9, "1.34B"), (999.6e6, "1B"), (27e6, "27M"), (0.25, "0.25"), (2e12, "2T"), (5e3, "5k")]
)
def test_counts_are_short(number: float, text: str) -> None:
    assert count_text(number) == text

"""A model that was made sparse on shapes alone gets the weights that it would have got on the device itself."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import smet_compile as smet
from smet_compile.ops import find_sites
from tests.support.small_models import two_layers
from tests.support.snapshots import assert_same, snapshot
from tests.support.training import train


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 8))


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 5))


class Residual(nn.Module):
    """Draws the compact weight of a child, as GPT-2 does, or changes it."""

    def __init__(self, factor: float | None = None) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)
        self.factor = factor
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.factor is None:
            nn.init.normal_(self.down.weight, std=0.05)
        else:
            self.down.weight.data.mul_(self.factor)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer, self.head = nn.Embedding(9, 12), nn.Linear(12, 12), nn.Linear(12, 9)
        self.embedding.weight = self.head.weight


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 64}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes))


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    return MixtralForCausalLM(MixtralConfig(num_hidden_layers=1, num_local_experts=4, vocab_size=64, **sizes))


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "linears": (two_layers, {}),
    "tiles": (two_layers, {"block_shape": (4, 4)}),
    "magnitude": (two_layers, {"select": "magnitude", "block_shape": (1, 4)}),
    "not_rescaled": (two_layers, {"rescale": False}),
    "batch_norm": (normed, {}),
    "convolutions": (convolutions, {"include": ["*.weight"]}),
    "attention": (lambda: nn.MultiheadAttention(16, 2), {}),
    "encoder_layer": (lambda: nn.TransformerEncoderLayer(16, 2, 32), {}),
    "drawn_by_a_parent": (Residual, {"block_shape": (4, 4)}),
    "changed_by_a_parent": (lambda: Residual(0.5), {"rescale": False}),
    "tied": (Tied, {}),
    "llama": (llama, {}),
    "mixtral": (mixtral, {}),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:sparsify")
def test_equal_to_sparsify_on_the_device(name: str) -> None:
    make, options = MODELS[name]
    torch.manual_seed(5)
    real = smet.sparsify(make(), 0.5, seed=5, **options)
    with torch.device("meta"):
        drawn = make()
    smet.sparsify(drawn, 0.5, seed=1, **options)
    random_state = torch.get_rng_state()
    assert smet.materialize(drawn, seed=5, device="cpu") is drawn
    assert torch.equal(torch.get_rng_state(), random_state)
    assert_same(dict(drawn.state_dict()), dict(real.state_dict()))
    assert [name for name, _ in drawn.named_parameters()] == [name for name, _ in real.named_parameters()]
    non_persistent = {n: b for n, b in real.named_buffers() if not n.endswith("lists")}
    assert_same({n: b for n, b in drawn.named_buffers() if not n.endswith("lists")}, non_persistent)


def test_after_to_empty_it_trains_as_the_other() -> None:
    torch.manual_seed(3)
    real = smet.sparsify(two_layers(), 0.4, seed=3)
    with torch.device("meta"):
        drawn = two_layers()
    smet.materialize(smet.sparsify(drawn, 0.4).to_empty(device="cpu"), seed=3)
    losses = []
    for model in (real, drawn):
        optimizer = smet.ActiveAdamW(model, lr=1e-2)
        losses.append(train(model, optimizer, smet.TopologyManager(model, optimizer, total_steps=40, every=2), steps=5))
    assert losses[0] == losses[1]
    assert_same(snapshot(drawn), snapshot(real))


def test_a_function_of_ones_own() -> None:
    def fill(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.constant_(module.weight, 0.25)
            module.bias.data.zero_()

    with torch.device("meta"):
        model = two_layers()
    smet.materialize(smet.sparsify(model, 0.25, rescale=True), device="cpu", initialize=fill)
    for site in find_sites(model).values():
        scale = math.sqrt(site.layout.num_blocks / site.num_active)
        assert torch.equal(site.values.detach(), torch.full_like(site.values, 0.25 * scale))
        assert int(site.mask().sum()) == site.num_active


def test_what_nothing_writes_is_named() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.scale = nn.Parameter(torch.ones(8))
            self.register_buffer("table", torch.arange(4))

    with torch.device("meta"):
        model = Scaled()
    smet.sparsify(model, 0.5)
    with pytest.raises(
        ValueError, match=r"materialize: scale, table were written by no reset_parameters .* initialize="
    ):
        smet.materialize(model, device="cpu")
    with pytest.raises(ValueError, match="has no data yet"):
        model.linear(torch.ones(2, 8))

    def ones(module: nn.Module) -> None:
        for tensor in (*module.parameters(False), *module.buffers(False)):
            tensor.data.fill_(1)
        if isinstance(module, nn.Linear):
            nn.init.ones_(module.weight)

    smet.materialize(model, initialize=ones)
    assert torch.equal(model.scale, torch.ones(8)) and torch.equal(model.table, torch.ones(4, dtype=torch.int64))
    model.linear(torch.ones(2, 8))


class Masked(nn.Module):
    def __init__(self, persistent: bool, writes: Any = None) -> None:
        super().__init__()
        self.linear, self.writes = nn.Linear(8, 8), writes
        self.register_buffer("mask", torch.ones(4, 4, dtype=torch.bool).tril(), persistent=persistent)

    def reset_parameters(self) -> None:
        if self.writes is not None:
            self.writes(self)


@pytest.mark.parametrize("persistent", [False, True])
def test_truth_values_that_nothing_writes_are_named(persistent: bool) -> None:
    with torch.device("meta"):
        model = Masked(persistent)
    smet.sparsify(model, 0.5)
    with pytest.raises(ValueError, match=r"materialize: mask were written by no reset_parameters .* initialize="):
        smet.materialize(model, device="cpu")


WRITES: dict[str, tuple[Any, torch.Tensor]] = {
    "true": (lambda m: m.mask.fill_(True), torch.ones(4, 4, dtype=torch.bool)),
    "false": (lambda m: m.mask.zero_(), torch.zeros(4, 4, dtype=torch.bool)),
    "copied": (lambda m: m.mask.copy_(torch.ones(4, 4).triu()), torch.ones(4, 4).triu().bool()),
    "replaced": (lambda m: setattr(m, "mask", torch.ones(4, 4).tril() > 0), torch.ones(4, 4).tril().bool()),
}


@pytest.mark.parametrize("how", WRITES)
def test_truth_values_that_are_written_are_kept(how: str) -> None:
    writes, expected = WRITES[how]
    with torch.device("meta"):
        model = Masked(False, writes)
    smet.materialize(smet.sparsify(model, 0.5), device="cpu")
    assert torch.equal(model.mask, expected)


def test_weights_that_are_there_are_not_drawn_anew() -> None:
    model = smet.sparsify(two_layers(), 0.4)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"0\.weight: expected a weight without data"):
        smet.materialize(model)
    assert_same(snapshot(model), before)
    with pytest.raises(ValueError, match="materialize: expected a model with compact weights"):
        smet.materialize(two_layers())

"""In models that people use it is known what feeds what, nothing is lost, and what is called dead has no gradient."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import smet_compile as smet
from smet_compile.ops import find_sites
from tests.models.classes import CAUSAL, REAL_MODELS, llama, mixtral

SMALL_MODEL = pytest.mark.filterwarnings("ignore:sparsify. the model's matrices as a whole")
pytestmark = SMALL_MODEL
LAYER = "model.layers.{}.{}.weight"


def made(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = smet.sparsify(REAL_MODELS[name].make(), 0.3, block_shape=4)
    return model, REAL_MODELS[name].batch()


@pytest.mark.parametrize(("name", "training"), [*((name, True) for name in REAL_MODELS), ("bert", False)])
def test_every_op_is_known_and_every_site_lies_between_input_and_output(name: str, training: bool) -> None:
    model, batch = made(name)
    found = smet.inspect(model.train(training), **batch)
    assert [note for note in found.notes if "without data" not in note] == []
    assert found.notes == () or name == "mixtral"  # before torch 2.15 its grouped_mm without data took bf16 alone
    assert all(site.reach is not None for site in found.sites)
    assert found.path_log10_share is not None and -20 < found.path_log10_share < -2
    for site in found.sites:
        assert found.graph.in_degree(site.name) and found.graph.out_degree(site.name)


def test_the_graph_of_llama() -> None:
    found = smet.inspect(made("llama")[0], **CAUSAL())
    names = [LAYER.format(i, name) for i in (0, 1) for name in ("self_attn.o_proj", "mlp.down_proj")]
    stream = ["model.embed_tokens.weight", *names]
    read_by = {
        name: stream[: 2 * i + 1 + (part == "mlp")]
        for i in (0, 1)
        for part, ends in (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj")))
        for name in (LAYER.format(i, f"{part}.{end}") for end in ends)
    }
    edges = {(source, name) for name, sources in read_by.items() for source in sources}
    edges |= {("input", stream[0]), ("lm_head.weight", "output")} | {(name, "lm_head.weight") for name in stream}
    for i in (0, 1):
        edges |= {(LAYER.format(i, f"self_attn.{x}_proj"), LAYER.format(i, "self_attn.o_proj")) for x in "qkv"}
        edges |= {(LAYER.format(i, f"mlp.{x}_proj"), LAYER.format(i, "mlp.down_proj")) for x in ("gate", "up")}
    assert set(found.graph.edges) == edges
    kinds = found.graph.nodes(data="kind")
    assert {name for name, kind in kinds if kind == "dense"} == {"model.embed_tokens.weight", "lm_head.weight"}


class NoNorm(nn.Module):
    """Replaces a norm, whose mean lets every unit touch every other: no path is followed through that."""

    def __init__(self, *_: Any) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def without_norms(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if "RMSNorm" in type(child).__name__:
                setattr(module, name, NoNorm())
    return model


def live_weights(model: nn.Module, density: float) -> dict[str, tuple[int, int]]:
    """Returns site → (weights on a live path as inspected, values with a gradient), in a model without norms."""
    torch.manual_seed(0)
    smet.sparsify(without_norms(model), density, block_shape=(4, 2)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    inputs = {"input_ids": torch.randint(0, 64, (6, 12), generator=torch.Generator().manual_seed(1))}
    found = smet.inspect(model, **inputs)
    logits = model(**inputs).logits
    torch.tanh(logits / logits.std()).mul(torch.randn(logits.shape, dtype=logits.dtype)).sum().backward()
    counts = {}
    for name, site in find_sites(model).items():
        reach, grad = found[name].reach, site.values.grad
        assert reach is not None and grad is not None
        counts[name] = reach.num_live_weights, int((grad != 0).sum())
    return counts


@pytest.mark.parametrize("make", [llama, partial(mixtral, experts_implementation="eager")])
@pytest.mark.parametrize("density", [0.1, 0.3])
def test_a_weight_has_a_gradient_exactly_where_it_lies_on_a_live_path(make: Any, density: float) -> None:
    """The models have no biases, so a dead unit is zero and not a constant."""
    for name, (inspected, with_gradient) in live_weights(make(), density).items():
        assert inspected == with_gradient, name


def test_where_it_is_not_known_which_expert_comes_next_nothing_alive_is_called_dead() -> None:
    for name, (inspected, with_gradient) in live_weights(mixtral(experts_implementation="batched_mm"), 0.1).items():
        assert inspected == with_gradient or ("experts" in name and inspected > with_gradient), name


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_torch_encoder_layers(norm_first: bool, training: bool) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, norm_first=norm_first)
    model = smet.sparsify(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), 0.4, block_shape=2)
    found = smet.inspect(model.train(training), torch.randn(2, 5, 16))
    assert found.notes == ()
    first = "layers.0.self_attn.in_proj_weight"
    after = ["layers.0.self_attn.out_proj.weight"]
    assert list(found.graph.successors(first)) == after and list(found.graph.predecessors(first)) == ["input"]


def test_attention_of_queries_to_other_keys_uses_thirds_of_one_weight() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
            return self.attention(x, memory, memory, need_weights=False)[0]

    model = smet.sparsify(Cross(), 0.5)
    site = find_sites(model)["attention.in_proj_weight"]
    mask = torch.ones(24, 8, dtype=torch.bool)
    mask[3] = False  # a query without weights: its key has no partner
    mask[16 + 5] = False  # a value without weights: the output gets its bias alone
    site.compact.resize(site.values, mask.flatten())
    found = smet.inspect(model, torch.randn(2, 4, 8), torch.randn(2, 6, 8))
    assert found.notes == ()
    assert found["attention.in_proj_weight"].dead.outputs.nonzero().flatten().tolist() == [3, 21]
    starved = found["attention.out_proj.weight"]
    assert starved.reach is not None
    assert set(starved.reach.starved.nonzero().flatten().tolist()) <= {5}


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_on_the_meta_device_what_feeds_what_is_the_same(name: str) -> None:
    model, batch = made(name)
    found = smet.inspect(model, **batch)
    topologies = {name: site.compact.topology for name, site in find_sites(model).items()}
    model.to("meta").tie_weights()
    for name, site in find_sites(model).items():
        site.compact.topology = topologies[name]
    on_meta = smet.inspect(model, **batch)
    assert on_meta == found
    assert set(on_meta.graph.edges) == set(found.graph.edges)


def test_gpt2_counts_the_rows_of_its_weights_as_inputs() -> None:
    model, batch = made("gpt2")
    alone, found = smet.inspect(model), smet.inspect(model, **batch)
    for site, with_graph in zip(alone.sites, found.sites, strict=True):
        assert site.dead.inputs.numel() == site.shape[0] and site.dead.outputs.numel() == site.shape[1]
        assert torch.equal(site.dead.inputs, with_graph.dead.inputs)

"""Routers stay dense, and nothing else does for that reason."""

from collections.abc import Callable
from fnmatch import fnmatchcase

import pytest
import torch
from torch import Tensor, nn

import smet_compile as smet
from smet_compile.convert.find_weights import find_weights
from smet_compile.ops import find_sites
from tests.convert.moe_families import FEW, ROUTERS, build

ROUTES = "routes tokens to experts"


def check_family(name: str) -> None:
    model = build(name)
    if model is None:
        pytest.skip(f"this transformers has no {name}")
    weights = find_weights(model)
    expected = {weight for weight in weights if any(fnmatchcase(weight, glob) for glob in ROUTERS[name])}
    assert expected
    assert {weight for weight, found in weights.items() if found.reason == ROUTES} == expected
    of_layers = [w for w, found in weights.items() if isinstance(found.module, nn.Linear) and "head" not in w]
    assert {weight for weight in of_layers if weights[weight].reason is not None} <= expected
    assert any(found.tensor.dim() == 3 and found.reason is None for found in weights.values()) or name in (
        "dbrx",  # its experts lie below one another in a matrix
        "doge",  # they are rows of embeddings
        "nllb_moe",
        "switch_transformers",  # one module each
    )


@pytest.mark.parametrize("name", FEW)
def test_families_of_transformers(name: str) -> None:
    check_family(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(ROUTERS) - set(FEW)))
def test_all_families_of_transformers(name: str) -> None:
    check_family(name)


def mlp(width: int = 16, inner: int = 24) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))


def experts(number: int = 4) -> nn.ModuleList:
    return nn.ModuleList(mlp() for _ in range(number))


def holding(**children: nn.Module) -> nn.Module:
    parent = nn.Module()
    for name, child in children.items():
        setattr(parent, name, child)
    return parent


class GatedMLP(nn.Module):
    def __init__(self, width: int = 16, inner: int = 24) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, inner), nn.Linear(width, inner)
        self.down_proj = nn.Linear(inner, width)


class TopKGate(nn.Module):
    def __init__(self, width: int = 16, number: int = 4) -> None:
        super().__init__()
        self.wg = nn.Linear(width, number, bias=False)


class ScoresInAParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 16))


class Stacks(nn.Module):
    """Keeps the experts below one another in a matrix, as megablocks does."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 4
        self.w1, self.w2 = nn.Parameter(torch.randn(4 * 24, 16)), nn.Parameter(torch.randn(4 * 24, 16))


class StacksOfItsOwn(nn.Module):
    def __init__(self, scorer: str) -> None:
        super().__init__()
        self.num_experts = 4
        self.w_in, self.w_out = nn.Parameter(torch.randn(4, 24, 16)), nn.Parameter(torch.randn(4, 16, 24))
        setattr(self, scorer, nn.Linear(16, 4))


class Attention(nn.Module):
    """Has a gate with one output a head, as many as there are experts elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.qkv, self.gate, self.out = nn.Linear(16, 48), nn.Linear(16, 4), nn.Linear(16, 16)


ByHand = dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]]

BY_HAND: ByHand = {
    "gate": (lambda: holding(experts=experts(), gate=nn.Linear(16, 4)), ("gate.weight",)),
    "sequential_router": (
        lambda: holding(experts=experts(), router=nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4))),
        ("router.0.weight", "router.2.weight"),
    ),
    "wg": (lambda: holding(experts=experts(), wg=nn.Linear(16, 4)), ("wg.weight",)),
    "gate_of_a_class": (lambda: holding(experts=experts(), gate=TopKGate()), ("gate.wg.weight",)),
    "class_under_another_name": (lambda: holding(experts=experts(), scores=TopKGate()), ("scores.wg.weight",)),
    "parameter": (lambda: holding(experts=experts(), gate=ScoresInAParameter()), ("gate.weight",)),
    "stacks_in_a_matrix": (lambda: holding(mlp=Stacks(), router=nn.Linear(16, 4)), ("router.weight",)),
    "gate_beside_stacks_in_a_matrix": (lambda: holding(experts=Stacks(), gate=nn.Linear(16, 4)), ("gate.weight",)),
    "router_proj": (lambda: holding(experts=experts(), router_proj=nn.Linear(16, 4)), ("router_proj.weight",)),
    "gate_network": (
        lambda: holding(experts=experts(), gate_network=nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))),
        ("gate_network.0.weight", "gate_network.1.weight"),
    ),
    "gates_of_tasks": (
        lambda: holding(experts=experts(), gates=nn.ModuleList([nn.Linear(16, 4), nn.Linear(16, 4)])),
        ("gates.0.weight", "gates.1.weight"),
    ),
    "noisy_gate": (
        lambda: holding(experts=experts(), gate=nn.Linear(16, 4), noise=nn.Linear(16, 4)),
        ("gate.weight", "noise.weight"),
    ),
    "without_a_telling_name": (lambda: holding(experts=experts(), score=nn.Linear(16, 4)), ("score.weight",)),
    "stacks_of_its_own": (lambda: holding(moe=StacksOfItsOwn("gating")), ("moe.gating.weight",)),
    "stacks_of_its_own_unnamed": (lambda: holding(moe=StacksOfItsOwn("assign")), ("moe.assign.weight",)),
    "above_the_experts": (
        lambda: holding(moe=holding(experts=experts()), gate=nn.Linear(16, 4)),
        ("gate.weight",),
    ),
    "experts_without_the_name": (
        lambda: holding(mlps=nn.ModuleList(GatedMLP() for _ in range(4)), gate=nn.Linear(16, 4)),
        ("gate.weight",),
    ),
    "experts_in_a_dict": (
        lambda: holding(experts=nn.ModuleDict({str(i): mlp() for i in range(4)}), gate=nn.Linear(16, 4)),
        ("gate.weight",),
    ),
    "as_wide_as_there_are_experts": (
        lambda: holding(experts=experts(16), gate=nn.Linear(16, 16), out=nn.Linear(16, 16)),
        ("gate.weight",),
    ),
    "shared_expert_gate": (
        lambda: holding(experts=experts(), gate=nn.Linear(16, 4), shared_expert_gate=nn.Linear(16, 1)),
        ("gate.weight", "shared_expert_gate.weight"),
    ),
    "head_with_as_many_classes": (
        lambda: holding(experts=experts(), gate=nn.Linear(16, 4), head=nn.Linear(16, 4)),
        ("gate.weight",),
    ),
    "gated_experts": (
        lambda: holding(experts=nn.ModuleList(GatedMLP(16, 4) for _ in range(4)), gate=nn.Linear(16, 4)),
        ("gate.weight",),
    ),
    "experts_of_several_layers": (
        lambda: holding(
            experts=nn.ModuleList(
                holding(layers=nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])) for _ in "abcd"
            ),
            score=nn.Linear(16, 4),
            pair=nn.Linear(16, 2),
        ),
        ("score.weight",),
    ),
    "router_that_embeds_experts": (
        lambda: holding(
            experts=experts(), router=holding(query=nn.Linear(16, 8), expert_embeddings=nn.Embedding(4, 8))
        ),
        ("router.query.weight", "router.expert_embeddings.weight"),
    ),
    "one_expert_is_no_mixture": (lambda: holding(expert=mlp(), gate_proj=nn.Linear(16, 4)), ()),
    "gated_mlp": (GatedMLP, ()),
    "gated_mlp_beside": (
        lambda: holding(moe=holding(experts=experts(), gate=nn.Linear(16, 4)), shared=GatedMLP(16, 4)),
        ("moe.gate.weight",),
    ),
    "gated_attention_beside": (
        lambda: holding(attention=Attention(), moe=holding(experts=experts(), gate=nn.Linear(16, 4))),
        ("moe.gate.weight",),
    ),
    "gate_without_experts": (lambda: holding(gate=nn.Linear(16, 4), body=mlp()), ()),
    "gates_of_a_cell": (lambda: holding(input_gate=nn.Linear(16, 4), forget_gate=nn.Linear(16, 4)), ()),
    "layers_and_classes": (lambda: holding(layers=nn.ModuleList(mlp() for _ in range(4)), head=nn.Linear(16, 4)), ()),
}


@pytest.mark.parametrize("name", list(BY_HAND))
def test_by_role(name: str) -> None:
    make, routers = BY_HAND[name]
    weights = find_weights(make())
    assert {weight for weight, found in weights.items() if found.reason == ROUTES} == set(routers)


def test_a_router_is_sparse_where_it_is_asked_for_by_name() -> None:
    model = smet.sparsify(BY_HAND["gate"][0](), 0.5, include=["gate", "experts.*"])
    assert "gate.weight" in find_sites(model)


def test_a_module_that_holds_both_is_no_router() -> None:
    class RouterAndExperts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts, self.router = experts(), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return sum(self.router(x)[..., i, None] * expert(x) for i, expert in enumerate(self.experts))  # type: ignore[misc]

    model = smet.sparsify(nn.Sequential(RouterAndExperts(), nn.Linear(16, 16)), 0.5)
    dense = {row.name: row.reason for row in smet.report(model).skipped}
    assert dense == {"0.router.weight": ROUTES} and len(find_sites(model)) == 9

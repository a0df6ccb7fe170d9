"""Tests compiled mixtures of experts, in each of the ways in which transformers multiplies its experts."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

import smet_compile as smet
from smet_compile.ops import find_sites
from smet_compile.passes.verify import FORWARD, FUSED, WEIGHT_GRADIENT
from smet_compile.tracing import Capture
from tests.models.compiled import Setting, assert_same_losses, own_loss, train
from tests.models.fused import PARTS, assert_fused, graphs_with_sites, outcomes_by_site, outputs, weight_sized


def mixtral(experts: str, dtype: torch.dtype, block_shape: int, **more: Any) -> Setting:
    config = {"_experts_implementation": experts, "intermediate_size": 56, "num_hidden_layers": 1}
    return Setting("mixtral", dtype, block_shape, config=config, **more)


@pytest.fixture
def exact_router(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces transformers' router: its softmax is always in fp32, by which a dense model too differs by 1e-7."""

    def forward(self: MixtralTopKRouter, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
        scores, indices = torch.topk(logits.softmax(-1), self.top_k, dim=-1)
        return logits, scores / scores.sum(-1, keepdim=True), indices

    monkeypatch.setattr(MixtralTopKRouter, "forward", forward)


@pytest.fixture
def fixed_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts by a token's place, unevenly many: the last bit of a bf16 score would else choose now this, now that."""

    def forward(self: MixtralTopKRouter, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
        first = torch.arange(len(logits)) % (self.num_experts - 1)
        indices = torch.stack([first, first + 1], dim=-1)
        scores = logits.softmax(-1).gather(-1, indices)
        return logits, scores / scores.sum(-1, keepdim=True), indices

    monkeypatch.setattr(MixtralTopKRouter, "forward", forward)


@pytest.mark.parametrize(("how", "block_shape"), [("loop", 1), ("step", 16)])
def test_grouped_products_are_fused(
    how: str, block_shape: int, fixed_choice: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain torch multiplies on both sides: another kernel rounds other sums to bf16, and the steps magnify that."""
    monkeypatch.setenv("SMET_COMPILE_KERNEL", "torch")
    setting = mixtral("grouped_mm", torch.bfloat16, block_shape, loss_fn=own_loss)
    capture = Capture()
    compiled = train(setting, how, backend=capture)
    assert_fused(compiled, capture)
    assert_same_losses(compiled, train(setting))


NOT_FUSED = [
    (mixtral("grouped_mm", torch.float32, 16, loss_fn=own_loss), "loop", "grouped_mm_fallback"),
    (mixtral("batched_mm", torch.float64, 1), "step", "looked up"),
]


@pytest.mark.parametrize(("setting", "how", "reason"), NOT_FUSED, ids=["opaque", "looked up"])
def test_other_products_are_recomputed(setting: Setting, how: str, reason: str, exact_router: None) -> None:
    capture = Capture()
    compiled = train(setting, how, backend=capture)
    (graph,) = graphs_with_sites(compiled.model, capture)
    found = outcomes_by_site(compiled.model, graph)
    assert found.keys() == find_sites(compiled.model).keys()
    for name, parts in found.items():
        if "experts" in name:
            assert reason in parts[FORWARD][0] and parts[WEIGHT_GRADIENT] != [FUSED]
        else:
            assert all(parts[part] == [FUSED] for part in PARTS), name
    assert not weight_sized(compiled.model, outputs(graph.forward))
    assert_same_losses(compiled, train(setting))


def test_products_that_depend_on_data(exact_router: None) -> None:
    """With a product for each expert that has a token, Dynamo breaks the graph and leaves experts to eager mode."""
    setting = mixtral("eager", torch.float64, 16)
    capture = Capture()
    compiled = train(setting, "step", backend=capture)
    assert_same_losses(compiled, train(setting))
    not_fused = smet.explain(compiled.model, **setting.batch(0)).not_fused
    assert set(not_fused) == {name for name in find_sites(compiled.model) if "experts" in name}


def test_experts_that_depend_on_data_are_not_saved() -> None:
    """They are read in eager pieces between graphs, where a recipe is kept in place of each dense stack."""
    setting = mixtral("eager", torch.float32, 16)
    model = setting.make()
    stacks = [site.layout for name, site in find_sites(model).items() if "experts" in name]
    sizes = {count * layout.rows * layout.cols * 4 for layout in stacks for count in (1, layout.num_matrices)}
    saved: list[int] = []

    @torch._dynamo.disable
    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor.untyped_storage().nbytes())
        return tensor

    compiled = torch.compile(model, backend=Capture())
    with torch.autograd.graph.saved_tensors_hooks(note, torch._dynamo.disable(lambda tensor: tensor)):
        loss = compiled(**setting.batch(0)).logits.square().sum()
    assert saved and not sizes & set(saved)
    loss.backward()

"""PEFT's adapters on a compact model: they are dense, train alone, and merge into what the tuned model computes."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import smet_compile as smet
from smet_compile.ops import find_sites


class Projections(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj(torch.relu(self.q_proj(x)))


def x() -> Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


def tuned(block: int = 1) -> PeftModel:
    torch.manual_seed(0)
    model = smet.sparsify(Projections(), density=0.3, block_shape=block)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "o_proj"]))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    before = [site.values.detach().clone() for site in find_sites(adapted).values()]
    for _ in range(10):
        (adapted(x()) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = [site.values.detach() for site in find_sites(adapted).values()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    return adapted


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.filterwarnings("ignore:sparsify")
def test_a_merged_model_computes_what_the_tuned_one_did(block: int, safe: bool) -> None:
    adapted = tuned(block)
    expected = adapted(x()).detach()
    with pytest.warns(UserWarning, match=r"q_proj\.weight: .* keeps every block from now on"):
        merged = adapted.merge_and_unload(safe_merge=safe)
    torch.testing.assert_close(merged(x()), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(smet.export_dense(merged)(x()), expected, rtol=1e-5, atol=1e-6)
    assert [site.density for site in find_sites(merged).values()] == [1.0, 1.0]


@pytest.mark.filterwarnings("ignore")
def test_merging_can_be_taken_back() -> None:
    adapted = tuned()
    expected = adapted(x()).detach()
    adapted.merge_adapter()
    torch.testing.assert_close(adapted(x()), expected, rtol=1e-5, atol=1e-6)
    adapted.unmerge_adapter()
    torch.testing.assert_close(adapted(x()), expected, rtol=1e-5, atol=1e-5)


def test_adapters_stay_dense_by_default() -> None:
    torch.manual_seed(0)
    adapted = get_peft_model(Projections(), LoraConfig(r=4, target_modules=["q_proj", "o_proj"]))
    smet.sparsify(adapted, density=0.3)
    assert sorted(name.split(".")[-3] for name in find_sites(adapted)) == ["o_proj", "q_proj"]
    reasons = {row.name: row.reason for row in smet.report(adapted).skipped}
    assert len(reasons) == 4 and set(reasons.values()) == {"an adapter"}


def test_adapters_of_other_libraries_stay_dense_too() -> None:
    class LoraLinear(nn.Linear):
        def __init__(self) -> None:
            super().__init__(16, 32)
            self.lora_A, self.lora_B = nn.Parameter(torch.zeros(4, 16)), nn.Parameter(torch.zeros(32, 4))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.lora_down = LoraLinear(), nn.Linear(32, 4)

    model = smet.sparsify(Block(), density=0.5)
    assert list(find_sites(model)) == ["up.weight"]
    assert {row.reason for row in smet.report(model).skipped} == {"an adapter"}

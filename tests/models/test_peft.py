"""PEFT's adapters on a compact model: they are dense, train alone, and merge into what the tuned model computes."""

import warnings
from pathlib import Path

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


@pytest.mark.parametrize("how", ["olora", "pissa", "orthogonal"])
@pytest.mark.filterwarnings("ignore:sparsify")
def test_adapters_that_begin_with_a_part_of_the_base(how: str) -> None:
    """PEFT takes that part out of the base, of which every block has numbers from then on."""
    torch.manual_seed(0)
    model = smet.sparsify(Projections(), density=0.3)
    expected = model(x()).detach()
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=how)
    changes_base = how != "orthogonal"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted = get_peft_model(model, config)
    told = [str(each.message) for each in caught if "q_proj.weight" in str(each.message)]
    assert ["keeps every block from now on" in each for each in told] == [True] * changes_base
    torch.testing.assert_close(adapted(x()), expected, rtol=1e-5, atol=1e-6)
    density = next(site.density for name, site in find_sites(adapted).items() if "q_proj" in name)
    assert (density == 1.0) is changes_base


@pytest.mark.filterwarnings("ignore")
def test_a_compact_layer_that_is_trained_and_saved_with_the_adapters(tmp_path: Path) -> None:
    """It loads onto a base that was made sparse in the same way."""

    def base() -> nn.Module:
        torch.manual_seed(0)
        return smet.sparsify(Projections(), density=0.3)

    adapted = get_peft_model(base(), LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["o_proj"]))
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.add_(0.1 * parameter.requires_grad)
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    torch.testing.assert_close(loaded(x()), adapted(x()))


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

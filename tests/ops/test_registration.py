"""Tests the ops as torch sees them: schemas with true mutations, fakes, autograd."""

from typing import Any

import pytest
import torch
from torch import Tensor

from smet_compile.format import Layout, pack_bits
from smet_compile.ops import CompactWeight
from smet_compile.ops.growth import Collected
from smet_compile.ops.rules import find_rule
from tests.support.updates import after_gradient, settings

LAYOUTS = {
    "single": ((7, 9), (1, 1)),
    "runs": ((3, 19), (1, 16)),
    "tiles": ((11, 13), (4, 4)),
    "stack": ((2, 5, 6), (2, 4)),
}


def site(name: str, dtype: torch.dtype = torch.float32) -> tuple[CompactWeight, Tensor, Tensor]:
    shape, block_shape = LAYOUTS[name]
    layout = Layout.of(shape, block_shape)
    mask = torch.arange(layout.num_blocks) % 3 != 0
    compact = CompactWeight(layout, mask, int(mask.sum()))
    dense = torch.randn(shape, dtype=dtype)
    assert torch.equal(compact.topology, pack_bits(mask))
    return compact, compact.right_inverse(dense).detach(), dense


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_unpack_and_pack(name: str) -> None:
    compact, values, dense = site(name)
    common = (compact.topology, compact.lists, compact.layout.text)
    torch.library.opcheck(torch.ops.smet.unpack.default, (values.requires_grad_(), *common, None, None, False))
    sink, growth = torch.zeros_like(values).requires_grad_(), torch.zeros_like(dense).requires_grad_()
    torch.library.opcheck(torch.ops.smet.unpack.default, (values.detach(), *common, sink, growth, False))
    torch.library.opcheck(torch.ops.smet.pack.default, (dense.requires_grad_(), *common, compact.num_active))


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_gradcheck(name: str) -> None:
    compact, values, dense = site(name, torch.float64)
    assert torch.autograd.gradcheck(compact, values.requires_grad_())
    assert torch.autograd.gradcheck(compact.right_inverse, dense.requires_grad_())
    assert torch.autograd.gradgradcheck(compact, values)


@pytest.mark.parametrize("noise_seed", [None, 3])
@pytest.mark.parametrize("name", list(LAYOUTS))
def test_update(name: str, noise_seed: int | None) -> None:
    compact, values, _ = site(name, torch.bfloat16 if noise_seed else torch.float32)
    num_active = compact.num_active
    births = torch.full((256,), -1)
    births[0] = 0
    step, lr = torch.tensor(4), torch.tensor(0.1)
    moments = [torch.zeros_like(values, dtype=torch.float32) for _ in range(2)]
    topology = (compact.topology, compact.lists, compact.layout.text)
    ages = torch.zeros(num_active, dtype=torch.uint8), births
    numbers = settings(warmup_steps=10, noise_seed=noise_seed)
    codes = [torch.full_like(m, 7, dtype=torch.uint8) for m in moments]
    for slots, scales in ((moments, None), (codes, torch.rand(2, compact.layout.num_groups))):
        state: list[Any] = [*slots, scales, torch.tensor(0), step]
        rest = after_gradient(state, lr, ages, topology, numbers)
        torch.library.opcheck(torch.ops.smet.update_.default, (values, torch.randn_like(values), *rest))


@pytest.mark.parametrize("rule", ["lion", "sgd", "scale", "scale_momentum"])
@pytest.mark.parametrize("name", list(LAYOUTS))
def test_update_by_other_rules(name: str, rule: str) -> None:
    compact, values, _ = site(name)
    known = find_rule(rule)
    state: list[Any] = [*(torch.zeros_like(values) for _ in known.slots), None, torch.tensor(0), torch.tensor(4)]
    topology = (compact.topology, compact.lists, compact.layout.text)
    numbers = settings(options=tuple(0.5 for _ in known.options), rule=rule)
    rest = after_gradient(state, torch.tensor(0.1), (None, None), topology, numbers)
    torch.library.opcheck(torch.ops.smet.update_.default, (values, torch.randn_like(values), *rest))


@pytest.mark.parametrize("with_active", [False, True])
@pytest.mark.parametrize("name", list(LAYOUTS))
def test_collected_gradients(name: str, with_active: bool) -> None:
    compact, values, dense = site(name)
    layout = compact.layout
    collected = Collected.empty(values, layout, 3, values.shape[0] if with_active else 0)
    place = compact.topology, layout.text, layout.num_blocks, ""
    torch.library.opcheck(torch.ops.smet.collect_gradient.default, (dense, *collected, *place))
    best = torch.ops.smet.collect_gradient(dense, *collected, *place)
    torch.library.opcheck(torch.ops.smet.collect_gradient.default, (dense, *best, *place))
    leaf = torch.zeros_like(values).requires_grad_()
    sink = torch.ops.smet.growth_sink(leaf, *collected, *place)
    sink.backward(dense)
    assert leaf.grad is None and all(map(torch.equal, collected, best))


def test_a_gradient_that_is_not_finite_is_not_collected() -> None:
    compact, values, dense = site("tiles")
    place = compact.topology, compact.layout.text, compact.layout.num_blocks, ""
    collected = Collected(
        *torch.ops.smet.collect_gradient(dense, *Collected.empty(values, compact.layout, 3, compact.num_active), *place)
    )
    dense[0, 0] = torch.inf
    again = Collected(*torch.ops.smet.collect_gradient(dense, *collected, *place))
    assert all(map(torch.equal, again, collected))

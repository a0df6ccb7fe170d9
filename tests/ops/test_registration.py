"""The ops as torch sees them: schemas with true mutations, fakes, autograd."""

from typing import Any

import pytest
import torch
from torch import Tensor

from smet_compile.format import Layout, num_groups, pack_bits
from smet_compile.ops import CompactWeight

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
    common = (compact.topology, compact.index, *compact.op_layout())
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
def test_active_adamw(name: str, noise_seed: int | None) -> None:
    compact, values, _ = site(name, torch.bfloat16 if noise_seed else torch.float32)
    num_active = compact.num_active
    births = torch.full((256,), -1)
    births[0] = 0
    step, lr = torch.tensor(4), torch.tensor(0.1)
    moments = [torch.zeros_like(values, dtype=torch.float32) for _ in range(2)]
    tensors: list[Any] = [values, torch.randn_like(values), *moments, None, torch.tensor(0), step, lr]
    tensors += [torch.zeros(num_active, dtype=torch.uint8), births, compact.topology, compact.index]
    scalars = (1.0, 0.9, 0.999, 1e-8, 0.0, 10, False, noise_seed)
    torch.library.opcheck(torch.ops.smet.active_adamw_.default, (*tensors, *compact.op_layout(), *scalars))
    tensors[2:5] = [
        *(torch.full_like(m, 7, dtype=torch.uint8) for m in moments),
        torch.rand(2, num_groups(compact.layout)),
    ]
    torch.library.opcheck(torch.ops.smet.active_adamw_.default, (*tensors, *compact.op_layout(), *scalars))

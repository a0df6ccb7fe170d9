"""A block whose gradient is not finite keeps weight and moments, is counted, and still grows older."""

import pytest
import torch

import smet_compile as smet
from smet_compile.ops import find_sites
from tests.support.slope import Slope, step_on
from tests.support.snapshots import same_bits


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("block_shape", [1, (2, 3)], ids=str)
def test_the_block_alone_is_skipped(block_shape: int | tuple[int, int], bad: float) -> None:
    model, reference = (smet.sparsify(Slope(6, 6), density=0.5, block_shape=block_shape) for _ in range(2))
    reference.load_state_dict(model.state_dict())
    optimizer, other = (smet.ActiveAdamW(m, lr=1e-2, warmup_steps=5, weight_decay=0.1) for m in (model, reference))
    step_on(model, optimizer), step_on(reference, other)
    values = find_sites(model)["weight"].values
    state = optimizer.state[values]
    kept = [t[1].detach().clone() for t in (values, state["exp_avg"], state["exp_avg_sq"])]
    model().backward(), reference().backward()
    values.grad[1].view(-1)[-1] = bad
    optimizer.step(), other.step()
    assert optimizer.num_skipped_blocks == 1 and other.num_skipped_blocks == 0
    for tensor, old in zip((values, state["exp_avg"], state["exp_avg_sq"]), kept, strict=True):
        assert same_bits(tensor[1].detach(), old)
    rest = torch.arange(len(values)) != 1
    expected = find_sites(reference)["weight"].values
    assert same_bits(values[rest].detach(), expected[rest].detach())
    assert optimizer.block_ages(values).tolist() == [2] * len(values)


def test_the_count_adds_up() -> None:
    model = smet.sparsify(Slope(6, 6), density=0.5)
    optimizer = smet.ActiveAdamW(model)
    values = find_sites(model)["weight"].values
    for bad in (2, 0, 5):
        model().backward()
        values.grad[:bad] = torch.nan
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.num_skipped_blocks == 7
    assert bool(values.isfinite().all())


def test_the_skipped_step_counts_in_the_bias_correction() -> None:
    """After a skip at t = 2, the step at t = 3 corrects for three steps."""
    model = smet.sparsify(Slope(4, 4).double(), density=0.5)
    optimizer = smet.ActiveAdamW(model, lr=1.0, eps=0.0, warmup_steps=0, lr_density_exponent=0.0)
    values = find_sites(model)["weight"].values
    step_on(model, optimizer)
    model().backward()
    values.grad[0] = torch.nan
    optimizer.step()
    optimizer.zero_grad()
    before = values[0].item()
    step_on(model, optimizer)
    m_hat = (1 - 0.9**2) / (1 - 0.9**3)
    v_hat = (1 - 0.999**2) / (1 - 0.999**3)
    assert before - values[0].item() == pytest.approx(m_hat / v_hat**0.5, rel=1e-10)

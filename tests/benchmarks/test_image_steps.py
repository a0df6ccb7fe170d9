"""The benchmark of image steps trains what it says, counts its bytes, and writes its own sections of a page."""

import re
from pathlib import Path

import pytest
import torch

from benchmarks import convolutions, image_steps
from benchmarks.image_steps import Case, Training, correction_row, median_interval, replace_section, sparse
from benchmarks.ratios import Pairs
from examples.resnet import resnet
from smet_compile.ops import find_sites
from smet_compile.tracing import Capture

SMALL = Case("small", lambda: resnet(24, 8, 1), 1, 4, ("eager",))


@pytest.mark.parametrize("density", [1.0, 0.25])
def test_bytes_of_weights_gradients_and_momentum(density: float) -> None:
    training = Training(sparse(SMALL.make, density, 1), 4, is_compiled=False)
    for _ in range(2):
        training.step()
    parameters = list(training.model.parameters())
    momentum = [
        t for p in parameters for t in training.optimizer.state[p].values() if getattr(t, "shape", None) == p.shape
    ]
    buffers = sum(buffer.nbytes for buffer in training.model.buffers())
    counted = 2 * sum(p.nbytes for p in parameters) + sum(t.nbytes for t in momentum) + buffers
    assert training.formula(False) == counted
    compact = sum(site.values.nbytes for site in find_sites(training.model).values())
    assert training.formula(True) == counted - compact


def test_compiled_steps_update_in_backward() -> None:
    eager, compiled = (Training(sparse(SMALL.make, 0.25, 1), 4, is_compiled, True) for is_compiled in (False, True))
    compiled.fused.compile(backend=Capture())
    assert compiled.fused.fused
    compiled.images, compiled.labels = eager.images, eager.labels
    for training in (eager, compiled):
        training.step()
    expected = find_sites(eager.model)
    for name, site in find_sites(compiled.model).items():
        torch.testing.assert_close(site.values, expected[name].values, rtol=1e-4, atol=1e-6, msg=name)


def test_a_row_times_both_steps_and_the_op_alone() -> None:
    row = correction_row(SMALL, "eager", rounds=3)
    assert re.fullmatch(r"\| small \| eager \| [\d.]+ \| [\d.]+ \([\d.]+-[\d.]+\) \| [\d.]+% \|", row), row


def test_the_interval_of_a_median() -> None:
    """The 41st and the 61st of 100 numbers enclose the median 95 times in 100."""
    pairs = Pairs((1.0,) * 100, tuple(float(number) for number in range(1, 101)))
    assert median_interval(pairs) == (41.0, 61.0)


def test_sections_of_a_page_are_written_apart(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Title\n\ntable\n\n## Memory of a training step\n\nold\n\n## Other\n\nkept\n")
    replace_section(page, "## Memory of a training step\n\nnew\n")
    assert page.read_text() == "# Title\n\ntable\n\n## Other\n\nkept\n\n## Memory of a training step\n\nnew\n"
    convolutions.write_first_part(page, "# Title\n\nanother\n")
    assert page.read_text() == "# Title\n\nanother\n\n## Other\n\nkept\n\n## Memory of a training step\n\nnew\n"
    assert all(part.startswith("## ") for part in (image_steps.MEMORY, image_steps.CORRECTION))


def test_corrected_steps_differ() -> None:
    plain, corrected = (Training(sparse(SMALL.make, 0.1, 1), 4, False, corrects) for corrects in (False, True))
    assert [any(s.compact.scales_rows for s in find_sites(t.model).values()) for t in (plain, corrected)] == [
        False,
        True,
    ]
    corrected.images, corrected.labels = plain.images, plain.labels
    for training in (plain, corrected):
        training.step()
    values = [torch.cat([s.values.detach() for s in find_sites(t.model).values()]) for t in (plain, corrected)]
    assert not torch.equal(*values)

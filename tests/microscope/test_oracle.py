"""Random graphs with random topologies have the path numbers that dense matrix products come to."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import smet_compile as smet
from tests.microscope.programs import WIDTH, Oracle, Step, masks_of, programs, sparse

pytestmark = pytest.mark.filterwarnings("ignore:sparsify. the model's matrices as a whole")
BLOCKS = st.sampled_from([1, 2, (1, 3), (4, 4), (2, 1)])


def program(*steps: tuple[str, int] | tuple[str, int, int]) -> list[Step]:
    return [Step(kind, tuple(sources)) for kind, *sources in steps]


GATE = program(("linear", 0), ("linear", 0), ("gate", 1, 2), ("linear", 3))
GATE_OF_GATE = program(("linear", 0), ("linear", 0), ("gate", 1, 2), ("linear", 0), ("gate", 3, 4), ("linear", 5))
ROTARY = program(("linear", 0), ("halves", 1), ("add", 1, 2), ("linear", 3))
SWAPPED = program(("linear", 0), ("swap_and_add", 1, 1), ("linear", 2))


@settings(max_examples=50, deadline=None)
@example(GATE, 0.1, 1, 0)
@example(GATE, 0.3, 2, 1)
@example(GATE_OF_GATE, 0.1, 1, 2)
@example(GATE_OF_GATE, 0.3, 2, 3)
@example(ROTARY, 0.1, 1, 4)
@example(SWAPPED, 0.1, 1, 5)
@given(programs(), st.sampled_from([0.1, 0.3, 0.6]), BLOCKS, st.integers(0, 1000))
def test_every_figure_is_that_of_brute_force(
    steps: list[Step], density: float, block_shape: int | tuple[int, int], seed: int
) -> None:
    network = sparse(steps, density, block_shape, seed)
    if network is None:
        return
    found = smet.inspect(network, torch.randn(2, 3, WIDTH))
    masks = masks_of(network)
    oracle = Oracle.of(steps, masks)
    oracle.derivatives()
    for site in found.sites:
        name = site.name.split(".")[1]
        mask, came, went = masks[name], oracle.came[name].detach(), oracle.went[name].grad
        wanted = torch.zeros(WIDTH) if went is None else went
        through = oracle.masks[name].grad
        on_path = 0 if through is None else int(((through > 0) & (mask > 0)).sum())
        assert torch.equal(site.dead.inputs, mask.sum(0) == 0)
        assert torch.equal(site.dead.outputs, mask.sum(1) == 0)
        assert site.reach is not None
        assert torch.equal(site.reach.starved, (came == 0) & (mask.sum(0) > 0))
        assert torch.equal(site.reach.unread, (wanted == 0) & (mask.sum(1) > 0))
        assert site.reach.num_live_weights == on_path
        assert site.num_active_weights == int(mask.sum())
    dense = Oracle.of(steps, {name: torch.ones_like(mask) for name, mask in masks.items()}).total.item()
    assert found.notes == ()
    if oracle.total.item() == 0:
        assert found.path_log10_share == -math.inf
    else:
        assert found.path_log10_share == pytest.approx(math.log10(oracle.total.item() / dense), abs=1e-9)


def _feeds(steps: list[Step]) -> set[tuple[str, str]]:
    """Walks the steps and returns which layer feeds which."""
    coming: list[set[str]] = [{"input"}]
    edges = set()
    for number, step in enumerate(steps):
        sources = set().union(*(coming[i] for i in step.sources))
        if step.kind in ("linear", "biased", "dense"):
            name = f"layers.{step.kind}{number}.weight"
            edges |= {(source, name) for source in sources}
            sources = {name}
        coming.append(sources)
    return edges | {(source, "output") for source in coming[-1]}


@settings(max_examples=15, deadline=None)
@given(programs(), st.integers(0, 1000))
def test_the_graph_has_the_edges_of_the_program(steps: list[Step], seed: int) -> None:
    network = sparse(steps, 0.5, 1, seed)
    if network is not None:
        assert set(smet.inspect(network, torch.randn(2, 3, WIDTH)).graph.edges) == _feeds(steps)

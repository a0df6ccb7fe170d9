"""A capture is fresh each time, names what broke it, and leaves no trace in a model or in torch's settings."""

import pytest
import torch
from torch import Tensor, nn

import smet_compile as smet
from smet_compile.tracing import SeveralGraphsError, capture_graphs, leave_no_trace, run_op_by_op
from tests.support.fresh_process import run_python


class Remembers(nn.Module):
    """Fills a cache, counts in a buffer and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.cache: dict[str, Tensor] = {}
        self.angles: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.angles = torch.arange(4.0)
        self.cache["x"] = x
        return nn.functional.dropout(self.norm(self.layer(x)) * self.angles)


def is_as_new(model: Remembers, state: dict[str, Tensor], random_state: Tensor) -> bool:
    same = all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    return same and model.cache == {} and model.angles is None and torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("fails", [False, True])
def test_what_a_forward_changes_is_put_back(fails: bool) -> None:
    model, x = Remembers(), torch.randn(3, 4)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    try:
        with leave_no_trace(model):
            model(x)
            assert not is_as_new(model, state, random_state)
            if fails:
                raise KeyError("after the forward")
    except KeyError:
        assert fails
    assert is_as_new(model, state, random_state)


def test_a_buffer_that_repeats_its_entries_is_put_back() -> None:
    model = nn.Module()
    model.register_buffer("ones", torch.ones(2, 1).expand(2, 8))
    model.register_buffer("scalar", torch.ones(()).expand(3, 4))
    with leave_no_trace(model):
        model.ones[0, 0] = 5.0
        model.scalar.data[0, 0] = 7.0
        assert model.ones.sum() == 48 and model.scalar.sum() == 84
    assert model.ones.sum() == 16 and model.scalar.sum() == 12


def test_explain_leaves_no_cache_filled() -> None:
    model = smet.sparsify(Remembers(), density=0.5)
    smet.explain(model, torch.randn(3, 4))
    assert model.cache == {} and model.angles is None


def test_settings_are_as_they_were() -> None:
    with torch.inference_mode(), pytest.raises(KeyError), run_op_by_op():
        assert not torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
        assert not torch.backends.mha.get_fastpath_enabled()
        raise KeyError
    assert torch.backends.mha.get_fastpath_enabled() and torch.is_grad_enabled()


def breaking(x: Tensor) -> Tensor:
    y = x + 1
    torch._dynamo.graph_break()
    return y * 2


def test_breaks_are_named_or_refused() -> None:
    x = torch.randn(3)
    for _ in range(2):
        graphs, breaks = capture_graphs(lambda: breaking(x))
        assert len(graphs) == 2 and len(breaks) == 1 and "graph_break" in breaks[0]
    with pytest.raises(SeveralGraphsError, match="graph_break"):
        capture_graphs(lambda: breaking(x), fullgraph=True)


def captured_size(size: int) -> tuple[int, ...]:
    """Captures one addition of a vector, and returns the shape that the graph has for it."""
    x = torch.randn(size)
    (graph,), breaks = capture_graphs(lambda: x + 1, fullgraph=True, dynamic=False)
    assert breaks == [] and graph.forward is not None and graph.inputs[0] is x
    (placeholder,) = graph.forward.graph.find_nodes(op="placeholder")
    return tuple(placeholder.meta["val"].shape)


def test_each_capture_is_fresh_whatever_sizes_came_before() -> None:
    assert [captured_size(size) for size in (3, 4, 5)] == [(3,), (4,), (5,)]


MAX_POOLING = """
import torch, smet_compile as smet
from torch import nn
model = smet.sparsify(nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 8)), 0.5)
print(smet.explain(model, torch.randn(2, 3, 4, 4)))
"""


def test_max_pooling_in_a_process_that_has_not_compiled() -> None:
    """Its decomposition looks for a module of the compiler that a capture has to import."""
    assert "2.weight" in run_python("-c", MAX_POOLING)

"""Tests whole compiled models with growth by gradient, changing lengths, checkpointing and generated code."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from smet_compile.passes.verify import FUSED, WEIGHT_GRADIENT
from smet_compile.tracing import Capture
from tests.models.compiled import ONE_LAYER, Setting, assert_same_losses, own_loss, train
from tests.models.fused import PARTS, assert_fused, graphs_with_sites, outcomes_by_site


@pytest.mark.parametrize("how", ["loop", "step"])
def test_growth_by_gradient(how: str) -> None:
    """The step before an update is another graph, in which each dense gradient is read to score it."""
    setting = Setting("bert", torch.float64, 16, grow="gradient", config=ONE_LAYER)
    capture = Capture()
    compiled = train(setting, how, backend=capture)
    plain, scoring = graphs_with_sites(compiled.model, capture)
    capture.graphs = [plain]
    assert_fused(compiled, capture)
    for parts in outcomes_by_site(compiled.model, scoring).values():
        assert {part for part in PARTS if parts[part] == [FUSED]} == PARTS - {WEIGHT_GRADIENT}
        assert "growth by gradient" in parts[WEIGHT_GRADIENT][0]
    assert_same_losses(compiled, train(setting))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_lengths_that_change(name: str) -> None:
    setting = Setting(name, torch.float64, 16, lengths=(7, 11), config=ONE_LAYER)
    capture = Capture()
    compiled = train(setting, "step", backend=capture, dynamic=True)
    assert_fused(compiled, capture)
    assert_same_losses(compiled, train(setting))


def checkpointed(model: Any) -> None:
    model.config.use_cache = False  # else transformers logs that it does so itself, which breaks the graph
    model.activation_checkpointing_enable()


@pytest.mark.parametrize("how", ["loop", "step"])
def test_activation_checkpointing(how: str) -> None:
    plain = Setting("llama", torch.float64, 1, config=ONE_LAYER)
    capture, of_plain = Capture(), Capture()
    compiled = train(replace(plain, prepare=checkpointed), how, backend=capture)
    assert_fused(compiled, capture)
    assert_same_losses(compiled, train(plain, how, backend=of_plain))
    saved = [graph.backward.graph.find_nodes(op="placeholder") for graph in (capture.graphs[0], of_plain.graphs[0])]
    assert len(saved[0]) < len(saved[1])


def test_a_graph_break_before_the_loss() -> None:
    """GPT-2 names no loss, and transformers logs that it takes its default. Gradients cross the break as values."""

    def nameless(model: Any) -> None:
        model.loss_type = None

    setting = Setting("gpt2", torch.float32, 16, own_loss, config=ONE_LAYER, prepare=nameless)
    capture = Capture()
    compiled = train(setting, "step", backend=capture)
    assert_fused(compiled, capture, update=False)
    assert_same_losses(compiled, train(setting))


GENERATED = [
    (Setting("llama", torch.float32, 16, own_loss, config=ONE_LAYER), "step"),
    (Setting("gpt2", torch.float64, 1, config=ONE_LAYER), "loop"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("setting", "how"), GENERATED, ids=str)
def test_generated_code(setting: Setting, how: str) -> None:
    """``tests/pretrain/test_compiled.py`` has a LLaMA in a step, ``tests/passes/test_inductor.py`` layers in a loop."""
    compiled = train(setting, how)
    assert_same_losses(compiled, train(setting))

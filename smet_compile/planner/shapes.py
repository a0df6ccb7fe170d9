"""Runs a training step on shapes alone: tensors without memory, eagerly or through the compiler's front half.

Nothing is computed and no code is generated, so a model of any size is run in seconds on any machine.
"""

from __future__ import annotations

import itertools
import types
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from smet_compile.optim import ActiveAdamW
from smet_compile.plan import Degrees, EagerStep, Timeline, compiled_timeline
from smet_compile.planner.copies import copy_with
from smet_compile.train_step import TrainStep

if TYPE_CHECKING:
    from smet_compile.tracing import Captured

Inputs = Callable[[int, int | None], Any]
LossFn = Callable[[Any, Any], Tensor]
_num_captured = itertools.count()


class SeveralGraphsError(Exception):
    """The step is not one graph."""


@dataclass(frozen=True)
class Step:
    """A training step.

    Args:
        inputs: (batch, sequence) → what it is called with. loss_fn: (model, that) → loss; None: ``model(**that).loss``.
        has_sequence: whether the inputs have one. checkpointing: of activations, as Hugging Face models do it.
    """

    inputs: Inputs
    loss_fn: LossFn | None
    has_sequence: bool
    checkpointing: bool

    def batch(self, degrees: Degrees) -> Any:
        return self.inputs(degrees.batch, degrees.sequence if self.has_sequence else None)

    def loss(self, model: Any, batch: Any) -> Tensor:
        if self.loss_fn is not None:
            return self.loss_fn(model, batch)
        loss: Tensor = model(**batch).loss
        return loss

    def results(self, model: Any, batch: Any) -> Any:
        """Of the compiled part where forward and backward are two calls: the model, and a loss function of its own."""
        return self.loss_fn(model, batch) if self.loss_fn is not None else model(**batch)


def _fake_copy(model: nn.Module, step: Step) -> nn.Module:
    """To be called under a fake tensor mode: as on a CPU, where the compiler and attention take their usual ways."""
    made = copy_with(model, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu"))
    if step.checkpointing:
        enable: Any = made.gradient_checkpointing_enable
        enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return made


@dataclass(frozen=True)
class EagerRun:
    """``followed``: the step. ``trained``: names of the parameters that it gave a gradient."""

    followed: EagerStep
    trained: set[str]


def run_eager(model: nn.Module, step: Step, degrees: Degrees) -> EagerRun:
    """Forward and backward of ``model``, which is on the meta device."""
    with FakeTensorMode():
        fake = _fake_copy(model, step)
        batch = step.batch(degrees)
        with EagerStep(degrees) as followed:
            loss = step.loss(fake, batch)
            followed.begin_backward()
            loss.backward()
        del loss
    return EagerRun(followed, {name for name, p in fake.named_parameters() if p.grad is not None})


def run_compiled(model: nn.Module, step: Step, degrees: Degrees, fused: bool) -> Timeline:
    """Forward and backward as the compiler's passes and its partitioner leave them, updates included if ``fused``."""
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fake = _fake_copy(model, step)
        batch = step.batch(degrees)
        captured = _capture_fused(fake, step, batch) if fused else _capture(lambda: step.results(fake, batch))
    if captured is None:
        raise SeveralGraphsError
    assert captured.forward is not None
    return compiled_timeline(captured.forward.graph, captured.backward.graph if captured.backward else None, degrees)


def _capture_fused(model: nn.Module, step: Step, batch: Any) -> Captured | None:
    trained = TrainStep(model, ActiveAdamW(model), step.loss, accumulate=1, max_norm=None)
    updates = trained.updates()
    with trained.gradients_in_sinks(updates):
        return _capture(lambda: trained.forward(batch, updates))


def _capture(call: Callable[[], Any]) -> Captured | None:
    """The one graph of ``call``; None where it breaks into several.

    By code of its own: Dynamo counts recompiles by code object, and remembers by its name what sizes changed.
    """
    from torch._dynamo import config
    from torch._dynamo.exc import Unsupported, UserError

    from smet_compile.tracing import Capture

    capture = Capture()
    code = call.__code__.replace(co_name=f"planned_{next(_num_captured)}")
    fresh = types.FunctionType(code, call.__globals__, code.co_name, None, call.__closure__)
    with torch.compiler.set_stance("default"), config.patch(automatic_dynamic_shapes=False, recompile_limit=2**20):
        try:
            torch.compile(fresh, backend=capture, dynamic=False, fullgraph=True)()
        except (Unsupported, UserError):
            return None
    (graph,) = capture.graphs
    return graph


def token_batch(batch: int, sequence: int | None) -> Mapping[str, Tensor]:
    """What a language model of Hugging Face trains on."""
    assert sequence is not None
    tokens = torch.zeros(batch, sequence, dtype=torch.int64)
    return {"input_ids": tokens, "labels": tokens}

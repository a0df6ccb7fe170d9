"""Runs a training step on shapes alone: tensors without memory, eagerly or through the compiler's front half.

Nothing is computed and no code is generated, and equal layers are run from one and from two of them, so a model of any
size is run in seconds on any machine.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from smet_compile.ops.products import shown_as_ops
from smet_compile.optim import ActiveAdamW
from smet_compile.plan.compiled import compiled_timeline
from smet_compile.plan.eager import EagerFollower, FakeTensorMode
from smet_compile.plan.layer_traffic import LayerTraffic
from smet_compile.plan.timeline import Degrees, Timeline
from smet_compile.tracing import Captured, SeveralGraphsError, capture_graphs
from smet_compile.train_step import TrainStep

Inputs = Callable[[int, int | None], Any]
LossFn = Callable[[Any, Any], Tensor]
Run = TypeVar("Run")


@dataclass(frozen=True)
class Step:
    """Describes a training step.

    Args:
        inputs: (batch, sequence) → inputs of the model.
        loss_fn: (model, inputs) → loss; None means ``model(**inputs).loss``.
        has_sequence: True where the inputs have a sequence.
        checkpointing: True for checkpointed activations, as Hugging Face models do it.
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

    def outputs(self, model: Any, batch: Any) -> Any:
        """Returns what a compiled model returns where forward and backward are two calls: the loss, if it has one."""
        return self.loss_fn(model, batch) if self.loss_fn is not None else model(**batch)


def token_batch(batch: int, sequence: int | None) -> Mapping[str, Tensor]:
    """Returns the inputs that a language model of Hugging Face trains on."""
    assert sequence is not None
    tokens = torch.zeros(batch, sequence, dtype=torch.int64)
    return {"input_ids": tokens, "labels": tokens}


def empty_copy(model: nn.Module, device: str = "meta", dtype: torch.dtype | None = None) -> nn.Module:
    """Returns a deep copy with empty tensors on ``device`` as parameters and buffers; tied ones stay tied.

    Args:
        dtype: the new dtype of floating-point tensors; None keeps theirs.
    """
    known: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=wanted, device=device)
        known[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, known)


@dataclass(frozen=True)
class EagerRun:
    """Holds a step that was followed.

    Args:
        trained: the names of the parameters that it gave a gradient.
        layers: sizes of activations.
        calls: how often it called each module inside of a list of modules, by name.
    """

    followed: EagerFollower
    trained: set[str]
    layers: LayerTraffic
    calls: Counter[str]


def run_eager(model: nn.Module, step: Step, degrees: Degrees) -> EagerRun:
    """Runs forward and backward of ``model``, which is on the meta device."""
    with FakeTensorMode():
        fake = _fake_copy(model, step)
        layers = LayerTraffic(degrees)
        layers.follow(fake)
        calls = _count_calls(fake)
        batch = step.batch(degrees)
        with EagerFollower(degrees) as followed, shown_as_ops():
            loss = step.loss(fake, batch)
            followed.begin_backward()
            loss.backward()
        del loss
    return EagerRun(followed, {name for name, p in fake.named_parameters() if p.grad is not None}, layers, calls)


def _count_calls(model: nn.Module) -> Counter[str]:
    """Returns a counter of the calls of each module inside of a list, by name, which counts from now on."""
    calls: Counter[str] = Counter()
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    for name, module in model.named_modules():
        if _is_inside(name, lists) and "parametrizations" not in name.split("."):
            module.register_forward_pre_hook(partial(_count_call, calls, name))
    return calls


def _count_call(calls: Counter[str], name: str, *_: Any) -> None:
    calls[name] += 1


def _is_inside(name: str, modules: Iterable[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def run_compiled(model: nn.Module, step: Step, degrees: Degrees, fused: bool) -> Timeline:
    """Follows forward and backward as the passes and the partitioner leave them, updates included if ``fused``.

    Raises:
        SeveralGraphsError: the step is not one graph.
    """
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fake = _fake_copy(model, step)
        batch = step.batch(degrees)
        captured = _capture_fused(fake, step, batch) if fused else _capture(lambda: step.outputs(fake, batch))
    assert captured.forward is not None
    return compiled_timeline(captured.forward.graph, captured.backward.graph if captured.backward else None, degrees)


def _fake_copy(model: nn.Module, step: Step) -> nn.Module:
    """Copies ``model`` under a fake tensor mode: to the CPU, where the compiler and attention take their usual ways."""
    fake = empty_copy(model, "cpu")
    if step.checkpointing:
        enable: Any = fake.gradient_checkpointing_enable
        enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return fake


def _capture_fused(model: nn.Module, step: Step, batch: Any) -> Captured:
    trained = TrainStep(model, ActiveAdamW(model), step.loss, accumulate=1, max_norm=None)
    updates = trained.updates()
    with trained.gradients_in_sinks(updates) as sinks:
        try:
            return _capture(lambda: trained.forward(batch, sinks))
        except SeveralGraphsError as error:  # raised once the step is put in order, which counts the updates of others
            broken = error
    raise broken


def _capture(call: Callable[[], Any]) -> Captured:
    """Returns the one graph of ``call``."""
    (graph,), _ = capture_graphs(call, fullgraph=True, dynamic=False)
    return graph


class Repeats(NamedTuple):
    """Names a list of layers that are equal from the first or from the second on.

    Args:
        name: the name of the list in the model.
        kept: the number of layers that stand for all. extra: the number of layers that the list has more.
    """

    name: str
    kept: int
    extra: int


def layers_of_parameters(model: nn.Module) -> dict[int, str]:
    """Returns id of a parameter → the name of its layer: the outermost element of an ``nn.ModuleList`` that has it.

    Parameters outside of lists are left out. A list inside a list counts as part of it, and of several layers that
    share a parameter the first counts.
    """
    found: dict[int, str] = {}

    def look(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            if isinstance(module, nn.ModuleList) and not isinstance(child, nn.ModuleList):
                for parameter in child.parameters():
                    found.setdefault(id(parameter), prefix + name)
            else:
                look(child, f"{prefix}{name}.")

    look(model, "")
    return found


def find_repeats(model: nn.Module, kind_of: Callable[[str], Any] = lambda name: None) -> list[Repeats]:
    """Finds the lists that are worth shortening.

    Args:
        kind_of: qualified name of a parameter → what must be equal beside its shape and dtype.
    """
    found: list[Repeats] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(outer.name + ".") for outer in found)
        if inside or not isinstance(module, nn.ModuleList) or len(module) < 4:
            continue
        kinds = [_kind(layer, f"{name}.{i}", kind_of) for i, layer in enumerate(module)]
        kept = 1 if kinds[0] == kinds[1] else 2
        if all(kind == kinds[kept - 1] for kind in kinds[kept:]):
            found.append(Repeats(name, kept, len(module) - kept))
    return found


def _kind(layer: nn.Module, prefix: str, kind_of: Callable[[str], Any]) -> Any:
    # By the names of classes: torch makes one for each module that it parametrizes.
    modules = [(name, type(module).__name__) for name, module in layer.named_modules()]
    parameters = [
        (name, parameter.shape, parameter.dtype, parameter.requires_grad, kind_of(f"{prefix}.{name}"))
        for name, parameter in layer.named_parameters()
    ]
    return modules, parameters


def run_repeated(
    model: nn.Module, repeats: list[Repeats], run: Callable[[nn.Module], Run], name: str
) -> list[tuple[int, Run]]:
    """Runs models with fewer layers; the whole model is the sum of factor times run.

    Raises ValueError, which names the model by ``name``, for errors in the model's own code.
    """
    if not repeats:
        return [(1, _run_or_explain(model, run, name))]
    factor = 1 - sum(repeat.extra for repeat in repeats)
    runs = [(factor, _run_or_explain(_shortened(model, repeats), run, name))]
    for each in repeats:
        runs.append((each.extra, _run_or_explain(_shortened(model, repeats, longer=each), run, name)))
    return runs


def run_checked(
    model: nn.Module, repeats: list[Repeats], run: Callable[[nn.Module], EagerRun], name: str
) -> tuple[list[Repeats], list[tuple[int, EagerRun]]]:
    """Runs models with fewer layers, as ``run_repeated`` does; returns the lists that may be shortened, and the runs.

    A list may be shortened where a layer more is called, and trained, as the one before it is, and changes nothing in
    the other lists. That is not so where a model goes through two lists together, or counts layers by their number.

    Raises ValueError, which names the model by ``name``, where the whole model cannot be run either.
    """
    lists = [repeat.name for repeat in repeats]
    while repeats:
        short = _run_or_none(_shortened(model, repeats), run)
        if short is None:
            break
        longer = [(each, _run_or_none(_shortened(model, repeats, longer=each), run)) for each in repeats]
        sound = [(each, one) for each, one in longer if one is not None and _adds_a_layer(each, lists, short, one)]
        if len(sound) == len(repeats):
            factor = 1 - sum(repeat.extra for repeat in repeats)
            return repeats, [(factor, short), *((each.extra, one) for each, one in sound)]
        repeats = [each for each, _ in sound]
    return [], [(1, _run_or_explain(model, run, name))]


def _run_or_none(model: nn.Module, run: Callable[[nn.Module], Run]) -> Run | None:
    try:
        return run(model)
    except Exception:  # whatever it is: the whole model may not have it
        return None


def _adds_a_layer(repeat: Repeats, lists: list[str], short: EagerRun, longer: EagerRun) -> bool:
    """Returns whether the additional layer does what the one before it does, and nothing else in the lists changes."""
    before, new = (f"{repeat.name}.{number}" for number in (repeat.kept - 1, repeat.kept))
    others = {
        name for name in short.calls | longer.calls if _is_inside(name, lists) and not _is_inside(f"{name}.", [new])
    }
    return (
        _of_layer(new, longer.calls) == _of_layer(before, longer.calls)
        and _of_layer(new, longer.trained) == _of_layer(before, longer.trained)
        and all(short.calls[name] == longer.calls[name] for name in others)
    )


def _of_layer(layer: str, names: Iterable[str]) -> Counter[str]:
    """Returns the names inside of a layer, its own as the empty one, with their counts, which are 1 in a set."""
    counts = names if isinstance(names, Counter) else Counter(names)
    return Counter({name.removeprefix(layer): n for name, n in counts.items() if f"{name}.".startswith(f"{layer}.")})


def _run_or_explain(model: nn.Module, run: Callable[[nn.Module], Run], name: str) -> Run:
    try:
        return run(model)
    except SeveralGraphsError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"model: {name} cannot be run on shapes alone: {reason}; see inputs= and loss_fn=") from error


def _shortened(model: nn.Module, repeats: list[Repeats], longer: Repeats | None = None) -> nn.Module:
    """Returns a copy with the layers that stand for all, and one more in ``longer``. Tensors are shared."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    num_kept = {repeat.name: repeat.kept + (repeat == longer) for repeat in repeats}
    for name, kept in num_kept.items():
        layers: Any = model.get_submodule(name)
        shared |= {id(layer): None for layer in layers[kept:]}
    short = copy.deepcopy(model, shared)
    for name, kept in num_kept.items():
        copied: Any = short.get_submodule(name)
        parent, _, last = name.rpartition(".")
        setattr(short.get_submodule(parent), last, nn.ModuleList(list(copied)[:kept]))
    return short


def representative(parameter: str, repeats: list[Repeats]) -> str:
    """Returns the name of the same parameter in the layer that stands for its own."""
    for repeat in repeats:
        prefix = repeat.name + "."
        if parameter.startswith(prefix):
            number, _, rest = parameter.removeprefix(prefix).partition(".")
            return f"{prefix}{min(int(number), repeat.kept - 1)}.{rest}"
    return parameter

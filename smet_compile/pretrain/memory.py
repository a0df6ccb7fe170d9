"""Counts the bytes of a run by kind, from its tensors; foresees and explains a lack of memory."""

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from smet_compile.presets import find_preset
from smet_compile.pretrain.config import DTYPES, RunConfig
from smet_compile.pretrain.model_config import NO_MODEL, num_layers_of
from smet_compile.pretrain.training import GradientBytes, Training, build_model, dense_optimizer

BYTE_KINDS = ("weights", "gradients", "moments", "index", "ages")
MOMENTS = {"exp_avg", "exp_avg_sq", "scales"}
Bytes = dict[str, int]
INTEGER_BYTES = 8
SPARSE_WEIGHTS_IN_LAYER = 7
ADVICE = "take a smaller --batch (and a larger --accumulate), a shorter --sequence, or a smaller --preset"
SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "Storage size calculation overflowed")


def bytes_by_kind(
    model: nn.Module, optimizer: torch.optim.Optimizer, gradients: GradientBytes, names: Iterable[str]
) -> Bytes:
    """Returns the bytes that the weights called `names` take, by `BYTE_KINDS`; "ages" also holds step counts.

    A name is that of the dense model ("layers.0.q_proj.weight"); the weight may be compact or dense.
    """
    parameters = dict(model.named_parameters())
    found = {kind: 0 for kind in BYTE_KINDS}
    for name in names:
        module, _, weight = name.rpartition(".")
        chain = f"{module}.parametrizations.{weight}"
        compact = f"{chain}.original" in parameters
        parameter = parameters[f"{chain}.original" if compact else name]
        found["weights"] += parameter.nbytes
        found["gradients"] += gradients.bytes_of(parameter)
        found["index"] += _index_bytes(model, chain) if compact else 0
        for key, state in optimizer.state[parameter].items():
            found["moments" if key in MOMENTS else "ages"] += state.nbytes if torch.is_tensor(state) else 0
    return found


def _index_bytes(model: nn.Module, chain: str) -> int:
    """Returns the bytes of the topology of a compact weight, of all its parts together."""
    compact: Any = model.get_submodule(f"{chain}.0")
    num_parts = 1 if compact.part is None else compact.part.count
    return num_parts * sum(buffer.nbytes for buffer in compact.buffers())


def measure(training: Training, config: RunConfig, vocab_size: int) -> dict[str, dict[str, Bytes | int]]:
    """Measures this run beside dense training: the bytes of the sparse layers ("sparse") and the whole model ("all").

    The optimizer must have taken a step. Dense training is measured on the same model without memory (device meta),
    after a real step of AdamW.
    """
    dense = build_model(config, vocab_size, "meta")
    optimizer = dense_optimizer(config, dense)
    gradients = GradientBytes(optimizer)
    for parameter in dense.parameters():
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    shapes = {name: parameter.shape for name, parameter in dense.named_parameters()}
    sparse = [name for name in shapes if name not in dict(training.model.named_parameters())]
    return {
        scope: {
            "num_weights": sum(math.prod(shapes[name]) for name in names),
            "run": bytes_by_kind(training.model, training.optimizer, training.gradients, names),
            "dense": bytes_by_kind(dense, optimizer, gradients, names),
        }
        for scope, names in (("sparse", sparse), ("all", list(shapes)))
    }


def expect_enough_memory(config: RunConfig, vocab_size: int, num_ranks: int = 1) -> None:
    """Raises ValueError for settings whose smallest possible need is beyond the memory of the machine or device.

    `num_ranks` processes, each with a device of its own, share a micro-batch.
    """
    (rows, columns), own = config.block_shape, config.model != NO_MODEL
    if not config.elastic:
        weights = sum(parameter.nbytes for parameter in build_model(config, vocab_size, "meta").parameters())
        name = "--model" if own else "--preset"
        _expect_room(name, "the dense weights, from which sparse ones are made,", weights, _device_bytes(config.device))
    num_layers = num_layers_of(config.model) if own else find_preset(config.preset).layers
    logits = config.batch // num_ranks * config.sequence * vocab_size * DTYPES[config.dtype].itemsize
    blocks = num_layers * SPARSE_WEIGHTS_IN_LAYER * rows * columns * DTYPES[config.dtype].itemsize
    _expect_room("--batch x --sequence", "the logits of a micro-batch", logits, _device_bytes(config.device))
    _expect_room("--block", "one block of each sparse weight", blocks, _device_bytes(config.device))
    _expect_room(
        "--batch x --accumulate x --sequence",
        "the tokens of a step",
        config.step_tokens * INTEGER_BYTES,
        _machine_bytes(),
    )


def expect_room_for_windows(config: RunConfig) -> None:
    """Raises ValueError where the held-out text of a stream, which may have no end, is larger than the memory."""
    windows = config.eval_windows * config.sequence * INTEGER_BYTES
    _expect_room("--eval-windows x --sequence", "the held-out tokens of a stream", windows, _machine_bytes())


def _expect_room(option: str, content: str, needed: int, available: int) -> None:
    if needed > available:
        raise ValueError(
            f"{option}: expected {content} to fit into {available / 2**30:.1f} GiB of memory, got "
            f"{needed / 2**30:.4g} GiB; take smaller numbers"
        )


def _machine_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _device_bytes(device: str) -> int:
    if torch.device(device).type == "cuda" and torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(device).total_memory)
    return _machine_bytes()


@contextmanager
def explaining_lack_of_memory() -> Iterator[None]:
    """Turns an allocation that failed into a ValueError that says what to make smaller."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(sign in str(error) for sign in SIGNS):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"there is not enough memory ({reason}); {ADVICE}") from error

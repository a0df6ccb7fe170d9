"""Bytes by kind, read from the tensors that a model and its optimizer hold."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from smet_compile.pretrain.config import RunConfig
from smet_compile.pretrain.gradient_bytes import GradientBytes
from smet_compile.pretrain.training import Training, build_model, dense_optimizer

KINDS = ("weights", "gradients", "moments", "index", "ages")
MOMENTS = {"exp_avg", "exp_avg_sq", "scales"}
Bytes = dict[str, int]


def bytes_by_kind(
    model: nn.Module, optimizer: torch.optim.Optimizer, gradients: GradientBytes, names: Iterable[str]
) -> Bytes:
    """Bytes that the weights called `names` take, by `KINDS`; "ages" also holds step counts.

    A name is that of the dense model ("layers.0.q_proj.weight"); the weight may be compact or dense.
    """
    parameters = dict(model.named_parameters())
    found = {kind: 0 for kind in KINDS}
    for name in names:
        module, _, weight = name.rpartition(".")
        chain = f"{module}.parametrizations.{weight}"
        compact = f"{chain}.original" in parameters
        parameter = parameters[f"{chain}.original" if compact else name]
        found["weights"] += parameter.nbytes
        found["gradients"] += gradients.of(parameter)
        found["index"] += sum(buffer.nbytes for buffer in model.get_submodule(chain).buffers()) if compact else 0
        for key, state in optimizer.state[parameter].items():
            found["moments" if key in MOMENTS else "ages"] += state.nbytes if torch.is_tensor(state) else 0
    return found


def measure(training: Training, config: RunConfig, vocab_size: int) -> dict[str, dict[str, Bytes | int]]:
    """Bytes of this run beside dense training, of the sparse layers ("sparse") and the whole model ("all").

    To be called when the optimizer has taken a step. Dense training is measured
    on the same model without memory (device meta), after a real step of AdamW.
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

"""Makes parameter groups, by weight decay and by learning rate, and scales rates and initial values with the width.

SμPar (Dey et al. 2024, arXiv 2405.15743) keeps the size of activations and of their changes the same at every width and
density, so that the best rate of a small model is that of a large one. For Adam and optimizers that, like it, make
steps of a size that does not follow the gradient's, a weight of density d that reads n inputs takes

    a rate in proportion to 1 / (d n), and initial values of a standard deviation in proportion to 1 / √(d n).

An output head takes 1 / (d n) for both. That is the same as the paper's division of the logits by the width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from smet_compile.format import arguments
from smet_compile.optim.parameters import describe_parameters
from smet_compile.shards import make_whole, reshard

Group = dict[str, Any]


def decay_groups(model: nn.Module, weight_decay: float) -> list[Group]:
    """Makes the usual two parameter groups, for ``ActiveAdamW(groups, model=model)`` or any optimizer.

    Matrices decay, biases and norms do not. A compact weight is a matrix, whatever the shape of its values.

    Raises:
        ValueError: ``model`` is no module, or the weight decay is no finite number of at least 0.
    """
    arguments.module("decay_groups", model)
    weight_decay = arguments.number("weight_decay", weight_decay, at_least=0)
    known = describe_parameters(model)
    matrices = [parameter for parameter in known if known[parameter].layout is not None]
    vectors = [parameter for parameter in known if known[parameter].layout is None]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def param_groups(
    model: nn.Module,
    lr: float,
    *,
    embedding_lr: float | None = None,
    weight_decay: float = 0.0,
    base_width: int | None = None,
) -> list[Group]:
    """Makes parameter groups in which embeddings, output head, norms and biases have a rate of their own.

    They fit ``ActiveAdamW(groups, model=model)`` or any optimizer of a dense model. First come the weights of linear
    layers and all other matrices; then the weights of ``nn.Embedding`` and of the output head, which is what
    ``get_output_embeddings()`` returns, else the last matrix; last the vectors, which do not decay. Without
    ``embedding_lr`` and ``base_width`` the groups are those of ``decay_groups``.

    Args:
        model: the model, before or after ``sparsify``, which makes other parameters of the same weights.
        lr: the rate of linear layers. An active optimizer multiplies it by d^(-p), as ever.
        embedding_lr: the rate of embeddings, output head and vectors. Default: ``lr``.
        weight_decay: of matrices, embeddings among them.
        base_width: makes rates follow the width as SμPar has it: ``lr`` is then the rate of a weight that reads
            ``base_width`` inputs, and one that reads n inputs gets lr · base_width / n. The output head gets
            embedding_lr · base_width / n unless it is tied to an embedding. The density's part, 1 / d, is that of
            ``ActiveAdamW`` and ``ActiveLion`` with their default p of 1. See ``scale_initial_``.

    Raises:
        ValueError: ``model`` is no module, or a number is out of range.
    """
    arguments.module("param_groups", model)
    lr = arguments.number("lr", lr, at_least=0)
    own_lr = lr if embedding_lr is None else arguments.number("embedding_lr", embedding_lr, at_least=0)
    width = None if base_width is None else arguments.whole_number("base_width", base_width, at_least=1)
    decay, no_decay = decay_groups(model, weight_decay)
    if embedding_lr is None and width is None:
        return [decay | {"lr": lr}, no_decay | {"lr": lr}]
    known = describe_parameters(model)
    alike: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for parameter in decay["params"]:
        one = known[parameter]
        factor = 1.0 if width is None or one.is_embedding else width / one.num_inputs
        alike.setdefault((one.is_embedding or one.is_head, factor), []).append(parameter)
    groups = [
        decay | {"params": parameters, "lr": (own_lr if is_own else lr) * factor}
        for (is_own, factor), parameters in sorted(alike.items(), key=lambda item: item[0][0])
    ]
    return [*groups, no_decay | {"lr": own_lr}]


@torch.no_grad()
def scale_initial_(model: nn.Module, *, std: float, base_width: int) -> nn.Module:
    """Scales the initial weights of ``model`` in place to the spread that SμPar gives them, and returns ``model``.

    Call it once the model has its first values, before or after ``sparsify``; a second call changes nothing. Beside it
    ``param_groups(model, lr, base_width=base_width)`` makes the rates. The spread is that of the entries which are not
    zero, about zero; a weight that is all zero stays so. Embeddings and vectors stay as they are, since theirs does not
    follow the width, and so does an output head that is tied to an embedding: there the model itself has to divide its
    logits by n / base_width.

    Args:
        std: the standard deviation of a dense weight that reads ``base_width`` inputs. One of density d that reads n
            gets std · √(base_width / (d n)), an output head std · base_width / (d n).
        base_width: the width of the model for which the hyperparameters were found.

    Raises:
        ValueError: ``model`` is no module, a number is out of range, or a weight has no data or is not finite. Nothing
            has changed then.
    """
    arguments.module("scale_initial_", model)
    std = arguments.number("std", std, above=0)
    width = arguments.whole_number("base_width", base_width, at_least=1)
    factors = {}
    reshard(model)
    for parameter, known in describe_parameters(model).items():
        if known.layout is None or known.is_embedding or not parameter.is_floating_point():
            continue
        ratio = width / (known.density * known.num_inputs)
        wanted = std * (ratio if known.is_head else math.sqrt(ratio))
        factors[parameter] = _checked(known.name, parameter, wanted) / _spread(known.name, parameter)
    for parameter, factor in factors.items():
        parameter.mul_(factor)
    return model


def _checked(name: str, weight: Tensor, wanted: float) -> float:
    """Returns the standard deviation that is wanted, which the dtype of the weight has to hold."""
    limits = torch.finfo(weight.dtype)
    if not limits.tiny <= wanted <= limits.max / 1000:
        raise ValueError(
            f"{name}: expected a standard deviation that {weight.dtype} can hold, got {wanted:g}; change std "
            "or base_width"
        )
    return wanted


def _spread(name: str, weight: Tensor) -> float:
    """Returns the root mean square of the entries that are not zero; 1 where all are zero."""
    if weight.is_meta:
        raise ValueError(
            f"{name}: expected a weight with data, got one on the meta device; call smet.materialize first"
        )
    weight = make_whole(weight.detach())
    norm = torch.linalg.vector_norm(weight, dtype=torch.float64).item()
    if not math.isfinite(norm):
        raise ValueError(f"{name}: expected finite initial values, got others; initialise the model first")
    return norm / math.sqrt(max(1, int(weight.count_nonzero()))) or 1.0

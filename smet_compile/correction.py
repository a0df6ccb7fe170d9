"""Corrects the gradients of sites that feed batch norm, which unequal fan-in skews (SparseOpt, arXiv 2605.27541)."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import ASGD, SGD, Optimizer

from smet_compile.format import arguments
from smet_compile.microscope.batch_norm import EVALUATED, NO_BATCH_NORM, BatchNormUse, find_uses
from smet_compile.microscope.recording import Recording, record_forward
from smet_compile.ops import Site, find_sites
from smet_compile.ops.optimizers import find_optimizers, optimizer_that_steps
from smet_compile.ops.plain_copy import without_data
from smet_compile.ops.row_scale import has_equal_fan_in
from smet_compile.ops.scaled_steps import scale_steps as scale_steps_of
from smet_compile.ops.sites import CONVOLUTIONS, check_sparsified, is_depthwise, without_wrappers
from smet_compile.optim import ActiveAdamW, ActiveLion, ActiveOptimizer
from smet_compile.optim.parameters import check_initialised
from smet_compile.shards import has_shards, reshard
from smet_compile.tables import table_lines
from smet_compile.tracing import leave_no_trace

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_CORRECTED = "corrected: batch norm alone reads its output"
_STEPS_SCALED = "its steps are scaled after Adam's direction, which is not SparseOpt's"
_EQUAL = "its pattern has equal fan-in, so that every factor is 1"
_DEPTHWISE = "a depthwise convolution, whose filters have few weights; depthwise=True includes it"
_STACKLEVEL = 4  # warnings name the line that calls correct_gradients
_BY_PLACE = " (judged by the order of modules, not by a forward)"


@dataclass(frozen=True)
class Correction:
    """Holds the result of ``correct_gradients``; ``print`` shows it as a table.

    Args:
        sites: for each site whether and why its gradient is corrected, or why not.
        corrected: the names of those that are.
    """

    sites: Mapping[str, str]
    corrected: tuple[str, ...]

    def __str__(self) -> str:
        rows = table_lines(list(self.sites.items()), left=(0, 1))
        return "\n".join([*rows, f"{len(self.corrected)} of {len(self.sites)} sites are corrected"])


def correct_gradients(
    model: nn.Module,
    optimizer: Any,
    *example: Any,
    depthwise: bool = False,
    scale_steps: bool = False,
    **inputs: Any,
) -> Correction:
    """Corrects the gradient of each compact weight whose output batch norm normalizes; of all others nothing changes.

    Batch norm makes an output independent of the size of its weights, so the gradient of row i is as large as 1/σ_i,
    where σ_i² is in proportion to the row's number of active weights k_i. With k̄ the mean of k over the rows, the
    compact gradient is multiplied in backward by √(k_i / k̄) (arXiv 2605.27541): in eager mode, compiled, with the
    update in backward, and for any optimizer. Scores of growth see the gradient without it. Call it after ``sparsify``,
    with the optimizer at hand; a second call decides anew::

        model     = smet.sparsify(model, density=0.1, include="conv")
        optimizer = smet.ActiveSGD(model, lr=0.1)
        print(smet.correct_gradients(model, optimizer, images))

    A site is corrected where a batch norm in training mode reads its output, through views, permutations, conversions,
    concatenations of channels and sums with what no site made, and nothing else reads it. One forward on tensors
    without data shows that. Without an example, and where the forward cannot be recorded, the order of modules decides,
    with a warning.

    Adam, and other rules that divide by the size of the gradient, cancel a factor that stays the same: then nothing is
    corrected, with a warning.

    Args:
        model: a model with compact weights, in training mode.
        optimizer: the optimizer that trains it, or several.
        example: the arguments of its forward.
        inputs: the keyword arguments of its forward.
        depthwise: whether depthwise convolutions are corrected too.
        scale_steps: for Adam and the like, multiplies each finished step by the factor, weight decay included. This is
            not the paper's method, and compiled steps keep their gradients until ``optimizer.step()``.

    Returns: what was decided for each site, as ``report`` and ``explain`` say it too.

    Raises:
        ValueError: a model without compact weights, without batch norm, or with all of it in evaluation mode; an
            example that its forward does not take; ``scale_steps`` where no optimizer cancels the factor. Nothing has
            changed.
    """
    arguments.module("correct_gradients", model)
    depthwise, wants_steps = arguments.flag("depthwise", depthwise), arguments.flag("scale_steps", scale_steps)
    owner = without_wrappers(model)
    check_sparsified("correct_gradients", owner)
    check_initialised("correct_gradients", owner)
    for name, site in find_sites(owner).items():
        if site.part is not None:
            raise ValueError(
                f"{name}: expected a whole weight, whose rows have all of their inputs, got a part of one; correct "
                "gradients without tensor parallelism"
            )
    found = find_optimizers(optimizer, owner.parameters())
    if not found:
        arguments.optimizer("optimizer", optimizer)
    use, is_traced = _find_uses(owner, example, inputs)
    sites = find_sites(owner)
    reasons = {name: _reason(site, use.reasons[name], depthwise) for name, site in sites.items()}
    holders = {name: optimizer_that_steps(optimizer, site.values) for name, site in sites.items() if not reasons[name]}
    cancelling = {name: each for name, each in holders.items() if each is not None and _cancels(each)}
    if wants_steps:
        _check_scaling(owner, cancelling)
    for name, holder in holders.items():
        if holder is None:
            reasons[name] = "no optimizer that was given holds it"
        elif name in cancelling and not wants_steps:
            reasons[name] = f"{type(holder).__name__} cancels a factor that stays the same"
    _warn(reasons, cancelling, wants_steps)
    for name, site in sites.items():
        site.compact.scales_rows = not reasons[name] and name not in cancelling
        site.compact.scales_steps = not reasons[name] and name in cancelling
        text = _STEPS_SCALED if name in cancelling else _CORRECTED
        text = f"not corrected: {reasons[name]}" if reasons[name] else text
        site.compact.correction = text if is_traced else text + _BY_PLACE
    for each in (each.optimizer for each in found if isinstance(each.optimizer, Optimizer)):
        scale_steps_of(each, [sites[name] for name, holder in cancelling.items() if wants_steps and holder is each])
    texts = {name: str(site.compact.correction) for name, site in sites.items()}
    return Correction(texts, tuple(name for name, reason in reasons.items() if not reason))


def _check_scaling(model: nn.Module, cancelling: dict[str, Any]) -> None:
    """Raises ValueError where no finished steps are to be scaled, or where they are those of shards."""
    if has_shards(model):
        raise ValueError(
            "scale_steps: expected a whole model, got one that fully_shard has cut; train it with SGD, whose gradients "
            "are corrected"
        )
    if not cancelling:
        raise ValueError(
            "scale_steps: expected an optimizer that cancels the correction, such as Adam, for a site that feeds batch "
            "norm, got none; leave it out, and gradients are corrected"
        )


def _check_synchronized(norms: Sequence[nn.Module]) -> None:
    """Warns of SyncBatchNorm that has nobody to synchronize with."""
    if any(isinstance(norm, nn.SyncBatchNorm) for norm in norms) and not _has_process_group():
        warnings.warn(
            "correct_gradients: the model has SyncBatchNorm and there is no process group, so that its statistics are "
            "those of this process alone; call torch.distributed.init_process_group first, or use BatchNorm",
            stacklevel=_STACKLEVEL,
        )


def _has_process_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _find_uses(model: nn.Module, example: tuple[Any, ...], inputs: dict[str, Any]) -> tuple[BatchNormUse, bool]:
    """Returns what feeds batch norm, and whether a forward showed it.

    Raises ValueError where there is no batch norm in training mode, or the forward takes no such example.
    """
    norms = [module for module in model.modules() if isinstance(module, BATCH_NORMS)]
    _check_synchronized(norms)
    shown = without_data(model) if reshard(model) else model
    recording, problem = Recording(), "no example was given"
    if example or inputs:
        try:
            recording = record_forward(shown, example, inputs)
            problem = recording.warning or "it returned no tensor"
        except Exception as error:
            problem = _check_example(model, example, inputs, error)
    if recording.is_complete:
        by_values = {id(site.values): site for site in find_sites(shown).values()}
        names = {name: by_values[id(p)] for name, p in shown.named_parameters() if id(p) in by_values}
        use = find_uses(recording, names)
    else:
        _warn_of_order(problem)
        use = _by_order(shown)
    _check_use(use, norms)
    return use, recording.is_complete


def _warn_of_order(problem: str) -> None:
    warnings.warn(
        f"correct_gradients: the forward could not be recorded ({problem}), so the order of modules decides: a weight "
        "is corrected where the next module beside its own is a batch norm of its size. Look at the printed result",
        stacklevel=_STACKLEVEL + 1,
    )


def _check_example(model: nn.Module, example: tuple[Any, ...], inputs: dict[str, Any], error: Exception) -> str:
    """Raises ValueError where the forward takes no such example; else returns why it could not be recorded."""
    try:
        with leave_no_trace(model), torch.no_grad():
            model(*example, **inputs)
    except Exception as real:
        raise ValueError(
            f"example: expected arguments that the model's forward takes, got an error from it: {_line(real)}; pass a "
            "batch as in training"
        ) from real
    return _line(error)


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _by_order(model: nn.Module) -> BatchNormUse:
    """Judges by the order in which modules were registered side by side."""
    sites = find_sites(model)
    by_module = {id(site.module): site for site in sites.values()}
    use = BatchNormUse(dict.fromkeys(sites, NO_BATCH_NORM))
    for module in model.modules():
        use.num_training += isinstance(module, BATCH_NORMS) and module.training
        use.num_evaluated += isinstance(module, BATCH_NORMS) and not module.training
        for child, following in itertools.pairwise(module.children()):
            site = by_module.get(id(child))
            if site is None or not isinstance(following, BATCH_NORMS):
                continue
            if isinstance(child, (nn.Linear, *CONVOLUTIONS)) and following.num_features == site.layout.rows:
                use.reasons[site.name] = "" if following.training else EVALUATED
    return use


def _check_use(use: BatchNormUse, norms: Sequence[nn.Module]) -> None:
    if use.num_training:
        return
    if norms or use.num_evaluated:
        raise ValueError(
            "correct_gradients: expected batch norm in training mode, got all of it in evaluation mode; call "
            "model.train() first"
        )
    raise ValueError(
        "correct_gradients: expected a model with batch norm, got one without; train it as it is, since only batch "
        "norm skews gradients"
    )


def _reason(site: Site, reason: str, depthwise: bool) -> str:
    """Returns why a site is not corrected, whatever the optimizer; an empty text where it is."""
    module = site.module
    if reason:
        return reason
    if isinstance(module, CONVOLUTIONS) and module.transposed:
        return "a transposed convolution, whose filters are not the rows of its weight"
    if is_depthwise(module) and not depthwise:
        return _DEPTHWISE
    if site.compact.pattern is not None and site.compact.has_data() and has_equal_fan_in(site.compact.active):
        return _EQUAL
    return ""


def _cancels(optimizer: Any) -> bool:
    """Tells whether an optimizer's steps do not depend on the size of the gradient."""
    if isinstance(optimizer, ActiveOptimizer):
        is_like_adam = isinstance(optimizer, ActiveAdamW | ActiveLion)
        return is_like_adam or optimizer.rule.normalized is not None
    if isinstance(optimizer, SGD | ASGD):
        return False
    return any(kind.__name__ in _CANCELLING for kind in type(optimizer).__mro__)


_CANCELLING = {
    *(
        "Adam",
        "AdamW",
        "Adamax",
        "NAdam",
        "RAdam",
        "SparseAdam",
        "Adadelta",
        "Adagrad",
        "Adafactor",
        "RMSprop",
        "Rprop",
    ),
    *("Lion", "LAMB", "Lamb"),
}


def _warn(reasons: dict[str, str], cancelling: dict[str, Any], wants_steps: bool) -> None:
    """Warns where the call was made for nothing."""
    if cancelling and not wants_steps:
        names = ", ".join(sorted({type(each).__name__ for each in cancelling.values()}))
        warnings.warn(
            f"correct_gradients: {names} divides by the size of the gradient, which cancels a factor that stays the "
            f"same, so {len(cancelling)} sites that feed batch norm are not corrected. Train with SGD, or pass "
            "scale_steps=True to scale the finished steps, which is not SparseOpt's method",
            stacklevel=3,
        )
    elif _EQUAL in reasons.values() and all(reasons.values()):
        num_equal = sum(reason == _EQUAL for reason in reasons.values())
        warnings.warn(
            f"correct_gradients: the {num_equal} sites that feed batch norm have equal fan-in, so that every factor is "
            "1 and nothing is to correct",
            stacklevel=3,
        )
    elif reasons and all(reasons.values()):
        first = next(iter(reasons.items()))
        warnings.warn(
            f"correct_gradients: no site is corrected ({first[0]}: {first[1]}); print the result for all reasons",
            stacklevel=3,
        )

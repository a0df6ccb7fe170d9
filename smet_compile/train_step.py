"""compile_train_step: forward, backward and update as one call, in which compact gradients die where they are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from smet_compile.ops import Site, find_sites
from smet_compile.optim.fused import Update, updates_of

LossFn = Callable[[Any, Any], Tensor]


def compile_train_step(
    model: nn.Module,
    optimizer: Optimizer,
    loss_fn: LossFn | None = None,
    *,
    accumulate: int = 1,
    max_grad_norm: float | None = None,
) -> TrainStep:
    """Compiles a training step of ``model``: ``loss = step(batch)`` is forward, backward and optimizer step.

    Without accumulation, clipping or data parallelism each compact weight is updated in backward, as soon as its
    gradient is known: no compact gradient outlives its update. All other parameters are updated by
    ``optimizer.step()`` as ever. With any of the three, gradients live as compact tensors until they are used::

        step = smet.compile_train_step(model, optimizer)
        for batch in loader:
            loss = step(batch)
            scheduler.step(); manager.step()

    Args:
        model: with compact weights; not compiled before.
        optimizer: ``ActiveAdamW``, or AdamW, Adam or SGD of ``torch.optim``; holds the model's parameters.
        loss_fn: ``loss_fn(model, batch)`` → 0-d loss. Default: ``model(**batch).loss``.
        accumulate: calls that make one optimizer step; each call's loss is divided by it for the gradients.
        max_grad_norm: clips the norm of all gradients together, as ``torch.nn.utils.clip_grad_norm_`` does.

    Returns: the step. It takes a batch and returns the loss, detached and not divided.

    Raises:
        ValueError: a model without compact weights; another optimizer, or one that holds other parameters; an
            argument out of range. In a step: a loss that is not a scalar, or a batch the default cannot take.
    """
    if accumulate < 1:
        raise ValueError(f"accumulate: expected a number of calls of at least 1, got {accumulate}")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm: expected a number above 0 or None, got {max_grad_norm}")
    sites = find_sites(model)
    if not sites:
        raise ValueError("compile_train_step: expected a model with compact weights, got one with none; sparsify it")
    _check_holds(model, optimizer, sites)
    return TrainStep(model, optimizer, loss_fn or _model_loss, accumulate, max_grad_norm)


class TrainStep:
    """One training step, compiled at its first call. Made by ``compile_train_step``."""

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, loss_fn: LossFn, accumulate: int, max_grad_norm: float | None
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.loss_fn = loss_fn
        self.accumulate = accumulate
        self.max_grad_norm = max_grad_norm
        self.sites = list(find_sites(model).values())
        self._update_of = updates_of(optimizer)
        self._num_accumulated = 0
        self._leaf = torch.zeros((), requires_grad=True)
        self._compiled = torch.compile(self.forward)

    @property
    def fused(self) -> bool:
        """Whether compact weights are updated in backward, and their gradients never kept."""
        reduced = any(isinstance(module, DistributedDataParallel) for module in self.model.modules())
        kept = self.accumulate > 1 or self.max_grad_norm is not None or reduced
        return not kept and self._update_of is not None

    def forward(self, batch: Any, updates: list[Update | None]) -> Tensor:
        """The part that is compiled: opens the sinks and computes the loss."""
        for site, update in zip(self.sites, updates, strict=True):
            compact = site.compact
            if update is not None:
                compact.update_sink = update.sink(self._leaf, site.values, *update.arguments)
                if compact.candidates is not None:
                    compact.growth_sink = compact.open_growth_sink(compact.update_sink)
        loss = self.loss_fn(self.model, batch)
        for site, update in zip(self.sites, updates, strict=True):
            if update is not None:
                site.compact.update_sink = site.compact.growth_sink = None
        return loss

    def __call__(self, batch: Any) -> Tensor:
        return self._fused_step(batch) if self.fused else self._step(batch)

    def _step(self, batch: Any) -> Tensor:
        loss = _checked(self._compiled(batch, [None] * len(self.sites)))
        (loss / self.accumulate if self.accumulate > 1 else loss).backward()
        self._num_accumulated += 1
        if self._num_accumulated == self.accumulate:
            self._num_accumulated = 0
            if self.max_grad_norm is not None:
                held = [p for group in self.optimizer.param_groups for p in group["params"]]
                clip_grad_norm_(held, self.max_grad_norm)
            self._finish()
        return loss.detach()

    def _fused_step(self, batch: Any) -> Tensor:
        updates = self.updates()
        with self.gradients_in_sinks(updates):
            loss = _checked(self._compiled(batch, updates))
            loss.backward()
        self._finish()
        return loss.detach()

    def _finish(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def updates(self) -> list[Update | None]:
        """The update of each site in backward; None for one that is frozen, and for all where none is fused."""
        if not self.fused or self._update_of is None:
            return [None] * len(self.sites)
        groups = {p: group for group in self.optimizer.param_groups for p in group["params"]}
        updates = []
        for site in self.sites:
            update = None
            if site.values.requires_grad:
                update = self._update_of(site.values, groups[site.values])
                site.compact.update_counts = update.counts
            updates.append(update)
        return updates

    @contextmanager
    def gradients_in_sinks(self, updates: list[Update | None]) -> Iterator[None]:
        """The values ask for no gradient while the sinks take it: what backward changes may not require one."""
        updated = [site for site, update in zip(self.sites, updates, strict=True) if update is not None]
        for site in updated:
            site.values.requires_grad_(False)
        try:
            yield
        finally:
            for site in updated:
                site.values.requires_grad_(True)
                site.compact.update_sink = site.compact.growth_sink = None


def _model_loss(model: nn.Module, batch: Any) -> Tensor:
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"batch: expected a dict of the model's arguments, got {type(batch).__name__}; pass "
            "loss_fn=lambda model, batch: ..."
        )
    loss: Tensor = model(**batch).loss
    return loss


def _checked(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss: expected a tensor without dimensions, got {got}; return loss.mean() from loss_fn")
    if not loss.requires_grad:
        raise ValueError("loss: expected one that depends on trained parameters, got one that needs no gradient")
    return loss


def _check_holds(model: nn.Module, optimizer: Optimizer, sites: dict[str, Site]) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    known = {id(p): name for name, p in model.named_parameters()}
    for name, site in sites.items():
        if site.values.requires_grad and id(site.values) not in held:
            raise ValueError(
                f"{name}: expected an optimizer that holds it, got one that does not; make the optimizer from "
                "model.parameters() after sparsify"
            )
    others = len(held - known.keys())
    if others:
        raise ValueError(
            f"optimizer: expected parameters of the model only, got {others} others; a step trains one model"
        )

"""Provides compile_train_step: forward, backward and optimizer step as one call.

Where no gradient has to be kept, the compiled forward opens an update sink for each compact weight (``ops.sinks``), so
that the optimizer's update is part of the compiled backward. Else the same call is a usual step with gradients.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from smet_compile.format import arguments
from smet_compile.format.arguments import function, number, whole_number
from smet_compile.ops import CompactWeight, Site, captures, find_sites
from smet_compile.ops.gate import is_traced
from smet_compile.ops.open_sinks import close_sinks, open_sinks
from smet_compile.ops.reads import settle_before_use
from smet_compile.ops.sinks import count_by, find_other_uses
from smet_compile.ops.sites import check_sparsified
from smet_compile.ops.torch_insides import keep_address, without_compiled_autograd
from smet_compile.optim.active import ActiveOptimizer
from smet_compile.optim.clipping import clip_grad_norm_
from smet_compile.optim.in_backward import BackwardUpdate, updates_of
from smet_compile.optim.kept_gradients import hooks_of, why_all_are_kept, why_kept
from smet_compile.optim.on_arrival import UpdatesOnArrival
from smet_compile.optim.recompiles import changing_options, why_recompiled
from smet_compile.shards import has_shards, reshard, set_gradient_sync

LossFn = Callable[[Any, Any], Tensor]
SinkToOpen = tuple[CompactWeight, Any, tuple[Any, ...]]
"""A weight, the op that opens its sink, and the arguments of that op: parameter, values, and those of the update."""
_num_compiled = itertools.count()


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
    ``optimizer.step()`` as usual. With any of the three, a hook of yours before the optimizer's step, or where the step
    is not one graph (a warning says why), gradients are compact tensors until ``optimizer.step()``; ``step.fused``
    tells which case it is. A hook on a compact parameter keeps its gradient. Of a model that ``fully_shard`` sharded,
    an active optimizer updates every parameter in backward, when its gradient has been reduced over the ranks; each
    rank gets the loss of its own batch::

        step = smet.compile_train_step(model, optimizer)
        for batch in loader:
            loss = step(batch)
            scheduler.step()

    A step may fail: something raises in its forward, backward or update, or Ctrl-C ends it. Then every gradient of the
    model is dropped, also one that was there before or that earlier calls accumulated. Accumulation begins anew with
    the next call. State that the optimizer made for an update that did not happen is deleted. Updates in backward that
    were made already cannot be undone: the weights without an update then count as frozen in that step. Training can go
    on from there; to repeat the step exactly, load a checkpoint. With accumulation DistributedDataParallel reduces
    gradients in the last call of each optimizer step only.

    Args:
        model: a model with compact weights, not compiled before.
        optimizer: ``ActiveAdamW``, or AdamW, Adam or SGD of ``torch.optim``; holds the model's parameters.
        loss_fn: ``loss_fn(model, batch)`` → 0-d loss. Default: ``model(**batch).loss``.
        accumulate: number of calls for one optimizer step; each call's loss is divided by it for the gradients.
        max_grad_norm: clips the norm of all gradients together, as ``torch.nn.utils.clip_grad_norm_`` does.

    Returns: the step. It takes a batch and returns the loss, detached and not divided.

    Raises:
        ValueError: a model without compact weights; another optimizer, or one that holds other parameters; an
            argument out of range. In a step: a loss that is not a scalar, or a batch the default cannot take.
    """
    arguments.module("model", model)
    arguments.optimizer("optimizer", optimizer)
    accumulate = whole_number("accumulate", accumulate, at_least=1)
    if max_grad_norm is not None:
        max_grad_norm = number("max_grad_norm", max_grad_norm, above=0, advice="pass None for no clipping")
    if loss_fn is not None:
        function("loss_fn", loss_fn, "(model, batch) → loss")
    check_sparsified("compile_train_step", model)
    reshard(model)
    _check_parameters(model, optimizer, find_sites(model).values())
    return TrainStep(model, optimizer, loss_fn, accumulate, max_grad_norm)


class TrainStep:
    """Makes one training step at each call, and compiles it at the first. ``compile_train_step`` returns it."""

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, loss_fn: LossFn | None, accumulate: int, max_norm: float | None
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.loss_fn = _model_loss if loss_fn is None else loss_fn
        self.accumulate = accumulate
        self.max_grad_norm = max_norm
        self.sites = list(find_sites(model).values())
        self._update_of = updates_of(optimizer)
        self._reducers = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
        self._is_sharded = has_shards(model)
        self._on_arrival: UpdatesOnArrival | None = None
        if self._is_sharded and isinstance(optimizer, ActiveOptimizer):
            self._on_arrival = UpdatesOnArrival(optimizer)
        self._num_accumulated = 0
        self._unfinished: list[BackwardUpdate | None] | None = None
        self._is_one_graph = True
        self.compile()

    def compile(self, **options: Any) -> None:
        """Makes the next call compile the step anew, by ``torch.compile`` with these options."""
        self._options = options
        self._compiled_shapes = self._shapes()
        self._compiled_options = changing_options(self.optimizer)
        self._compiled = self._compile(fullgraph=self._uses_sinks)

    def _shapes(self) -> list[torch.Size | None]:
        """Returns the shapes of the values, which a density stage changes."""
        return [None if (values := site.values_maybe) is None else values.shape for site in self.sites]

    def _compile(self, fullgraph: bool) -> Callable[..., Tensor]:
        """Compiles ``forward`` with a code object and a name of its own.

        Dynamo limits recompiles per code object, so two models that share one would share the limit. It also remembers
        by the name what changed from call to call, and would make a second model's sizes and options symbols.
        """
        forward = TrainStep.forward
        code = forward.__code__.replace(co_name=f"forward_{next(_num_compiled)}")
        own = MethodType(FunctionType(code, forward.__globals__, code.co_name, None, forward.__closure__), self)
        compiled: Callable[..., Tensor] = torch.compile(own, fullgraph=fullgraph, **self._options)
        return compiled

    @property
    def fused(self) -> bool:
        """Tells whether compact weights are updated in backward, so that their gradients are never kept.

        A single weight may be an exception (``explain`` says why). Where parameters are sharded, all are updated, each
        when its gradient has been reduced over the ranks.
        """
        if self._uses_sinks:
            return not all(hooks_of(site.values) for site in self.sites)
        return self._on_arrival is not None and self._why_all_are_kept is None

    def why_kept(self, site: Site) -> str | None:
        """Says why the gradient of a weight is kept until the optimizer's step; None where it need not be."""
        return self._why_all_are_kept or why_kept(site.values)

    @property
    def _why_all_are_kept(self) -> str | None:
        if self.accumulate > 1:
            return "gradients are accumulated over several calls"
        if self.max_grad_norm is not None:
            return "the norm of all gradients together is clipped"
        if self._reducers:
            return "DistributedDataParallel reduces gradients"
        if self._update_of is None:
            return "the optimizer is differentiable or capturable, and left to torch"
        return why_all_are_kept(self.optimizer)

    @property
    def _uses_sinks(self) -> bool:
        return bool(self.sites) and self._why_all_are_kept is None and not self._is_sharded and self._is_one_graph

    def forward(self, batch: Any, sinks: list[SinkToOpen]) -> Tensor:
        """Opens the sinks and computes the loss. This is the part that is compiled.

        It looks nothing up: a compiler that traced how sites are found would take seconds longer, and guard all of it.
        """
        if not sinks:
            return self.loss_fn(self.model, batch)
        opened = open_sinks(sinks)
        loss = self.loss_fn(self.model, batch)
        if isinstance(loss, Tensor):
            loss = find_other_uses(loss, [each[0] for each in opened], [each[2] for each in opened])
        close_sinks([compact for compact, _, _ in sinks])
        return loss

    def __call__(self, batch: Any) -> Tensor:
        if self.loss_fn is _model_loss and not isinstance(batch, Mapping):
            raise ValueError(
                f"batch: expected a dict of the model's arguments, got {type(batch).__name__}; pass "
                "loss_fn=lambda model, batch: ..."
            )
        self._abandon()  # if the cleaning up after an earlier step was interrupted
        if self._is_sharded:
            reshard(self.model)
        if self._shapes() != self._compiled_shapes:
            self.compile(**self._options)  # a recompile of the old one would make sizes of the state symbols
        settle_before_use(*(site.compact for site in self.sites))
        self._unfinished = updates = self.updates()
        self._note_capture()
        try:
            loss = self._step(batch, updates)
        except BaseException:
            self._abandon()
            raise
        self._unfinished = None
        return loss

    def _note_capture(self) -> None:
        if self.sites and captures.is_capturing(self.sites[0].values.device):
            captures.note(site.values for site in self.sites)

    def _step(self, batch: Any, updates: list[BackwardUpdate | None]) -> Tensor:
        is_last = self._num_accumulated + 1 == self.accumulate
        with ExitStack() as stack:
            for reducer in () if is_last else self._reducers:
                if not reducer.static_graph:  # which fails without a reduction
                    stack.enter_context(reducer.no_sync())
            try:
                loss = self._loss(batch, updates)
            except _not_one_graph() as broken:
                if not self._uses_sinks:
                    raise
                updates = [None] * len(self.sites)
                loss = self._loss_in_parts(batch, broken)
            if self._is_sharded:
                set_gradient_sync(self.model, is_last)
            if self._on_arrival is not None and self._why_all_are_kept is None:
                stack.enter_context(self._on_arrival.active())
            if any(updates):  # compiled autograd would compile the backward again, and fails on ops that change values
                stack.enter_context(without_compiled_autograd())
            (loss / self.accumulate if self.accumulate > 1 else loss).backward()
        self.forget_unused(updates)
        self._num_accumulated += 1
        if is_last:
            self._finish()
            self._num_accumulated = 0
        return loss.detach().clone()  # a CUDA graph computes the next loss in the same memory

    def _abandon(self) -> None:
        """Cleans up after a step that failed, except for updates that it made. Does nothing if none is unfinished."""
        updates = self._unfinished
        if updates is None:
            return
        self._num_accumulated = 0
        self.model.zero_grad(set_to_none=True)
        for reducer in self._reducers:
            _forget_reduction(reducer)
        close_sinks(site.compact for site in self.sites)
        for site in self.sites:
            if site.compact.collected is not None:
                site.compact.collected.forget()
        self.forget_unused(updates)
        self._unfinished = None

    def _loss(self, batch: Any, updates: list[BackwardUpdate | None]) -> Tensor:
        with self.gradients_in_sinks(updates) as sinks:
            return _check_loss(self._compiled(batch, sinks))

    def _loss_in_parts(self, batch: Any, broken: Exception) -> Tensor:
        """Computes the loss with graph breaks, and from now on with gradients that are kept.

        A graph returns zeros for a sink that it does not use, so weights that no graph reaches would be updated too.
        """
        previous, self._compiled = self._compiled, self._compile(fullgraph=False)
        try:
            loss = self._loss(batch, [None] * len(self.sites))
        except BaseException:
            self._compiled = previous
            raise
        self._is_one_graph = False
        first = (str(broken).strip().splitlines() or [type(broken).__name__])[0]
        reason = f"the step is not one graph ({first})"
        changed = why_recompiled(self._compiled_options, changing_options(self.optimizer))
        if isinstance(broken, _recompile_limit()) and changed is not None:
            reason = f"the step was compiled too often, since {changed}"
        warnings.warn(
            f"compile_train_step: {reason}, so no update is fused, and compact gradients "
            "are in memory until optimizer.step(); smet_compile.explain(model, ...) shows the graph breaks",
            stacklevel=4,
        )
        return loss

    def _finish(self) -> None:
        if self.max_grad_norm is not None:
            clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)

    def updates(self) -> list[BackwardUpdate | None]:
        """Returns each site's update in backward; None where it is not fused: frozen weights, those ``why_kept``."""
        groups = {p: group for group in self.optimizer.param_groups for p in group["params"]}
        stateless = [site.values for site in self.sites if not self.optimizer.state.get(site.values)]
        try:
            update_of = self._update_of if self._uses_sinks else None
            return [self._update(site, groups, update_of) for site in self.sites]
        except BaseException:
            for values in stateless:
                self.optimizer.state.pop(values, None)
            raise

    def _update(self, site: Site, groups: dict[nn.Parameter, dict[str, Any]], update_of: Any) -> BackwardUpdate | None:
        values = site.values
        if values.requires_grad and values not in groups:
            raise _not_held_error(site)
        if update_of is None or not values.requires_grad or why_kept(values) is not None:
            return None
        update: BackwardUpdate = update_of(values, groups[values])
        count_by(self.optimizer, values, update.num_updates, update.num_skipped)
        return update

    @contextmanager
    def gradients_in_sinks(self, updates: list[BackwardUpdate | None]) -> Iterator[list[SinkToOpen]]:
        """Yields the sinks that a forward opens, and closes what is left open at its end."""
        try:
            yield [
                (site.compact, update.sink, (site.values, _without_gradient(site.values), *update.arguments))
                for site, update in zip(self.sites, updates, strict=True)
                if update is not None
            ]
        except BaseException:
            self.forget_unused(updates)
            raise
        finally:
            close_sinks(site.compact for site in self.sites)

    def forget_unused(self, updates: list[BackwardUpdate | None]) -> None:
        """Deletes state that was made for a weight which the step then did not reach."""
        for site, update in zip(self.sites, updates, strict=True):
            if update is None or not update.made_state or site.values not in self.optimizer.state:
                continue
            if int(update.num_updates) == 0:
                assert self._update_of is not None
                self._update_of.forget(site.values)


def _without_gradient(parameter: Tensor) -> Tensor:
    """Returns the values of a parameter as a tensor that needs no gradient, since backward changes it."""
    values = parameter.detach()
    if not is_traced(values):
        keep_address(values)
    return values


def _model_loss(model: nn.Module, batch: Any) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def _not_one_graph() -> tuple[type[Exception], ...]:
    """Returns the errors that Dynamo raises where it cannot make one graph; imports them here, which takes seconds."""
    from torch._dynamo.exc import Unsupported, UserError

    return Unsupported, UserError, _recompile_limit()


def _recompile_limit() -> type[Exception]:
    from torch._dynamo.exc import FailOnRecompileLimitHit

    return FailOnRecompileLimitHit


def _forget_reduction(reducer: DistributedDataParallel) -> None:
    """Makes the reducer ready for a new forward after an interrupted backward, for the rest of which it would wait."""
    reducer.reducer._reset_state()


def _check_loss(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss: expected a tensor without dimensions, got {got}; return loss.mean() from loss_fn")
    if not loss.requires_grad:
        raise ValueError("loss: expected one that depends on trained parameters, got one that needs no gradient")
    return loss


def _not_held_error(site: Site) -> ValueError:
    return ValueError(
        f"{site.name}: expected an optimizer that holds it, got one that does not; make the optimizer from "
        "model.parameters() after sparsify"
    )


def _check_parameters(model: nn.Module, optimizer: Optimizer, sites: Iterable[Site]) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for site in sites:
        if site.values.requires_grad and id(site.values) not in held:
            raise _not_held_error(site)
    others = len(held - {id(p) for p in model.parameters()})
    if others:
        raise ValueError(
            f"optimizer: expected parameters of the model only, got {others} others; a step trains one model"
        )

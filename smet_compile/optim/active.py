"""Defines ActiveOptimizer, the base of all optimizers here: everything but the rule and its options.

A step reuses each parameter's ``Update`` of the step before where only gradient and rate have changed, makes the others
anew, and then makes all updates by one call of ``make_updates``.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Hashable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from smet_compile.format import TopologyChange, arguments
from smet_compile.format.arguments import described, flag, seed_number
from smet_compile.ops import captures
from smet_compile.ops.gate import is_traced
from smet_compile.ops.law import compute_dtype
from smet_compile.ops.loaded import MANAGER, Saved, check_groups
from smet_compile.ops.optimizers import changes_nothing, has_state, register
from smet_compile.ops.reads import settle_live
from smet_compile.ops.rules import Rule
from smet_compile.ops.torch_insides import outside_graphs, prepare
from smet_compile.ops.updates import Update, check
from smet_compile.optim.options import (
    CommonOptions,
    check_moment_dtype,
    check_names,
    check_options,
    initial_warmup,
    without_model,
)
from smet_compile.optim.parameters import (
    ReadyUpdate,
    check_initialised,
    describe_parameters,
    find_misfit,
    make_updates,
    not_trained,
    warn_of_untrained,
)
from smet_compile.optim.rates import Rates
from smet_compile.optim.state import (
    StateKind,
    add_generation,
    check_state,
    find_ages,
    is_kept_by_wrapper,
    moment_dtype,
    of_all_ranks,
    read_slot,
    ready_state,
    share_scales,
)
from smet_compile.shards import check_dtypes, is_sharded, local, reshard

_TRAINABLE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_PICKLED = ("moment_dtype", "stochastic_rounding", "seed", "_model", "_parameters", "_options", "_names_but_rate")


class ActiveOptimizer(Optimizer):
    """Keeps state for active weights only, and gives each block its own age and warm-up (SMET, arXiv 2606.00888).

    A subclass sets the rule, and the options of its groups besides ``lr``, both warm-ups and ``lr_density_exponent``. A
    block whose gradient is not finite keeps weight and state, is counted in ``num_skipped_blocks``, and grows older.
    Plain parameters are moved by the same rule (d = 1, no warm-up, their own step count).

    Args:
        params: the model; or parameters or parameter groups, with ``model=`` given.
        options: the rule's options, as defaults that a group may override.
        common: see ``CommonOptions``.

    Raises:
        ValueError: an argument out of range; groups without ``model``; a parameter that is not the model's; a complex
            parameter; 8-bit state for a parameter whose groups of codes are cut into shards. In a step: a gradient for
            a dtype that is not trained.
    """

    rule: ClassVar[Rule]
    warmup_steps: ClassVar[int] = 100
    lr_density_exponent: ClassVar[float] = 1.0

    def __init__(
        self, params: nn.Module | Iterable[Any], options: dict[str, Any], common: CommonOptions | dict[str, Any]
    ) -> None:
        check_names(type(self).__name__, common)
        model = common.get("model")
        if isinstance(params, nn.Module):
            if model is not None and model is not params:
                raise ValueError(f"model: expected none beside a model, got {described(model)}; leave it out")
            model, params = params, list(params.parameters())
        if model is None:
            raise without_model(type(self).__name__, params)
        arguments.module("model", model)
        self.moment_dtype = check_moment_dtype(common.get("moment_dtype"))
        rounding = common.get("stochastic_rounding")
        self.stochastic_rounding = rounding is None or flag("stochastic_rounding", rounding)
        self.seed = seed_number("seed", common.get("seed", 0))
        check_initialised(type(self).__name__, model)
        check_dtypes(model)
        self._model, self._parameters = model, describe_parameters(model)
        defaults = check_options(
            {
                **options,
                "warmup_steps": common.get("warmup_steps", self.warmup_steps),
                "initial_warmup_steps": common.get("initial_warmup_steps"),
                "lr_density_exponent": common.get("lr_density_exponent", self.lr_density_exponent),
            }
        )
        self._options = frozenset(defaults)  # torch adds others to its own copy when a state is loaded
        self._is_first_step = True
        self._names_but_rate = tuple(name for name in defaults if name != "lr")
        self._drop_ready_updates()
        super().__init__(params, defaults)
        register(self)
        prepare()

    @classmethod
    def rule_for(cls, is_vector: bool, is_head: bool) -> Rule:
        """Returns the rule for a kind of parameter: the one of the class, unless a subclass has several.

        ``is_vector``: the parameter is no matrix. ``is_head``: it is the weight of the output layer.
        """
        return cls.rule

    def rule_of(self, parameter: nn.Parameter) -> Rule:
        """Returns the rule that moves ``parameter``."""
        known = self._parameters[parameter]
        return self.rule_for(known.layout is None, known.is_head)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        checked = check_options(self.defaults | param_group)
        known = {key: checked[key] for key in param_group if key in self.defaults}
        super().add_param_group(param_group | known | initial_warmup(checked))
        self._parameters = describe_parameters(self._model) | self._parameters
        for parameter in self.param_groups[-1]["params"]:
            error = find_misfit(type(self).__name__, parameter, self._parameters, self.moment_dtype)
            if error is not None:
                del self.param_groups[-1]
                raise error

    @outside_graphs("an active optimizer's step runs in eager mode; compile what calls it without fullgraph=True")
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes one update of every parameter that has a gradient. Returns the closure's loss, if there is one.

        A first step with rates and gradients of 0 only makes the state (``changes_nothing``).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        settle_live()
        ready, missing = self._look_up()
        if missing and reshard(self._model):
            ready, missing = self._look_up()
        if missing:
            captures.refuse_in_capture(missing[0][1].device, "a step of the same parameters")
            self._check_all()
            only_makes_state = not has_state(self) and changes_nothing(self)
            for index, parameter, group in missing:
                ready[index] = self.update_of(parameter, group)
            if only_makes_state:
                return loss
        self.param_groups[0].pop(MANAGER, None)  # of a run that has none now: it would be behind
        if self._is_first_step:
            self._is_first_step = False
            warn_of_untrained(type(self).__name__, self._model)
        if any(captures.is_capturing(update.values.device) for update in ready[:1]):
            captures.note(update.values for update in ready)
        make_updates(ready)
        for known in self._ready.values():
            if known.parameter.grad is not None:
                known.count_change()
        return loss

    def _look_up(self) -> tuple[list[Any], list[tuple[int, nn.Parameter, dict[str, Any]]]]:
        """Returns the updates, None for each that has to be made anew, and (index, parameter, group) of those."""
        ready: list[Update | None] = []
        missing = []
        for group in self.param_groups:
            options, device = self._options_of(group), None
            for parameter in group["params"]:
                grad = parameter.grad
                if grad is None:
                    if parameter.requires_grad:
                        self._parameters[parameter].check(parameter)
                    continue
                if grad.device != device:
                    device, rate = grad.device, self._rates.rate(group, grad.device)
                known, here = self._ready.get(parameter), local(grad)
                update = None if known is None else known.with_gradient(here, self.state[parameter], options, rate)
                if update is None:
                    missing.append((len(ready), parameter, group))
                ready.append(update)
        return ready, missing

    def _options_of(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """Returns the options of a group except its rate."""
        return tuple(group[name] for name in self._names_but_rate)

    def _check_all(self) -> None:
        """Raises for a parameter or gradient that cannot be trained, before any state is made."""
        for group in self.param_groups:
            for parameter in group["params"]:
                grad = parameter.grad
                if parameter.requires_grad or grad is not None:
                    self._parameters[parameter].check(parameter)
        for group in self.param_groups:
            for parameter in group["params"]:
                grad = parameter.grad
                if grad is None:
                    continue
                name = self._parameters[parameter].name
                if parameter.dtype not in _TRAINABLE_DTYPES:
                    raise not_trained(name, parameter)
                if grad.is_sparse:
                    raise ValueError(f"{name}: expected a dense gradient, got a sparse one; use sparse=False")

    def update_of(self, parameter: nn.Parameter, group: dict[str, Any]) -> Update:
        """Makes the next update of the rows of a parameter that this rank holds, and its state where there is none yet.

        The gradient is ``parameter.grad``; where that is None, the parameter itself is a placeholder for it.
        """
        known = self._parameters[parameter]
        kind = self._state_kind(parameter, group)
        self.state[parameter] = state = ready_state(known.name, parameter, kind, self.state[parameter])
        rule, compact = self.rule_of(parameter), known.site.compact if known.site else None
        update = Update(
            rule=rule,
            values=local(parameter),
            grad=local(parameter if parameter.grad is None else parameter.grad),
            slots=tuple(local(state[slot.name]) for slot in rule.slots),
            scales=state.get("scales"),
            num_skipped=state["num_skipped"],
            step=state["step"],
            lr=self._rates.rate(group, parameter.device),
            generation=local(state.get("generation")),
            births=state.get("births"),
            layout=known.layout,
            **known.place_of_rows(parameter, rule),
            units_are_columns=known.units_are_columns,
            options=_numbers_of(rule, group),
            density_rate=known.density ** -group["lr_density_exponent"],
            warmup_steps=group["warmup_steps"] if compact else 0,
            initial_warmup_steps=group["initial_warmup_steps"] if compact else 0,
            noise_seed=zlib.crc32(f"{self.seed} {known.name}".encode()) if self.stochastic_rounding else None,
        )
        warmups = update.warmup_steps, update.initial_warmup_steps
        if any(warmups) and update.generation is None:
            raise ValueError(
                f"{known.name}: expected warmup_steps and initial_warmup_steps of 0 as when the optimizer made its "
                f"state, got {warmups}: blocks have no age; make the optimizer anew with warmup_steps="
            )
        check(known.name, update)
        if not is_traced(update.values):
            self._ready[parameter] = ReadyUpdate(update, parameter, known, state, self._options_of(group))
        return update

    def _state_kind(self, parameter: nn.Parameter, group: dict[str, Any]) -> StateKind:
        rule, site = self.rule_of(parameter), self._parameters[parameter].site
        has_ages = rule.needs_ages or group["warmup_steps"] > 0 or group["initial_warmup_steps"] > 0
        return StateKind(rule.slots, moment_dtype(parameter, self.moment_dtype), site, has_ages)

    def check_parameter(self, parameter: nn.Parameter) -> None:
        """Raises ValueError where ``parameter`` is no longer what it was when the optimizer was made."""
        self._parameters[parameter].check(parameter)

    @property
    def num_skipped_blocks(self) -> int:
        """Counts the blocks (for plain parameters, entries) whose gradient was not finite, over all steps."""
        return sum(int(state["num_skipped"]) for state in self.state.values() if state)

    @torch.no_grad()
    def on_topology_change(self, change: TopologyChange) -> None:
        """Moves the state of one compact parameter: survivors bit for bit, newcomers zero and of age 0.

        Scales of 8-bit state stay, since they belong to groups of dense positions. Tensors of the values' shape that a
        wrapper keeps in the same state (Lookahead's slow weights) move too.
        """
        state = self.state.get(change.values)
        born = ~change.survived
        if not state or not (change.resizes or born.any()):
            return
        self._ready.pop(change.values, None)
        rule = self.rule_of(change.values)
        ours = {slot.name for slot in rule.slots} | {"generation"}
        if "scales" in state:
            share_scales(state["scales"], change)
        for key, rows in state.items():
            if key in ours or is_kept_by_wrapper(key, rows, change):
                change.remap_(rows)
        if "generation" not in state or not born.any():
            return
        group = next(g for g in self.param_groups if any(p is change.values for p in g["params"]))
        options = rule.named_options(_numbers_of(rule, group))
        mature_age = rule.mature_age(options, compute_dtype(change.values.dtype))
        mature_age = max(mature_age, group["warmup_steps"], group["initial_warmup_steps"])
        if add_generation(state, change, mature_age):
            captures.warn_of_new_memory([change.values])

    def block_ages(self, values: nn.Parameter) -> Tensor:
        """Returns the age (N,) int64 of each block of a compact parameter: optimizer steps since it was grown.

        Without ages (a rule that needs none, and no warm-up) every block is as old as the training. Where the parameter
        is sharded, every rank has to ask, and gets the ages of all blocks; under tensor parallelism those of its part.
        """
        state, rows = self.state.get(values), self._parameters[values].rows_of(values)
        num_blocks = rows.cuts[-1]
        if not state:
            return torch.zeros(num_blocks, dtype=torch.int64, device=values.device)
        if "generation" not in state:
            return state["step"].expand(num_blocks).clone()
        generation = rows.gather(local(state["generation"]))
        return find_ages(generation, state["births"], state["step"])

    def read_slot(self, values: nn.Parameter, name: str) -> Tensor | None:
        """Returns the state of a compact parameter by the name of a slot, decoded to fp32 if it is kept in 8 bits.

        Returns None where the rule has no such slot, or before the first step.
        """
        site = self._parameters[values].site
        return read_slot(self.state.get(values, {}), self.rule_of(values).slots, name, site)

    def state_dict(self) -> dict[str, Any]:
        """Returns torch's state dict, with the blocks skipped on all ranks. Of a sharded model every rank asks."""
        found = super().state_dict()
        numbered = enumerate(p for group in self.param_groups for p in group["params"])
        sharded = {number: p for number, p in numbered if is_sharded(p) and number in found["state"]}
        known = [(number, p, self._parameters[p]) for number, p in sharded.items()]
        counts_of = of_all_ranks([(found["state"][number], each.rows_of(p), each.site) for number, p, each in known])
        for number, counts in zip(sharded, counts_of, strict=True):
            found["state"][number] = found["state"][number] | counts
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads ``state_dict()`` of the same model, every state tensor in the dtype it was saved in.

        torch's own method casts all state to the parameter's dtype, which destroys integers in a bf16 model. Raises
        ValueError as ``check_state_dict`` does, before anything has changed.
        """
        saved = self.check_state_dict(state_dict)
        loaded: dict[Tensor, dict[str, Tensor]] = {}
        for key, state in state_dict["state"].items():
            parameter = saved[key].parameter
            loaded[parameter] = {k: v.to(parameter.device, copy=True) for k, v in state.items()}
            if not self._parameters[parameter].rows_of(parameter).are_first:  # the first rank's count is that of all
                loaded[parameter]["num_skipped"].zero_()
        captures.warn_of_new_memory([parameter for parameter in loaded if self.state.get(parameter)])
        self._drop_ready_updates()  # they would keep the old state alive
        first = self.register_load_state_dict_post_hook(lambda own: own.state.update(loaded), prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            first.remove()

    def check_state_dict(self, state_dict: Any) -> dict[Hashable, Saved]:
        """Checks a state dict, and returns each parameter and its saved group, by the parameter's number there.

        Raises:
            ValueError: an option that the constructor would refuse; state of other parameters, or of another dtype or
                shape; counts, ages or scales that no training makes. Moments may be anything: an overflow is kept.
        """
        saved = check_groups(state_dict, self, self._options - {"initial_warmup_steps"})  # older files lack it
        for i, group in enumerate(state_dict["param_groups"]):
            try:
                check_options({option: group[option] for option in self._options & group.keys()})
            except (ValueError, TypeError) as error:
                raise ValueError(f"param_groups[{i}]: {error}") from error
        for key, state in state_dict["state"].items():
            if key not in saved:
                raise ValueError("optimizer state: expected that of this model's parameters, got that of others")
            parameter, group = saved[key]
            kind = self._state_kind(parameter, group | initial_warmup(group))
            check_state(self._parameters[parameter].name, parameter, kind, state)
        return saved

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {key: getattr(self, key) for key in (*_PICKLED, "_is_first_step")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"_is_first_step": True} | state)
        for group in self.param_groups:
            group.update(initial_warmup(group))
        self._drop_ready_updates()
        register(self)

    def _drop_ready_updates(self) -> None:
        """Drops the cached updates, which are then made anew from the state."""
        self._ready: dict[nn.Parameter, ReadyUpdate] = {}
        self._rates = Rates()


def _numbers_of(rule: Rule, group: dict[str, Any]) -> tuple[float, ...]:
    """Returns the options of a parameter group that the rule needs, in its order."""
    named = group | dict(zip(("beta1", "beta2"), group.get("betas", ()), strict=False))
    return tuple(float(named[option]) for option in rule.options)

"""Defines what a rule is: the mathematics of one optimizer, as a pure function and a few names.

Everything else about an update is written once for every rule: ages of blocks, warm-up, the factor for density,
stochastic rounding, bf16 and 8-bit state, work in chunks, topology changes, checkpoints, and updates in backward.
Modules of ``optim`` register rules here by name, and the ops look them up by that name.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smet_compile.format.arguments import described

Options = Any
"""A named tuple of a rule's options, all of them floats, such as ``options.beta1``."""
Step = Callable[["Block", Options], tuple[Tensor, ...]]


class Slot(NamedTuple):
    """Names a tensor of the weight's shape that the optimizer keeps in its state.

    Args:
        name: its key in the state, such as "exp_avg".
        signed: False where it is never negative (a mean of squares).
    """

    name: str
    signed: bool = True


class Block(NamedTuple):
    """Holds the entries that a rule moves in one call. All tensors have one dtype, fp32 or fp64.

    Args:
        weight: the weights.
        grad: their gradient, of the same shape.
        slots: their state, tensors of the same shape in the order of ``Rule.slots``.
        rate: step size of each entry, lr · d^(-p) · min(1, age / W), with density d and W steps of warm-up, which are
            others for the initial blocks than for grown ones; broadcasts.
        of_age: the tensors that ``Rule.of_age`` returned, looked up at each entry's age; they broadcast.
        unit_norm: norm of the output unit that each entry belongs to, for a rule with ``normalized``; broadcasts.
    """

    weight: Tensor
    grad: Tensor
    slots: tuple[Tensor, ...]
    rate: Tensor
    of_age: tuple[Tensor, ...] = ()
    unit_norm: Tensor | None = None


def _needs_no_age(age: Tensor, options: Options) -> tuple[Tensor, ...]:
    return ()


def _mature_at_once(options: Options, dtype: torch.dtype) -> int:
    return 1


@dataclass(frozen=True)
class Rule:
    """Says how one optimizer moves a weight.

    Args:
        name: the name by which ops find the rule.
        step: (block, options) → the new weight, then one new tensor for each slot. It never writes to its arguments.
        slots: the state that it keeps.
        options: names of its numbers, in the order in which an op passes them.
        of_age: (ages fp64, options) → tensors of the same shape, such as bias corrections. They are computed once for
            each generation (the blocks that were activated in one step) and then looked up for each block.
        mature_age: (options, dtype) → the age from which ``of_age`` no longer changes in ``dtype``.
        shared_step: ``of_age`` gets the parameter's step count instead of a block's age.
        normalized: (block, options) → a tensor like the gradient. Its norm over the active entries of each output unit
            reaches ``step`` as ``block.unit_norm``. None where the rule treats each entry alone.
    """

    name: str
    step: Step
    slots: tuple[Slot, ...] = ()
    options: tuple[str, ...] = ()
    of_age: Callable[[Tensor, Options], tuple[Tensor, ...]] = _needs_no_age
    mature_age: Callable[[Options, torch.dtype], int] = _mature_at_once
    shared_step: bool = False
    normalized: Callable[[Block, Options], Tensor] | None = None
    _options_type: Callable[..., Options] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_options_type", namedtuple("Options", self.options))

    @property
    def needs_ages(self) -> bool:
        return self.of_age is not _needs_no_age

    def named_options(self, numbers: Sequence[float]) -> Options:
        """Returns the numbers, which come in the order of ``options``, as a named tuple."""
        return self._options_type(*numbers)


_rules: dict[str, Rule] = {}


def register_rule(rule: Rule) -> Rule:
    """Makes a rule known to the ops by its name, and returns it.

    Raises:
        ValueError: another rule has this name.
    """
    if not isinstance(rule, Rule):
        raise ValueError(f"rule: expected a Rule, got {described(rule)}; make one of a name and a function")
    if _rules.setdefault(rule.name, rule) is not rule:
        raise ValueError(f"rule {rule.name!r}: expected a name of its own, got one that is registered; rename the rule")
    return rule


def known_slots() -> set[str]:
    """Returns the names of the state slots of all registered rules."""
    return {slot.name for rule in _rules.values() for slot in rule.slots}


def find_rule(name: str) -> Rule:
    """Returns the registered rule of this name."""
    rule = _rules.get(name)
    if rule is None:
        raise ValueError(
            f"rule {name!r}: expected one of {', '.join(_rules) or 'none'}; import the module that registers it"
        )
    return rule

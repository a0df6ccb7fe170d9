"""A rule says how an optimizer moves a weight. Everything else about an update is written once, for every rule.

Generic are ages, warm-up, density rate, stochastic rounding, bf16 and 8-bit state, chunks, topology moves, checkpoints
and updates in backward. A rule is one pure function and a few names.
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
"""A named tuple of a rule's options, all floats: ``options.beta1``."""
Step = Callable[["Block", Options], tuple[Tensor, ...]]


class Slot(NamedTuple):
    """A tensor of the shape of the weight that the optimizer keeps in its state.

    Args:
        name: its key in the state, as ``exp_avg``. signed: False for one that is never negative, as a mean of squares.
    """

    name: str
    signed: bool = True


class Block(NamedTuple):
    """The entries that a rule moves at once, all tensors in one dtype, fp32 or fp64.

    Args:
        weight, grad: of one shape. slots: of the same shape, in the order of the rule's.
        rate: step size by entry, lr · d^(-p) · min(1, age / W); broadcasts.
        of_age: what the rule's ``of_age`` returned at each entry's age; broadcasts.
        unit_norm: norm of the output unit that an entry belongs to, for a rule with ``normalized``; broadcasts. Else
            None.
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
    """How one optimizer moves a weight.

    Args:
        name: as ops and checkpoints of graphs know it.
        step: (block, options) → the new weight and the new slots, as many as ``slots``. Pure; never writes to its
            arguments.
        slots: the state it keeps, each of the shape of the weight.
        options: names of its numbers, in the order in which they travel.
        of_age: (ages fp64, options) → tensors of the same shape, such as bias corrections: computed once for each
            generation of blocks, then looked up by block.
        mature_age: (options, dtype) → the age from which ``of_age`` returns the same in ``dtype``.
        shared_step: ``of_age`` sees the parameter's step count instead of a block's age.
        normalized: (block, options) → a tensor like the gradient; its norm over the active entries of each output unit
            of the weight reaches ``step`` as ``block.unit_norm``. None: the rule looks at each entry alone.
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
        """Returns the numbers, in the order of ``options``, by name."""
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


def find_rule(name: str) -> Rule:
    """Returns the registered rule of this name."""
    rule = _rules.get(name)
    if rule is None:
        raise ValueError(
            f"rule {name!r}: expected one of {', '.join(_rules) or 'none'}; import the module that registers it"
        )
    return rule


def known_rules() -> tuple[Rule, ...]:
    """Returns every registered rule."""
    return tuple(_rules.values())

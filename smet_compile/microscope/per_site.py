"""Finds what holds of each compact weight by itself: dead units, ages, churn, survival of grown blocks.

Shape suffixes: S stacked matrices (R, C) of M block rows and K block columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smet_compile.ops import Site
from smet_compile.ops.optimizers import optimizer_that_steps
from smet_compile.runtime import TopologyEvent


@dataclass(frozen=True)
class DeadUnits:
    """Holds the dead units of a stack of S matrices (R, C).

    Inputs are its columns and outputs its rows. A module that multiplies with its weight from the other side (Hugging
    Face ``Conv1D``, a lookup) has rows as inputs and columns as outputs.

    Args:
        inputs: (S C,) bool, those without active weight: what comes there is ignored.
        outputs: (S R,) bool, those without active weight: what comes out is zero, or the bias.
    """

    inputs: Tensor
    outputs: Tensor

    def __bool__(self) -> bool:
        return bool(self.inputs.any() or self.outputs.any())


def dead_units(site: Site, rows_are_inputs: bool | None = None) -> DeadUnits:
    """Reads dead units from the topology, on the device it is on, in time linear in its bits.

    Args:
        rows_are_inputs: how the weight is used; None: as the class of its module says.

    Raises:
        ValueError: a topology on the meta device.
    """
    check_has_data(site)
    layout, (bm, bn) = site.layout, site.layout.block_shape
    mask_SMK = site.mask().view(layout.num_matrices, layout.block_rows, layout.block_cols)
    rows = ~mask_SMK.any(2).repeat_interleave(bm, dim=1)[:, : layout.rows].flatten().cpu()
    cols = ~mask_SMK.any(1).repeat_interleave(bn, dim=1)[:, : layout.cols].flatten().cpu()
    if rows_are_inputs is None:
        classes = {kind.__name__ for kind in type(site.module).__mro__}
        rows_are_inputs = "Conv1D" in classes or isinstance(site.module, nn.Embedding)
    return DeadUnits(rows, cols) if rows_are_inputs else DeadUnits(cols, rows)


def check_has_data(site: Site) -> None:
    """Raises ValueError where a topology is on the meta device and has no data."""
    if site.compact.topology.is_meta:
        raise ValueError(
            f"{site.name}: expected a topology with data, got one on the meta device; load a checkpoint, or sparsify "
            "the model on another device"
        )


@dataclass(frozen=True)
class Cohort:
    """Counts the blocks of one weight, or of several, that were grown at one topology update.

    Args:
        born_step: the step of that update; 0: the blocks active from the beginning.
        num_grown: how many they were.
        num_active: how many of them are active now, never dropped since.
    """

    born_step: int
    num_grown: int
    num_active: int

    @property
    def survival_fraction(self) -> float | None:
        """Returns the share that is active; None if nothing was grown or the optimizer joined older cohorts with it."""
        is_known = self.num_grown > 0 and self.num_active <= self.num_grown
        return self.num_active / self.num_grown if is_known else None


@dataclass(frozen=True)
class SiteHistory:
    """Says what became of one weight over time.

    Args:
        age_counts: age in steps → number of active blocks, exactly; empty where the optimizer keeps no ages.
        churn: (step, dropped over active blocks) for each topology update.
        cohorts: by birth; empty without ages.
        explored_fraction: blocks that were ever active, of all (the in-time over-parameterization rate of Liu et
            al. 2021); None without an update.
    """

    age_counts: dict[int, int]
    churn: tuple[tuple[int, float], ...]
    cohorts: tuple[Cohort, ...]
    explored_fraction: float | None

    @property
    def mean_age(self) -> float | None:
        num_blocks = sum(self.age_counts.values())
        return sum(age * count for age, count in self.age_counts.items()) / num_blocks if num_blocks else None


def history_of(site: Site, optimizer: Any, events: Sequence[TopologyEvent], step: int) -> SiteHistory:
    """Returns what became of one weight.

    Args:
        optimizer: the one that knows ages, or several, or a wrapper. events: the topology updates so far.
        step: how many steps the optimizer has taken.
    """
    own = [(event.step, event.sites[site.name]) for event in events if site.name in event.sites]
    ages = _age_counts(site, optimizer)
    num_first = own[0][1].num_before if own else site.num_active_in_whole
    grown = {0: num_first} | {at: event.num_added for at, event in own}
    alive = {step - age: count for age, count in ages.items()}
    return SiteHistory(
        age_counts=ages,
        churn=tuple((at, event.churn_fraction) for at, event in own),
        cohorts=tuple(Cohort(born, count, alive.get(born, 0)) for born, count in grown.items() if ages),
        explored_fraction=own[-1][1].explored_fraction if own else None,
    )


def _age_counts(site: Site, optimizer: Any) -> dict[int, int]:
    ages_of = getattr(optimizer_that_steps(optimizer, site.values), "block_ages", None)
    if ages_of is None:
        return {}
    of_blocks = ages_of(site.values)
    of_blocks = of_blocks if site.part is None else site.part.gather(of_blocks)
    ages, counts = torch.unique(of_blocks.cpu(), return_counts=True)
    return dict(zip(ages.tolist(), counts.tolist(), strict=True))


def join_cohorts(histories: Sequence[SiteHistory]) -> tuple[Cohort, ...]:
    """Returns the cohorts of several weights, those of one birth as one."""
    counts: dict[int, list[int]] = {}
    for cohort in (cohort for history in histories for cohort in history.cohorts):
        so_far = counts.setdefault(cohort.born_step, [0, 0])
        so_far[0] += cohort.num_grown
        so_far[1] += cohort.num_active
    return tuple(Cohort(born, *both) for born, both in sorted(counts.items()))

"""Has backward collect dense gradients in the steps before an update, for policies that ask for them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from smet_compile.ops import Site, find_sites
from smet_compile.ops.growth import NO_GRADIENT, Collected, follow_gradient, give_up_rest, keep_for_good, used_by_steps
from smet_compile.ops.loaded import check_keys, check_names, check_tensor
from smet_compile.ops.optimizers import FoundOptimizer
from smet_compile.runtime.parts import join_collected, split_collected
from smet_compile.runtime.update import Rules, find_ranks
from smet_compile.shards import ALONE, Ranks, is_fully_sharded

_PARTS = Collected._fields


class GradientCollection:
    """Gives weights their buffers in the window before an update, and takes them away afterwards.

    Buffers that another manager gave are left alone. They are taken away when this object is gone.

    Args:
        model: has the weights.
        changing: those whose topology changes, which alone get buffers.
        rules: the policies, and so whether anything is collected at all.
        window: number of steps up to the update; None for what the policies say.
        largest_fraction: the most that an update ever drops, which fixes the size of the buffers.

    Attributes:
        growth: how many blocks of each weight the next density stage grows, for which buffers have to suffice.
    """

    def __init__(
        self, model: nn.Module, changing: dict[str, Site], rules: Rules, window: int | None, largest_fraction: float
    ) -> None:
        asked = max((policy.window for policy in rules.asking), default=0)
        self.window = window if asked and window is not None else asked
        self._model, self._sites, self._changing = model, find_sites(model), changing
        self._rules, self._largest_fraction = rules, largest_fraction
        self._decay = min((policy.decay for policy in rules.asking), default=1.0)
        self._given: dict[str, tuple[Site, Collected]] = {}
        self._announced: list[Site] = []
        self._of_original: dict[str, Collected] = {}
        self.growth: Mapping[str, int] = {}
        self._stop_when_gone()

    def _stop_when_gone(self) -> None:
        weakref.finalize(self, _take_away, self._given).atexit = False
        weakref.finalize(self, _take_back, self._announced).atexit = False

    def has_gradient(self, site: Site) -> bool:
        """Tells whether a gradient of this weight has come; True where none is asked for."""
        return not self.window or (site.name in self._given and self._given[site.name][1].has_gradient())

    def advance(self, is_near: bool, afresh: bool) -> None:
        """Prepares for the next step.

        Args:
            is_near: an update comes within the window.
            afresh: what was collected so far is not for that update.
        """
        for site in self._changing.values() if self.window else ():
            if not site.compact.is_collected:
                site.compact.is_collected = True
                self._announced.append(site)
        if afresh or not is_near:
            _take_away(self._given)
        if not is_near:
            return
        ranks = ALONE if self._given else find_ranks(self._model, self._sites)[1]
        keeps_gradients = not self._given and not is_fully_sharded(self._model)
        for name, site in self._changing.items():
            if name not in self._given:
                self._give(site, ranks, keeps_gradients)
            elif self.window == 1:
                self._given[name][1].forget()
            elif self._decay < 1:
                self._given[name][1].scale_(self._decay)

    def renew(self, name: str, is_near: bool) -> None:
        """Gives a weight that was resized by a load buffers of its new size, if an update comes within the window."""
        if name in self._given:
            _take_away({name: self._given.pop(name)})
        if not is_near:
            return
        ranks, keeps_gradients = find_ranks(self._model, self._sites)[1], not is_fully_sharded(self._model)
        for each in [site for other, site in self._changing.items() if other not in self._given]:
            self._give(each, ranks, keeps_gradients)

    def _give(self, site: Site, ranks: Ranks, keeps_gradients: bool) -> None:
        collected = self._rules.collect(site, self._largest_fraction, self.growth.get(site.name, 0))
        self._given[site.name] = site, collected
        site.compact.collected = collected
        site.compact.reduced_over = ranks.names if ranks.run_all_layers else ""
        if keeps_gradients:  # FSDP2 takes them away after each backward
            follow_gradient(collected, site.values)

    def end_step(self, optimizer: Any) -> None:
        """Keeps what was collected for a step that ``optimizer`` has made."""
        own = {id(p) for group in optimizer.param_groups for p in group["params"]} if self._given else set()
        for site, collected in self._given.values():
            if id(site.values) in own:
                keep_for_good(collected)

    def begin_update(self, optimizers: Iterable[FoundOptimizer]) -> None:
        """Gives up what the weights of these ``optimizers`` collected after the last step of theirs.

        The gradient of a generator's loss in the discriminator, which has made its step, is one that no step uses.
        """
        stepped = set().union(*(found.steps for found in optimizers)) if self._given else set()
        for site, collected in self._given.values():
            if id(site.values) in stepped:
                give_up_rest(collected)

    @contextmanager
    def given_up_after_error(self) -> Iterator[None]:
        """Has an error in an update leave no gradients behind that the next step would be added to.

        A longer window goes on as it does after an update that was postponed.
        """
        try:
            yield
        except BaseException:
            self.advance(is_near=bool(self._given), afresh=False)
            raise

    def forget(self, name: str) -> None:
        """Forgets what was collected for a weight, which has another topology now."""
        if name in self._given:
            self._given[name][1].forget()

    def state_dict(self, within_step: bool = False) -> dict[str, dict[str, Any]]:
        """Returns what was collected in earlier steps of the window, by weight. Gradients that wait are not saved.

        It is that of this rank: where backward does not reduce it (DistributedDataParallel), others have their own.

        Args:
            within_step: an optimizer made a step that the manager has not counted yet, so that a window of one step may
                hold something.
        """
        given = self._given.items() if self.window > 1 or within_step else ()
        return {name: join_collected(site, used_by_steps(collected))._asdict() for name, (site, collected) in given}

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        """Fills the buffers that weights have now, as ``advance`` gave them."""
        for name, parts in state.items():
            if name in self._given:
                site, buffers = self._given[name]
                for buffer, saved in zip(buffers, split_collected(site, Collected(**parts)), strict=True):
                    buffer.copy_(saved)

    def check_state_dict(self, state: Any, growth: Mapping[str, int]) -> None:
        """Raises ValueError where ``state`` cannot be that of these weights under these policies, with this growth."""
        check_names("collected", state, self._sites.keys())
        for name, parts in state.items():
            site = self._sites[name]
            check_keys(f"collected[{name!r}]", parts, _PARTS)
            ours = self._rules.collect(site, self._largest_fraction, growth.get(name, 0)) if self.window else None
            if ours is None:
                raise ValueError(f"{name}: expected no collected gradients, since no policy asks for them, got some")
            num_parts = 1 if site.part is None else site.part.count
            for part, expected in ours._asdict().items():
                shape = (num_parts * expected.shape[0], *expected.shape[1:])
                check_tensor(f"collected[{name!r}].{part}", parts[part], expected.dtype, shape)
            _check_positions(name, site, parts["positions"])

    def parts_of_state(self) -> list[dict[str, Any]]:
        """Returns the dicts that hold what ``load_state_dict`` changes, for whoever has to put it back."""
        return [self.__dict__, self._given]

    def fill_as_original(self) -> None:
        """Fills the buffers of a copy, once ``advance`` gave them, with what those of the original held."""
        for name, (_, collected) in self._given.items():
            for buffer, value in zip(collected, self._of_original.get(name, collected), strict=True):
                buffer.copy_(value)
        self._of_original = {}

    def __getstate__(self) -> dict[str, Any]:
        held = {name: used_by_steps(collected) for name, (_, collected) in self._given.items()}
        return self.__dict__ | {"_given": {}, "_announced": [], "_of_original": held}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._stop_when_gone()


def _check_positions(name: str, site: Site, positions: torch.Tensor) -> None:
    known = positions[positions != NO_GRADIENT]
    in_range = bool(((known >= 0) & (known < site.whole.num_blocks)).all())
    if not in_range or known.unique().numel() != known.numel() or known.numel() not in (0, positions.numel()):
        raise ValueError(f"{name}: expected positions of different blocks below {site.whole.num_blocks}, got others")


def _take_away(given: dict[str, tuple[Site, Collected]]) -> None:
    for site, collected in given.values():
        if site.values_maybe is not None and site.compact.collected is collected:
            site.compact.collected = None
    given.clear()


def _take_back(announced: list[Site]) -> None:
    for site in announced:
        if site.values_maybe is not None:
            site.compact.is_collected = False

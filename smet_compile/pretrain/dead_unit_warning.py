"""Warns while a run goes on when a layer has units without any active weight."""

from typing import Any

from torch import nn

from smet_compile.microscope import dead_units
from smet_compile.ops import find_sites
from smet_compile.pretrain.console import print_plainly

MOST_NAMES = 3


class DeadUnitWarning:
    """Looks at a model's topologies when asked to; says once of each layer that it has dead units.

    `console` is a `rich.console.Console`.
    """

    def __init__(self, console: Any) -> None:
        self._console = console
        self._warned: set[str] = set()

    def look(self, model: nn.Module) -> None:
        """To be called at the start and after each topology update: linear in the bits of the topology."""
        found = {name: dead_units(site) for name, site in find_sites(model).items()}
        new = [name for name, dead in found.items() if dead and name not in self._warned]
        if not new:
            return
        self._warned.update(new)
        inputs = sum(int(found[name].inputs.sum()) for name in new)
        outputs = sum(int(found[name].outputs.sum()) for name in new)
        named = ", ".join(new[:MOST_NAMES]) + (f" and {len(new) - MOST_NAMES} more" if len(new) > MOST_NAMES else "")
        print_plainly(
            self._console,
            f"warning: {named}: {inputs:,} inputs and {outputs:,} outputs without an active weight; a higher --density "
            "or a smaller --block avoids that, `inspect` shows where they are",
        )

"""RigL's growth: where the gradient of an inactive block is large (Evci et al. 2020).

On request, the backward of a weight scores its inactive blocks and keeps the positions of the best: one layer's
dense gradient at a time. Each backward replaces what an earlier one found, so under gradient accumulation the last
micro-batch decides. The gradients are those before clipping or any other correction.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smet_compile.ops import Site
from smet_compile.ops.sinks import NO_GRADIENT


class GradientScores:
    """Asks for the candidates of one site.

    Args:
        max_count: the most that will ever be taken. It fixes the shape of the buffer, and so a compiled graph.
    """

    def __init__(self, site: Site, max_count: int) -> None:
        self.site = site
        self.max_count = max(1, max_count)

    def attach(self) -> None:
        self.site.compact.candidates = torch.full((self.max_count,), NO_GRADIENT, device=self.site.values.device)

    def detach(self) -> None:
        self.site.compact.candidates = None

    def take(self, count: int) -> Tensor | None:
        """The ``count`` best candidates, best first; None where no gradient came."""
        candidates = self.site.compact.candidates
        if candidates is None or candidates[0] == NO_GRADIENT:
            return None
        return candidates[:count]

"""RigL's growth: where the gradient of an inactive block is large (Evci et al. 2020).

On request, the backward of each unpacked weight scores its inactive blocks and keeps the positions of the best:
one layer's dense gradient at a time. Each backward replaces what an earlier one found, so under gradient
accumulation the last micro-batch decides. The gradients are those before clipping or any other correction.
"""

from __future__ import annotations

import weakref
from functools import partial

import torch
from torch import Tensor

from smet_compile.format import all_block_means
from smet_compile.ops import Site


class _Use:
    """One read of a weight whose gradient has not come yet. Dies with the graph that reads it."""


class GradientScores:
    """Listens to the dense gradient of one site and keeps ``count`` candidates.

    A weight read several times in a forward has several gradients: they are added up, and scored when the last
    one has come.
    """

    def __init__(self, site: Site, count: int) -> None:
        self.site = site
        self.count = count
        self.candidates: Tensor | None = None
        self._waiting: weakref.WeakSet[_Use] = weakref.WeakSet()
        self._sum: Tensor | None = None

    def attach(self) -> None:
        self.site.compact.on_dense_grad = self._listen

    def detach(self) -> None:
        self.site.compact.on_dense_grad = None

    def _listen(self, dense: Tensor) -> None:
        use = _Use()
        self._waiting.add(use)
        dense.register_hook(partial(self._receive, use))

    # What torch.compiler.disable sets, without its import of the whole compiler: hooks are for eager code.
    _listen._torchdynamo_disable = True  # type: ignore[attr-defined]

    def _receive(self, use: _Use, grad: Tensor) -> None:
        self._waiting.discard(use)
        total = grad.detach() if self._sum is None else self._sum + grad.detach()
        if len(self._waiting):
            self._sum = total
            return
        self._sum = None
        self.candidates = self._best(total)

    def take(self) -> Tensor | None:
        """The candidates (count,), best blocks first in no particular order; None where no gradient came."""
        if self._sum is not None:
            self.candidates = self._best(self._sum)
        return self.candidates

    @torch.no_grad()
    def _best(self, grad: Tensor) -> Tensor:
        scores = all_block_means(grad, self.site.layout)
        scores.masked_fill_(self.site.mask(), -1)
        return scores.topk(self.count, sorted=False).indices

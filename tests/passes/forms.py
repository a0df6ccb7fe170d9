"""Lists the call forms that fuse, for one weight each: its shape, the computation, the shapes of the inputs."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)


class Form(NamedTuple):
    shape: tuple[int, ...]
    apply: Callable[..., Any]
    inputs: tuple[tuple[int, ...], ...]


W, S = (24, 16), (3, 24, 16)
X2, X3, X4 = (5, 16), (2, 3, 16), (2, 3, 2, 16)


def checkpointed(x: Tensor, w: Tensor) -> Tensor:
    return checkpoint(lambda y: F.linear(y.tanh(), w).tanh(), x, use_reentrant=False)


def selectively(x: Tensor, w: Tensor) -> Tensor:
    """Keeps what products give, recomputes all else."""

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        save = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(lambda y: F.linear(y.tanh(), w).tanh(), x, use_reentrant=False, context_fn=contexts)


LINEAR = {
    "linear, bias": Form(W, lambda x, b, w: F.linear(x, w, b), (X2, (24,))),
    "linear": Form(W, lambda x, w: F.linear(x, w), (X2,)),
    "linear, 3-D, bias": Form(W, lambda x, b, w: F.linear(x, w, b), (X3, (24,))),
    "linear, 3-D": Form(W, lambda x, w: F.linear(x, w), (X3,)),
    "linear, 4-D, bias": Form(W, lambda x, b, w: F.linear(x, w, b), (X4, (24,))),
    "linear, 4-D": Form(W, lambda x, w: F.linear(x, w), (X4,)),
    "linear, 1-D": Form(W, lambda x, w: F.linear(x, w), ((16,),)),
    "linear, one token": Form(W, lambda x, w: F.linear(x, w), ((1, 16),)),
    "expanded, one token each": Form(W, lambda x, w: torch.bmm(x, w.t().expand(3, 16, 24)), ((3, 1, 16),)),
    "linear, no token": Form(W, lambda x, w: F.linear(x, w), ((0, 16),)),
    "linear, strided input": Form(W, lambda x, w: F.linear(x.t(), w), ((16, 5),)),
    "@ w.T": Form(W, lambda x, w: x @ w.T, (X2,)),
    "@ w.mT": Form(W, lambda x, w: x @ w.mT, (X3,)),
    "matmul": Form(W, lambda x, w: torch.matmul(x, w.transpose(0, 1)), (X3,)),
    "matmul, untransposed": Form(W, lambda x, w: torch.matmul(x, w), ((2, 3, 24),)),
    "contiguous transpose": Form(W, lambda x, w: x @ w.t().contiguous(), (X2,)),
    "mm": Form(W, lambda x, w: torch.mm(x, w.t()), (X2,)),
    "mm, weight left": Form(W, lambda x, w: torch.mm(w, x.t()), (X2,)),
    "matmul, weight left": Form(W, lambda x, w: w @ x.mT, (X3,)),
    "addmm (Conv1D)": Form(W, lambda x, b, w: torch.addmm(b, x, w), ((5, 24), (16,))),
    "addmm, transposed": Form(W, lambda x, b, w: torch.addmm(b, x, w.t()), (X2, (24,))),
    "addmm, bias of a column": Form(W, lambda x, b, w: torch.addmm(b, x, w.t()), (X2, (5, 1))),
    "addmm, weight left": Form(W, lambda x, b, w: torch.addmm(b, w, x), ((16, 5), (24, 1))),
    "einsum": Form(W, lambda x, w: torch.einsum("btc,rc->btr", x, w), (X3,)),
    "einsum, weight first": Form(W, lambda x, w: torch.einsum("rc,btc->btr", w, x), (X3,)),
    "einsum, rows first": Form(W, lambda x, w: torch.einsum("rc,btc->rbt", w, x), (X3,)),
    "tensordot": Form(W, lambda x, w: torch.tensordot(x, w, dims=([-1], [1])), (X3,)),
    "twice": Form(W, lambda x, w: F.linear(x, w) + F.linear(x.sin(), w), (X2,)),
    "both ways": Form(W, lambda x, w: F.linear(x, w).tanh() @ w, (X2,)),
    "bmm, expanded": Form(W, lambda x, w: torch.bmm(x, w.t().expand(2, 16, 24)), (X3,)),
    "bmm, expanded over none": Form(W, lambda x, w: torch.bmm(x, w.t().expand(0, 16, 24)), ((0, 3, 16),)),
    "in halves": Form(W, lambda x, w: torch.cat([F.linear(x, half) for half in w.chunk(2)], -1), (X2,)),
    "split unevenly": Form(W, lambda x, w: torch.cat([F.linear(x, p) for p in w.split([8, 16])], -1), (X2,)),
    "some rows": Form(W, lambda x, w: F.linear(x, w[3:11]), (X2,)),
    "some rows of some rows": Form(W, lambda x, w: F.linear(x, w[4:20][2:9]), (X2,)),
    "halves of a half": Form(W, lambda x, w: F.linear(x, w.chunk(2)[1].chunk(2)[1]), (X2,)),
    "some rows, untransposed": Form(W, lambda x, w: x @ w[3:9], ((5, 6),)),
    "rows of the transpose": Form(W, lambda x, w: x @ w.t()[:, 3:9], (X2,)),
    "checkpoint": Form(W, checkpointed, (X2,)),
    "selective checkpoint": Form(W, selectively, (X2,)),
}

EXPERTS = {
    "bmm": Form(S, lambda x, w: torch.bmm(x, w.mT), ((3, 5, 16),)),
    "bmm, one token": Form(S, lambda x, w: torch.bmm(x, w.mT), ((3, 1, 16),)),
    "bmm, weight left, one token": Form(S, lambda x, w: torch.bmm(w, x), ((3, 16, 1),)),
    "bmm, untransposed": Form(S, lambda x, w: torch.bmm(x, w), ((3, 5, 24),)),
    "bmm, weight left": Form(S, lambda x, w: torch.bmm(w, x.permute(1, 2, 0)), ((5, 3, 16),)),
    "matmul": Form(S, lambda x, w: x @ w.mT, ((3, 5, 16),)),
    "einsum": Form(S, lambda x, w: torch.einsum("stc,src->str", x, w), ((3, 5, 16),)),
    "einsum, weight first": Form(S, lambda x, w: torch.einsum("src,tsc->trs", w, x), ((5, 3, 16),)),
    "gate and up": Form(S, lambda x, w: torch.cat([torch.bmm(x, p.mT) for p in w.chunk(2, 1)], -1), ((3, 5, 16),)),
    "some rows": Form(S, lambda x, w: torch.bmm(x, w[:, 3:11]), ((3, 5, 8),)),
    "one expert": Form((1, 24, 16), lambda x, w: torch.bmm(x, w.mT), ((1, 5, 16),)),
}

FORMS = {f"linear: {name}": form for name, form in LINEAR.items()}
FORMS |= {f"experts: {name}": form for name, form in EXPERTS.items()}

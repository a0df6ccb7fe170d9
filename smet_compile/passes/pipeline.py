"""The order of the passes, the pass that Inductor sees, and how it gets there, beside what a user has put there."""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch._inductor.config as inductor
from torch import fx
from torch._C._dynamo.eval_frame import set_code_exec_strategy
from torch._dynamo.types import FrameAction, FrameExecStrategy
from torch._inductor.custom_graph_pass import CustomGraphPass

from smet_compile.ops import CompactWeight, library, saved_weights
from smet_compile.passes import is_enabled
from smet_compile.passes.canonicalize import canonicalize
from smet_compile.passes.fuse_masked_matmul import fuse_masked_matmul
from smet_compile.passes.fuse_sampled_matmul import fuse_sampled_matmul
from smet_compile.passes.fuse_update import fuse_update
from smet_compile.passes.graph import PassReport
from smet_compile.passes.recompute_unpack import mark_seen, recompute_unpack
from smet_compile.passes.verify import verify

Pass = Callable[[fx.Graph], PassReport]

PASSES: tuple[Pass, ...] = (
    recompute_unpack,
    canonicalize,
    fuse_masked_matmul,
    fuse_sampled_matmul,
    fuse_update,
    verify,
)


def run_passes(graph: fx.Graph, passes: Iterable[Pass] = PASSES) -> list[PassReport]:
    """Runs the passes in their order on a joint forward and backward graph (or a forward alone)."""
    reports = [each(graph) for each in passes]
    graph.lint()
    return reports


class JointPasses(CustomGraphPass):
    """What Inductor calls: the passes a user had set before, then ours, if they are switched on.

    Args:
        before: what was in ``joint_custom_pre_pass`` when ours were installed.
    """

    def __init__(self, before: tuple[Any, ...] = ()) -> None:
        self.before = before

    def __call__(self, graph: fx.Graph) -> None:
        for each in self.before:
            each(graph)
        if is_enabled():
            run_passes(graph)
        else:
            mark_seen(graph)

    def uuid(self) -> Any:
        """Changes with the source of this library, with the switch, and with the passes before; None where one of
        those has no uuid, which tells Inductor not to cache."""
        theirs = [each.uuid() if isinstance(each, CustomGraphPass) else None for each in self.before]
        if any(uuid is None for uuid in theirs):
            return None
        return (source_hash(), is_enabled(), *theirs)


@functools.cache
def source_hash() -> str:
    """Of every source file that decides what a compiled graph computes: the passes, the ops and their autograd."""
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for room in ("format", "ops", "passes"):
        for path in sorted((package / room).rglob("*.py")):
            digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return digest.hexdigest()


_warned: set[str] = set()


def install() -> None:
    """Sets ``torch._inductor.config.joint_custom_pre_pass``, chained behind what it holds. Twice is as once."""
    library.on_unseen_graph = _warn_unseen
    for function in (CompactWeight.forward, *saved_weights.RUN_IN_EAGER):
        _never_by_itself(function)
    current = inductor.joint_custom_pre_pass
    if not _holds_ours(current):
        before = current if isinstance(current, list | tuple) else () if current is None else (current,)
        inductor.joint_custom_pre_pass = JointPasses(tuple(before))


def _never_by_itself(function: Any) -> None:
    """Dynamo may trace ``function`` into a graph, but not start one with it.

    After a graph break it would compile what reads a weight to a graph that returns the dense weight, and autograd
    would keep that: in eager it is not kept.
    """
    set_code_exec_strategy(function.__code__, FrameExecStrategy(FrameAction.SKIP, FrameAction.SKIP))


def _holds_ours(current: Any) -> bool:
    several = current if isinstance(current, list | tuple) else [current]
    return any(isinstance(each, JointPasses) for each in several)


def _warn_unseen() -> None:
    """A compiled graph runs that the passes never saw: once a reason, say which."""
    if not is_enabled():
        return
    if _holds_ours(inductor.joint_custom_pre_pass):
        reason = (
            'it was compiled by a backend other than "inductor", or with options= that set another '
            "joint_custom_pre_pass; use the backend inductor, and set your own pass in "
            "torch._inductor.config.joint_custom_pre_pass before sparsify, which chains the two"
        )
    else:
        reason = (
            "torch._inductor.config.joint_custom_pre_pass was set to another pass after sparsify; set yours before, "
            "or call smet_compile.passes.pipeline.install() afterwards, which chains the two"
        )
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"smet_compile: a compiled graph runs without the passes: {reason}. It is right, but dense weights and "
            "gradients are in memory",
            stacklevel=2,
        )

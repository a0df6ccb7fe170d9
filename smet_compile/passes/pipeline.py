"""Defines the order of the passes, and installs them in Inductor, after any pass that the user had set."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch._inductor.config as inductor
from torch import fx
from torch._C._dynamo.eval_frame import set_code_exec_strategy
from torch._dynamo.types import FrameAction, FrameExecStrategy
from torch._inductor.custom_graph_pass import CustomGraphPass

from smet_compile.ops import CompactWeight, direct, library, products, reads, saved_weights, shared_class
from smet_compile.ops.torch_insides import warn_once
from smet_compile.passes import is_enabled
from smet_compile.passes.canonicalize import canonicalize
from smet_compile.passes.fuse_masked_matmul import fuse_masked_matmul
from smet_compile.passes.fuse_sampled_matmul import fuse_sampled_matmul
from smet_compile.passes.fuse_update import fuse_update
from smet_compile.passes.graph import PassReport
from smet_compile.passes.lower_convolutions import lower_convolutions
from smet_compile.passes.recompute_unpack import mark_seen, recompute_unpack
from smet_compile.passes.verify import verify

Pass = Callable[[fx.Graph], PassReport]

PASSES: tuple[Pass, ...] = (
    recompute_unpack,
    lower_convolutions,
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
    """Runs, as the one pass that Inductor calls, the passes that the user had set, then ours if they are enabled.

    Args:
        before: the passes in ``joint_custom_pre_pass`` when ours were installed.
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
        """Returns a key of our source, the switch and the user's passes, for Inductor's cache; None to not cache."""
        theirs = [each.uuid() if isinstance(each, CustomGraphPass) else None for each in self.before]
        if any(uuid is None for uuid in theirs):
            return None
        return (source_hash(), is_enabled(), *theirs)


@functools.cache
def source_hash() -> str:
    """Returns a hash of every source file that decides what a compiled graph computes: format, ops and passes."""
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for room in ("format", "ops", "passes"):
        for path in sorted((package / room).rglob("*.py")):
            digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return digest.hexdigest()


_RUN_IN_EAGER = (
    *direct.RUN_IN_EAGER,
    *products.RUN_IN_EAGER,
    *shared_class.RUN_IN_EAGER,
)

_RUN_IN_EAGER_AS_A_WHOLE = (saved_weights, reads)
"""Modules whose functions autograd's hooks and finalizers call, wherever Dynamo happens to listen."""


def install() -> None:
    """Sets ``torch._inductor.config.joint_custom_pre_pass``, keeping the user's. A second call has no effect."""
    library.on_unseen_graph = _warn_unseen
    whole = (function for module in _RUN_IN_EAGER_AS_A_WHOLE for function in _functions(module))
    for function in (CompactWeight.forward, *_RUN_IN_EAGER, *whole):
        if function not in saved_weights.MAY_BE_COMPILED:
            _never_by_itself(function)
    current = inductor.joint_custom_pre_pass
    if not _holds_ours(current):
        before = current if isinstance(current, list | tuple) else () if current is None else (current,)
        inductor.joint_custom_pre_pass = JointPasses(tuple(before))


def _functions(module: ModuleType) -> Iterator[FunctionType]:
    """Yields the functions that a module defines, and the methods of its classes."""
    owners = [each for each in vars(module).values() if inspect.isclass(each) and each.__module__ == module.__name__]
    for found in (each for owner in (module, *owners) for each in vars(owner).values()):
        parts = (found.fget, found.fset) if isinstance(found, property) else (inspect.unwrap(found),)
        for part in parts:
            if isinstance(part, FunctionType) and part.__module__ == module.__name__:
                yield part


def _never_by_itself(function: Any) -> None:
    """Keeps Dynamo from starting a graph with ``function``; it may still trace it as part of one.

    After a graph break Dynamo would compile the read of a weight to a graph that returns the dense weight, which
    autograd would save. In eager mode it is not saved. And it would compile finalizers anew for each object.
    """
    set_code_exec_strategy(function.__code__, FrameExecStrategy(FrameAction.SKIP, FrameAction.SKIP))


def _holds_ours(current: Any) -> bool:
    several = current if isinstance(current, list | tuple) else [current]
    return any(isinstance(each, JointPasses) for each in several)


def _warn_unseen() -> None:
    """Warns, once for each reason, that a compiled graph runs which the passes did not see."""
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
    warn_once(
        f"smet_compile: a compiled graph runs without the passes: {reason}. It is right, but dense weights and "
        "gradients are in memory"
    )

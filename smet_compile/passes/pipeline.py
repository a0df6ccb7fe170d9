"""The order of the passes, and the pass that Inductor sees."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

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

"""Puts the passes where Inductor finds them, beside what a user has put there."""

from __future__ import annotations

import warnings
from typing import Any

import torch._inductor.config as inductor
from torch._C._dynamo.eval_frame import set_code_exec_strategy
from torch._dynamo.types import FrameAction, FrameExecStrategy

from smet_compile.ops import CompactWeight, library, saved_weights
from smet_compile.passes import is_enabled
from smet_compile.passes.pipeline import JointPasses

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
            "or call smet_compile.passes.install.install() afterwards, which chains the two"
        )
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"smet_compile: a compiled graph runs without the passes: {reason}. It is right, but dense weights and "
            "gradients are in memory",
            stacklevel=2,
        )

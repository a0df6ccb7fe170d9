"""Predicts the cost of a training run: bytes by kind, peak memory and operations, as numbers and as formulas."""

from smet_compile.plan.report import Plan
from smet_compile.plan.request import plan

__all__ = ["Plan", "plan"]

"""What a training will cost: layouts, and a step on shapes alone; the room `plan` says what that comes to."""

from smet_compile.planner.model import plan

__all__ = ["plan"]

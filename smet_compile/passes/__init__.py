"""How a compiled graph changes: one pass a file, their order in ``pipeline.PASSES``, and the switch."""

from smet_compile.passes.switch import disabled

__all__ = ["disabled"]

"""The libraries of the `pretrain` extra: see `smet_compile.extras`."""

from smet_compile.extras import MissingExtraError, require

__all__ = ["MissingExtraError", "require"]

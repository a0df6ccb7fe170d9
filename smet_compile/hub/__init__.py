"""Writes a compact model into a folder that can be shared, and loads it: weights, configuration and a model card."""

from smet_compile.hub.load import load_compact
from smet_compile.hub.save import save_compact

__all__ = ["load_compact", "save_compact"]

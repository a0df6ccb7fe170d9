"""Tells what is still alive of models and captures."""

import gc
import weakref
from collections.abc import Callable

from torch import nn


def living_modules_of(model: nn.Module) -> Callable[[], int]:
    """Returns a function that counts the modules of ``model`` which nobody has freed, after cycles were collected."""
    references = [weakref.ref(module) for module in model.modules()]

    def count() -> int:
        gc.collect()
        return sum(reference() is not None for reference in references)

    return count


def num_living(kind: type) -> int:
    """Returns how many objects of a type nobody has freed, after cycles were collected."""
    gc.collect()
    return sum(isinstance(thing, kind) for thing in gc.get_objects())

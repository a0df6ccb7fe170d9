"""Checks that nothing is changed in structure, values and identity of a model's parameters."""

from typing import Any

from torch import nn

from tests.support.snapshots import assert_same, snapshot


class Unchanged:
    """Checks at the end of its with statement that the objects are as they were at the beginning."""

    def __init__(self, *objects: Any) -> None:
        self.objects = objects

    def __enter__(self) -> None:
        self.states = snapshot(*self.objects)
        self.structure = [structure(o) for o in self.objects]

    def __exit__(self, kind: Any, value: Any, traceback: Any) -> None:
        if kind is not None:
            return
        assert_same(snapshot(*self.objects), self.states, "state")
        assert [structure(o) for o in self.objects] == self.structure


def structure(thing: Any) -> list[Any]:
    if not isinstance(thing, nn.Module):
        return []
    modules = [(name, type(module), id(module)) for name, module in thing.named_modules()]
    return modules + [(name, id(p), p.requires_grad) for name, p in thing.named_parameters()]

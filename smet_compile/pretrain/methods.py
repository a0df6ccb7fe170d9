"""The training methods by name: which optimizer rule, which growth, which schedule."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """How a topology moves: `grow` and `schedule` as in `TopologyManager`; `naive` picks `NaiveAdamW`."""

    grow: str = "random"
    schedule: str = "cosine"
    naive: bool = False


METHODS: dict[str, Method | None] = {
    "smet": Method(),
    "smet-rigl": Method(grow="gradient"),
    "set-naive": Method(naive=True),
    "rigl-naive": Method(grow="gradient", naive=True),
    "static": Method(schedule="none"),
    "dense": None,
}


def find_method(name: str) -> Method | None:
    """The method called `name`, None for dense training; a ValueError lists the names otherwise."""
    if name not in METHODS:
        raise ValueError(f"--method: expected one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]

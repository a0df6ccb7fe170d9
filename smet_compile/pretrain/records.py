"""The records of metrics.jsonl: which kinds there are, and which values each must hold."""

from collections.abc import Mapping
from typing import Any

import smet_compile as smet
from smet_compile.pretrain.memory import KINDS as BYTE_KINDS
from smet_compile.pretrain.option_values import shown

Record = dict[str, Any]

COUNT = (int,)
NUMBER = (int, float)
MAYBE = (int, float, type(None))
BYTES = {
    "num_weights": COUNT,
    "run": dict.fromkeys(BYTE_KINDS, COUNT),
    "dense": dict.fromkeys(BYTE_KINDS, COUNT),
}
SITE = {
    "churn_fraction": NUMBER,
    "grown_survival_fraction": MAYBE,
    "mean_age": MAYBE,
    "explored_fraction": NUMBER,
}
EVENT = {"step": COUNT, "drop_fraction": NUMBER, "num_dropped": COUNT, "churn_fraction": NUMBER, "sites": dict}
RECORDS: dict[str, dict[str, Any]] = {
    "train": {"loss": NUMBER, "lr": NUMBER, "seconds": NUMBER},
    "eval": {"loss": NUMBER},
    "topology": {"event": EVENT},
    "bytes": {"sparse": BYTES, "all": BYTES},
    "gap": {"first_step": COUNT},
    "end": {},
}
OPTIONAL = ("lr", "seconds")
TYPE_NAMES = {COUNT: "a whole number from 0", NUMBER: "a number", MAYBE: "a number or null"}


def check_record(record: object) -> Record:
    """Return `record`; a ValueError says what is wrong with it. Kinds of a newer version need `step` alone."""
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object with kind and step, got {shown(record)}")
    if not isinstance(record.get("kind"), str):
        raise ValueError(f"expected a text called kind, got {shown(record.get('kind'))}")
    _check(record, {"step": COUNT, **RECORDS.get(record["kind"], {})}, record["kind"])
    if record["kind"] == "topology":
        for name, site in record["event"]["sites"].items():
            _check(site, SITE, f"topology.event.sites.{name}")
    return record


def _check(value: Any, shape: Any, where: str) -> None:
    """Compare `value` with `shape`: a dict of shapes by key, `dict` for any JSON object, or a tuple of types."""
    if isinstance(shape, Mapping) or shape is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected a JSON object, got {shown(value)}")
        for key, inner in shape.items() if isinstance(shape, Mapping) else ():
            if key in value:
                _check(value[key], inner, f"{where}.{key}")
            elif key not in OPTIONAL:
                raise ValueError(f"{where}: expected {key}, got a record without it")
    elif isinstance(value, bool) or not isinstance(value, shape) or (shape is COUNT and value < 0):
        raise ValueError(f"{where}: expected {TYPE_NAMES[shape]}, got {shown(value)}")


def of_kind(records: list[Record], kind: str) -> list[Record]:
    """The records of one kind, in order."""
    return [record for record in records if record["kind"] == kind]


def event_values(event: smet.TopologyEvent) -> dict[str, Any]:
    """Return the values under `event` of a topology record."""
    totals = {"num_dropped": event.num_dropped, "churn_fraction": event.churn_fraction}
    return event.to_dict() | totals

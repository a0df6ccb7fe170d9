"""Moves a live run from one layout over ranks to another (DynaTrain, arXiv 2605.18815)."""

from smet_compile.distributed.advise import Advice, Card, Option, advise
from smet_compile.distributed.layout import TensorNote, describe_model, regions_of
from smet_compile.distributed.space import Item, Placed, Region, SwitchPlan, plan_switch
from smet_compile.distributed.switch import Run, Switched, switch
from smet_compile.distributed.transfer import Meter, Transfer
from smet_compile.distributed.world import World

__all__ = [
    "Advice",
    "Card",
    "Item",
    "Meter",
    "Option",
    "Placed",
    "Region",
    "Run",
    "SwitchPlan",
    "Switched",
    "TensorNote",
    "Transfer",
    "World",
    "advise",
    "describe_model",
    "plan_switch",
    "regions_of",
    "switch",
]

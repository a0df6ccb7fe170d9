"""Moves a live run from one layout over ranks to another (DynaTrain, arXiv 2605.18815)."""

from smet_compile.distributed.advise import Advice, Card, Option, advise
from smet_compile.distributed.generation import begin_group
from smet_compile.distributed.layout import TensorNote, describe_model, regions_of
from smet_compile.distributed.members import LostRun
from smet_compile.distributed.run import Blueprint, Prepared, Run, data_rank
from smet_compile.distributed.space import Item, Placed, Region, SwitchPlan, plan_switch
from smet_compile.distributed.switch import Switched, SwitchOptions, switch
from smet_compile.distributed.transfer import Meter, Transfer
from smet_compile.distributed.world import Change, World, WorldOptions, ask

__all__ = [
    "Advice",
    "Blueprint",
    "Card",
    "Change",
    "Item",
    "LostRun",
    "Meter",
    "Option",
    "Placed",
    "Prepared",
    "Region",
    "Run",
    "SwitchOptions",
    "SwitchPlan",
    "Switched",
    "TensorNote",
    "Transfer",
    "World",
    "WorldOptions",
    "advise",
    "ask",
    "begin_group",
    "data_rank",
    "describe_model",
    "plan_switch",
    "regions_of",
    "switch",
]

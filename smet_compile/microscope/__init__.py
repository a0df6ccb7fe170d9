"""Looks inside a topology: dead units, live paths, ages, churn, survival."""

from smet_compile.microscope.dead import DeadUnits, dead_units
from smet_compile.microscope.history import Cohort, SiteHistory
from smet_compile.microscope.inspect import inspect
from smet_compile.microscope.inspection import Inspection, SiteInspection
from smet_compile.microscope.site_reach import Reach

__all__ = ["Cohort", "DeadUnits", "Inspection", "Reach", "SiteHistory", "SiteInspection", "dead_units", "inspect"]

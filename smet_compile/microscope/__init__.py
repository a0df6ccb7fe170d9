"""Looks inside a topology: dead units, live paths, ages, churn, survival."""

from smet_compile.microscope.inspect import inspect
from smet_compile.microscope.inspection import Inspection, SiteInspection
from smet_compile.microscope.live_paths import Reach
from smet_compile.microscope.per_site import Cohort, DeadUnits, SiteHistory, dead_units

__all__ = ["Cohort", "DeadUnits", "Inspection", "Reach", "SiteHistory", "SiteInspection", "dead_units", "inspect"]

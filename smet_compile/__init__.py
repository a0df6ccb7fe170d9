"""Trains sparse models in little memory: weights are stored, differentiated and optimised only where they are active.

Every public name is imported when it is first used, so importing the package imports nothing else.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smet_compile.api import sparsify
    from smet_compile.convert import Report, export_dense, masks, materialize, report
    from smet_compile.correction import Correction, correct_gradients
    from smet_compile.explain import Explanation, explain
    from smet_compile.format.densities import cubic_density
    from smet_compile.hub import load_compact, save_compact
    from smet_compile.microscope import Inspection, inspect
    from smet_compile.ops import Kernel, register_kernel, unregister_kernel
    from smet_compile.ops.rules import Rule, Slot, register_rule
    from smet_compile.optim import (
        ActiveAdamW,
        ActiveLion,
        ActiveOptimizer,
        ActiveScale,
        ActiveSGD,
        NaiveAdamW,
        clip_grad_norm_,
        decay_groups,
        param_groups,
        scale_initial_,
    )
    from smet_compile.plan import Plan, plan
    from smet_compile.runtime import (
        SiteEvent,
        TopologyContext,
        TopologyEvent,
        TopologyManager,
        load_checkpoint,
        mix_growth,
        needs_gradient,
        save_checkpoint,
    )
    from smet_compile.train_step import TrainStep, compile_train_step

    __version__: str

__all__ = [
    "ActiveAdamW",
    "ActiveLion",
    "ActiveOptimizer",
    "ActiveSGD",
    "ActiveScale",
    "Correction",
    "Explanation",
    "Inspection",
    "Kernel",
    "NaiveAdamW",
    "Plan",
    "Report",
    "Rule",
    "SiteEvent",
    "Slot",
    "TopologyContext",
    "TopologyEvent",
    "TopologyManager",
    "TrainStep",
    "clip_grad_norm_",
    "compile_train_step",
    "correct_gradients",
    "cubic_density",
    "decay_groups",
    "explain",
    "export_dense",
    "inspect",
    "load_checkpoint",
    "load_compact",
    "masks",
    "materialize",
    "mix_growth",
    "needs_gradient",
    "param_groups",
    "plan",
    "register_kernel",
    "register_rule",
    "report",
    "save_checkpoint",
    "save_compact",
    "scale_initial_",
    "sparsify",
    "unregister_kernel",
]

_NAMES_OF_MODULES = {
    "api": ("sparsify",),
    "convert": ("Report", "export_dense", "masks", "materialize", "report"),
    "correction": ("Correction", "correct_gradients"),
    "explain": ("Explanation", "explain"),
    "format.densities": ("cubic_density",),
    "hub": ("load_compact", "save_compact"),
    "microscope": ("Inspection", "inspect"),
    "ops": ("Kernel", "register_kernel", "unregister_kernel"),
    "ops.rules": ("Rule", "Slot", "register_rule"),
    "optim": (
        "ActiveAdamW",
        "ActiveLion",
        "ActiveOptimizer",
        "ActiveSGD",
        "ActiveScale",
        "NaiveAdamW",
        "clip_grad_norm_",
        "decay_groups",
        "param_groups",
        "scale_initial_",
    ),
    "plan": ("Plan", "plan"),
    "runtime": (
        "SiteEvent",
        "TopologyContext",
        "TopologyEvent",
        "TopologyManager",
        "load_checkpoint",
        "mix_growth",
        "needs_gradient",
        "save_checkpoint",
    ),
    "train_step": ("TrainStep", "compile_train_step"),
}
_MODULES = {name: f"{__name__}.{module}" for module, names in _NAMES_OF_MODULES.items() for name in names}


class _Door(ModuleType):
    """Keeps a public function from being replaced by the module of the same name (``plan``, ``explain``).

    Python binds a submodule to its name in the package whenever the submodule is first imported.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _MODULES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Door


if not TYPE_CHECKING:  # with it, a type checker would accept any name

    def __getattr__(name: str) -> Any:
        """Imports a public name, the version, or the package of compiler passes, which has their switch."""
        if name in _MODULES:
            value = getattr(import_module(_MODULES[name]), name)
        elif name == "__version__":
            value = _find_version()
        elif name == "passes":
            return import_module("smet_compile.passes")
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


def _find_version() -> str:
    """Returns the version of the installed package, else that of the source tree, else "0+unknown"."""
    import tomllib
    from importlib.metadata import PackageNotFoundError, version
    from pathlib import Path

    try:
        return version("smet-compile")
    except PackageNotFoundError:
        pass
    project_file = Path(__file__).parents[1] / "pyproject.toml"
    project = tomllib.loads(project_file.read_text()).get("project", {}) if project_file.is_file() else {}
    return str(project["version"]) if project.get("name") == "smet-compile" else "0+unknown"

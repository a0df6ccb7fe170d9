"""update_all: the optimizer step of many parameters, each by the kernel that suits it, one call of a kernel for all."""

from __future__ import annotations

import importlib
from collections import defaultdict
from typing import Any

from smet_compile.ops import check, choose

_END_OF_LAYOUT = 15


def update_all(updates: list[tuple[Any, ...]]) -> None:
    """Makes every update; each is the arguments of ``smet::active_adamw_``, its values first."""
    by_module = defaultdict(list)
    for arguments in updates:
        by_module[choose.update_kernel_of(arguments).module].append(arguments)
    for module, of_one_kernel in by_module.items():
        importlib.import_module(module).update_all(of_one_kernel)


def active_adamw_(*arguments: Any) -> None:
    """Computes the op, which ``ops.adamw.active_adamw_`` defines, after a look at what it is given."""
    check.update("active_adamw_", arguments[0], *arguments[2:_END_OF_LAYOUT])
    update_all([arguments])

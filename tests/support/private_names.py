"""Lists the private names of torch that the package uses: they may change with any release of torch.

``python -m tests.support.private_names > tests/private_names.json`` renews the table, which
``tests/test_private_names.py`` compares with the source. With ``--check`` it looks the names up in the torch of the
Python that runs it, which needs no more than torch.
"""

import ast
import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from tests.support.rooms import dotted

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "tests" / "private_names.json"


def is_private(name: str) -> bool:
    """Returns whether ``name`` is a name of torch with a component that begins with an underscore."""
    first, *others = name.split(".")
    return first == "torch" and any(part.startswith("_") and not part.endswith("__") for part in others)


def aliases_of(tree: ast.Module) -> dict[str, str]:
    """Returns what the names that a file imports stand for: ``from torch import nn`` gives nn → torch.nn."""
    aliases = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            aliases |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return aliases


def chains(tree: ast.Module) -> Iterator[str]:
    """Yields every import and every chain of attributes, as long as it is written; imported names are written out."""
    aliases = aliases_of(tree)
    inner: set[ast.expr] = set()
    for node in ast.walk(tree):  # what is outside comes first
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            if node not in inner and (chain := dotted(node)):
                first, _, others = chain.partition(".")
                yield f"{aliases.get(first, first)}.{others}"
            inner.add(node.value)


def private_names(source: str) -> list[str]:
    """Returns the private names of torch that a file uses, each as long as it is written anywhere in the file."""
    found = {name for name in chains(ast.parse(source)) if is_private(name)}
    return sorted(name for name in found if not any(other.startswith(f"{name}.") for other in found))


def scan(root: Path = ROOT) -> dict[str, list[str]]:
    """Returns the private names of torch by the file of the package that uses them."""
    files = sorted((root / "smet_compile").rglob("*.py"))
    names = {file.relative_to(root).as_posix(): private_names(file.read_text()) for file in files}
    return {file: found for file, found in names.items() if found}


def resolve(name: str) -> Any:
    """Returns what ``name`` stands for in the installed torch. Raises AttributeError where it does not exist."""
    first, *others = name.split(".")
    found: Any = import_module(first)
    path = first
    for part in others:
        path = f"{path}.{part}"
        if not hasattr(found, part):
            try:
                found = import_module(path)
                continue
            except ImportError:
                raise AttributeError(f"{path} does not exist in the installed torch") from None
        found = getattr(found, part)
    return found


def check() -> None:
    """Prints which torch has all the names of the table; exits with the first that it lacks."""
    import torch

    names = {name for found in json.loads(TABLE.read_text()).values() for name in found}
    for name in sorted(names):
        try:
            resolve(name)
        except AttributeError as error:
            sys.exit(f"torch {torch.__version__}: {error}")
    print(f"torch {torch.__version__}: has all {len(names)} private names")


if __name__ == "__main__":
    if "--check" in sys.argv:
        check()
    else:
        print(json.dumps(scan(), indent=2))

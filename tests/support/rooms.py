"""Checks what each room of the package may import, by the source alone and without importing any of it."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ALL_ROOMS = {"runtime", "convert", "passes", "optim", "ops", "format", "shards"}
ABOVE = {"distributed", "api", "train_step", "explain", "correction", "tracing", "plan", "microscope", "presets", "hub"}
TABLES = "it writes rows of text, whatever they say"
SIDE_BY_SIDE = "convert, passes and optim never import one another: what needs two goes into api.py"
UNTOUCHED_GRAPH = "a topology change must not touch the graph"
KERNELS = "the library imports and runs on machines without a GPU or a compiler"
INDUCTOR = "it moves with every torch release, so one room follows it"
ASKED_FOR = "each integration is imported only where somebody asks for it"
EXTRA = "it comes with the extra `pretrain`, and the library works without it"


class Room(NamedTuple):
    may_import: set[str]
    because: str


ROOMS = {
    "shards": Room(set(), "which rank holds which rows is a matter of torch's meshes alone"),
    "notebook": Room(set(), "it shows texts and numbers, whatever they say"),
    "format": Room({"shards"}, "everything stands on the format, so it stands on torch alone"),
    "ops": Room({"format", "shards"}, "what is computed does not know who asks for it"),
    "tables": Room(set(), TABLES),
    "convert": Room({"ops", "format", "shards", "tables"}, SIDE_BY_SIDE),
    "passes": Room({"ops", "format"}, f"{SIDE_BY_SIDE}; {UNTOUCHED_GRAPH}"),
    "optim": Room({"ops", "format", "shards"}, SIDE_BY_SIDE),
    "runtime": Room({"ops", "format", "shards"}, f"{UNTOUCHED_GRAPH}, and optimizers are spoken to through a protocol"),
    "distributed": Room(
        {"runtime", "convert", "plan", "ops", "format", "shards", "tables"},
        "it moves a whole run from ranks to ranks, whatever it is, and asks the planner which suit it",
    ),
    "api": Room(ALL_ROOMS, "imports point down only"),
    "train_step": Room(
        {"ops", "optim", "format", "shards"}, "a step computes and updates; it does not know when the topology changes"
    ),
    "tracing": Room({"passes"}, "it captures a graph and runs the passes on it, whatever the model and its reader"),
    "explain": Room(
        {"ops", "passes", "tracing", "train_step", "format", "shards", "tables"},
        "it asks the passes what they did, and changes nothing",
    ),
    "correction": Room(
        {"microscope", "tracing", "optim", "ops", "format", "shards", "tables"},
        "it reads from a forward what feeds batch norm, and marks sites; what to do with the marks is known below",
    ),
    "microscope": Room(
        {"runtime", "tracing", "ops", "format", "shards", "tables"},
        "it looks at a model and at its history, and changes nothing",
    ),
    "presets": Room({"format"}, "a shape and its model know nothing of sparsity"),
    "plan": Room(
        {"convert", "passes", "optim", "ops", "format", "shards", "train_step", "tracing", "presets", "tables"},
        "it makes a step without memory and counts what that comes to; nothing below asks what a run will cost",
    ),
    "integrations": Room(
        {"api", "convert", "runtime", "optim", "plan", "ops", "format"},
        "each file fits the library into one other tool",
    ),
    "hub": Room(
        {"api", "convert", "runtime", "ops", "format", "shards"},
        "it writes and reads a model, compact or to become so; nothing below knows of files to share",
    ),
    "__init__": Room(ALL_ROOMS | ABOVE, "the door loads rooms as they are asked for; the main job stands above it"),
    "pretrain": Room(ALL_ROOMS | ABOVE | {"__init__", "tables"}, "imports point down only"),
    "__main__": Room({"pretrain"}, "it is the main job's command line and nothing else"),
}

ONLY_IN = {  # package → the one folder that may import it, and why
    "networkx": ("smet_compile/microscope", "one room draws graphs of weights, and only where somebody looks"),
    "triton": ("smet_compile/ops/kernels", KERNELS),
    "torch.utils.cpp_extension": ("smet_compile/ops/kernels", KERNELS),
    "torch._inductor": ("smet_compile/passes", INDUCTOR),
    "transformers": ("smet_compile/pretrain", EXTRA),
    "datasets": ("smet_compile/pretrain", EXTRA),
    "typer": ("smet_compile/pretrain", "the command line is the main job's"),
    "rich": ("smet_compile/pretrain", "what is shown on a terminal is the main job's; tables of text come from tables"),
    "matplotlib": ("smet_compile/pretrain", EXTRA),
    "lightning": ("smet_compile/integrations", ASKED_FOR),
    "torchtitan": ("smet_compile/integrations", ASKED_FOR),
}


ALSO_IN = {
    "smet_compile/tables.py": "rich",  # a table of text anywhere
    "smet_compile/tracing.py": "torch._inductor",  # a capture decomposes ops as Inductor does
    "smet_compile/integrations/transformers.py": "transformers",  # it is imported by itself
    "smet_compile/hub/hugging_face.py": "transformers",  # where a model is built from its config alone
}

FREE = {"notebook"}
"""Rooms that any other may import, since they import nothing of ours."""


def dotted(node: ast.expr) -> str:
    """Returns ``a.b.c`` as text; an empty text for anything but a chain of names."""
    if isinstance(node, ast.Name):
        return node.id
    start = dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{start}.{node.attr}" if start else ""


def imports(tree: ast.Module, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Yields (line, module) of every import, inside functions too, and of what is reached through attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            source = [*above, node.module] if node.module else above
            yield from ((node.lineno, ".".join([*source, alias.name])) for alias in node.names)
        elif isinstance(node, ast.Attribute) and dotted(node) in ONLY_IN:
            yield node.lineno, dotted(node)
        elif isinstance(node, ast.Call) and dotted(node.func).endswith(("import_module", "__import__")):
            yield from ((node.lineno, str(name.value)) for name in node.args if isinstance(name, ast.Constant))


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def room_of(module: str) -> str:
    """Returns the room of a module: ``smet_compile.format.Layout`` → ``format``; others are the door's."""
    name = module.split(".")[1] if "." in module else "__init__"
    return name if name in ROOMS else "__init__"


def broken_rule(path: str, module: str) -> str | None:
    """Returns ``rule; because`` of the rule that this import in the library breaks, None if there is none."""
    name, top = path.split("/")[1].removesuffix(".py"), module.split(".")[0]
    if name not in ROOMS:
        return f"{name} is not a room; every room says in tests/support/rooms.py what it may import"
    room = ROOMS[name]
    if top == "smet_compile" and room_of(module) not in {name, *room.may_import, *FREE}:
        return f"{name} imports {', '.join(sorted(room.may_import)) or 'nothing of ours'}; {room.because}"
    for package, (folder, because) in ONLY_IN.items():
        if within(module, package) and not path.startswith(folder + "/") and ALSO_IN.get(path) != package:
            return f"only {folder} imports {package}; {because}"
    if top in ("passes", "runtime"):
        return f"its name is smet_compile.{top}; the link at the top is for readers"
    if name == "format" and top not in {"torch", "smet_compile", *sys.stdlib_module_names}:
        return f"format imports torch and the standard library; {room.because}"
    return None


def public_names(root: Path) -> set[str]:
    """Returns ``__all__`` of the door."""
    for node in ast.parse((root / "smet_compile/__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and dotted(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def used_of_ours(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yields (line, name) of what an example takes from us: ``smet.sparsify`` is ``smet_compile.sparsify``."""
    aliases = {"smet_compile": "smet_compile"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {alias.asname: alias.name for alias in node.names if alias.asname}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and dotted(node.value) in aliases:
            yield node.lineno, f"{aliases[dotted(node.value)]}.{node.attr}"
    for line, module in imports(tree, ()):
        if module != "smet_compile":
            yield line, module


def violations(root: Path) -> list[str]:
    """Returns one line for each broken rule: ``file:line imports X; rule; because``."""
    found = []
    for path in sorted((root / "smet_compile").rglob("*.py")):
        name = path.relative_to(root).as_posix()
        for line, module in imports(ast.parse(path.read_text(), name), path.relative_to(root).parts[:-1]):
            if rule := broken_rule(name, module):
                found.append(f"{name}:{line} imports {module}; {rule}")
    allowed = {f"smet_compile.{name}" for name in public_names(root)}
    for path in sorted((root / "examples").rglob("*.py")):
        name = path.relative_to(root).as_posix()
        for line, module in used_of_ours(ast.parse(path.read_text(), name)):
            if within(module, "smet_compile") and module not in allowed:
                rule = "examples use public names only; what they need and cannot have, a user lacks too"
                found.append(f"{name}:{line} imports {module}; {rule}")
    return found

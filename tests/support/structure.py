"""Counts what the package is made of: ``python -m tests.support.structure`` prints it.

Files, lines, the longest file, the median file, functions of more than six parameters, and imports in both directions.
"""

import ast
import statistics
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "smet_compile"
MOST_PARAMETERS = 6
SCHEMAS = ("ops/library.py",)
"""Files whose functions have the parameters of a registered op."""


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def num_lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def long_functions() -> Iterator[tuple[str, int]]:
    """Yields each function of more than six parameters, outside Triton kernels and the schemas."""
    for path in files():
        name = path.relative_to(PACKAGE).as_posix()
        if name in SCHEMAS:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or _is_kernel(node):
                continue
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = len([each for each in arguments if each.arg not in ("self", "cls")])
            if count > MOST_PARAMETERS:
                yield f"{name}:{node.lineno} {node.name}", count


def _is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(ast.unparse(each) == "triton.jit" for each in function.decorator_list)


def two_way_imports() -> list[tuple[str, str]]:
    """Returns the pairs of modules that import each other, under TYPE_CHECKING and in functions too."""
    names = {path: _module(path) for path in files()}
    known = set(names.values())
    imports = {name: set(_imports(path, known)) - {name} for path, name in names.items()}
    return sorted((a, b) for a in imports for b in imports[a] if a < b and a in imports[b])


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path, known: set[str]) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names if each.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for each in node.names:
                longer = f"{node.module}.{each.name}"
                found = longer if longer in known else node.module
                if found in known:
                    yield found


def main() -> None:
    lengths = {path: num_lines(path) for path in files()}
    longest = max(lengths, key=lengths.__getitem__)
    functions = sorted(long_functions(), key=lambda each: -each[1])
    print(f"files: {len(lengths)}")
    print(f"lines: {sum(lengths.values())}")
    print(f"longest: {longest.relative_to(ROOT)} ({lengths[longest]})")
    print(f"median: {statistics.median(lengths.values()):.0f}")
    print(f"functions of more than {MOST_PARAMETERS} parameters: {len(functions)}")
    for name, count in functions:
        print(f"  {count:3d} {name}")
    print(f"two-way imports: {len(two_way_imports())}")
    for pair in two_way_imports():
        print(f"  {' <-> '.join(pair)}")


if __name__ == "__main__":
    main()

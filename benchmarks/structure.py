"""Size and import depth of a package, read from its source files without importing them.

    python benchmarks/structure.py src/cntlora --without cli lab     # the library
    python benchmarks/structure.py src/cntlora --only lab            # the laboratory; all that it imports counts as one
    python benchmarks/structure.py path/to/lineax --verbose          # with the depth of every module

The import depth is the number of files in the longest chain of module-level imports inside the package. Imports under
`if TYPE_CHECKING:` do not count. Those inside functions do not count either, since they run later; so that none hides
there, their number is printed too. A cycle is an error. The lines of a function are counted without its docstring,
those of a file are counted as they are.
"""

from __future__ import annotations

import argparse
import ast
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

REST = "(the rest of the package)"
"""Stands for every module outside `only`."""


@dataclass(frozen=True)
class Structure:
    """Measurements of a package.

    Attributes:
        chain: the longest chain of imports, from the importing end.
        depths: module → the length of its longest chain.
        deferred: imports of its own modules inside functions, as (importing module, imported module).
        file_lines, function_lines: of every file, and of every function and method.
    """

    chain: tuple[str, ...]
    depths: dict[str, int]
    deferred: tuple[tuple[str, str], ...]
    file_lines: tuple[int, ...]
    function_lines: tuple[int, ...]


class ImportCycleError(Exception):
    """Modules import each other while they are loaded."""


def measure(root: Path, without: Iterable[str] = (), only: str = "") -> Structure:
    """Measure the package in the folder `root`.

    Args:
        without: subpackages and modules to leave out, relative to the package.
        only: the one subpackage to measure; the rest of the package then counts as a single module.

    Raises:
        ImportCycleError: names the modules of the cycle.
        FileNotFoundError: there is no Python file to measure.
    """
    package = root.resolve().name
    every = _modules(root, package)
    modules = {name: path for name, path in every.items() if _wanted(name, package, list(without), only)}
    if not modules:
        raise FileNotFoundError(f"{root}: there is no Python file to measure")
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in modules.items()}
    graph: dict[str, list[str]] = {REST: []}
    deferred = []
    for name, tree in trees.items():
        is_package = modules[name].name == "__init__.py"
        found = _imported(name, _import_statements(tree.body), is_package, every) - {name}
        deferred += [(name, other) for other in sorted(_imported(name, _inside_functions(tree), is_package, every))]
        graph[name] = sorted({other if other in modules else REST for other in found if other in modules or only})
    chains = _longest_chains(graph)
    chains.pop(REST)
    functions = [node for tree in trees.values() for node in ast.walk(tree)]
    return Structure(
        chain=max(chains.values(), key=len),
        depths={name: len(chain) for name, chain in chains.items()},
        deferred=tuple(deferred),
        file_lines=tuple(len(path.read_text(encoding="utf-8").splitlines()) for path in modules.values()),
        function_lines=tuple(_lines(f) for f in functions if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef))),
    )


def percentile(values: Iterable[int], share: float) -> int:
    """The smallest value that at least `share` of all values do not exceed; 0 where there is none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0


def _modules(root: Path, package: str) -> dict[str, Path]:
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = (package, *path.relative_to(root).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _wanted(name: str, package: str, without: list[str], only: str) -> bool:
    def inside(part: str) -> bool:
        return f"{name}.".startswith(f"{package}.{part}.")

    return not any(map(inside, without)) and (not only or inside(only))


def _imported(
    module: str, statements: Iterable[ast.Import | ast.ImportFrom], is_package: bool, modules: Iterable[str]
) -> set[str]:
    """The modules of the package that the import statements of a module name."""
    known, found = set(modules), set()
    for node in statements:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            continue
        parts = module.split(".")
        above = parts[: len(parts) - node.level + is_package] if node.level else []
        source = ".".join([*above, *([node.module] if node.module else [])])
        for alias in node.names:
            inner = f"{source}.{alias.name}"
            found.add(inner if inner in known else source)
    return found & known


def _import_statements(body: Iterable[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports that run when a module is loaded."""
    for node in body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.If):
            if not any(
                getattr(part, "id", getattr(part, "attr", "")) == "TYPE_CHECKING" for part in ast.walk(node.test)
            ):
                yield from _import_statements(node.body)
            yield from _import_statements(node.orelse)
        elif isinstance(node, ast.Try):
            for part in (node.body, node.orelse, node.finalbody, *(handler.body for handler in node.handlers)):
                yield from _import_statements(part)
        elif isinstance(node, (ast.With, ast.ClassDef)):
            yield from _import_statements(node.body)


def _inside_functions(tree: ast.Module) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports that run when a function is called."""
    functions = (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))
    for function in functions:
        yield from (node for node in ast.walk(function) if isinstance(node, (ast.Import, ast.ImportFrom)))


def _longest_chains(graph: dict[str, list[str]]) -> dict[str, tuple[str, ...]]:
    chains: dict[str, tuple[str, ...]] = {}

    def chain_from(name: str, above: tuple[str, ...]) -> tuple[str, ...]:
        if name in above:
            raise ImportCycleError(" > ".join((*above[above.index(name) :], name)))
        if name not in chains:
            below = [chain_from(other, (*above, name)) for other in graph[name]]
            chains[name] = (name, *max(below, key=len, default=()))
        return chains[name]

    for name in graph:
        chain_from(name, ())
    return chains


def _lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = function.body[0]
    documented = (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    )
    docstring = (first.end_lineno or first.lineno) - first.lineno + 1 if documented else 0
    return (function.end_lineno or function.lineno) - function.lineno + 1 - docstring


def main() -> int:
    """Print the measurement; the exit code is 1 if there is a cycle."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder of the package")
    parser.add_argument("--without", nargs="*", default=[], metavar="PART", help="subpackages or modules to leave out")
    parser.add_argument("--only", default="", metavar="PART", help="the one subpackage to measure")
    parser.add_argument("--verbose", action="store_true", help="print depths and imports inside functions")
    given = parser.parse_args()
    try:
        found = measure(given.root, given.without, given.only)
    except ImportCycleError as cycle:
        print(f"import cycle: {cycle}", file=sys.stderr)
        return 1
    for name, depth in sorted(found.depths.items(), key=lambda item: (-item[1], item[0])) if given.verbose else ():
        print(f"{depth:3d}  {name}")
    for name, other in found.deferred if given.verbose else ():
        print(f"     {name} imports {other} inside a function")
    print(f"import depth {len(found.chain)}: {' > '.join(found.chain)}")
    print(f"{len(found.deferred)} imports of its own modules inside functions")
    for kind, lines in (("files", found.file_lines), ("functions", found.function_lines)):
        print(f"{len(lines)} {kind}, 90 % of them within {percentile(lines, 0.9)} lines")
    return 0


if __name__ == "__main__":
    sys.exit(main())

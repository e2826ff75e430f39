"""The layers of the package: no module imports upwards, none in a circle (read from the source)."""

import ast
from pathlib import Path

import pytest
from launch import ROOT

# Each layer may import from those before it, and from itself. Leaves import nothing of the package.
LAYERS = (
    "tasks", "records", "policies", "kernels", "transport", "aggregation", "data", "model", "session", "planning",
    "reports", "commands",
)  # fmt: skip
LEAVES = ("mpisync.settings", "mpisync.launchers")
# Tasks are plain torch. Planning simulates policies, and reports read records, with neither torch nor MPI.
NARROW = {"tasks": ("tasks",), "planning": ("records", "policies", "planning"), "reports": ("records", "reports")}
# What a layer must not import from outside, not even late.
FORBIDDEN = {
    "tasks": {"mpi4py", "numba"},
    "records": {"mpi4py", "numpy", "torch", "numba"},
    "policies": {"mpi4py", "numpy", "torch", "numba"},
    "kernels": {"mpi4py", "torch"},
    "planning": {"mpi4py", "torch"},
    "reports": {"mpi4py", "torch", "numba"},
}


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted((ROOT / "mpisync").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name: str, *, late: bool = True) -> set[str]:
    """Return the modules that one imports; without `late`, only what runs when it is imported."""
    tree = ast.parse(MODULES[name].read_text())
    found = set()
    for node in _nodes(tree, late):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively, line {node.lineno}"
            # `from mpisync.policies import base` imports a module, or a name from one.
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= whole & set(MODULES) or {node.module}
    return found


def _nodes(tree, late):
    for node in ast.iter_child_nodes(tree):
        if not late and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _nodes(node, late)


def packages(name: str) -> set[str]:
    """Return the packages that hold a module."""
    parts = name.split(".")
    return {".".join(parts[:n]) for n in range(1, len(parts))}


def layer(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LAYERS else None


@pytest.mark.parametrize("name", MODULES)
def test_no_module_imports_upwards(name):
    own = layer(name)
    for other in sorted(imports(name)):
        if other.split(".")[0] != "mpisync":
            assert other.split(".")[0] not in FORBIDDEN.get(own, ()), f"{name} imports {other}"
        elif name in LEAVES:
            raise AssertionError(f"{name} is a leaf, and imports {other}")
        elif own and layer(other):
            allowed = NARROW.get(own, LAYERS[: LAYERS.index(own) + 1])
            assert layer(other) in allowed, f"{name} imports {other}, of a layer above it"
        elif own is None:
            # Modules at the top serve all layers, so they stand below them; the command's entry
            # points stand above.
            entry = name in ("mpisync", "mpisync.__main__")
            assert entry or layer(other) is None, f"{name} serves all layers, and imports {other}"


def test_there_is_no_import_circle():
    graph = {}
    for name in MODULES:
        direct = imports(name, late=False) & set(MODULES)
        # Importing a module runs the packages that hold it, but for those running already.
        graph[name] = direct | {p for other in direct for p in packages(other)} - packages(name)
        graph[name].discard(name)
    done: set[str] = set()

    def visit(name, path):
        assert name not in path, "import circle: " + " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, [*path, name])
            done.add(name)

    for name in graph:
        visit(name, [])


def test_every_public_name_has_a_home_and_is_found_there():
    import mpisync

    assert mpisync.__all__ == ["__version__", *mpisync._HOMES]
    tree = ast.parse(MODULES["mpisync"].read_text())
    typed = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {line.names[0].name: line.module for line in typed.body}
    assert seen == mpisync._HOMES, "type checkers and users see the same names"
    for name, home in mpisync._HOMES.items():
        assert home in MODULES and name in MODULES[home].read_text()
        assert name in dir(mpisync)
    with pytest.raises(AttributeError, match="has no attribute 'Sesion'"):
        mpisync.Sesion  # noqa: B018  (the use is the test)

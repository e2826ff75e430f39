"""The rooms of the package: none imports upwards, no module in a circle; annotations count (read from the source)."""

import ast
from pathlib import Path

import pytest
from launch import ROOT

# What each room may import beside itself: rooms, or single modules of one. The modules at the top serve all.
ROOMS = {
    "tasks": set(),
    "records": set(),
    "policies": {"records"},
    "kernels": set(),
    "device": {"kernels.dtypes"},
    "transport": {"kernels"},
    "data": set(),
    "model": {"kernels", "transport.layout"},
    "aggregation": {"records", "policies", "kernels", "transport"},
    "session": {"records", "policies", "kernels", "transport", "data", "model", "aggregation"},
    "planning": {"records", "policies"},
    "reports": {"records"},
    "commands": {
        "records", "policies", "kernels", "transport", "aggregation", "session", "planning", "reports", "tasks",
    },
}  # fmt: skip
LEAVES = ("mpisync.settings", "mpisync.launchers", "mpisync.version")
# What a room must not import from outside, not even late.
FORBIDDEN = {
    "tasks": {"mpi4py", "numba"},
    "records": {"mpi4py", "numpy", "torch", "numba"},
    "policies": {"mpi4py", "numpy", "torch", "numba"},
    "kernels": {"mpi4py", "torch"},
    "device": {"mpi4py", "torch", "numba"},
    "transport": {"torch"},
    "aggregation": {"torch"},
    "data": {"mpi4py", "numba"},
    "model": {"mpi4py"},
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
        yield node
        yield from _nodes(node, late)


def packages(name: str) -> set[str]:
    """Return the packages that hold a module."""
    parts = name.split(".")
    return {".".join(parts[:n]) for n in range(1, len(parts))}


def room(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else None


def test_every_folder_is_a_room():
    folders = {path.name for path in (ROOT / "mpisync").iterdir() if (path / "__init__.py").exists()}
    assert folders == set(ROOMS)
    for name, allowed in ROOMS.items():
        assert name not in allowed and all(one.split(".")[0] in ROOMS for one in allowed)


@pytest.mark.parametrize("name", MODULES)
def test_no_module_imports_upwards(name):
    own = room(name)
    for other in sorted(imports(name)):
        if other.split(".")[0] != "mpisync":
            assert other.split(".")[0] not in FORBIDDEN.get(own, ()), f"{name} imports {other}"
        elif name in LEAVES:
            raise AssertionError(f"{name} is a leaf, and imports {other}")
        elif own and room(other):
            allowed = ROOMS[own] | {own}
            assert room(other) in allowed or other.removeprefix("mpisync.") in allowed, f"{name} imports {other}"
        elif own is None:
            # Modules at the top serve all rooms, so they stand below them; the command's entry
            # points stand above.
            entry = name in ("mpisync", "mpisync.__main__")
            assert entry or room(other) is None, f"{name} serves all rooms, and imports {other}"
        else:
            assert other != "mpisync" or own == "commands", f"{name} imports the package, which stands above all rooms"


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


def test_one_can_hold_each_file_and_each_class_in_ones_head():
    for name, path in MODULES.items():
        text = path.read_text()
        assert text.count("\n") <= 450, f"{name} has more than 450 lines: has it one subject?"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                assert len(public_members(node)) <= 20, f"{name}.{node.name} has more than 20 public members"


def public_members(node):
    """Methods, class attributes, and what methods set on self."""
    found = set()
    for one in node.body:
        if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(one.name)
        elif isinstance(one, ast.AnnAssign | ast.Assign):
            targets = one.targets if isinstance(one, ast.Assign) else [one.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    for one in ast.walk(node):
        if isinstance(one, ast.Attribute) and isinstance(one.ctx, ast.Store):
            if isinstance(one.value, ast.Name) and one.value.id == "self":
                found.add(one.attr)
    return {name for name in found if not name.startswith("_")}

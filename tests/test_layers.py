"""No import points upward: between the rooms of a package, and between the packages."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Lowest first. A room may import only rooms of lower levels, not of its own level.
LEVELS = {
    "mtlora": (
        ("errors", "files", "families", "parameters", "control_group", "client", "ops"),
        ("config", "answer", "packaged", "vllm_cpu"),
        ("adapter", "vision"),
        ("methods", "backbone", "task", "vllm_vision"),
        ("prompt", "suite", "checkpoint"),
        ("model", "vllm_plugin"),
        ("evaluation",),
        ("train",),
        ("merge", "plot"),
        ("sweep",),
        ("cli",),
    ),
    "server": (
        ("errors", "isolation", "job"),
        ("settings", "telemetry"),
        ("tenants",),
        ("accounting",),
        ("scheduling", "registry", "engine"),
        ("call",),
        ("rpc",),
        ("app",),
        ("cli", "probe"),
        ("__main__",),
    ),
}
LEVEL_OF = {
    package: {room: level for level, rooms in enumerate(levels) for room in rooms} for package, levels in LEVELS.items()
}
# Packages that a package must not import.
FORBIDDEN = {
    "mtlora": ("server", "loadtest", "benchmarks", "tests", "deploy"),
    "loadtest": ("server", "benchmarks", "tests"),
    "server": ("loadtest", "benchmarks", "tests", "deploy"),
    "benchmarks": ("tests", "deploy"),
    "deploy": ("tests",),
}


def imports(file: Path) -> Iterator[str]:
    """Dotted names that a file imports: anywhere in it, for type checking too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms(package: str) -> Iterator[tuple[Path, str]]:
    """Each file of a package, and its room. The package's own `__init__.py` has none."""
    for file in sorted((ROOT / package).rglob("*.py")):
        room = file.relative_to(ROOT / package).with_suffix("").parts[0]
        if room != "__init__":
            yield file, room


@pytest.mark.parametrize("package", LEVELS)
def test_every_room_has_a_level(package: str) -> None:
    assert {room for _, room in rooms(package)} == set(LEVEL_OF[package])


@pytest.mark.parametrize("package", LEVELS)
def test_rooms_import_lower_ones_alone(package: str) -> None:
    levels = LEVEL_OF[package]
    upward = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file, room in rooms(package)
        for name in imports(file)
        if name.startswith(f"{package}.")
        and (imported := name.split(".")[1]) in levels
        and imported != room
        and levels[imported] >= levels[room]
    ]
    assert not upward


@pytest.mark.parametrize("package", FORBIDDEN)
def test_packages_do_not_import_what_is_built_on_them(package: str) -> None:
    found = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in sorted((ROOT / package).rglob("*.py"))
        for name in imports(file)
        if name.split(".")[0] in FORBIDDEN[package]
    ]
    assert not found

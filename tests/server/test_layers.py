"""No import points upward: between the rooms of the server, and between the packages."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Lowest first. A room imports rooms of lower levels alone, never one of its own level.
LEVELS = (
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
)
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
# Packages that a package must not import.
FORBIDDEN = {
    "mtlora": ("server", "loadtest", "benchmarks", "tests", "deploy"),
    "loadtest": ("server", "benchmarks", "tests"),
    "server": ("loadtest", "benchmarks", "tests", "deploy"),
}


def imports(file: Path) -> Iterator[str]:
    """Dotted names that a file imports: anywhere in it, for type checking too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(file: Path) -> str:
    return file.relative_to(ROOT / "server").with_suffix("").parts[0]


def test_every_room_of_the_server_has_a_level() -> None:
    rooms = {room_of(file) for file in (ROOT / "server").rglob("*.py")} - {"__init__"}
    assert rooms == set(LEVEL_OF)


def test_rooms_of_the_server_import_lower_ones_alone() -> None:
    upward = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in sorted((ROOT / "server").rglob("*.py"))
        for name in imports(file)
        if name.startswith("server.")
        and (imported := name.split(".")[1]) != room_of(file)
        and LEVEL_OF[imported] >= LEVEL_OF[room_of(file)]
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

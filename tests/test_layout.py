"""The map of the code: imports go down only, and what is foreign stays behind its door."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import batcher

ROOT = Path(batcher.__file__).parent

FLOORS = (
    {"bits", "checks", "errors", "images", "killpoint", "payload", "redact"},
    {"imported", "parameters", "records"},
    {"store"},
    {"job"},
    {"dialects", "ledger", "parse", "prompt", "report", "retry", "schedule", "schema", "sink", "source"}
    | {"strict", "where"},
    {"access", "score", "transport"},
    {"models"},
    {"engine", "export", "init", "verify"},
    {"results", "status"},
    {"simulator"},
    {"rehearse"},
    {"plan"},
    {"__init__"},
    {"cli"},
    {"__main__"},
)
"""Who may import whom: a room imports from floors below its own, and from itself."""

MODULES = {
    ".".join(("batcher", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}


def room_of(module: str) -> str:
    """The room that a module belongs to: the first part of its name below the package."""
    return [*module.split("."), "__init__"][1]


def imports_in(source: str, package: list[str]) -> set[str]:
    """The modules that are imported anywhere in a source, also inside of functions; ours to the very module."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            inner = {f"{base}.{alias.name}" for alias in node.names}
            found |= inner & MODULES.keys()
            if not inner <= MODULES.keys():
                found.add(base)
    return found


def imports_of(module: str) -> set[str]:
    """The modules that a module imports."""
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    return imports_in(path.read_text(encoding="utf-8"), package)


def rooms_of(module: str) -> set[str]:
    """The other rooms of the package that a module imports."""
    ours = {name for name in imports_of(module) if name.split(".")[0] == "batcher"}
    return {room_of(name) for name in ours} - {room_of(module)}


def test_every_room_has_its_floor() -> None:
    """The map names every room that there is, once, and no other."""
    listed = [room for floor in FLOORS for room in floor]
    assert sorted(listed) == sorted({room_of(module) for module in MODULES})


def test_imports_are_found_in_every_form() -> None:
    """No way to write an import escapes these tests."""
    source = """
import batcher.sink
from batcher import source, Job
from . import quota
from ..retry import Guard
from .. import report
def late():
    from batcher.engine.run import run
    import aiohttp.web as web
"""
    assert imports_in(source, ["batcher", "schedule"]) == {
        *("batcher", "batcher.sink", "batcher.source", "batcher.schedule.quota", "batcher.retry"),
        *("batcher.report", "batcher.engine.run", "aiohttp.web"),
    }


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_only(module: str) -> None:
    """A module imports from lower floors and from its own room, never from a neighbour or from above."""
    floor = next(number for number, rooms in enumerate(FLOORS) if room_of(module) in rooms)
    below = set().union(*FLOORS[:floor])
    assert rooms_of(module) <= below


def test_modules_of_one_room_have_an_order_too() -> None:
    """No modules import each other in a circle."""
    graph = {module: imports_of(module) & MODULES.keys() - {module} for module in MODULES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)


@pytest.mark.parametrize("module", [module for module in MODULES if room_of(module) == "simulator"])
def test_the_simulator_stands_alone(module: str) -> None:
    """The simulated service shares no code with the client that is tested against it."""
    assert rooms_of(module) <= {"errors", "records"}


def test_http_stays_behind_its_door() -> None:
    """An HTTP library is imported by the one module that sends with it; the simulated service answers with aiohttp."""

    def users(library: str) -> set[str]:
        return {module for module in MODULES if any(name.split(".")[0] == library for name in imports_of(module))}

    assert users("aiohttp") == {"batcher.transport.aio", "batcher.simulator.server"}
    assert users("pyreqwest") == {"batcher.transport.reqwest"}


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is_for(module: str) -> None:
    """The first line of every module is one sentence about it."""
    said = ast.get_docstring(ast.parse(MODULES[module].read_text(encoding="utf-8"))) or ""
    first = said.split("\n")[0]
    assert len(first) > 20
    assert first.endswith(".")

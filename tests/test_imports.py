"""Imports form no circle, and none points up in the order of the house.

Every import statement counts, in functions too, except under `if TYPE_CHECKING`.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
Graph = dict[str, set[str]]  # module to the modules that it imports

# from the bottom up; places in one row may import each other unless APART says no
ORDER = (
    # helpers, the package itself and its data: they import nothing of ours
    (
        *("lora_drop_vllm", "adapters", "atomic_files", "cache", "families", "json_lines"),
        *("opinions", "plots", "server_process"),
    ),
    ("method", "kernels"),
    ("config", "hub", "model_card"),
    ("engine", "decode"),
    ("generation",),
    ("training", "evaluation"),
    ("cli", "playground"),
    ("benchmarks",),
    ("tests",),
)
APART = {("engine", "decode"), ("decode", "engine")}
APART |= {
    ("playground", p) for p in ("cli", "engine", "decode", "generation", "training", "evaluation")
}
TYPES_ONLY = ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def house(root: Path) -> dict[str, Path]:
    """All modules by the name under which they are imported."""
    folders = [
        ("lora_drop_vllm", root / "lora_drop_vllm"),
        ("lora_drop_vllm.kernels", root / "kernels"),
        ("lora_drop_vllm.adapters", root / "adapters"),
        ("", root / "benchmarks"),  # pytest's `pythonpath`, and where the commands run
        ("", root / "tests/support"),
        ("tests", root / "tests"),
    ]
    found: dict[str, Path] = {}
    for prefix, folder in folders:
        for path in sorted(folder.rglob("*.py")):
            parts = [*prefix.split("."), *path.relative_to(folder).with_suffix("").parts]
            name = ".".join(p for p in parts if p and p != "__init__")
            if path not in found.values():
                assert name not in found, f"two modules are called {name}"
                found[name] = path
    return found


def imported(name: str, path: Path) -> Iterator[tuple[str, str]]:
    """Module and name of each import in a file; the name is empty for `import module`."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    nodes: list[ast.AST] = [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) in TYPES_ONLY:
            nodes += node.orelse
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join(above + ([node.module] if node.module else []))
            yield from ((module, alias.name) for alias in node.names)


def targets(name: str, path: Path, known: Collection[str]) -> set[str]:
    """The known modules that a module imports.

    An import also runs the packages around what it imports, except those that are being imported
    already because the importer is in them.
    """
    found = set()
    for module, attribute in imported(name, path):
        target = f"{module}.{attribute}" if f"{module}.{attribute}" in known else module
        parts = target.split(".")
        around = {".".join(parts[:n]) for n in range(1, len(parts))}
        found |= {target} | {p for p in around if not f"{name}.".startswith(f"{p}.")}
    return (found & set(known)) - {name}


def graph(modules: dict[str, Path]) -> Graph:
    """Which module imports which."""
    return {name: targets(name, path, modules) for name, path in modules.items()}


def circle(arrows: Graph) -> list[str]:
    """Modules that import each other in a circle, if there are any."""
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def place(name: str, path: Path) -> str:
    """The part of the house in which a module stands."""
    if name.startswith("lora_drop_vllm."):
        return name.split(".")[1]
    return name if name == "lora_drop_vllm" else path.relative_to(ROOT).parts[0]


def upward(arrows: Graph, modules: dict[str, Path]) -> list[str]:
    """Imports of what stands higher, or apart."""
    level = {place: n for n, places in enumerate(ORDER) for place in places}
    found = []
    for name, below in arrows.items():
        for target in below:
            pair = place(name, modules[name]), place(target, modules[target])
            if level[pair[0]] < level[pair[1]] or pair in APART:
                found.append(f"{name} imports {target}")
    return sorted(found)


MODULES = house(ROOT)
ARROWS = graph(MODULES)


def test_every_module_has_a_place() -> None:
    places = {place for row in ORDER for place in row}
    assert {place(name, path) for name, path in MODULES.items()} <= places


def test_no_imports_in_a_circle() -> None:
    assert circle(ARROWS) == []


def test_no_import_points_up() -> None:
    assert upward(ARROWS, MODULES) == []


def test_helpers_import_nothing_of_ours() -> None:
    for name, path in MODULES.items():
        if place(name, path) in ORDER[0]:
            assert ARROWS[name] == set(), name


def test_the_house_does_not_use_its_public_names() -> None:
    """The package fetches them by name from above, with the first use; see its `__getattr__`."""
    for name, path in MODULES.items():
        if place(name, path) not in ("benchmarks", "tests"):
            taken = {what for module, what in imported(name, path) if module == "lora_drop_vllm"}
            public = {what for what in taken if f"lora_drop_vllm.{what}" not in MODULES}
            assert public <= {"", "__version__"}, name


def test_closed_forms_need_no_trainer() -> None:
    """`lora-drop cost` reaches none of the training code, nor what it is built on."""
    reached, new = set(), {"lora_drop_vllm.cli.cost"}
    while new:
        reached |= new
        new = {target for name in new for target in ARROWS[name]} - reached
        new.discard("lora_drop_vllm.cli")  # the parser, which knows every command
    places = {place(name, MODULES[name]) for name in reached}
    assert not places & {"engine", "decode", "generation", "training", "evaluation"}


@pytest.mark.parametrize(
    ("importer", "line", "caught"),
    [
        ("lora_drop_vllm.method.layers", "from lora_drop_vllm.method.schedule import x", "circle"),
        ("lora_drop_vllm.method.layers", "import lora_drop_vllm.method.schedule", "circle"),
        ("lora_drop_vllm.method.layers", "from .schedule import x", "circle"),
        ("lora_drop_vllm.method.layers", "from lora_drop_vllm import config", "up"),
        ("lora_drop_vllm.kernels.heuristics", "from lora_drop_vllm.engine import models", "up"),
        ("lora_drop_vllm.decode.masks", "import lora_drop_vllm.engine.models", "up"),
        ("lora_drop_vllm.playground.app", "from lora_drop_vllm.engine import metrics", "up"),
        ("lora_drop_vllm.training.rows", "from support import record", "up"),
        ("lora_drop_vllm.method.layers", "import torch, lora_drop_vllm.atomic_files", ""),
    ],
)
def test_a_wrong_import_in_a_function_is_caught(
    tmp_path: Path, importer: str, line: str, caught: str
) -> None:
    """Whatever its form; what only a type checker reads is left out."""
    schedule, changed = tmp_path / "schedule.py", tmp_path / "changed.py"
    schedule.write_text("from lora_drop_vllm.method.layers import y\n")
    files = {"lora_drop_vllm.method.schedule": schedule, importer: changed}
    places = {"def f():": caught, "if not TYPE_CHECKING:": caught, "if TYPE_CHECKING:": ""}
    for before, wrong in places.items():
        changed.write_text(f"{before}\n    {line}\n")
        arrows = ARROWS | {name: targets(name, path, MODULES) for name, path in files.items()}
        found = {"circle": bool(circle(arrows)), "up": bool(upward(arrows, MODULES))}
        assert found[wrong] if wrong else not any(found.values())

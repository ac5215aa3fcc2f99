"""README and docs: what they name exists, what they show is what the records say."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").glob("*.md"))
PAGES += sorted((ROOT / "adapters").glob("*.md"))
FOLDERS = ("lora_drop_vllm", "kernels", "tests", "benchmarks", "docs", "adapters", "docker")
FOLDERS += ("requirements",)
PATH = re.compile(rf"(?<![\w/.-])((?:{'|'.join(FOLDERS)})/[\w./-]*)")
FILE = re.compile(r"`([\w-]+\.(?:py|md|sh|toml))`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"^    .+$|`[^`\n]+`", re.MULTILINE)


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


def commands(text: str, program: str) -> list[list[str]]:
    """Words of every command line of a program in code, continuation lines joined."""
    found = []
    for code in CODE.findall(text.replace("\\\n", " ")):
        start = re.search(rf"(?:^|[\s`/]){re.escape(program)} (.*)", code.strip("`"))
        if start:
            found.append(start[1].replace("…", "").split())
    return found


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_paths_and_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for path in PATH.findall(text):
        assert (ROOT / path.rstrip(".")).exists(), path
    for name in FILE.findall(text):
        assert any(f for f in ROOT.rglob(name) if ".venv" not in f.parts), name
    for link in LINK.findall(text):
        if "://" not in link and not link.startswith("#"):
            assert (page.parent / link.split("#")[0]).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_documented_commands_and_flags_exist(
    page: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lora_drop_vllm.cli import main

    text = page.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in commands(text, "make"):
        assert words[0] in targets, words
    for command, *words in commands(text, "lora-drop"):
        if command == "lm-eval":  # its flags are lm-eval's own
            continue
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0, command
        known = capsys.readouterr().out
        for flag in (word for word in words if word.startswith("--")):
            assert re.search(rf"{flag}\b", known), (command, flag)
    for script, *words in commands(text, "python"):
        if script.startswith("benchmarks/"):
            source = (ROOT / script).read_text()
            for flag in (word for word in words if word.startswith("--") and word != "--help"):
                assert f'"{flag}"' in source, (script, flag)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 60


def test_every_folder_stands_in_the_architecture() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    for top in ("lora_drop_vllm", "kernels", "tests", "benchmarks"):
        for path in (ROOT / top, *(ROOT / top).rglob("*")):
            if any(path.glob("*.py")):
                assert f"| `{path.relative_to(ROOT)}/` |" in page, path


@pytest.mark.parametrize("name", ["README.md", "docs/results.md"])
def test_tables_are_the_records(name: str) -> None:
    import record

    assert (ROOT / name).read_text() == record.rendered(ROOT / name)


def test_every_kind_of_record_has_its_table() -> None:
    from support import tables

    page = (ROOT / "docs/results.md").read_text()
    assert re.findall(r"<!-- table: (\w+) -->", page) == list(tables.TABLES)


def test_the_picture_is_of_the_records() -> None:
    import record
    from support import overview

    assert overview.digest(overview.points()).encode() in record.PICTURE.read_bytes()


def test_the_picture_of_load_is_of_the_records() -> None:
    import record
    from support.load import picture

    if records := picture.shown():
        assert picture.digest(records).encode() in record.LOAD_PICTURE.read_bytes()


def test_the_wheel_ships_the_demos_adapter_only() -> None:
    from lora_drop_vllm.cli.demo import BUNDLED_ADAPTER

    package_data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    globs = package_data["package-data"]["lora_drop_vllm.adapters"]
    shipped = {path for pattern in globs for path in (ROOT / "adapters").glob(pattern)}
    names = ("adapter_config.json", "adapter_model.safetensors")
    assert shipped == {BUNDLED_ADAPTER / name for name in names}


def test_the_table_of_compatibility_names_tests_that_exist() -> None:
    """What works or is refused has a test, and each test of that server has its row."""
    home = "tests/server/test_compatibility.py"
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (ROOT / "docs/compatibility.md").read_text().splitlines()
        if line.startswith("| ") and not line.startswith(("| ---", "| feature"))
    ]
    named = set()
    for feature, state, shown in rows:
        path, _, test = shown.strip("`").rpartition("::")
        if not test:
            assert state.startswith(("not tried", "refused, by a check without")), feature
            continue
        assert state.startswith(("works", "refused")), feature
        assert re.search(rf"^def {test}\(", (ROOT / (path or home)).read_text(), re.MULTILINE), test
        named.add(test)
    assert set(re.findall(r"^def (test_\w+)", (ROOT / home).read_text(), re.MULTILINE)) <= named

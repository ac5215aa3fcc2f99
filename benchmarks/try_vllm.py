"""Tries another vLLM: which seams it lost, and which tests fail on it. docs/porting.md says more.

    python benchmarks/try_vllm.py --python OTHER_VENV/bin/python
    python benchmarks/try_vllm.py --python OTHER_VENV/bin/python --tests tests/engine --quick

OTHER_VENV has that vLLM and pytest. Neither it nor this checkout is changed: a copy of the package
whose pin is that version stands before it on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
PARTS = ("lora_drop_vllm", "kernels", "adapters", "tests", "benchmarks", "docker", "requirements")
FILES = ("pyproject.toml", "README.md", "Makefile")
PARITY = ("tests/engine/test_seams.py", "tests/engine/test_refusals.py")
PARITY += ("tests/engine/test_stock.py", "tests/engine/test_parity.py")
QUICK = "update-skip-block or previous-write-attn_mlp or not test_parity"
PIN = re.compile(r'"(vllm(?:-cpu)?)==[^"]*"')
LOST = "from lora_drop_vllm.engine.seams import lost; print(*lost(), sep='\\n')"


@dataclass
class Report:
    """What another vLLM breaks.

    Attributes:
        version: of that vLLM
        seams: a message for each seam that is lost
        failures: test to the first line of its error
        passed: number of tests that passed
    """

    version: str
    seams: list[str]
    failures: dict[str, str] = field(default_factory=dict)
    passed: int = 0

    @property
    def fits(self) -> bool:
        """True if nothing is broken and something was tested."""
        return not self.seams and not self.failures and self.passed > 0

    def __str__(self) -> str:
        lines = [f"vLLM {self.version}: {len(self.seams)} seams lost"]
        lines += [f"  {message}" for message in self.seams]
        lines.append(f"{self.passed} tests passed, {len(self.failures)} failed")
        lines += [f"  {test}: {error}" for test, error in self.failures.items()]
        return "\n".join(lines)


def try_vllm(python: Path, tests: list[str], quick: bool) -> Report:
    """Checks the seams, then runs tests, under both model runners where they are made for both.

    Raises:
        RuntimeError: there is no vLLM, or the copy of the package could not be made.
    """
    version = _output([str(python), "-c", "from importlib import metadata as m; "
                       "print(m.version('vllm'))"], os.environ)  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="try_vllm_") as folder:
        copy = copy_of(Path(folder) / "tree", version)
        site = Path(folder) / "site"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        pip += ["--no-build-isolation", "--target", str(site), str(copy)]
        _output(pip, os.environ)
        environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        lost = _output([str(python), "-c", LOST], environment).splitlines()
        report = Report(version, [line for line in lost if line])
        v2 = {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}
        for runner, more, marked in (("V1", {}, ""), ("V2", v2, " and runners")):
            chosen = ["-m", f"engine and not model{marked}", *(["-k", QUICK] if quick else [])]
            command = [str(python), "-m", "pytest", "-q", "--tb=line", *chosen, *tests]
            results = Path(folder) / f"{runner}.xml"
            # `-m pytest` would put the copy's root, and its folder `kernels`, first on the path
            command[1:3] = ["-P", "-m", "pytest"]
            subprocess.run(
                [*command, f"--junitxml={results}"], cwd=copy, env=environment | more, check=False
            )
            read_results(results, runner, report)
    return report


def copy_of(folder: Path, version: str) -> Path:
    """A copy of the checkout that is pinned to one vLLM; returns its folder."""
    folder.mkdir(parents=True)
    for name in PARTS:
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)
    pyproject = folder / "pyproject.toml"
    pyproject.write_text(PIN.sub(rf'"\1=={version}"', pyproject.read_text()))
    return folder


def read_results(results: Path, runner: str, report: Report) -> None:
    """Adds the results of one run of pytest to the report."""
    if not results.is_file():
        report.failures[f"{runner}: pytest"] = "no results; it ended before its tests"
        return
    for case in ElementTree.parse(results).iter("testcase"):
        bad = next((e for e in case if e.tag in ("failure", "error")), None)
        if bad is not None:
            test = f"{runner}: {case.get('classname')}::{case.get('name')}"
            report.failures[test] = (bad.get("message") or "").partition("\n")[0]
        elif not any(e.tag == "skipped" for e in case):
            report.passed += 1


def _output(command: list[str], environment: dict[str, str] | os._Environ[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=dict(environment))
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} failed:\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


def main(arguments: list[str] | None = None) -> int:
    """Prints the report; the status is 0 if that vLLM fits."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--python", type=Path, required=True, help="of the environment to try")
    parser.add_argument("--tests", nargs="+", default=list(PARITY), help="files or folders")
    parser.add_argument("--quick", action="store_true", help="two settings of the parity tests")
    given = parser.parse_args(arguments)
    report = try_vllm(given.python, given.tests, given.quick)
    print(report)
    return 0 if report.fits else 1


if __name__ == "__main__":
    sys.exit(main())

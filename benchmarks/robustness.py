"""Tests of what goes wrong, counted, and the table of docs/robustness.md from their records.

python benchmarks/robustness.py                   all suites, one record each
python benchmarks/robustness.py faults full_disk
python benchmarks/robustness.py --render          only the table
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

import record
import tables

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "robustness.md"
BEGIN, END = "<!-- rendered by benchmarks/robustness.py -->", "<!-- end -->"
SUITES = {
    "scheduler": "--effort 50 tests/test_scheduler_model.py",
    "workloads": "--effort 5 tests/test_random_workloads.py",
    "untrusted": "--effort 50 tests/test_untrusted.py",
    "faults": "tests/test_faults.py",
    "full_disk": "tests/test_disk_full.py",
    "killed_trainers": "tests/test_processes.py",
    "data_parallel": "tests/test_data_parallel.py",
    "tensor_parallel": "tests/test_tensor_parallel.py",
}


def command_of(suite: str) -> str:
    """What a suite runs, as one would type it."""
    return f"pytest --matrix {SUITES[suite]}"


def run(suite: str) -> dict[str, Any]:
    """Run a suite; count its tests by how they ended, and what they say they tried."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        program, *arguments = command_of(suite).split()
        subprocess.run(
            [str(Path(sys.executable).with_name(program)), *arguments, f"--junitxml={report}"],
            cwd=ROOT,
        )
        found = ElementTree.parse(report).getroot()[0]
    counts, tried = found.attrib, Counter[str]()
    for entry in found.iter("property"):
        tried[entry.attrib["name"]] += int(entry.attrib["value"])
    failed, skipped = int(counts["failures"]) + int(counts["errors"]), int(counts["skipped"])
    return {
        "passed": max(int(counts["tests"]) - failed - skipped, 0),
        "failed": failed,
        "skipped": skipped,
        "seconds": round(time.monotonic() - began),
        "tried": dict(tried),
    }


def rows() -> list[str]:
    """The lines of the table."""
    lines = ["| command | outcome | date | machine | commit |", "| --- | --- | --- | --- | --- |"]
    for r in record.newest("robustness"):
        m = r["metrics"]
        outcome = ", ".join(f"{m[n]} {n}" for n in ("passed", "failed", "skipped") if m[n])
        outcome += f" in {m['seconds']} s"
        if tried := m["tried"]:
            outcome += "; " + ", ".join(
                f"{n:,} {what.replace('_', ' ')}" for what, n in tried.items()
            )
        lines.append(_row(command_of(r["settings"]["suite"]), outcome, r))
    for r in record.newest("soak"):
        m, minutes = r["metrics"], r["settings"]["minutes"]
        outcome = (
            f"{m['requests']} requests, {m['dropped']} of them dropped by the client; "
            f"{m['errors']} errors, {m['blocks_left']} blocks left, memory {m['rss_growth']:+.1%}, "
            f"p95 {m['p95_growth']:+.1%}; out of bounds: {', '.join(m['broken']) or 'nothing'}"
        )
        lines.append(_row(f"python benchmarks/soak.py --minutes {minutes:g}", outcome, r))
    return lines


def _row(command: str, outcome: str, r: dict[str, Any]) -> str:
    machine, date = tables.machine_name(r), r["utc"][:10]
    return f"| `{command}` | {outcome} | {date} | {machine} | {r['commit']} |"


def rendered_page() -> str:
    """The page with its table as the records have it."""
    before, rest = PAGE.read_text().split(BEGIN)
    return "\n".join([before + BEGIN, *rows(), END + rest.split(END)[1]])


def main() -> None:
    """Run, record, render."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=", ".join(SUITES))
    parser.add_argument("--render", action="store_true", help="run nothing")
    given = parser.parse_args()
    if unknown := set(given.suites) - set(SUITES):
        parser.error(f"{', '.join(sorted(unknown))}: expected some of {', '.join(SUITES)}")
    failed = 0
    for suite in [] if given.render else given.suites or SUITES:
        metrics = run(suite)
        record.write("robustness", {"suite": suite}, metrics)
        failed += metrics["failed"] or not metrics["passed"]
    PAGE.write_text(rendered_page())
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

"""One JSON line per measured run, with all that is needed to read it later.

python benchmarks/record.py      renders the newest records into the README
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import tables

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "vllm", "lora_drop_vllm")


def write(
    name: str, settings: dict[str, Any], metrics: dict[str, Any], failed: str | None = None
) -> dict[str, Any]:
    """Append a record to `results/<machine>.jsonl` and return it.

    Args:
        name: of the benchmark
        settings: what was run
        metrics: what came out, baseline included
        failed: why the run gives no figure
    """
    record = {
        "benchmark": name,
        "settings": settings,
        **({"failed": failed} if failed else {"metrics": metrics}),
        "machine": machine(),
        "versions": {p: _version(p) for p in PACKAGES} | {"python": platform.python_version()},
        "commit": _git("rev-parse", "--short", "HEAD"),
        # records of the same session are no change of what is measured
        "dirty": bool(
            _git("status", "--porcelain", "-uno", ":/", ":(top,exclude)benchmarks/results")
        ),
        "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    RESULTS.mkdir(exist_ok=True)
    kind = "gpu" if "gpu" in record["machine"] else "cpu"
    with (RESULTS / f"{kind}.jsonl").open("a") as out:
        out.write(json.dumps(record) + "\n")
    return record


def machine() -> dict[str, Any]:
    """CPU model and cores, and the GPU if there is one."""
    import torch

    found: dict[str, Any] = {"cpu": _cpu_name(), "cores": os.cpu_count()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, text=True
    )
    return done.stdout.strip()


BEGIN, END = "<!-- rendered by benchmarks/record.py -->", "<!-- end -->"
README = Path(__file__).parent.parent / "README.md"


def newest() -> list[dict[str, Any]]:
    """The newest record of every benchmark for each of its settings; runs that failed are none."""
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(RESULTS.glob("*.jsonl")):
        for line in file.read_text().splitlines():
            record = json.loads(line)
            if "failed" not in record:
                key = [file.name, record["benchmark"], record["settings"]]
                found[json.dumps(key, sort_keys=True)] = record
    return list(found.values())


def rendered_readme() -> str:
    """The README with its tables as the records have them."""
    text = README.read_text()
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{tables.of(newest())}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    README.write_text(rendered_readme())

"""One JSON line per measured run, with all that is needed to read it later."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from lora_drop_vllm.atomic_files import append_line

RESULTS = Path(__file__).parents[1] / "results"
# written by a session of measurements, and no change of what is measured
RECORDED = tuple(f":(top,exclude){path}" for path in ("benchmarks/results", "README.md", "docs"))
PACKAGES = ("torch", "triton", "vllm", "lora_drop_vllm")


def write(
    name: str, settings: dict[str, Any], metrics: dict[str, Any], failed: str | None = None
) -> dict[str, Any]:
    """Appends a record to `results/cpu.jsonl` or `results/gpu.jsonl` and returns it.

    Args:
        name: the benchmark
        settings: what was run
        metrics: what came out, baseline included
        failed: why the run gives no figure
    """
    record = {
        "benchmark": name,
        "settings": settings,
        **({"failed": failed} if failed else {"metrics": metrics}),
        "machine": machine(),
        "instructions": instructions(),
        "versions": {p: _version(p) for p in PACKAGES} | {"python": platform.python_version()},
        "commit": _git("rev-parse", "--short", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "-uno", ":/", *RECORDED)),
        "argv": [without_folders(argument) for argument in sys.argv],
        "utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    RESULTS.mkdir(exist_ok=True)
    kind = "gpu" if "gpu" in record["machine"] else "cpu"
    append_line(RESULTS / f"{kind}.jsonl", json.dumps(record))
    return record


def without_folders(text: str) -> str:
    """The text, in which absolute paths lose their folders: these mean nothing elsewhere."""
    return re.sub(r"(?<!\S)/\S*/", "", text)


def machine() -> dict[str, Any]:
    """CPU model and cores, and the GPU if there is one."""
    import torch

    found: dict[str, Any] = {"cpu": _cpu_name(), "cores": os.cpu_count()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def instructions() -> str:
    """The widest vector instructions that torch uses here, such as AVX2; CPU names hide them."""
    import torch

    return torch.backends.cpu.get_cpu_capability()


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


def by_settings(*further: str) -> list[list[dict[str, Any]]]:
    """Records of the same benchmark, settings and machine, oldest first; failed runs are left out.

    The number of rounds is no setting; `further` names other keys that must agree.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(RESULTS.glob("*.jsonl")):
        for line in file.read_text().splitlines():
            record = json.loads(line)
            if "failed" not in record:
                found.setdefault(settings_key(record, *further), []).append(record)
    return list(found.values())


def settings_key(record: dict[str, Any], *further: str) -> str:
    """Key that is equal for records which `by_settings` groups."""
    # older records do not say that all engines were alive at once, as they always were on a CPU
    settings = {"together": True} | record["settings"] | {"rounds": None}
    key = [record[name] for name in ("benchmark", "machine", *further)]
    return json.dumps([key, settings], sort_keys=True)


def speed_ups(records: list[dict[str, Any]]) -> list[float]:
    """Speed-ups of the records that have one."""
    return [r["metrics"]["speed_up"] for r in records if "speed_up" in r["metrics"]]


def newest(*benchmarks: str) -> list[dict[str, Any]]:
    """The newest record of each setting and machine, of the named benchmarks or of all.

    `speed_ups` lists the speed-ups of all runs with the same settings and commit.
    """
    found = [records[-1] | {"speed_ups": speed_ups(records)} for records in by_settings("commit")]
    found = list({settings_key(r): r for r in sorted(found, key=lambda r: r["utc"])}.values())
    return [r for r in found if r["benchmark"] in benchmarks or not benchmarks]


def latest(benchmark: str, **wanted: Any) -> dict[str, Any] | None:
    """The newest record of a benchmark with these settings, on any machine; None without one.

    A setting of None is one that the record lacks.
    """
    found = [
        r
        for r in newest(benchmark)
        if all(r["settings"].get(name) == value for name, value in wanted.items())
    ]
    return max(found, key=lambda r: r["utc"], default=None)

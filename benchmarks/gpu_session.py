"""Everything that needs a GPU in one command: tests, kernel times, decode and serving tables.

Stages run until the time is over, the most telling first. The output folder remembers which have
passed, so the next call resumes after them and tries failed ones again. Records go to
benchmarks/results/gpu.jsonl as always, a copy of each stage's output to the folder.

    python benchmarks/gpu_session.py
    python benchmarks/gpu_session.py --minutes 9 --out DIR
    python benchmarks/gpu_session.py --list
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAPER_MODELS = ("llama-3-8b", "qwen2.5-7b", "llama-2-7b", "qwen2.5-14b")
RATIOS = ("0.5", "0.25", "0.75")
LEAST_SECONDS = 45  # seconds; no stage begins with less left


@dataclass(frozen=True)
class Stage:
    """One command of the session."""

    name: str
    command: tuple[str, ...]


def stages() -> list[Stage]:
    """All stages, the most telling first."""
    # -P: the repository's root must not come first on the path
    pytest = (sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider")
    # kernels compile in parallel where pytest-xdist is there
    workers = ("-n", "8") if importlib.util.find_spec("xdist") else ()
    table = [
        Stage(f"decode_{model}_rho{rho}", _decode(model, rho, "1", "512", "256", "3"))
        for rho in RATIOS
        for model in PAPER_MODELS
    ]
    batches = [
        Stage(f"batches_{model}", _decode(model, "0.5", "8 32 128", "64", "65", "2"))
        for model in PAPER_MODELS
    ]
    served = [Stage(f"serve_{model}", _serve(model)) for model in PAPER_MODELS]
    op_latency = (sys.executable, "benchmarks/op_latency.py", "--d", "4096", "--rounds", "10")
    sanitizer = ("compute-sanitizer", "--error-exitcode", "9")
    return [
        Stage(
            "kernels",
            (
                *pytest,
                *workers,
                "tests/kernels/test_kernels.py",
                "tests/kernels/test_kernel_ops.py",
            ),
        ),
        Stage("parity", (*pytest, "-m", "gpu", "tests/engine/test_gpu.py")),
        Stage("op_latency", op_latency),
        table[0],
        *batches[:1],
        *table[1:],
        *batches[1:],
        *served,
        Stage(
            "sanitizer",
            (*sanitizer, *pytest, "tests/kernels/test_kernel_ops.py", "-k", "sanitized"),
        ),
    ]


def _decode(model: str, rho: str, batch: str, *lengths: str) -> tuple[str, ...]:
    prompt, tokens, rounds = lengths
    return (
        *(sys.executable, "benchmarks/decode_latency.py", "--model", model, "--rho", rho),
        *("--k", "3", "1", "5", "--batch", *batch.split()),
        *("--prompt", prompt, "--tokens", tokens, "--rounds", rounds),
    )


def _serve(model: str) -> tuple[str, ...]:
    return (
        *(sys.executable, "benchmarks/serve_latency.py", "--model", model, "--compile"),
        *("--concurrency", "1", "16", "--context", "1024", "--tokens", "33", "--rounds", "12"),
        *("--kv-tokens", "0"),
    )


def run(stage: Stage, out: Path, seconds: float) -> dict[str, object]:
    """Runs a stage within its time; returns its line of the log."""
    began = time.monotonic()
    with (out / f"{stage.name}.txt").open("w") as output:
        try:
            done = subprocess.run(
                stage.command,
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=seconds,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
            )
            status = "passed" if done.returncode == 0 else f"failed with {done.returncode}"
        except subprocess.TimeoutExpired:
            status = "out of time"
        except OSError as error:
            status = f"failed: {error}"
    return {"stage": stage.name, "status": status, "seconds": round(time.monotonic() - began, 1)}


def main() -> None:
    """Runs what has not passed yet; exits with 1 if a stage failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.5, help="time limit of the session")
    parser.add_argument("--out", type=Path, default=ROOT / "gpu_session", help="output folder")
    parser.add_argument("--list", action="store_true", help="print the stages and exit")
    given = parser.parse_args()
    if given.list:
        for stage in stages():
            print(f"{stage.name:28} {' '.join(stage.command[1:])}")
        return
    end = time.monotonic() + 60 * given.minutes
    given.out.mkdir(parents=True, exist_ok=True)
    log = given.out / "session.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    passed = {line["stage"] for line in lines if line["status"] == "passed"}
    failed = False
    for stage in stages():
        if stage.name in passed:
            continue
        left = end - time.monotonic()
        if left < LEAST_SECONDS:
            print(f"{stage.name}: left for the next session")
            continue
        print(f"{stage.name}: running", flush=True)
        line = run(stage, given.out, left)
        failed = failed or str(line["status"]).startswith("failed")
        with log.open("a") as lines_out:
            lines_out.write(json.dumps(line) + "\n")
        print(f"{stage.name}: {line['status']} after {line['seconds']} s", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

"""Everything that needs a GPU in one command: tests, kernel times, decode and serving tables.

Stages run until the time is over, the most telling first. The output folder remembers which have
passed, so the next call resumes after them and tries failed ones again. A stage whose engines need
more memory than the card has is refused before anything starts. Records go to
benchmarks/results/gpu.jsonl as always, a copy of each stage's output to the folder.

    python benchmarks/gpu_session.py
    python benchmarks/gpu_session.py --minutes 9 --out DIR
    python benchmarks/gpu_session.py --dry-run
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import decode_latency
import psutil
import serve_latency
from support import gpu_memory, servers
from support.engines import SHAPES

ROOT = Path(__file__).parent.parent
PAPER_MODELS = ("llama-3-8b", "qwen2.5-7b", "llama-2-7b", "qwen2.5-14b")
RATIOS = ("0.5", "0.25", "0.75")
LEAST_SECONDS = 45  # no stage begins with less left
STOP_SECONDS = 10  # for what a stage leaves running to end by itself
CARDS = {"80 GB": 80e9, "141 GB": 141e9}  # of `--dry-run`
SUBREAPER = 36  # of Linux's prctl


@dataclass(frozen=True)
class Stage:
    """One command of the session.

    Attributes:
        name: of its log
        command: to run
        engines: GPU memory that each of its engines needs, in bytes
        take_turns: whether the engines need not be alive at once
    """

    name: str
    command: tuple[str, ...]
    engines: tuple[int, ...] = (gpu_memory.ENGINE_BYTES,)
    take_turns: bool = False

    def plan(self, card: float) -> str:
        """How its engines run on a card of so many bytes, or why not."""
        return gpu_memory.plan(self.engines, card, self.take_turns)


def stages() -> list[Stage]:
    """All stages, the most telling first."""
    # -P: the repository's root must not come first on the path
    pytest = (sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider")
    # kernels compile in parallel where pytest-xdist is there
    workers = ("-n", "8") if importlib.util.find_spec("xdist") else ()
    table = [
        _decode(f"decode_{model}_rho{rho}", model, rho, "1", "512", "256", "3")
        for rho in RATIOS
        for model in PAPER_MODELS
    ]
    batches = [
        _decode(f"batches_{model}", model, "0.5", "8 32 128", "64", "65", "2")
        for model in PAPER_MODELS
    ]
    served = [_serve(model) for model in PAPER_MODELS]
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


def _decode(name: str, model: str, rho: str, batch: str, *lengths: str) -> Stage:
    prompt, tokens, rounds = lengths
    arguments = (
        *("--model", model, "--rho", rho, "--k", "3", "1", "5", "--batch", *batch.split()),
        *("--prompt", prompt, "--tokens", tokens, "--rounds", rounds),
    )
    needs = decode_latency.needs(decode_latency.parse([*arguments]))
    command = (sys.executable, "benchmarks/decode_latency.py", *arguments)
    return Stage(name, command, tuple(needs.values()), take_turns=True)


def _serve(model: str) -> Stage:
    arguments = (
        *("--model", model, "--compile", "--concurrency", "1", "16", "--context", "1024"),
        *("--tokens", "33", "--rounds", "12", "--kv-tokens", "0"),
    )
    needs = servers.needs(SHAPES[model], serve_latency.parse([*arguments]))
    command = (sys.executable, "benchmarks/serve_latency.py", *arguments)
    return Stage(f"serve_{model}", command, tuple(needs.values()))


def run(stage: Stage, out: Path, seconds: float) -> dict[str, object]:
    """Runs a stage within its time; returns its line of the log. Nothing of it is left running."""
    began = time.monotonic()
    ctypes.CDLL(None).prctl(SUBREAPER, 1)  # what it leaves behind becomes a child of ours
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
        finally:
            end_children()
    return {"stage": stage.name, "status": status, "seconds": round(time.monotonic() - began, 1)}


def end_children() -> None:
    """Ends all processes that come from this one, also those in groups of their own or stopped."""
    left = psutil.Process().children(recursive=True)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
            process.resume()  # a stopped one does not end
    _, alive = psutil.wait_procs(left, STOP_SECONDS)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, STOP_SECONDS)


def dry_run() -> None:
    """Prints every stage with the memory it needs, and how it would run on cards of two sizes."""
    width = max(len(stage.name) for stage in stages())
    for stage in stages():
        need = f"{sum(stage.engines) / 1e9:4.0f} GB"
        if stage.take_turns:
            need += f" ({max(stage.engines) / 1e9:.0f} one after the other)"
        verdicts = "; ".join(f"{name}: {stage.plan(card)}" for name, card in CARDS.items())
        print(f"{stage.name:{width}}  {need:36} {verdicts}")
        print(f"{'':{width}}    {' '.join(stage.command[1:])}")


def main() -> None:
    """Runs what has not passed yet; exits with 1 if a stage failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.5, help="time limit of the session")
    parser.add_argument("--out", type=Path, default=ROOT / "gpu_session", help="output folder")
    parser.add_argument("--dry-run", action="store_true", help="print stages and their memory")
    given = parser.parse_args()
    if given.dry_run:
        dry_run()
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the stage at hand ends with us
    end = time.monotonic() + 60 * given.minutes
    given.out.mkdir(parents=True, exist_ok=True)
    log = given.out / "session.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    passed = {line["stage"] for line in lines if line["status"] == "passed"}
    failed, card = False, gpu_memory.card_bytes()
    for stage in stages():
        if stage.name in passed:
            continue
        if card and (how := stage.plan(card)).startswith("refused"):
            print(f"{stage.name}: {how}")
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

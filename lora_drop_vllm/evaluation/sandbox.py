"""Runs programs that a model wrote, each in a confined process.

The process has an empty working folder, none of our environment variables, and limits of time and
memory. It may only make the system calls in `sandbox_process.ALLOWED`: it cannot write files, start
processes or threads, send signals, or open a socket. It can read what we can read, but it cannot
send that anywhere. Linux only.

A program has passed if it ran to its end. Its process then reports a token that is drawn for each
run. This catches what models do by accident or by a simple trick (exit early, print success, close
files); code that searches the interpreter's memory for the token could still claim success.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PROCESS = Path(__file__).with_name("sandbox_process.py")
REPORT_BYTES = 200
# numerical libraries may not start threads either
ENVIRONMENT = {"LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
PROBE = """
import os
try:
    os.fork()
except PermissionError:
    pass
else:
    os._exit(1)
"""


@dataclass(frozen=True)
class Limits:
    """Limits of one program: CPU seconds, wall-clock seconds, MiB of address space."""

    cpu_seconds: int = 5
    wall_seconds: float = 30.0
    memory_mib: int = 1024


@dataclass(frozen=True)
class Verdict:
    """Outcome of a program: passed, or the reason why not, such as `AssertionError`."""

    passed: bool
    reason: str = ""


DEFAULT = Limits()


def run_program(parts: Sequence[str], limits: Limits = DEFAULT) -> Verdict:
    """Runs the parts of a Python program one after the other, in one namespace.

    Each part is compiled on its own, so that an open string cannot swallow the next part.
    """
    token = secrets.token_hex(16)
    asked = {
        "parts": list(parts),
        "token": token,
        "cpu_seconds": limits.cpu_seconds,
        "memory_bytes": limits.memory_mib << 20,
    }
    reader, writer = os.pipe()
    with tempfile.TemporaryDirectory(prefix="lora_drop_program_") as folder, open(reader, "rb", 0):
        with open(writer, "wb", 0):
            process = subprocess.Popen(
                [sys.executable, "-I", "-B", str(PROCESS), str(writer)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env=ENVIRONMENT,
                pass_fds=[writer],
                start_new_session=True,  # a process group of its own
            )
        timely = _finish(process, json.dumps(asked).encode(), limits.wall_seconds)
        # read after the end: a program that floods the pipe only fills the pipe
        said = os.read(reader, REPORT_BYTES).decode(errors="replace")
    if timely and said == token:
        return Verdict(True)
    if not timely:
        return Verdict(False, f"not done after {limits.wall_seconds:g} s")
    if process.returncode == -signal.SIGXCPU:
        return Verdict(False, f"not done after {limits.cpu_seconds} s of CPU time")
    return Verdict(False, said or f"exited early (exit status {process.returncode})")


def _finish(process: subprocess.Popen[bytes], given: bytes, seconds: float) -> bool:
    """Feeds the process and waits for its end; kills its group after `seconds`. True if in time."""
    try:
        process.communicate(given, timeout=seconds)
    except subprocess.TimeoutExpired:
        return False
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return True


def require_sandbox() -> None:
    """Raises RuntimeError if this machine cannot confine programs."""
    verdict = run_program([PROBE])
    if not verdict.passed:
        raise RuntimeError(
            f"--run-code: this machine cannot confine programs ({verdict.reason}); the sandbox "
            "needs Linux and libseccomp (libseccomp.so.2; Debian's package libseccomp2). Install "
            "libseccomp, or leave HumanEval out"
        )

"""Runs programs that a model wrote, each in a confined process of its own.

Such a process has an empty working folder, no environment of ours, limits of time and memory, and
of the system's calls only those of `sandbox_process.ALLOWED`: it can neither write files, nor start
processes or threads, nor send signals, nor open a socket. It can read what we can read, but has
nowhere to take it. Linux only.

A program passed if it ran to its end, which its process reports with a token drawn for this run.
That stops what models do by accident or by a simple trick (leaving early, printing success, closing
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
# libraries for arrays may not start threads either
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
    """Of one program: seconds on a core, seconds on the clock, MiB of address space."""

    cpu_seconds: int = 5
    wall_seconds: float = 30.0
    memory_mib: int = 1024


@dataclass(frozen=True)
class Verdict:
    """Whether a program ran to its end; what stopped it if not, such as `AssertionError`."""

    passed: bool
    reason: str = ""


DEFAULT = Limits()


def run_program(parts: Sequence[str], limits: Limits = DEFAULT) -> Verdict:
    """Run Python source to its end, in one namespace, part after part.

    No part can swallow the next one, say by an open string.
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
        # read only now: what a program floods the pipe with stays in the pipe
        said = os.read(reader, REPORT_BYTES).decode(errors="replace")
    if timely and said == token:
        return Verdict(True)
    if not timely:
        return Verdict(False, f"not done after {limits.wall_seconds:g} s")
    if process.returncode == -signal.SIGXCPU:
        return Verdict(False, f"not done after {limits.cpu_seconds} s on a core")
    return Verdict(False, said or f"left before its end (exit status {process.returncode})")


def _finish(process: subprocess.Popen[bytes], given: bytes, seconds: float) -> bool:
    """Feed the process and wait for its end; kills its whole group if it does not come in time."""
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
    """Raise RuntimeError where programs cannot be confined."""
    verdict = run_program([PROBE])
    if not verdict.passed:
        raise RuntimeError(
            f"--run-code: programs cannot be confined here ({verdict.reason}). It takes Linux and "
            "libseccomp (libseccomp.so.2; Debian's package libseccomp2); leave human_eval out, or "
            "evaluate where both are"
        )

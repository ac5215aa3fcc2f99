"""Programs that a model wrote: correct ones pass; all others fail and leave nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_drop_vllm.evaluation.sandbox import Limits, require_sandbox, run_program

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")
SHORT = Limits(cpu_seconds=1, wall_seconds=120, memory_mib=256)
DEEDS = """
os.fork()
os.posix_spawn('/bin/true', ['true'], {})
subprocess.run(['true'])
os.execv('/bin/true', ['true'])
socket.socket()
socket.socketpair()
os.kill(os.getppid(), 9)
os.killpg(os.getpgrp(), 9)
open(OUTSIDE, 'w')
open(OUTSIDE, 'a')
open('inside', 'w')
os.open(OUTSIDE, os.O_RDONLY | os.O_TRUNC)
os.open('.', os.O_TMPFILE | os.O_RDWR)
os.truncate(OUTSIDE, 0)
os.remove(OUTSIDE)
os.rename(OUTSIDE, OUTSIDE + '2')
os.link(OUTSIDE, OUTSIDE + '2')
os.chmod(OUTSIDE, 0)
os.mkdir('folder')
os.mkfifo('pipe')
os.memfd_create('memory')
os.setuid(1)
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
"""


def test_a_right_program_passes_and_a_wrong_one_does_not() -> None:
    imports = "import collections, copy, hashlib, heapq, itertools, math, random, re, string\n"
    assert run_program([imports + "print('text')", "assert math.gcd(4, 6) == 2"]).passed
    verdict = run_program(["x = 1", "assert x == 2"])
    assert not verdict.passed and verdict.reason == "AssertionError"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("while True: pass", "1 s of CPU time"),
        (
            "import os, signal; signal.signal(signal.SIGXCPU, signal.SIG_IGN)\n"
            "while True:\n try: os.fork()\n except OSError: pass",
            "exit status -9",
        ),
        ("x = [0]\nwhile True: x += x", "MemoryError"),
        ("import sys; sys.exit(0)", "SystemExit"),
        ("import os; os._exit(0)", "exited early"),
        ("print('passed'); raise SystemExit", "SystemExit"),
        ("import os\nfor n in range(1000):\n try: os.write(n, b'ok')\n except OSError: pass", "ok"),
        ("import os\nos.closerange(0, 1024)", "exited early"),
        ("import sys; sys.stdout.close(); sys.stderr.close(); 1 / 0", "ZeroDivisionError"),
        ("import os; os.abort()", "exited early"),
        ("import builtins; builtins.exec = print; 1 / 0", "ZeroDivisionError"),
        ("def f(:", "SyntaxError"),
        ("input()", "EOFError"),
    ],
)  # fmt: skip
def test_what_is_not_run_to_its_end_fails(source: str, reason: str) -> None:
    verdict = run_program([source], SHORT)
    assert not verdict.passed and reason in verdict.reason


def test_a_program_that_sleeps_or_floods_is_stopped_by_the_clock() -> None:
    clock = Limits(cpu_seconds=60, wall_seconds=1, memory_mib=256)
    assert "1 s" in run_program(["import time; time.sleep(60)"], clock).reason
    flood = "import os\nwhile True:\n for n in range(3, 20):\n  try: os.write(n, b'x' * 4096)\n"
    assert "1 s" in run_program([f"{flood}  except OSError: pass"], clock).reason


def test_nothing_outside_can_be_touched(tmp_path: Path) -> None:
    outside = tmp_path / "file"
    outside.write_text("mine")
    deeds = [deed.replace("OUTSIDE", repr(str(outside))) for deed in DEEDS.split("\n") if deed]
    source = f"""
import os, resource, socket, subprocess
done = []
for deed in {deeds!r}:
    try:
        eval(deed)
        done.append(deed)
    except (PermissionError, ValueError):  # `resource` turns it into the latter
        pass
raise type(str(done), (Exception,), {{}})
"""
    assert run_program([source]).reason == "[]"
    assert outside.read_text() == "mine" and outside.stat().st_mode & 0o400
    assert list(tmp_path.iterdir()) == [outside]


def test_no_thread_starts_and_our_environment_stays_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "1")
    threads = "import threading\nthreading.Thread(target=print).start()"
    assert run_program([threads]).reason == "RuntimeError"
    assert run_program(["import os\nassert 'SECRET' not in os.environ and not os.listdir()"]).passed


def test_no_process_is_left_of_a_program_that_is_stopped() -> None:
    run_program(["import time\ntime.sleep(60)"], Limits(wall_seconds=0.5))
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    commands = [Path(f"/proc/{child}/cmdline").read_text() for child in children]
    assert not [command for command in commands if "sandbox_process" in command]


def test_where_nothing_can_be_confined_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    require_sandbox()
    real = subprocess.Popen

    def without_python(arguments: list[str], **rest: object) -> subprocess.Popen[bytes]:
        failing = "import os, sys; os.write(int(sys.argv[1]), b'libseccomp: no'); os._exit(1)"
        return real([arguments[0], "-c", failing, arguments[-1]], **rest)

    monkeypatch.setattr("lora_drop_vllm.evaluation.sandbox.subprocess.Popen", without_python)
    with pytest.raises(RuntimeError, match=r"--run-code: .* \(libseccomp: no\)"):
        require_sandbox()

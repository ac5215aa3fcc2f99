"""No kernel of ours is left to compile when the first request comes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from environment import V2

pytest.importorskip("triton.backends.nvidia.compiler")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(V2, reason="the runner makes no difference to our kernels"),
]

KERNELS = ("_compact_slots", "_run", "_save_changes", "_save_stream", "_shrink", "_update")


def test_requests_compile_nothing() -> None:
    script = Path(__file__).parents[1] / "support/count_compiles.py"
    done = subprocess.run(
        [sys.executable, str(script)],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    counted = json.loads(done.stdout.splitlines()[-1])
    compiled = {name for one in counted.values() for name in one["start"]}
    assert compiled == {f"{name}_kernel" for name in KERNELS}
    assert not {where: one["requests"] for where, one in counted.items() if one["requests"]}

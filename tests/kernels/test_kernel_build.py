"""All kernels compile for GPUs, here without one, and none needs more than the GPU has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia.compiler")

KERNELS = ("_compact_slots", "_run", "_save_changes", "_save_stream", "_shrink", "_update")
SHARED = {80: 163 << 10, 90: 227 << 10}  # bytes of shared memory that a block may have


@pytest.mark.parametrize("capability", [90, pytest.param(80, marks=pytest.mark.matrix)])
def test_all_kernels_compile_for_a_gpu(capability: int, tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "support/build_kernels.py"
    done = subprocess.run(
        [sys.executable, str(script), str(capability)],
        env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    built = json.loads(done.stdout)
    assert {kernel["name"] for kernel in built} == {f"{name}_kernel" for name in KERNELS}
    assert not [kernel for kernel in built if kernel["spilled"]]
    assert max(kernel["shared"] for kernel in built) <= SHARED[capability]


def test_the_tests_multiply_fp32_as_fp32(tmp_path: Path) -> None:
    """Triton's attention on a GPU is held to an oracle in fp32."""
    script = Path(__file__).parents[1] / "support/dot_precision.py"
    done = subprocess.run(
        [sys.executable, str(script)],
        env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "ieee", done.stderr

"""Compiles every kernel for a GPU without having one, for the table's launches; prints them.

python build_kernels.py 90        (an H100 or H200; 80: an A100)
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime.jit import JITFunction

built: dict[str, dict[str, Any]] = {}  # by hash


def stand_in(capability: int) -> Any:
    """The part of a driver that chooses and compiles a kernel."""
    return SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        is_active=lambda: True,
    )


def compile_only(capability: int) -> None:
    """Makes every launch stop after the compilation of its kernel."""
    run = JITFunction.run

    def compiled(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernel = run(self, *args, **kwargs | {"warmup": True})
        if kernel.hash not in built:
            spilled = spilled_bytes(kernel.asm["ptx"], capability)
            built[kernel.hash] = {"name": kernel.metadata.name, "spilled": spilled}
            built[kernel.hash] |= {"shared": kernel.metadata.shared}
        return kernel

    JITFunction.run = compiled


def spilled_bytes(ptx: str, capability: int) -> int:
    """Bytes that do not fit into the registers of a thread."""
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert target
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "kernel.ptx"
        source.write_text(ptx)
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={target[1]}", str(source)]
        done = subprocess.run([*command, "-o", "/dev/null"], capture_output=True, text=True)
    found = re.search(r"(\d+) bytes spill stores", done.stderr)
    assert found, done.stderr
    return int(found[1])


def launch_all(dtype: torch.dtype, rows: int, d: int, r: int, layers: int, rule: str) -> None:
    """Launches the kernels of a LoRA step and of a full step of one run of drop layers."""
    from lora_drop_vllm.kernels.reference import Update
    from lora_drop_vllm.kernels.triton_run import drop_run_triton
    from lora_drop_vllm.kernels.triton_state import save_changes_triton, save_stream_triton
    from lora_drop_vllm.method.reuse import REUSE

    x = torch.empty(rows, d, dtype=dtype)
    states = torch.empty(layers, rows, d, dtype=dtype)
    slots = torch.arange(rows)
    A, B = torch.empty(layers, r, d, dtype=dtype), torch.empty(layers, d, r, dtype=dtype)
    of = REUSE[rule]
    kept = states if of.keeps_state else None
    drop_run_triton(x, kept, slots, Update(A, B, 0.5, of.beta, of.writes_back))
    save_stream_triton(x, states, 0, slots)
    save_changes_triton(x, states, states[:, 0].contiguous(), slots)


def main() -> None:
    """Compiles all kernels and prints one JSON line."""
    capability = int(sys.argv[1])
    triton.runtime.driver.set_active(stand_in(capability))
    compile_only(capability)
    from lora_drop_vllm.kernels.triton_slots import compact_slots_triton

    ints = torch.arange(4, dtype=torch.int32)
    compact_slots_triton(ints, ints[:3], ints[:3, None], torch.arange(5), ints[:3].clone(), 16)
    # rows, d, r, layers: one case for each kind of launch in the table
    sizes = [
        (1, 4096, 16, 1),
        (1, 576, 16, 13),
        (8, 5120, 16, 3),
        (4, 8192, 16, 3),
        (32, 8192, 128, 2),
    ]
    rules = ["update", "previous", "none", "anchor"]
    for n, (dtype, size) in enumerate(product((torch.bfloat16, torch.float32), sizes)):
        launch_all(dtype, *size, rules[n % 4])
    print(json.dumps(list(built.values())))


if __name__ == "__main__":
    main()

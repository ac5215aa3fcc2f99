"""Triton kernels that fill the drop layers' states in a full step; they read only last rows."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lora_drop_vllm.kernels.heuristics import STATE_BLOCK, power_of_2


@triton.jit
def _save_stream_kernel(
    x_ptr,
    state_ptr,
    slots_ptr,
    x_stride,
    state_stride,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program per row and block of d; rows without a slot return at once."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    if slot < 0:
        return
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = cols < D
    x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0)
    tl.store(state_ptr + slot * state_stride + cols, x, mask=mask)


@triton.jit
def _save_changes_kernel(
    x_ptr,
    states_ptr,
    gates_ptr,
    slots_ptr,
    sites,
    x_stride,
    site_stride,
    state_stride,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program per row and block of d, for all sites; rows without a slot return at once."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    if slot < 0:
        return
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = cols < D
    last = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
    dtype = states_ptr.dtype.element_ty
    at = states_ptr + slot * state_stride + cols
    gate_at = gates_ptr + cols
    before = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    for _ in range(sites - 1):
        after = tl.load(at + site_stride, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(gate_at, mask=mask, other=0.0).to(tl.float32)
        tl.store(at, (gate * (after - before)).to(dtype), mask=mask)
        before = after
        at += site_stride
        gate_at += D
    gate = tl.load(gate_at, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, (gate * (last - before)).to(dtype), mask=mask)


def save_stream_triton(x: Tensor, states: Tensor, site: int, slots: Tensor) -> None:
    """Runs `reference.save_stream` in one launch.

    x: [T, d]; states: [L, S, d]; slots: [T]; contiguous in their last dimension.
    """
    rows, d = x.shape
    if rows == 0:
        return
    block = min(power_of_2(d), STATE_BLOCK)
    _save_stream_kernel[(rows, triton.cdiv(d, block))](
        x,
        states[site],
        slots,
        x.stride(0),
        states.stride(1),
        D=d,
        BLOCK_D=block,
    )


def save_changes_triton(x: Tensor, states: Tensor, gates: Tensor, slots: Tensor) -> None:
    """Runs `reference.save_changes` in one launch.

    x: [T, d]; states: [L, S, d]; gates: [L, d]; slots: [T]. The gates are contiguous, the others in
    their last dimension.
    """
    rows, d = x.shape
    if rows == 0:
        return
    assert gates.is_contiguous()
    block = min(power_of_2(d), STATE_BLOCK)
    _save_changes_kernel[(rows, triton.cdiv(d, block))](
        x,
        states,
        gates,
        slots,
        len(states),
        x.stride(0),
        states.stride(0),
        states.stride(1),
        D=d,
        BLOCK_D=block,
    )

"""Triton kernels that fill the drop layers' states in a full step; they read only last rows."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lora_drop_vllm.kernels.heuristics import STATE_BLOCK, power_of_2


@triton.jit
def stream(hidden_ptr, residual_ptr, hidden_stride, residual_stride, row, cols, mask):
    """The sum hidden + residual of a row in fp32; the caller rounds it to the model's dtype."""
    hidden = tl.load(hidden_ptr + row * hidden_stride + cols, mask=mask, other=0.0)
    residual = tl.load(residual_ptr + row * residual_stride + cols, mask=mask, other=0.0)
    return hidden.to(tl.float32) + residual.to(tl.float32)


@triton.jit
def _save_stream_kernel(
    hidden_ptr,
    residual_ptr,
    state_ptr,
    slots_ptr,
    hidden_stride,
    residual_stride,
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
    x = stream(hidden_ptr, residual_ptr, hidden_stride, residual_stride, row, cols, mask)
    at = state_ptr + slot * state_stride + cols
    tl.store(at, x.to(state_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _save_changes_kernel(
    hidden_ptr,
    residual_ptr,
    states_ptr,
    gates_ptr,
    slots_ptr,
    sites,
    hidden_stride,
    residual_stride,
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
    last = stream(hidden_ptr, residual_ptr, hidden_stride, residual_stride, row, cols, mask)
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
    tl.store(at, (gate * (last.to(dtype).to(tl.float32) - before)).to(dtype), mask=mask)


def save_stream_triton(
    hidden: Tensor, residual: Tensor, states: Tensor, site: int, slots: Tensor
) -> None:
    """Runs `reference.save_stream` in one launch.

    hidden, residual: [T, d]; states: [L, S, d]; slots: [T]; contiguous in their last dimension.
    """
    rows, d = hidden.shape
    if rows == 0:
        return
    block = min(power_of_2(d), STATE_BLOCK)
    _save_stream_kernel[(rows, triton.cdiv(d, block))](
        hidden,
        residual,
        states[site],
        slots,
        hidden.stride(0),
        residual.stride(0),
        states.stride(1),
        D=d,
        BLOCK_D=block,
    )


def save_changes_triton(
    hidden: Tensor, residual: Tensor, states: Tensor, gates: Tensor, slots: Tensor
) -> None:
    """Runs `reference.save_changes` in one launch.

    hidden, residual: [T, d]; states: [L, S, d]; gates: [L, d]; slots: [T]. The gates are
    contiguous, the others in their last dimension.
    """
    rows, d = hidden.shape
    if rows == 0:
        return
    assert gates.is_contiguous()
    block = min(power_of_2(d), STATE_BLOCK)
    _save_changes_kernel[(rows, triton.cdiv(d, block))](
        hidden,
        residual,
        states,
        gates,
        slots,
        len(states),
        hidden.stride(0),
        residual.stride(0),
        states.stride(0),
        states.stride(1),
        D=d,
        BLOCK_D=block,
    )

"""Triton kernel that fills a drop layer's state in a full step; only the last rows are read."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _save_state_kernel(
    hidden_ptr,
    residual_ptr,
    state_ptr,
    slots_ptr,
    gate_ptr,
    d,
    hidden_stride,
    residual_stride,
    state_stride,
    DIFFERENCE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program per row and block of d; rows without a slot return at once."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    if slot < 0:
        return
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = cols < d
    hidden = tl.load(hidden_ptr + row * hidden_stride + cols, mask=mask, other=0.0)
    residual = tl.load(residual_ptr + row * residual_stride + cols, mask=mask, other=0.0)
    at = state_ptr + slot * state_stride + cols
    # the stream is a tensor of the model's dtype: round the sum before anything else uses it
    x = (hidden.to(tl.float32) + residual.to(tl.float32)).to(state_ptr.dtype.element_ty)
    if DIFFERENCE:
        before = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        x = (gate * (x.to(tl.float32) - before)).to(state_ptr.dtype.element_ty)
    tl.store(at, x, mask=mask)


def save_state_triton(
    hidden: Tensor,
    residual: Tensor,
    state: Tensor,
    slots: Tensor,
    gate: Tensor | None,
    difference: bool,
) -> None:
    """`reference.save_input` (difference=False, no gate) or `reference.save_output`."""
    rows, d = hidden.shape
    if rows == 0:
        return
    block = min(triton.next_power_of_2(d), 1024)
    _save_state_kernel[(rows, triton.cdiv(d, block))](
        hidden,
        residual,
        state,
        slots,
        hidden if gate is None else gate,
        d,
        hidden.stride(0),
        residual.stride(0),
        state.stride(0),
        DIFFERENCE=difference,
        BLOCK_D=block,
    )

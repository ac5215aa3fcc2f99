"""Triton kernel that fills the drop layers' states in a full step; only the last rows are read."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lora_drop_vllm.kernels.heuristics import STATE_BLOCK, power_of_2


@triton.jit
def _save_state_kernel(
    hidden_ptr,
    residual_ptr,
    state_ptr,
    slots_ptr,
    gate_ptr,
    next_ptr,
    hidden_stride,
    residual_stride,
    state_stride,
    next_stride,
    D: tl.constexpr,
    DIFFERENCE: tl.constexpr,
    HAS_NEXT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program per row and block of d; rows without a slot return at once."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    if slot < 0:
        return
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = cols < D
    hidden = tl.load(hidden_ptr + row * hidden_stride + cols, mask=mask, other=0.0)
    residual = tl.load(residual_ptr + row * residual_stride + cols, mask=mask, other=0.0)
    at = state_ptr + slot * state_stride + cols
    # the stream is a tensor of the model's dtype: round the sum before anything else uses it
    x = (hidden.to(tl.float32) + residual.to(tl.float32)).to(state_ptr.dtype.element_ty)
    if HAS_NEXT:
        tl.store(next_ptr + slot * next_stride + cols, x, mask=mask)
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
    gate: Tensor | None = None,
    next: Tensor | None = None,
) -> None:
    """`reference.save_input`, `save_output` or, with a gate and `next`, `save_between`.

    hidden, residual: [T, d]; state, next: [S, d]; slots: [T]; gate: [d], for a difference only.
    All are contiguous in their last dimension; state and next share a dtype and no element.
    """
    rows, d = hidden.shape
    if rows == 0:
        return
    block = min(power_of_2(d), STATE_BLOCK)
    _save_state_kernel[(rows, triton.cdiv(d, block))](
        hidden,
        residual,
        state,
        slots,
        hidden if gate is None else gate,
        state if next is None else next,
        hidden.stride(0),
        residual.stride(0),
        state.stride(0),
        0 if next is None else next.stride(0),
        D=d,
        DIFFERENCE=gate is not None,
        HAS_NEXT=next is not None,
        BLOCK_D=block,
    )

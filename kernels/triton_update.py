"""Triton kernel of the update: cached state + low-rank update + write-back, one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _drop_update_kernel(
    x_ptr,
    state_ptr,
    slots_ptr,
    a_ptr,
    b_ptr,
    out_ptr,
    scale,
    beta,
    d,
    r,
    x_stride,
    state_stride,
    out_stride,
    HAS_STATE: tl.constexpr,
    WRITES_BACK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One program per row: A x over blocks of d into a register vector, then B times it."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    ranks = tl.arange(0, BLOCK_R)
    rank_mask = ranks < r

    low = tl.zeros((BLOCK_R,), dtype=tl.float32)
    for start in range(0, d, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        col_mask = cols < d
        x = tl.load(x_ptr + row * x_stride + cols, mask=col_mask, other=0.0).to(tl.float32)
        a = tl.load(
            a_ptr + ranks[:, None] * d + cols[None, :],
            mask=rank_mask[:, None] & col_mask[None, :],
            other=0.0,
        ).to(tl.float32)
        low += tl.sum(a * x[None, :], axis=1)
    low *= scale

    for start in range(0, d, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        col_mask = cols < d
        x = tl.load(x_ptr + row * x_stride + cols, mask=col_mask, other=0.0).to(tl.float32)
        b = tl.load(
            b_ptr + cols[:, None] * r + ranks[None, :],
            mask=col_mask[:, None] & rank_mask[None, :],
            other=0.0,
        ).to(tl.float32)
        out = beta * x + tl.sum(b * low[None, :], axis=1)
        owned = col_mask & (slot + 0 * cols >= 0)  # a padding row's slot is negative
        if HAS_STATE:
            at = state_ptr + slot * state_stride + cols
            out += tl.load(at, mask=owned, other=0.0).to(tl.float32)
        rounded = out.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * out_stride + cols, rounded, mask=col_mask)
        if WRITES_BACK:
            at = state_ptr + slot * state_stride + cols
            tl.store(at, rounded.to(state_ptr.dtype.element_ty), mask=owned)


def drop_update_triton(
    x: Tensor,
    state: Tensor | None,
    slots: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    beta: float,
    writes_back: bool,
    out: Tensor | None = None,
) -> Tensor:
    """`reference.drop_update` in one launch; `out` [T, d] may be given.

    A [r, d] and B [d, r] must be contiguous, x and state contiguous in their last dimension.
    """
    rows, d = x.shape
    r = A.shape[0]
    assert A.is_contiguous() and B.is_contiguous() and x.stride(1) == 1
    assert state is None or state.stride(1) == 1
    if out is None:
        out = torch.empty_like(x)
    if rows == 0:
        return out
    block_r = triton.next_power_of_2(r)
    _drop_update_kernel[(rows,)](
        x,
        x if state is None else state,
        slots,
        A,
        B,
        out,
        scale,
        beta,
        d,
        r,
        x.stride(0),
        0 if state is None else state.stride(0),
        out.stride(0),
        HAS_STATE=state is not None,
        WRITES_BACK=writes_back,
        BLOCK_D=min(triton.next_power_of_2(d), max(16, 4096 // block_r)),
        BLOCK_R=block_r,
    )
    return out

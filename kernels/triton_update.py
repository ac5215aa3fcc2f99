"""Triton kernels of the update: one launch, or a shrink (A x) and an expand (the rest).

Programs write disjoint blocks of the output and of the state. Of the state, a program reads only
the block that it writes, so the write-back needs no order between programs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_drop_vllm.kernels.heuristics import (
    DOT_ROWS,
    Launch,
    parts_at_a_time,
    power_of_2,
    update_launch,
)
from lora_drop_vllm.kernels.reference import Update


@triton.jit
def shrink_tile(x, a, PRECISION: tl.constexpr, GROUPS: tl.constexpr):
    """The product x a^T in fp32, [M, K] and [R, K] to [M, R]: a plain sum if M = 1, else tl.dot.

    The operands are widened first: tf32 holds every bf16 and fp16 value, so products are exact.
    The sum over K is cut into GROUPS, one per warp: the warps of a small tl.dot repeat each other.
    """
    M: tl.constexpr = x.shape[0]
    K: tl.constexpr = x.shape[1]
    R: tl.constexpr = a.shape[0]
    x, a = x.to(tl.float32), a.to(tl.float32)
    if M == 1:
        low = tl.reshape(tl.sum(a * tl.reshape(x, (K,))[None, :], axis=1), (1, R))
    else:
        x = tl.permute(tl.reshape(x, (M, GROUPS, K // GROUPS)), (1, 0, 2))
        a = tl.permute(tl.reshape(a, (R, GROUPS, K // GROUPS)), (1, 2, 0))
        low = tl.sum(tl.dot(x, a, input_precision=PRECISION), axis=0)
    return low


@triton.jit
def expand_tile(low, b, PRECISION: tl.constexpr):
    """The product low b^T in fp32, [M, R] and [N, R] to [M, N]; a plain sum if M = 1."""
    N: tl.constexpr = b.shape[0]
    R: tl.constexpr = b.shape[1]
    b = b.to(tl.float32)
    if low.shape[0] == 1:
        out = tl.reshape(tl.sum(b * tl.reshape(low, (R,))[None, :], axis=1), (1, N))
    else:
        out = tl.dot(low, tl.trans(b), input_precision=PRECISION)
    return out


@triton.jit
def sum_of_parts(
    low_ptr, row, rank, rows, R: tl.constexpr, PARTS: tl.constexpr, BLOCK_PARTS: tl.constexpr
):
    """Sums what a shrink left to A x of a block of rows: [PARTS, rows, R] to [M, BLOCK_R]."""
    M: tl.constexpr = row.shape[0]
    low = tl.zeros((M, rank.shape[0]), dtype=tl.float32)
    in_low = (row < rows) & (rank[None, :] < R)
    for first in range(0, PARTS, BLOCK_PARTS):
        if M == 1:  # a dimension of one row would lead Triton to a slow layout of b
            part = first + tl.arange(0, BLOCK_PARTS)[:, None]
            at = low_ptr + (part * rows + row) * R + rank[None, :]
            parts = tl.load(at, mask=(part < PARTS) & in_low, other=0.0)
            low += tl.reshape(tl.sum(parts, axis=0), low.shape)
        else:
            part = first + tl.arange(0, BLOCK_PARTS)[None, :, None]
            at = low_ptr + (part * rows + row[:, :, None]) * R + rank[None, None, :]
            parts = tl.load(at, mask=(part < PARTS) & in_low[:, None, :], other=0.0)
            low += tl.sum(parts, axis=1)
    return low


@triton.jit(do_not_specialize=["rows"])
def _shrink_kernel(
    x_ptr,
    a_ptr,
    low_ptr,
    rows,
    x_stride,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SHRINK: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Computes low[i, rows, :] = A x over block i of d, for one block of rows."""
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    rank = tl.arange(0, BLOCK_R)
    x = tl.load(x_ptr + row * x_stride + cols, mask=(row < rows) & (cols < D), other=0.0)
    a_mask = (rank[:, None] < R) & (cols < D)
    a = tl.load(a_ptr + rank[:, None] * D + cols, mask=a_mask, other=0.0)
    low = shrink_tile(x, a, SHRINK, GROUPS)
    low_at = low_ptr + (tl.program_id(1) * rows + row) * R + rank[None, :]
    tl.store(low_at, low, mask=(row < rows) & (rank[None, :] < R))


@triton.jit(do_not_specialize=["rows"])
def _update_kernel(
    x_ptr,
    state_ptr,
    slots_ptr,
    a_ptr,
    b_ptr,
    low_ptr,
    out_ptr,
    next_low_ptr,
    scale,
    beta,
    rows,
    x_stride,
    state_stride,
    out_stride,
    D: tl.constexpr,
    R: tl.constexpr,
    HAS_STATE: tl.constexpr,
    WRITES_BACK: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_NEXT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    SHRINK: tl.constexpr,
    EXPAND: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Computes one block of rows and of d of the output.

    A x is the sum of PARTS partial sums in `low`; with PARTS = 0 this program computes it from all
    of A. With HAS_NEXT, `a` belongs to the next layer; a partial sum of its A x is left as well.
    """
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    rank = tl.arange(0, BLOCK_R)
    in_rank = rank[None, :] < R
    in_tile = (row < rows) & (cols < D)[None, :]
    # loads that depend on nothing come first
    out = beta * tl.load(x_ptr + row * x_stride + cols[None, :], mask=in_tile, other=0.0).to(
        tl.float32
    )
    b_at = b_ptr + cols[:, None] * R + rank[None, :]
    b = tl.load(b_at, mask=(cols < D)[:, None] & in_rank, other=0.0)
    if HAS_NEXT:
        a_mask = (rank[:, None] < R) & (cols < D)[None, :]
        next_a = tl.load(a_ptr + rank[:, None] * D + cols[None, :], mask=a_mask, other=0.0)
    if HAS_STATE:
        slot = tl.load(slots_ptr + row, mask=row < rows, other=-1).to(tl.int64)
        state_at = state_ptr + slot * state_stride + cols[None, :]
        owned = (slot >= 0) & (cols < D)[None, :]
        out += tl.load(state_at, mask=owned, other=0.0).to(tl.float32)

    if PARTS == 0:
        low = tl.zeros((BLOCK_ROWS, BLOCK_R), dtype=tl.float32)
        for start in range(0, D, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)[None, :]
            x = tl.load(x_ptr + row * x_stride + k, mask=(row < rows) & (k < D), other=0.0)
            a_mask = (rank[:, None] < R) & (k < D)
            a = tl.load(a_ptr + rank[:, None] * D + k, mask=a_mask, other=0.0)
            low += shrink_tile(x, a, SHRINK, GROUPS)
    else:
        low = sum_of_parts(low_ptr, row, rank, rows, R, PARTS, BLOCK_PARTS)

    out += scale * expand_tile(low, b, EXPAND)
    rounded = out.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * out_stride + cols[None, :], rounded, mask=in_tile)
    if WRITES_BACK:
        tl.store(state_at, rounded.to(state_ptr.dtype.element_ty), mask=owned)
    if HAS_NEXT:
        low_at = next_low_ptr + (tl.program_id(1) * rows + row) * R + rank[None, :]
        tl.store(low_at, shrink_tile(rounded, next_a, SHRINK, GROUPS), mask=(row < rows) & in_rank)


def drop_update_triton(
    x: Tensor,
    state: Tensor | None,
    slots: Tensor,
    update: Update,
    out: Tensor | None = None,
    launch: Launch | None = None,
) -> Tensor:
    """Runs `reference.drop_update`; `out` [T, d] and the launch may be given.

    A [r, d] and B [d, r] have the dtype of `x` and are contiguous; x, state and out are contiguous
    in their last dimension.
    """
    if out is None:
        out = torch.empty_like(x)
    if x.shape[0] == 0:
        return out
    launch = launch or update_launch(*x.shape, len(update.A), x.element_size())
    low = shrink(x, update.A, launch) if launch.split else None
    launch_update(x, state, slots, update, out, launch, low)
    return out


def shrink(x: Tensor, A: Tensor, launch: Launch) -> Tensor:
    """Computes A x in parts, one per block of d: [parts, T, r] in fp32, to be summed over parts."""
    rows, d = x.shape
    assert A.is_contiguous() and A.dtype == x.dtype and x.stride(1) == 1
    parts = triton.cdiv(d, launch.block_d)
    low = torch.empty(parts, rows, len(A), dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(rows, launch.block_rows), parts)
    _shrink_kernel[grid](x, A, low, rows, x.stride(0), **_constants(launch, d, len(A), x.dtype))
    return low


def launch_update(
    x: Tensor,
    state: Tensor | None,
    slots: Tensor,
    update: Update,
    out: Tensor,
    launch: Launch,
    low: Tensor | None,
    following: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Writes the update [T, d] to `out` in one launch.

    Args:
        low: A x in parts [parts, T, r]; with it, A itself is not read
        following: the A of the next layer, and the buffer for its A x in parts; needs `low`
    """
    rows, d = x.shape
    A, B, r = update.A, update.B, update.B.shape[1]
    next_low = None
    if following is not None:
        A, next_low = following
    assert A.is_contiguous() and B.is_contiguous() and A.dtype == B.dtype == x.dtype
    assert all(t.stride(1) == 1 for t in (x, out, x if state is None else state))
    _update_kernel[(triton.cdiv(rows, launch.block_rows), triton.cdiv(d, launch.block_d))](
        x,
        x if state is None else state,
        slots,
        A,
        B,
        x if low is None else low,
        out,
        x if next_low is None else next_low,
        update.scale,
        update.beta,
        rows,
        x.stride(0),
        0 if state is None else state.stride(0),
        out.stride(0),
        HAS_STATE=state is not None,
        WRITES_BACK=update.writes_back,
        PARTS=0 if low is None else len(low),
        HAS_NEXT=next_low is not None,
        BLOCK_K=launch.block_k,
        BLOCK_PARTS=1 if low is None else parts_at_a_time(len(low), launch.block_rows, r),
        EXPAND="ieee" if x.dtype == torch.float32 else "tf32x3",
        **_constants(launch, d, r, x.dtype),
    )


def _constants(launch: Launch, d: int, r: int, dtype: torch.dtype) -> dict[str, Any]:
    assert launch.block_rows == 1 or launch.block_rows >= DOT_ROWS
    summed = launch.block_d if launch.split else launch.block_k  # columns of a tile of A
    return dict(
        D=d,
        R=r,
        BLOCK_ROWS=launch.block_rows,
        BLOCK_D=launch.block_d,
        BLOCK_R=max(power_of_2(r), 1 if launch.block_rows == 1 else DOT_ROWS),
        SHRINK="ieee" if dtype == torch.float32 else "tf32",
        GROUPS=max(1, min(launch.warps, summed // 16)),
        num_warps=launch.warps,
    )

"""Triton kernel of a run of updates: all layers in one launch, or one launch per layer.

One launch suits small layers: a single multiprocessor reads their A and B in less time than a
launch per layer takes. Otherwise each layer has a launch, which also computes its block's part of
the next layer's A x while the block is at hand. A and B are then read once, and only the first
layer needs a shrink.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_drop_vllm.kernels.heuristics import Chain, Launch, power_of_2, run_launch
from lora_drop_vllm.kernels.reference import Update
from lora_drop_vllm.kernels.triton_update import drop_update_triton, launch_update, shrink


@triton.jit
def _run_kernel(
    x_ptr,
    states_ptr,
    slots_ptr,
    a_ptr,
    b_ptr,
    out_ptr,
    scale,
    beta,
    layers,
    x_stride,
    layer_stride,
    state_stride,
    out_stride,
    D: tl.constexpr,
    R: tl.constexpr,
    HAS_STATE: tl.constexpr,
    WRITES_BACK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One program per row, which keeps x in registers from layer to layer."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    in_col = cols < D
    owned = cols < tl.where(slot >= 0, D, 0)
    state_at = states_ptr + slot * state_stride + cols
    x = tl.load(x_ptr + row * x_stride + cols, mask=in_col, other=0.0).to(tl.float32)
    for _ in range(layers):
        out = beta * x
        if HAS_STATE:
            out += tl.load(state_at, mask=owned, other=0.0).to(tl.float32)
        for first in range(0, R, BLOCK_R):
            rank = first + tl.arange(0, BLOCK_R)
            a_mask = (rank < R)[:, None] & in_col[None, :]
            b_mask = in_col[:, None] & (rank < R)[None, :]
            a = tl.load(a_ptr + rank[:, None] * D + cols[None, :], mask=a_mask, other=0.0)
            b = tl.load(b_ptr + cols[:, None] * R + rank[None, :], mask=b_mask, other=0.0)
            low = scale * tl.sum(a.to(tl.float32) * x[None, :], axis=1)
            out += tl.sum(b.to(tl.float32) * low[None, :], axis=1)
        # between layers the stream is a tensor of the model's dtype
        rounded = out.to(out_ptr.dtype.element_ty)
        if WRITES_BACK:
            tl.store(state_at, rounded.to(states_ptr.dtype.element_ty), mask=owned)
        x = rounded.to(tl.float32)
        a_ptr += R * D
        b_ptr += R * D
        state_at += layer_stride
    tl.store(out_ptr + row * out_stride + cols, x.to(out_ptr.dtype.element_ty), mask=in_col)


def drop_run_triton(
    x: Tensor,
    states: Tensor | None,
    slots: Tensor,
    update: Update,
    launch: Chain | Launch | None = None,
) -> Tensor:
    """Runs `reference.drop_run`, launched as given or as the table says.

    A [L, r, d] and B [L, d, r] have the dtype of `x` and are contiguous; x and states are
    contiguous in their last dimension.
    """
    if len(x) == 0:
        return torch.empty_like(x)
    layers, r, _ = update.A.shape
    launch = launch or run_launch(layers, *x.shape, r, x.element_size())
    if isinstance(launch, Chain):
        return _chained(x, states, slots, update, launch)
    if launch.split:
        return _linked(x, states, slots, update, launch)
    for i in range(layers):
        state = None if states is None else states[i]
        x = drop_update_triton(x, state, slots, update.layer(i), launch=launch)
    return x


def _chained(
    x: Tensor, states: Tensor | None, slots: Tensor, update: Update, launch: Chain
) -> Tensor:
    """Runs all layers in one launch."""
    rows, d = x.shape
    A, B = update.A, update.B
    layers, r, _ = A.shape
    assert A.is_contiguous() and B.is_contiguous() and A.dtype == B.dtype == x.dtype
    assert x.stride(1) == 1 and (states is None or states.stride(2) == 1)
    out = torch.empty_like(x)
    _run_kernel[(rows,)](
        x,
        x if states is None else states,
        slots,
        A,
        B,
        out,
        update.scale,
        update.beta,
        layers,
        x.stride(0),
        0 if states is None else states.stride(0),
        0 if states is None else states.stride(1),
        out.stride(0),
        D=d,
        R=r,
        HAS_STATE=states is not None,
        WRITES_BACK=update.writes_back,
        BLOCK_D=power_of_2(d),
        BLOCK_R=launch.block_rank,
        num_warps=launch.warps,
    )
    return out


def _linked(
    x: Tensor, states: Tensor | None, slots: Tensor, update: Update, launch: Launch
) -> Tensor:
    """Runs one launch per layer after a shrink; each leaves the next layer's A x in parts."""
    # two buffers take turns: no launch reads what it writes
    outs = [torch.empty_like(x) for _ in range(2)]
    low = shrink(x, update.A[0], launch)
    lows = [low, torch.empty_like(low)]
    last = len(update.A) - 1
    for i in range(last + 1):
        state = None if states is None else states[i]
        following = None if i == last else (update.A[i + 1], lows[(i + 1) % 2])
        out, low = outs[i % 2], lows[i % 2]
        launch_update(x, state, slots, update.layer(i), out, launch, low, following)
        x = out
    return x

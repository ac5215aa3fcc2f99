"""Triton kernel that finds the KV slots of the drop layers' compacted lists."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lora_drop_vllm.kernels.heuristics import SLOTS_BLOCK


# one launch compiles it for all: nothing depends on sizes, strides or alignment
@triton.jit(
    do_not_specialize=[
        *("starts_ptr", "cache_lens_ptr", "table_ptr", "slots_ptr", "seq_lens_ptr"),
        *("num_reqs", "num_slots", "table_stride", "block_size"),
    ]
)
def _compact_slots_kernel(
    starts_ptr,
    cache_lens_ptr,
    table_ptr,
    slots_ptr,
    seq_lens_ptr,
    num_reqs,
    num_slots,
    table_stride,
    block_size,
    BLOCK: tl.constexpr,
):
    """One program per request, and one more for the slots after the last token."""
    request = tl.program_id(0)
    start = tl.load(starts_ptr + request)
    if request == num_reqs:
        for first in range(start, num_slots, BLOCK):
            token = first + tl.arange(0, BLOCK)
            tl.store(slots_ptr + token, -1, mask=token < num_slots)
        return
    stop = tl.load(starts_ptr + request + 1)
    cached = tl.load(cache_lens_ptr + request)
    tl.store(seq_lens_ptr + request, cached + stop - start)
    table_ptr += request.to(tl.int64) * table_stride
    for first in range(start, stop, BLOCK):
        token = first + tl.arange(0, BLOCK)
        entry = cached + token - start
        block = tl.load(table_ptr + entry // block_size, mask=token < stop, other=0).to(tl.int64)
        tl.store(slots_ptr + token, block * block_size + entry % block_size, mask=token < stop)


def compact_slots_triton(
    starts: Tensor,
    cache_lens: Tensor,
    block_table: Tensor,
    slots: Tensor,
    seq_lens: Tensor,
    block_size: int,
) -> None:
    """Runs `reference.compact_slots` in one launch.

    starts: [num_reqs + 1]; cache_lens, seq_lens: [num_reqs]; block_table: [num_reqs, max_blocks];
    slots: [tokens]. All are contiguous, but the table's rows may lie apart.
    """
    num_reqs = len(cache_lens)
    assert block_table.stride(1) == 1 and slots.is_contiguous()
    _compact_slots_kernel[(num_reqs + 1,)](
        starts,
        cache_lens,
        block_table,
        slots,
        seq_lens,
        num_reqs,
        len(slots),
        block_table.stride(0),
        block_size,
        BLOCK=SLOTS_BLOCK,
    )

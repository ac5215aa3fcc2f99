"""A drop layer's work on a set of rows: Triton on CUDA tensors, the reference elsewhere.

The Triton files must not be named after these functions: importing a submodule sets its name here.
"""

from __future__ import annotations

from torch import Tensor

from lora_drop_vllm.kernels import reference


def drop_update(
    x: Tensor,
    state: Tensor | None,
    slots: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    beta: float,
    writes_back: bool,
) -> Tensor:
    """Output of one drop layer on a LoRA step; see `reference.drop_update`."""
    if x.is_cuda:
        from lora_drop_vllm.kernels.triton_update import drop_update_triton

        return drop_update_triton(x, state, slots, A, B, scale, beta, writes_back)
    return reference.drop_update(x, state, slots, A, B, scale, beta, writes_back)


def drop_run(
    x: Tensor,
    states: Tensor | None,
    slots: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    beta: float,
    writes_back: bool,
) -> Tensor:
    """Output of consecutive drop layers on a LoRA step; see `reference.drop_run`.

    Whether that is one launch or one per layer is for `heuristics.run_launch` to say.
    """
    if x.is_cuda:
        from lora_drop_vllm.kernels.triton_run import drop_run_triton

        return drop_run_triton(x, states, slots, A, B, scale, beta, writes_back)
    return reference.drop_run(x, states, slots, A, B, scale, beta, writes_back)


def save_stream(hidden: Tensor, residual: Tensor, states: Tensor, site: int, slots: Tensor) -> None:
    """Keep the stream of each request's last token; see `reference.save_stream`."""
    if hidden.is_cuda:
        from lora_drop_vllm.kernels.triton_state import save_stream_triton

        save_stream_triton(hidden, residual, states, site, slots)
        return
    reference.save_stream(hidden, residual, states, site, slots)


def save_changes(
    hidden: Tensor, residual: Tensor, states: Tensor, gates: Tensor, slots: Tensor
) -> None:
    """Turn the streams kept in front of sites into c_i; see `reference.save_changes`."""
    if hidden.is_cuda:
        from lora_drop_vllm.kernels.triton_state import save_changes_triton

        save_changes_triton(hidden, residual, states, gates, slots)
        return
    reference.save_changes(hidden, residual, states, gates, slots)


def compact_slots(
    starts: Tensor,
    cache_lens: Tensor,
    block_table: Tensor,
    slots: Tensor,
    seq_lens: Tensor,
    block_size: int,
) -> None:
    """KV slots and lengths of the compacted lists; see `reference.compact_slots`."""
    if slots.is_cuda:
        from lora_drop_vllm.kernels.triton_slots import compact_slots_triton

        compact_slots_triton(starts, cache_lens, block_table, slots, seq_lens, block_size)
        return
    reference.compact_slots(starts, cache_lens, block_table, slots, seq_lens, block_size)

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


def save_input(hidden: Tensor, residual: Tensor, state: Tensor, slots: Tensor) -> None:
    """Keep x_a^{i-1} of each request's last token; see `reference.save_input`."""
    if hidden.is_cuda:
        from lora_drop_vllm.kernels.triton_state import save_state_triton

        save_state_triton(hidden, residual, state, slots)
        return
    reference.save_input(hidden, residual, state, slots)


def save_output(
    hidden: Tensor, residual: Tensor, state: Tensor, slots: Tensor, gate: Tensor | None
) -> None:
    """Fill c_i after a full step; see `reference.save_output`."""
    if hidden.is_cuda:
        from lora_drop_vllm.kernels.triton_state import save_state_triton

        save_state_triton(hidden, residual, state, slots, gate)
        return
    reference.save_output(hidden, residual, state, slots, gate)


def save_between(
    hidden: Tensor, residual: Tensor, done: Tensor, gate: Tensor, next: Tensor, slots: Tensor
) -> None:
    """Fill c_i of one drop layer and start the next; see `reference.save_between`."""
    if hidden.is_cuda:
        from lora_drop_vllm.kernels.triton_state import save_state_triton

        save_state_triton(hidden, residual, done, slots, gate, next)
        return
    reference.save_between(hidden, residual, done, gate, next, slots)


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

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


def save_input(hidden: Tensor, residual: Tensor, state: Tensor, slots: Tensor) -> None:
    """Keep x_a^{i-1} of each request's last token; see `reference.save_input`."""
    if hidden.is_cuda:
        from lora_drop_vllm.kernels.triton_state import save_state_triton

        save_state_triton(hidden, residual, state, slots, None, difference=False)
        return
    reference.save_input(hidden, residual, state, slots)


def save_output(
    hidden: Tensor, residual: Tensor, state: Tensor, slots: Tensor, gate: Tensor | None
) -> None:
    """Fill c_i after a full step; see `reference.save_output`."""
    if hidden.is_cuda:
        from lora_drop_vllm.kernels.triton_state import save_state_triton

        save_state_triton(hidden, residual, state, slots, gate, difference=gate is not None)
        return
    reference.save_output(hidden, residual, state, slots, gate)

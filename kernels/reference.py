"""Eager PyTorch: the definition of correct for every kernel here.

T is the rows of a step, S the state slots, d the hidden size, r the rank. `slots` [T] names each
row's state slot; a negative slot marks a row that owns none (padding, or a token that is not the
last of its request): its state is neither read into a result that counts nor written.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
    """Output of one drop layer on a LoRA step (Eq. 4 with delta = 0, for every `reuse` rule).

    x_t^i = beta * x_t^{i-1} + c_i + scale * B A x_t^{i-1}, accumulated in fp32, rounded once.

    Args:
        x:     [T, d]  layer input x_t^{i-1}, one row per request
        state: [S, d]  c_i by slot, or None where the rule keeps none
        slots: [T]     slot of each row, negative for padding
        A, B:  [r, d], [d, r]
        writes_back: replace c_i by the result (`previous`)

    Returns:
        [T, d] in the dtype of `x`; padding rows hold no meaning.
    """
    low = x.float() @ A.float().T  # [T, r]
    out = torch.mm(low, B.float().T).mul_(scale)  # [T, d]
    if beta:
        out.add_(x.float(), alpha=beta)
    if state is not None:
        out.add_(state.index_select(0, slots.clamp(min=0)).float())
    result = out.to(x.dtype)
    if writes_back:
        assert state is not None
        _scatter(state, slots, result)
    return result


def save_input(hidden: Tensor, residual: Tensor, state: Tensor, slots: Tensor) -> None:
    """state[slot] = x_a^{i-1} = hidden + residual, for rows that own a slot; the rest untouched.

    Args:
        hidden, residual: [T, d]  what enters the layer
        state:            [S, d]
        slots:            [T]
    """
    rows = slots.ge(0).nonzero().squeeze(1)
    x = hidden.index_select(0, rows) + residual.index_select(0, rows)
    state.index_copy_(0, slots.index_select(0, rows), x.to(state.dtype))


def save_output(
    hidden: Tensor, residual: Tensor, state: Tensor, slots: Tensor, gate: Tensor | None
) -> None:
    """Fill c_i after a full step, from what leaves the layer.

    Without a gate (`previous`, `anchor`) c_i = x_a^i. With one (`update`) the state must hold
    x_a^{i-1} (`save_input`), and c_i = gate * (x_a^i - x_a^{i-1}), computed in fp32.

    Args:
        hidden, residual: [T, d]  what leaves the layer
        state:            [S, d]
        slots:            [T]
        gate:             [d] or None
    """
    rows = slots.ge(0).nonzero().squeeze(1)
    owners = slots.index_select(0, rows)
    x = hidden.index_select(0, rows) + residual.index_select(0, rows)
    if gate is not None:
        x = gate.float() * (x.float() - state.index_select(0, owners).float())
    state.index_copy_(0, owners, x.to(state.dtype))


def _scatter(state: Tensor, slots: Tensor, rows: Tensor) -> None:
    owned = slots.ge(0).nonzero().squeeze(1)
    state.index_copy_(0, slots.index_select(0, owned), rows.index_select(0, owned))

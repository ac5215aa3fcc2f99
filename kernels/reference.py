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
    """Output of L consecutive drop layers on a LoRA step: `drop_update`, L times (Eq. 4).

    Each layer's output is rounded to the dtype of `x` before the next one takes it up.

    Args:
        x:      [T, d]     input of the first layer
        states: [L, S, d]  c_i of each layer by slot, or None where the rule keeps none
        slots:  [T]        slot of each row in every layer, negative for padding
        A, B:   [L, r, d], [L, d, r]
        writes_back: replace each c_i by the layer's result (`previous`)

    Returns:
        [T, d] output of the last layer; padding rows hold no meaning.
    """
    for i in range(len(A)):
        state = None if states is None else states[i]
        x = drop_update(x, state, slots, A[i], B[i], scale, beta, writes_back)
    return x


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
        x = gated_change(state.index_select(0, owners), x, gate)
    state.index_copy_(0, owners, x.to(state.dtype))


def save_between(
    hidden: Tensor, residual: Tensor, done: Tensor, gate: Tensor, next: Tensor, slots: Tensor
) -> None:
    """Between two drop layers in a full step (`update`): fill c_i of one, start the other.

    With x_a^i = hidden + residual: done[slot] = gate * (x_a^i - done[slot]), next[slot] = x_a^i.

    Args:
        hidden, residual: [T, d]  what leaves the one layer and enters the other
        done, next:       [S, d]  their states; `done` holds x_a^{i-1}
        gate:             [d]     of the layer that is done
        slots:            [T]
    """
    save_output(hidden, residual, done, slots, gate)
    save_input(hidden, residual, next, slots)


def compact_slots(
    starts: Tensor,
    cache_lens: Tensor,
    block_table: Tensor,
    slots: Tensor,
    seq_lens: Tensor,
    block_size: int,
) -> None:
    """KV slots and lengths of a full step's tokens in the drop layers' compacted lists.

    Token j of request q becomes entry e = cache_lens[q] + j of that request's list, in slot
    block_table[q, e // block_size] * block_size + e % block_size.

    Args:
        starts:      [num_reqs + 1]  first token of each request, then the number of tokens;
            requests of no tokens (padding) come last
        cache_lens:  [num_reqs]      entries in each request's list so far, 0 for padding
        block_table: [num_reqs, max_blocks]
        slots:       [tokens]        written: the slot of each token, -1 behind the last one
        seq_lens:    [num_reqs]      written: entries in each list with this step's tokens
        block_size:  entries of a block
    """
    query_lens = starts.diff()
    seq_lens.copy_(cache_lens + query_lens)
    request = torch.repeat_interleave(query_lens)
    entry = torch.arange(len(request), device=starts.device) - starts[request] + cache_lens[request]
    block = block_table[request, entry // block_size].to(slots.dtype)
    slots[: len(request)] = block * block_size + entry % block_size
    slots[len(request) :] = -1


def gated_change(before: Tensor, after: Tensor, gate: Tensor) -> Tensor:
    """gate * (x_a^i - x_a^{i-1}) in fp32, what `update` keeps; [..., d] each, gate [d]."""
    return gate.float() * (after.float() - before.float())


def _scatter(state: Tensor, slots: Tensor, rows: Tensor) -> None:
    owned = slots.ge(0).nonzero().squeeze(1)
    state.index_copy_(0, slots.index_select(0, owned), rows.index_select(0, owned))

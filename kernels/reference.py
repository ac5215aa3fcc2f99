"""Eager PyTorch: the definition of correct for every kernel here.

T is the number of rows of a step, S of state slots, d the hidden size, r the rank. `slots` names
the state slot of each row; it may be longer than T. A negative slot marks a row that owns none
(padding, or a token that is not the last of its request): its state is neither written nor read
into a result that counts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Update:
    """The update of a layer, or of a run of L layers: what is the same for all rows.

    Attributes:
        A, B: [r, d], [d, r]; for a run [L, r, d], [L, d, r]
        scale: alpha / r
        beta: weight of the layer's own input
        writes_back: whether the result replaces c_i (`previous`)
    """

    A: Tensor
    B: Tensor
    scale: float
    beta: float
    writes_back: bool

    def layer(self, i: int) -> Update:
        """The update of one layer of a run."""
        return replace(self, A=self.A[i], B=self.B[i])


def drop_update(x: Tensor, state: Tensor | None, slots: Tensor, update: Update) -> Tensor:
    """Output of one drop layer on a LoRA step (Eq. 4 with delta = 0, for every `reuse` rule).

    x_t^i = beta * x_t^{i-1} + c_i + scale * B A x_t^{i-1}, accumulated in fp32, rounded once.

    Args:
        x:     [T, d]  layer input x_t^{i-1}, one row per request
        state: [S, d]  c_i by slot, or None if the rule keeps none
        slots: [T]     slot of each row, negative for padding

    Returns:
        [T, d] in the dtype of `x`; padding rows hold no meaning.
    """
    run = replace(update, A=update.A[None], B=update.B[None])
    return drop_run(x, None if state is None else state[None], slots, run)


def drop_run(x: Tensor, states: Tensor | None, slots: Tensor, update: Update) -> Tensor:
    """Output of L consecutive drop layers on a LoRA step: `drop_update`, L times (Eq. 4).

    Each layer's output is rounded to the dtype of `x` before the next layer reads it.

    Args:
        x:      [T, d]     input of the first layer
        states: [L, S, d]  c_i of each layer by slot, or None if the rule keeps none
        slots:  [T]        slot of each row in every layer, negative for padding

    Returns:
        [T, d] output of the last layer; padding rows hold no meaning.
    """
    slots = slots[: len(x)]
    kept = None
    if states is not None:
        kept = states.index_select(1, slots.clamp(min=0)).float()  # [L, T, d]
    downs, ups = update.A.float().mT.unbind(), update.B.float().mT.unbind()
    result = x
    with torch.autocast(x.device.type, enabled=False):  # fp32 also where a trainer casts
        for i, (down, up) in enumerate(zip(downs, ups)):
            x = result.float()
            out = x * update.beta if kept is None else torch.add(kept[i], x, alpha=update.beta)
            result = out.addmm_(x @ down, up, alpha=update.scale).to(result.dtype)
            if update.writes_back:
                assert states is not None
                _scatter(states[i], slots, result)
    return result


def save_stream(x: Tensor, states: Tensor, site: int, slots: Tensor) -> None:
    """Saves x_a of the rows that own a slot to states[site, slot].

    Taken at the end of a site, x_a is its c_i (`previous`, `anchor`); taken at the start, it is
    what `save_changes` needs.

    Args:
        x:      [T, d]     the stream
        states: [L, S, d]  of consecutive sites
        slots:  [T]
    """
    _scatter(states[site], slots, x)


def save_changes(x: Tensor, states: Tensor, gates: Tensor, slots: Tensor) -> None:
    """Computes c_i = g_i * (x_a^i - x_a^{i-1}) of L sites in a row after a full step (`update`).

    Args:
        x:      [T, d]     the stream that leaves the last site
        states: [L, S, d]  x_a^{i-1} of each site (`save_stream`); c_i replaces it
        gates:  [L, d]
        slots:  [T]
    """
    owners, x = _last(x, slots)
    before = states.index_select(1, owners)  # [L, M, d]
    after = torch.cat([before[1:], x[None]])
    change = gated_change(before, after, gates[:, None])
    states.index_copy_(1, owners, change.to(states.dtype))


def compact_slots(
    starts: Tensor,
    cache_lens: Tensor,
    block_table: Tensor,
    slots: Tensor,
    seq_lens: Tensor,
    block_size: int,
) -> None:
    """Finds the KV slots and lengths of the drop layers' compacted lists in a full step.

    Token j of request q becomes entry e = cache_lens[q] + j of that request's list, in slot
    block_table[q, e // block_size] * block_size + e % block_size.

    Args:
        starts:      [num_reqs + 1]  first token of each request, then the number of tokens;
            requests without tokens (padding) come last
        cache_lens:  [num_reqs]      entries in each request's list so far, 0 for padding
        block_table: [num_reqs, max_blocks]
        slots:       [tokens]        written: the slot of each token, -1 after the last one
        seq_lens:    [num_reqs]      written: entries in each list, this step's tokens included
        block_size:  entries per block
    """
    query_lens = starts.diff()
    seq_lens.copy_(cache_lens + query_lens)
    request = torch.repeat_interleave(query_lens)
    entry = torch.arange(len(request), device=starts.device) - starts[request] + cache_lens[request]
    block = block_table[request, entry // block_size].to(slots.dtype)
    slots[: len(request)] = block * block_size + entry % block_size
    slots[len(request) :] = -1


def gated_change(before: Tensor, after: Tensor, gate: Tensor) -> Tensor:
    """The change that `update` keeps, gate * (x_a^i - x_a^{i-1}) in fp32; [..., d] each."""
    return after.float().sub(before).mul_(gate)


def _last(x: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Slots of the M rows that own one, [M], and their stream, [M, d]."""
    owners = slots[: len(x)]
    if len(x) and owners.min().item() >= 0:  # decoding: fewer operators, once for each site
        return owners, x
    rows = owners.ge(0).nonzero().squeeze(1)
    return owners.index_select(0, rows), x.index_select(0, rows)


def _scatter(state: Tensor, slots: Tensor, x: Tensor) -> None:
    """Writes the rows that own a slot to state [S, d]."""
    owners, x = _last(x, slots)
    state.index_copy_(0, owners, x)

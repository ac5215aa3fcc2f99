"""A batch as the layers need it, and the part of it that an adapter can change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_drop_vllm.decode.keys_values import Places, Rope
from lora_drop_vllm.decode.masks import Span, causal_mask
from lora_drop_vllm.decode.positions import Layout, Schedule, take


@dataclass(frozen=True)
class Batch:
    """One batch as the layers need it; see `Schedule` and `Layout`.

    Attributes:
        rope, full_rope: of all positions [N, T] and of the full positions [N, F]
        mask: for layers outside D
        drop_mask: for layers in D; queries are the full positions
    """

    layout: Layout
    rope: Rope
    full_rope: Rope
    mask: Any
    drop_mask: Any

    @classmethod
    def of(cls, model: Any, schedule: Schedule, kv: str, attention: str = "sdpa") -> Batch:
        """A batch for one model, KV mode and attention backend."""
        everything = Span(_columns(schedule), schedule.sequence)
        layout = Layout.of(schedule)
        full = _full_span(everything, layout)
        return cls(
            layout,
            *_ropes(model, schedule, layout),
            causal_mask(attention, everything, everything),
            causal_mask(attention, full, full if kv == "skip" else everything),
        )


@dataclass(frozen=True)
class Tail:
    """The positions that an adapter can change: in each sequence, from before its first LoRA step.

    The prompt before the tail is the base model's own. Its last token belongs to the tail, because
    the first LoRA steps reuse what that token's full step kept.

    Attributes:
        at: [N, A]  flat positions of the tail; a row with fewer than A repeats its first position
        batch: the tail's A positions are the queries, and all T positions are the keys
        rows: places of the tail's positions among all positions
        full_rows: places of its full positions [N, F] among all positions
    """

    at: Tensor
    batch: Batch
    rows: Places
    full_rows: Places

    @classmethod
    def of(cls, model: Any, schedule: Schedule, kv: str, attention: str) -> Tail | None:
        """The tail of a batch, or None if the batch has no LoRA step."""
        inside = _tail(schedule)
        at, real = _compacted(inside)
        if not real.any():
            return None
        part = Schedule(
            _rows(schedule.sequence, at).where(real, -1),
            _rows(schedule.position, at),
            _rows(schedule.full, at) & real,
            _rows(schedule.lora, at) & real,
        )
        layout = Layout.of(part)
        everything = Span(_columns(schedule), schedule.sequence)
        queries = Span(_rows(everything.column, at), part.sequence)
        written = everything
        if kv == "skip":
            written = Span(everything.column, schedule.sequence.where(schedule.full, -1))
        batch = Batch(
            layout,
            *_ropes(model, part, layout),
            causal_mask(attention, queries, everything),
            causal_mask(attention, _full_span(queries, layout), written),
        )
        full_at = _rows(at, layout.full_at)
        return cls(at, batch, _places(at, real), _places(full_at, layout.real))


def _tail(schedule: Schedule) -> Tensor:
    """[N, T] bool: true from the last position before a sequence's first LoRA step."""
    count = schedule.lora.int().cumsum(1)
    begins = schedule.position == 0  # no LoRA step
    before = torch.where(begins, count, 0).cummax(1).values
    reached = (count > before) & (schedule.sequence >= 0)
    inside = reached.clone()
    inside[:, :-1] |= reached[:, 1:] & ~begins[:, 1:]
    return inside


def _compacted(inside: Tensor) -> tuple[Tensor, Tensor]:
    """Flat positions of the True entries, in order per row, [N, A], and a mask of the real ones."""
    N, T = inside.shape
    count = inside.sum(1, keepdim=True)
    real = torch.arange(int(count.max()), device=inside.device) < count
    at = (torch.arange(N, device=inside.device)[:, None] * T).repeat(1, real.shape[1])
    at[real] = inside.flatten().nonzero().squeeze(1)
    return at, real


def _places(at: Tensor, real: Tensor) -> Places:
    rows = real.flatten().nonzero().squeeze(1)
    return Places(rows, at.flatten()[rows])


def _rows(x: Tensor, at: Tensor) -> Tensor:
    """Values of [N, T] at flat positions, in the shape of `at`."""
    return x.flatten()[at]


def _columns(schedule: Schedule) -> Tensor:
    column = torch.arange(schedule.full.shape[1], device=schedule.full.device)
    return column.expand_as(schedule.full)


def _full_span(queries: Span, layout: Layout) -> Span:
    """The full positions among queries."""
    sequence = _rows(queries.sequence, layout.full_at).where(layout.real, -1)
    return Span(_rows(queries.column, layout.full_at), sequence)


def _ropes(model: Any, schedule: Schedule, layout: Layout) -> tuple[Rope, Rope]:
    """The rotary embedding of all positions, and of the full positions."""
    cos, sin = model.model.rotary_emb(model.model.embed_tokens.weight, schedule.position)
    full_cos, full_sin = (take(part, layout.full_at) for part in (cos, sin))
    full = Rope(full_cos, full_sin, _rows(schedule.position, layout.full_at))
    return Rope(cos, sin, schedule.position), full

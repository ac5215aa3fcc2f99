"""The served schedule for whole sequences: the full positions, and the places of their rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def rows(lengths: Sequence[int]) -> Tensor:
    """Sequence numbers [N, T] of a batch with one right-padded sequence per row."""
    column = torch.arange(max(lengths))
    number = torch.arange(len(lengths))[:, None]
    return torch.where(column < torch.tensor(lengths)[:, None], number, -1)


@dataclass(frozen=True)
class Schedule:
    """The step kind of every position (Sec. II-B), for a batch of N rows of T positions.

    Attributes:
        sequence: [N, T] int  number of the position's sequence, negative for padding
        position: [N, T] int  place in that sequence
        full: [N, T] bool     prompt positions and refreshes
        lora: [N, T] bool     LoRA positions; padding is neither full nor LoRA
    """

    sequence: Tensor
    position: Tensor
    full: Tensor
    lora: Tensor

    @classmethod
    def of(
        cls, sequence: Tensor, prompt: int | Tensor, k: int | Tensor, phase: int | Tensor = 0
    ) -> Schedule:
        """A prompt, then cycles of k LoRA positions and a refresh.

        Args:
            sequence: [N, T]  from `rows`, or of packed rows; S sequences have numbers from 0 across
                the whole batch, and each is one run
            prompt, k, phase: one for all or [S]; `phase` counts the LoRA positions of the first
                cycle that have already passed

        Raises:
            ValueError: a sequence is in pieces, or a prompt, k or phase is out of range.
        """
        column = torch.arange(sequence.shape[1], device=sequence.device)
        real = sequence >= 0
        begins = torch.ones_like(real)
        begins[:, 1:] = sequence[:, 1:] != sequence[:, :-1]
        lengths = _lengths(sequence, begins & real)
        prompt, k, phase = (
            torch.as_tensor(value, device=sequence.device).expand_as(lengths)
            for value in (prompt, k, phase)
        )
        _check(lengths, prompt, k, phase)
        position = column - torch.where(begins, column, 0).cummax(1).values
        of = sequence.clamp(min=0)
        decoded = position - prompt[of]
        full = (decoded < 0) | ((decoded + phase[of]) % (k[of] + 1) == k[of])
        return cls(sequence, position, full & real, ~full & real)


def _lengths(sequence: Tensor, begins: Tensor) -> Tensor:
    """Lengths [S], from the numbers of the runs in a batch."""
    numbers = sequence[begins]
    if not torch.equal(numbers.sort().values, torch.arange(len(numbers), device=numbers.device)):
        raise ValueError(
            f"sequence={numbers.tolist()}, one number per run: expected 0, 1, 2, … each once; give "
            "each sequence of the batch its own number."
        )
    return sequence[sequence >= 0].bincount(minlength=len(numbers))


def _check(lengths: Tensor, prompt: Tensor, k: Tensor, phase: Tensor) -> None:
    def require(ok: Tensor, name: str, values: Tensor, allowed: str) -> None:
        if not ok.all():
            bad = int((~ok).nonzero()[0])
            raise ValueError(f"{name}={int(values[bad])} of sequence {bad}: expected {allowed}.")

    require(prompt >= 1, "prompt", prompt, "at least 1 token; prepend one, such as the BOS token")
    require(prompt <= lengths, "prompt", prompt, "at most its length; shorten the prompt")
    require(k >= 0, "k", k, "0 or more LoRA steps between two full steps")
    require((phase >= 0) & (phase <= k), "phase", phase, "0 to k LoRA steps already done")


@dataclass(frozen=True)
class Layout:
    """Index tensors between a batch's positions and the rows that drop layers compute.

    Full positions are compacted to [N, F]; attention under `kv: skip` is then causal among them.

    Attributes:
        full_at: [N, F]  flat position (n * T + t) of every full position in order; a row with fewer
            than F repeats its first position
        real: [N, F] bool  false on these repetitions
        lora_at: [M]  flat position of every LoRA position
        slots: [M]  flat place in [N, F] of the last full position before it
        source: [N * T]  place of each position's result in the N * F full rows, followed by the M
            LoRA rows; arbitrary for padding
    """

    full_at: Tensor
    real: Tensor
    lora_at: Tensor
    slots: Tensor
    source: Tensor

    @classmethod
    def of(cls, schedule: Schedule) -> Layout:
        """The layout of one batch, on the schedule's device."""
        full = schedule.full
        N, T = full.shape
        row = torch.arange(N, device=full.device)[:, None]
        count = full.sum(1, keepdim=True)
        F = int(count.max())
        place = row * F + full.cumsum(1) - 1
        full_at = (row * T).repeat(1, F).flatten()
        full_at[place[full]] = full.flatten().nonzero().squeeze(1)
        lora_at = schedule.lora.flatten().nonzero().squeeze(1)
        source = torch.where(full, place, 0).flatten()
        source[lora_at] = N * F + torch.arange(len(lora_at), device=full.device)
        return cls(
            full_at=full_at.view(N, F),
            real=torch.arange(F, device=full.device) < count,
            lora_at=lora_at,
            slots=place.flatten()[lora_at],
            source=source,
        )


def take(x: Tensor, at: Tensor) -> Tensor:
    """Vectors of [N, T, d] at flat positions, in the shape of `at`."""
    return x.flatten(0, 1).index_select(0, at.flatten()).view(*at.shape, x.shape[-1])


def sum_since_full(z: Tensor, layout: Layout) -> Tensor:
    """Sum from the first LoRA position after the last full one to each position, [M, d], fp32."""
    N, d = layout.full_at.shape[0], z.shape[-1]
    spread = z.new_zeros(layout.source.numel(), d, dtype=torch.float32)
    spread = spread.index_copy(0, layout.lora_at, z.float())
    total = spread.view(N, -1, d).cumsum(1)
    anchor_at = layout.full_at.flatten()[layout.slots]
    return take(total, layout.lora_at) - take(total, anchor_at)

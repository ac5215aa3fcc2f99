"""Figures from streamed answers: which steps count, and of what kind they are."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np

from support.decode_figures import metrics_of, split_by_kind
from support.stream_client import Answer, RunFailedError

COUNTERS = ("lora_drop_full_steps_total", "lora_drop_lora_steps_total")
QUANTILES = tuple(range(5, 100, 5))  # percent, of the latencies by kind of step


@dataclass(frozen=True)
class Block:
    """One burst of one variant.

    Attributes:
        steps: full and LoRA steps that the server counted meanwhile; None for stock vLLM
    """

    answers: list[Answer]
    steps: tuple[int, int] | None

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all answers over the time from the first request to the last token."""
        first = min(a.sent for a in self.answers)
        last = max(a.stamps[-1] for a in self.answers)
        return sum(len(a.tokens) for a in self.answers) / (last - first)


def together(answers: list[Answer]) -> list[float]:
    """Milliseconds of the steps in which all requests decode, in order.

    They are the gaps of the request whose first token came last, until the first answer ends. Its
    prompt was a full step for everybody, so the kinds of these steps are known: k LoRA steps, a
    full step, and so on.
    """
    last = max(answers, key=lambda a: a.stamps[0])
    end = min(a.stamps[-1] for a in answers)
    return [1000 * (b - a) for a, b in zip(last.stamps, last.stamps[1:]) if b <= end]


def check_steps(block: Block, k: int) -> None:
    """Raises RunFailedError unless the server counted the LoRA steps that this k makes.

    For a lone request the number is exact; for several it is that after the last prompt.
    """
    if block.steps is None:
        raise RunFailedError("the server has no LoRA-Drop counters; is it stock vLLM?")
    decoded = max(len(a.tokens) for a in block.answers) - 1
    wanted = decoded - decoded // (k + 1)
    lora = block.steps[1]
    exact = len(block.answers) == 1 or not k
    if lora < wanted or (exact and lora != wanted):
        raise RunFailedError(
            f"/metrics counted {lora} LoRA steps instead of {wanted}: the drop path did not run "
            f"as k = {k} has it, or somebody else uses the server"
        )


def figures(
    blocks: dict[str, list[Block]], layers: int, drop: list[int], k: int, **attention: Any
) -> dict[str, Any]:
    """All figures of one setting.

    Args:
        blocks: by variant: `stock`, `k0`, `lora_drop` and, for the ideal, `fewer_layers`
        layers, drop: n, and the layers that drop whole
        attention: further arguments of `metrics_of`
    """
    rounds = {name: [together(b.answers) for b in found] for name, found in blocks.items()}
    for name, runs in rounds.items():
        if short := [len(run) for run in runs if len(run) <= k + 1]:
            raise RunFailedError(
                f"{name}: all requests decoded together in only {short[0]} steps, which makes no "
                f"cycle of {k + 1}; raise --tokens"
            )
    kinds = split_by_kind(rounds["lora_drop"], k)
    lora = sum(b.steps[1] for b in blocks["lora_drop"] if b.steps)
    full = sum(b.steps[0] for b in blocks["lora_drop"] if b.steps)
    return metrics_of(rounds, layers, drop, k, **attention) | {
        "ttft_ms": {name: _first_tokens(found) for name, found in blocks.items()},
        "tokens_per_s": {
            name: round(statistics.median(b.tokens_per_s for b in found), 2)
            for name, found in blocks.items()
        },
        "steps": {"full": full, "lora": lora},
        "by_kind_ms": {kind: quantiles(times) for kind, times in kinds.items()},
        "tokens_in_shared_chunks": {name: shared_chunks(found) for name, found in blocks.items()},
    }


def quantiles(values: list[float]) -> list[float]:
    """The `QUANTILES` of some values."""
    return [round(float(x), 3) for x in np.percentile(values, QUANTILES)]


def shared_chunks(blocks: list[Block]) -> int:
    """Number of tokens that shared a chunk; their gaps are 0."""
    return sum(len(a.tokens) - a.chunks for b in blocks for a in b.answers)


def _first_tokens(blocks: list[Block]) -> dict[str, float]:
    times = [a.first_token_ms for b in blocks for a in b.answers]
    middle, late = np.percentile(times, (50, 95))
    return {"p50": round(float(middle), 3), "p95": round(float(late), 3)}

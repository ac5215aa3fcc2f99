"""Rollouts in numbers: length, loops, variety, and what the base model thinks of each answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_drop_vllm.engine.offline_generation import LOOP
from lora_drop_vllm.evaluation.served_answers import Pass
from lora_drop_vllm.evaluation.significance import Estimate, mean, share, share_difference
from lora_drop_vllm.opinions import Scores

START = 32  # first tokens of two answers that are compared
# figures of a rollout, by field: name in the table, factor, decimals
FIGURES = {
    "tokens": ("tokens", 1, 1),
    "cut_off": ("cut off, %", 100, 1),
    "loops": ("loops, %", 100, 1),
    "distinct_1": ("distinct-1", 1, 3),
    "distinct_2": ("distinct-2", 1, 3),
    "distinct_3": ("distinct-3", 1, 3),
    "logprob": ("log-probability", 1, 3),
    "first_choice": ("first choice, %", 100, 1),
}


@dataclass(frozen=True)
class Rollout:
    """One answer.

    Attributes:
        tokens: number of its tokens, the one that ended it included
        cut_off: True if it ran into `--max-tokens` or the model's length
        loops: True if a phrase of 8 to 128 tokens stands in it three times in a row
        distinct_1, distinct_2, distinct_3: number of different runs of 1, 2 and 3 tokens, as a
            share of all such runs
        logprob: the base model's mean log-probability of its tokens, in nats
        first_choice: share of its tokens that are the base model's own first choice
    """

    text: str
    tokens: int
    cut_off: bool
    loops: bool
    distinct_1: float
    distinct_2: float
    distinct_3: float
    logprob: float
    first_choice: float

    @classmethod
    def of(cls, text: str, ids: Sequence[int], cut_off: bool, scores: Scores) -> Rollout:
        """A rollout from its tokens and the base model's opinion of them."""
        return cls(
            text=text,
            tokens=len(ids),
            cut_off=cut_off,
            loops=loops(ids),
            distinct_1=distinct(ids, 1),
            distinct_2=distinct(ids, 2),
            distinct_3=distinct(ids, 3),
            logprob=scores.mean_logprob,
            first_choice=scores.agreement,
        )


@dataclass(frozen=True)
class Figure:
    """One figure under LoRA-Drop and of the base model, and their difference, paired by prompt."""

    lora_drop: Estimate
    base: Estimate
    difference: Estimate

    @classmethod
    def of(cls, ours: Sequence[Any], base: Sequence[Any]) -> Figure:
        """The figure from one value per prompt; truth values give shares, numbers give means."""
        if isinstance(ours[0], bool):
            return cls(share(ours), share(base), share_difference(ours, base))
        return cls(mean(ours), mean(base), mean([a - b for a, b in zip(ours, base, strict=True)]))


@dataclass(frozen=True)
class RolloutsResult:
    """Answers to chat prompts, with the base model and with LoRA-Drop.

    Attributes:
        prompts: name of their file
        examples: prompts that both answered
        skipped: prompts that the server refused
        refusal: first reason that the server gave for a refusal
        base, lora_drop: tokens and steps of each
        figures: means and shares over the prompts, by the fields of a rollout
        same_start: share of the first 32 tokens before the two answers differ, mean over prompts
        answers: one entry per prompt, with both answers
    """

    prompts: str
    examples: int
    skipped: int
    refusal: str
    base: Pass
    lora_drop: Pass
    figures: dict[str, Figure]
    same_start: Estimate
    answers: list[dict[str, Any]]

    def lines(self) -> list[str]:
        """Steps of both, and a table with one row per figure."""
        refusal = f" ({self.refusal})" if self.refusal else ""
        head = f"{self.prompts}: {self.examples} prompts, {self.skipped} skipped{refusal}"
        lines = [head, self.base.line("base"), self.lora_drop.line("LoRA-Drop")]
        columns = ("LoRA-Drop [95 % interval]", "base", "difference")
        lines.append(_row("", columns))
        for field, figure in self.figures.items():
            name, factor, decimals = FIGURES[field]
            three = (figure.lora_drop, figure.base, figure.difference)
            lines.append(_row(name, [_shown(each, factor, decimals) for each in three]))
        start = _shown(self.same_start, 100, 1)
        return [*lines, f"  of the first {START} tokens, {start} % are the same before they differ"]


def loops(ids: Sequence[int]) -> bool:
    """True if a phrase stands three times in a row, at the sizes of `lora-drop generate`."""
    return loop_start(ids) is not None


def loop_start(ids: Sequence[int]) -> int | None:
    """Place of the first token that begins a phrase three times in a row; None without one."""
    starts, times = [], LOOP["min_count"]
    for size in range(LOOP["min_pattern_size"], LOOP["max_pattern_size"] + 1):
        run = 0  # tokens in a row that stand `size` places earlier too
        for place, (token, later) in enumerate(zip(ids, ids[size:]), 1):
            run = run + 1 if token == later else 0
            if run == (times - 1) * size:
                starts.append(place - run)
                break
    return min(starts, default=None)


def distinct(ids: Sequence[int], size: int) -> float:
    """Distinct runs of tokens as a share of all runs; 1 if the answer is too short for a run."""
    runs = list(zip(*(ids[n:] for n in range(size))))
    return len(set(runs)) / len(runs) if runs else 1.0


def same_start(ids: Sequence[int], others: Sequence[int]) -> float:
    """Share of the first tokens before two answers differ."""
    length = min(START, max(len(ids), len(others)))
    same = 0
    for one, other in zip(ids[:length], others):
        if one != other:
            break
        same += 1
    return same / length


def figures(ours: Sequence[Rollout], base: Sequence[Rollout]) -> dict[str, Figure]:
    """Every figure of the two models, which answered the same prompts."""
    return {
        name: Figure.of([getattr(r, name) for r in ours], [getattr(r, name) for r in base])
        for name in FIGURES
    }


def _row(name: str, cells: Sequence[str]) -> str:
    return f"  {name:<18}" + "".join(f"{cell:<28}" for cell in cells).rstrip()


def _shown(estimate: Estimate, factor: int, decimals: int) -> str:
    value, low, high = (
        f"{factor * number:.{decimals}f}"
        for number in (estimate.value, estimate.low, estimate.high)
    )
    return f"{value} [{low}, {high}]"

"""Figures of runs under load, and of the rounds of variants that took turns."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from support.load.client import Run
from support.stream_client import RunFailedError

VARIANTS = ("stock", "now", "wait")
# two-sided 95 % quantile of Student's t by degrees of freedom; the last holds for more of them
T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
RISE = 1.1  # a burst four times as large that completes fewer times as many requests is the last
RATIOS = ("tokens_per_s", "tpot_mean_ms")
DIFFERENCES = ("ttft_p50_ms", "ttft_p99_ms")

Rounds = dict[str, list[Run]]  # by variant, the runs of one rate


def saturation(seconds: Callable[[int], float], most: int) -> float:
    """Requests per second that a server completes at most.

    Args:
        seconds: time in which it answers so many requests that arrive at once
        most: requests of the largest burst
    """
    best, size = 1 / seconds(1), 1
    while size < most:
        size = min(4 * size, most)
        found = size / seconds(size)
        if found < RISE * best:
            return max(found, best)
        best = found
    return best


def figures(run: Run) -> dict[str, float]:
    """The figures of one run; shares of steps are missing for stock vLLM."""
    found = {
        "tokens_per_s": run.tokens_per_s,
        "tpot_mean_ms": statistics.fmean(run.tpot_ms),
        "tpot_p50_ms": float(np.percentile(run.tpot_ms, 50)),
        "tpot_p95_ms": float(np.percentile(run.tpot_ms, 95)),
        "ttft_p50_ms": float(np.percentile(run.ttft_ms, 50)),
        "ttft_p99_ms": float(np.percentile(run.ttft_ms, 99)),
        "kv_used": statistics.fmean(run.kv_used) if run.kv_used else 0.0,
        "kv_used_most": max(run.kv_used, default=0.0),
        "preemptions": run.counts["preemptions"],
        "steps": run.counts["steps"],
    }
    if "lora" in run.counts:
        steps = run.counts["full"] + run.counts["lora"]
        found["lora_share"] = run.counts["lora"] / steps
        found["prompt_share"] = run.counts["prompt"] / steps
    return {name: round(value, 4) for name, value in found.items()}


def check(rounds: Rounds, k: int) -> None:
    """Raises RunFailedError unless the LoRA-Drop servers ran LoRA steps, and stock vLLM none."""
    for name, runs in rounds.items():
        for run in runs:
            if ("lora" in run.counts) != (name != "stock"):
                raise RunFailedError(f"{name}: its /metrics are those of another variant")
            if name != "stock" and bool(run.counts["lora"]) != bool(k):
                raise RunFailedError(f"{name}: {run.counts['lora']} LoRA steps at k = {k}")


def rate_figures(rounds: Rounds) -> dict[str, Any]:
    """Figures of one rate.

    Returns:
        By variant, each figure's values round by round; and under `against`, by the other
        variant, what `wait` differs by: ratios of `RATIOS`, `DIFFERENCES` in milliseconds, each as
        mean and 95 % interval over the rounds.
    """
    found: dict[str, Any] = {}
    for name, runs in rounds.items():
        each = [figures(run) for run in runs]
        found[name] = {figure: [e[figure] for e in each] for figure in each[0]}
    found["against"] = {
        other: {
            figure: interval([a / b for a, b in zip(found["wait"][figure], found[other][figure])])
            for figure in RATIOS
        }
        | {
            figure: interval([a - b for a, b in zip(found["wait"][figure], found[other][figure])])
            for figure in DIFFERENCES
        }
        for other in VARIANTS
        if other != "wait"
    }
    return found


def interval(values: Sequence[float]) -> list[float]:
    """Mean and 95 % interval (Student's t) over rounds; a lone round has no interval."""
    mean, n = statistics.fmean(values), len(values)
    if n == 1:
        return [round(mean, 4)] * 3
    half = T_95[min(n - 1, len(T_95)) - 1] * statistics.stdev(values) / math.sqrt(n)
    return [round(x, 4) for x in (mean, mean - half, mean + half)]


def burst_figures(run: Run) -> dict[str, float]:
    """Figures of a burst, from which a cost model is fitted.

    The gaps are those of each answer's last three quarters, in which all requests decode.
    """
    gaps = np.concatenate([gaps[len(gaps) // 4 :] for gaps in run.gaps_ms])
    return {
        "requests": len(run.ttft_ms),
        "seconds": round(run.seconds, 4),
        "ttft_mean_ms": round(statistics.fmean(run.ttft_ms), 2),
        "gap_p50_ms": round(float(np.percentile(gaps, 50)), 3),
        "gap_mean_ms": round(float(gaps.mean()), 3),
    }

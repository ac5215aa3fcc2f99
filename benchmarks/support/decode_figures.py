"""Figures from the times of steps: ratios with intervals, the ideal, percentiles."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_drop_vllm.method.cost import ideal_speed

Times = dict[str, list[list[float]]]  # by variant and round, the milliseconds of each step


def metrics_of(
    rounds: Times,
    layers: int,
    drop: Sequence[int],
    k: int,
    attention_only: Sequence[int] = (),
    share: float = 0.0,
) -> dict[str, Any]:
    """Ratios of a measurement, its ideal, and the milliseconds behind them.

    Without the variant `fewer_layers` the cost of a layer is unknown, and what follows from it is
    left out.

    Args:
        drop: the layers that drop whole
        attention_only: the layers of which only the attention drops
        share: of a layer's time, what its attention takes
    """
    typical = {name: [cycle_mean(times, k + 1) for times in runs] for name, runs in rounds.items()}

    def ratios(a: str, b: str) -> list[float]:
        return [x / y for x, y in zip(typical[a], typical[b], strict=True)]

    speed_ups = ratios("stock", "lora_drop")
    speed = statistics.median(speed_ups)
    by_kind = split_by_kind(rounds["lora_drop"], k)
    lora = statistics.median(by_kind["lora"])
    found = {
        "speed_up": round(speed, 3),
        "speed_up_95": [round(end, 3) for end in interval_95(speed_ups)],
        "k0_over_stock": round(statistics.median(ratios("k0", "stock")), 3),
        "lora_step_ms": round(lora, 3),
        "full_step_ms": round(statistics.median(by_kind["full"]), 3),
        "ms_per_token": {name: round(statistics.median(t), 3) for name, t in typical.items()},
    } | percentiles(rounds)
    if "fewer_layers" not in typical:
        return found
    step = statistics.median(typical["stock"])
    saved = step * (1 - statistics.median(ratios("fewer_layers", "stock")))
    layer = saved / (layers - layers // 2)
    rest = step - layers * layer
    ideal = ideal_speed([layer] * layers, drop, k, rest, attention_only, share)
    left_out = (len(drop) + share * len(attention_only)) * layer
    return found | {
        "ideal_speed_up": round(ideal, 3),
        "share_of_ideal": round(speed / ideal, 3),
        "layer_ms": round(layer, 3),
        "rest_ms": round(rest, 3),
        "lora_step_over_ideal": round(lora / (step - left_out), 3),
    }


def split_by_kind(rounds: list[list[float]], k: int) -> dict[str, list[float]]:
    """Steps after the prompt by kind: k LoRA steps, a full step, and so on."""
    steps = [step for times in rounds for step in enumerate(times)]
    return {
        "lora": [t for n, t in steps if n % (k + 1) < k],
        "full": [t for n, t in steps if n % (k + 1) == k],
    }


def percentiles(rounds: Times) -> dict[str, dict[str, float]]:
    """p50, p95, p99 and mean of every variant's steps."""
    found: dict[str, dict[str, float]] = {f"{p}_ms": {} for p in ("p50", "p95", "p99", "mean")}
    for name, runs in rounds.items():
        times = [t for run in runs for t in run]
        for percent in (50, 95, 99):
            found[f"p{percent}_ms"][name] = round(float(np.percentile(times, percent)), 3)
        found["mean_ms"][name] = round(statistics.fmean(times), 3)
    return found


def cycle_mean(times: list[float], period: int) -> float:
    """Mean time per token over all windows of one cycle, for each variant alike."""
    windows = range(len(times) - period + 1)
    return statistics.fmean(statistics.fmean(times[i : i + period]) for i in windows)


def interval_95(values: list[float]) -> tuple[float, float]:
    """95 % interval of the median: percentiles of the bootstrap's medians."""
    drawn = np.random.default_rng(0).choice(values, (2000, len(values)))
    low, high = np.percentile(np.median(drawn, axis=1), (2.5, 97.5))
    return float(low), float(high)

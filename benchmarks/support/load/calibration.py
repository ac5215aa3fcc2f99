"""The cost model against a measured machine: its constants, and how far the simulation is off."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from support.load.client import Offer, Shape
from support.load.cost_model import Machine, Model, Step, fit, prompt_step
from support.load.figures import VARIANTS, rate_figures
from support.load.scenario import RANK, Scenario

Record = dict[str, Any]
FIGURES = ("tokens_per_s", "tpot_mean_ms", "tpot_p95_ms", "ttft_p50_ms", "ttft_p99_ms")
SHARES = ("lora_share", "prompt_share")
MIDDLE = 5 / 8  # of an answer, the mean place of the gaps that `burst_figures` takes
SEEDS = 5


def machine(records: Sequence[Record], config: dict[str, Any], size: int) -> Machine:
    """The constants that fit the bursts of some records of load.py.

    Stock vLLM's bursts give the full steps, those of `now` the LoRA steps, and the first token of
    a lone request the step of a prompt.
    """
    found: list[tuple[Model, Step, float]] = []
    for r in records:
        s = r["settings"]
        models = [Model.of(config, size, d, RANK) for d in (0, len(s["drop_layers"]))]
        bursts = r["metrics"]["bursts"]
        decoded = MIDDLE * s["tokens"]
        short = s["prompt"] + decoded / (s["k"] + 1)
        for name, model, lora in (("stock", models[0], False), ("now", models[1], True)):
            for b in bursts[name]:
                rows, long = b["requests"], s["prompt"] + decoded
                read, few = rows * long, rows * short
                step = Step(rows, rows, read, few, read, few, lora)
                found.append((model, step, b["gap_p50_ms"] / 1000))
        first = next(b for b in bursts["stock"] if b["requests"] == 1)
        found.append((models[0], prompt_step(s["prompt"]), first["ttft_mean_ms"] / 1000))
    return fit(records[0]["machine"]["cpu"], found)


def errors(record: Record, scenario: Scenario) -> dict[str, dict[str, float]]:
    """How far simulated figures lie from a record's, over its rates.

    Returns:
        By figure, the mean and the largest relative error (of shares: the difference) over rates
        and variants; and for `wait/stock` and `wait/now` those of the ratios of `tokens_per_s` and
        `tpot_mean_ms`, on which the simulation's conclusions rest.
    """
    s = record["settings"]
    shape = Shape(s["prompt"], s["tokens"])
    off: dict[str, list[float]] = {}
    for rate in record["metrics"]["rates"]:
        at_once = None if rate["requests_per_s"] else 1
        offers = [
            Offer(rate["requests"], rate["requests_per_s"] or None, at_once, seed)
            for seed in range(SEEDS)
        ]
        simulated = rate_figures(scenario.rounds(shape, offers))
        for name in VARIANTS:
            for figure in FIGURES:
                ratio = _mean(simulated[name][figure]) / _mean(rate[name][figure])
                off.setdefault(figure, []).append(abs(ratio - 1))
            for figure in SHARES if name != "stock" else ():
                difference = _mean(simulated[name][figure]) - _mean(rate[name][figure])
                off.setdefault(figure, []).append(abs(difference))
        for other, ratios in rate["against"].items():
            for figure in ("tokens_per_s", "tpot_mean_ms"):
                ratio = simulated["against"][other][figure][0] / ratios[figure][0]
                off.setdefault(f"{figure}, wait/{other}", []).append(abs(ratio - 1))
    return {
        figure: {"mean": round(statistics.fmean(found), 4), "most": round(max(found), 4)}
        for figure, found in off.items()
    }


def _mean(rounds: list[float]) -> float:
    return statistics.fmean(rounds)

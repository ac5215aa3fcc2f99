"""Rows of the tables about load."""

from __future__ import annotations

import statistics
from typing import Any

from support import record
from support.load.figures import VARIANTS

Record = dict[str, Any]

LOAD = (
    "under load, stock → `now` → `wait` | requests/s (of saturation) | steps of `now` with a "
    "prompt | LoRA steps, `now` → `wait` | tokens/s | mean TPOT ms | p95 TPOT ms | "
    "p50 TTFT ms | p99 TTFT ms | KV held MB | preemptions"
)
AGAINST = (
    "`wait` beside | requests/s (of saturation) | tokens/s | mean TPOT | p50 TTFT | p99 TTFT | "
    "p99 TTFT allowed"
)
SIMULATE = (
    "simulated, stock → `now` → `wait` | requests/s (of saturation) | steps of `now` with a "
    "prompt | LoRA steps, `now` → `wait` | tokens/s | mean TPOT ms | p99 TTFT ms | most KV in use "
    "| preemptions | `wait` beside stock"
)
CALIBRATION = "simulated beside measured | figure | mean error | largest error"
# differences of ratios that count as none: about the mean error of the calibrated simulation
NOISE = {"tokens_per_s": 0.05, "tpot_mean_ms": 0.1}


def newest_rates() -> list[Record]:
    """The newest record of each setting, with the newest run of every rate in it."""
    found = []
    for records in record.by_settings():
        if records[0]["benchmark"] == "load":
            rates = {x["share_of_saturation"]: x for r in records for x in r["metrics"]["rates"]}
            metrics = records[-1]["metrics"] | {"rates": [rates[at] for at in sorted(rates)]}
            found.append(records[-1] | {"metrics": metrics})
    return found


def whole_pool() -> list[Record]:
    """Those of `newest_rates` in which as many requests as may run at once find KV blocks."""
    settings = [(r, r["settings"]) for r in newest_rates()]
    return [r for r, s in settings if s["pool_requests"] >= s["max_requests"]]


def load(r: Record) -> list[list[str]]:
    """One row per rate; figures are means over the rounds."""
    pool = r["metrics"]["pool_mb"]
    return [
        [
            _setting(r["settings"]),
            _offered(rate),
            _percent(rate["now"]["prompt_share"]),
            " → ".join(_percent(rate[name]["lora_share"]) for name in VARIANTS[1:]),
            _chain(rate, "tokens_per_s", 1),
            _chain(rate, "tpot_mean_ms"),
            _chain(rate, "tpot_p95_ms"),
            _chain(rate, "ttft_p50_ms"),
            _chain(rate, "ttft_p99_ms"),
            _chain(rate, "kv_used", 0, pool),
            _chain(rate, "preemptions"),
        ]
        for rate in r["metrics"]["rates"]
    ]


def against(r: Record) -> list[list[str]]:
    """What `wait` differs by from the other two, with intervals."""
    return [
        [
            f"{other}: {_setting(r['settings'])}",
            _offered(rate),
            *(_ratio(found[name]) for name in ("tokens_per_s", "tpot_mean_ms")),
            *(_difference(found[name]) for name in ("ttft_p50_ms", "ttft_p99_ms")),
            f"+{_full_steps(rate, r['settings']['k']):.0f} ms" if other == "now" else "",
        ]
        for other in VARIANTS[:2]
        for rate in r["metrics"]["rates"]
        for found in (rate["against"][other],)
    ]


def simulate(r: Record) -> list[list[str]]:
    """One row per rate of a simulation."""
    s = r["settings"]
    return [
        [
            f"{s['model']}, {s['prompt']} + {s['tokens']}",
            _offered(rate),
            _percent(rate["now"]["prompt_share"]),
            " → ".join(_percent(rate[name]["lora_share"]) for name in VARIANTS[1:]),
            _chain(rate, "tokens_per_s"),
            _chain(rate, "tpot_mean_ms", 1),
            _chain(rate, "ttft_p99_ms"),
            " → ".join(_percent(rate[name]["kv_used_most"]) for name in VARIANTS),
            _chain(rate, "preemptions"),
            verdict(rate, s["k"]),
        ]
        for rate in r["metrics"]["rates"]
    ]


def calibration(r: Record) -> list[list[str]]:
    """One row per figure that was simulated and measured."""
    s = r["settings"]
    setting = f"{s['model']}, {s['prompt']} + {s['tokens']}"
    return [
        [setting, f"`{figure}`", f"{error['mean']:.0%}", f"{error['most']:.0%}"]
        for figure, error in r["metrics"]["errors"].items()
    ]


def verdict(rate: Record, k: int) -> str:
    """`wait` beside stock vLLM: what it gains, and whether first tokens pay for it.

    A first token is late if p99 grows by more than k full steps, which is what a prompt may wait.
    """
    found = rate["against"]["stock"]
    tokens = (found["tokens_per_s"][0] - 1) / NOISE["tokens_per_s"]
    tpot = (found["tpot_mean_ms"][0] - 1) / NOISE["tpot_mean_ms"]
    faster, slower = tokens >= 1 or tpot <= -1, tokens <= -1 or tpot >= 1
    late = found["ttft_p99_ms"][0] > _full_steps(rate, k)
    if slower:
        return "mixed" if faster else "loses"
    if not faster:
        return "first tokens late" if late else "no gain"
    return "wins, first tokens late" if late else "wins"


def _full_steps(rate: Record, k: int) -> float:
    """Milliseconds of k full steps at this rate; stock vLLM's steps are full ones."""
    return k * statistics.fmean(rate["stock"]["tpot_mean_ms"])


def _setting(s: Record) -> str:
    names = [s["model"]] + ([s["adapter"]] if s["adapter"] else [])
    found = f"{', '.join(names)}, {s['prompt']} + {s['tokens']}"
    tight = s["pool_requests"] < s["max_requests"]
    return found + (f", KV pool of {s['pool_requests']} requests" if tight else "")


def _offered(rate: Record) -> str:
    share = rate["share_of_saturation"]
    digits = 0 if rate["requests_per_s"] >= 10 else 1
    return f"{rate['requests_per_s']:.{digits}f} ({share:.0%})" if share else "one at a time"


def _percent(rounds: list[float]) -> str:
    return f"{statistics.fmean(rounds):.0%}"


def _chain(rate: Record, figure: str, digits: int = 0, scale: float = 1.0) -> str:
    means = [scale * statistics.fmean(rate[name][figure]) for name in VARIANTS]
    return " → ".join(f"{mean:.{digits}f}" for mean in means)


def _ratio(found: list[float]) -> str:
    mean, low, high = found
    return f"{mean - 1:+.0%} ({low - 1:+.0%} to {high - 1:+.0%})"


def _difference(found: list[float]) -> str:
    mean, low, high = found
    return f"{mean:+.0f} ms ({low:+.0f} to {high:+.0f})"

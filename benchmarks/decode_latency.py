"""Time per output token with LoRA-Drop, with k = 0 and with stock vLLM, beside the ideal.

One engine per variant, all alive at once in processes of their own, measured in turn: the machine's
drift then hits all of them alike. Ratios are taken round by round, and their median is the result.
On a GPU the engines are compiled and use CUDA graphs; on a CPU they are eager unless told.

    python benchmarks/decode_latency.py
    python benchmarks/decode_latency.py --model 1b --rounds 5 --tokens 33
    python benchmarks/decode_latency.py --model llama-3-8b --rho 0.25 --k 1 3 5 --batch 1 8
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import record
from engines import SHAPES, Engine, make_shape
from tqdm import tqdm

from lora_drop_vllm.method.cost import ideal_speed
from lora_drop_vllm.method.layers import choose_layers, eligible_layers, num_drop_layers

Times = dict[str, list[list[float]]]  # by variant and round, the milliseconds of each step


def engine_arguments(given: argparse.Namespace) -> dict[str, Any]:
    """Arguments of every engine, sized for the largest batch asked for."""
    shape = SHAPES[given.model]
    heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    size = 4 if given.dtype == "float32" else 2  # bytes of a number
    per_token = 2 * size * shape["num_hidden_layers"] * kv_heads * shape["hidden_size"] // heads
    length = given.prompt + given.tokens
    return dict(
        enforce_eager=not given.compile,
        dtype=given.dtype,
        max_model_len=length + 64,
        max_num_seqs=max(given.batch),
        # a block of slack for each request in each of the two groups of layers
        kv_cache_memory_bytes=max((length + 512) * max(given.batch) * per_token, 1 << 28),
        compilation_config={"cudagraph_capture_sizes": sorted(given.batch)},
    )


def start(given: argparse.Namespace, scratch: Path) -> dict[str, Engine]:
    """The engines of all variants, up and warm."""
    layers = SHAPES[given.model]["num_hidden_layers"]
    full = str(make_shape(scratch / "full", given.model))
    half = str(make_shape(scratch / "half", given.model, layers // 2))
    ours = {"untrained": True, "drop_layers": drop_layers(given)}
    variants: dict[str, tuple[str, dict[str, Any] | None]] = {
        "stock": (full, None),
        "fewer_layers": (half, None),
        "lora_drop": (full, ours | {"k": max(given.k)}),
        "k0": (full, ours | {"k": 0}),
    }
    engines = {
        name: Engine(folder, settings, engine_arguments(given))
        for name, (folder, settings) in variants.items()
    }
    for engine in tqdm(engines.values(), desc="Starting engines"):
        engine.wait()
    return engines


def drop_layers(given: argparse.Namespace) -> list[int]:
    """D: the middle run for the share asked for."""
    layers = SHAPES[given.model]["num_hidden_layers"]
    count = num_drop_layers(given.rho, layers)
    return choose_layers("contiguous", count, eligible_layers(layers))


def measure(
    engines: dict[str, Engine], given: argparse.Namespace, batch: int, k: int
) -> tuple[Times, dict[str, int]]:
    """All variants in turn, round by round; the first round warms up.

    Returns the times, and by variant the most GPU memory held.

    Raises:
        RuntimeError: the LoRA steps did not run as scheduled.
    """
    rounds: Times = {name: [] for name in engines}
    held = {}
    for n in tqdm(range(given.rounds + 1), desc=f"batch {batch}, k {k}"):
        names = list(engines)
        for name in names[n % len(names) :] + names[: n % len(names)]:  # no one is always last
            own_k = k if name == "lora_drop" else None
            found = engines[name].decode(batch, given.prompt, given.tokens, own_k)
            # of the tokens behind the prompts', one step in k + 1 is full
            wanted = (given.tokens - 1) - (given.tokens - 1) // (k + 1)
            if name == "lora_drop" and abs(found["lora_steps"] - wanted) > 1:
                raise RuntimeError(f"{found['lora_steps']} LoRA steps instead of {wanted}")
            held[name] = found["gpu_bytes"]
            if n:
                rounds[name].append(found["times"])
    return rounds, held


def metrics_of(rounds: Times, layers: int, drop: list[int], k: int) -> dict[str, Any]:
    """Ratios of a measurement, its ideal, and the milliseconds behind them.

    Without the variant `fewer_layers` nobody knows what a layer costs, and what follows from it is
    left out.
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
    ideal = ideal_speed([layer] * layers, drop, k, rest)
    return found | {
        "ideal_speed_up": round(ideal, 3),
        "share_of_ideal": round(speed / ideal, 3),
        "layer_ms": round(layer, 3),
        "rest_ms": round(rest, 3),
        "lora_step_over_ideal": round(lora / (step - len(drop) * layer), 3),
    }


def split_by_kind(rounds: list[list[float]], k: int) -> dict[str, list[float]]:
    """The steps behind the prompt by kind: k LoRA steps, a full step, and so on."""
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
    """Mean time of a token over all windows of one cycle; every variant's, so that they compare."""
    windows = range(len(times) - period + 1)
    return statistics.fmean(statistics.fmean(times[i : i + period]) for i in windows)


def interval_95(values: list[float]) -> tuple[float, float]:
    """Where the median lies with 95 % confidence: percentiles of the bootstrap's medians."""
    drawn = np.random.default_rng(0).choice(values, (2000, len(values)))
    low, high = np.percentile(np.median(drawn, axis=1), (2.5, 97.5))
    return float(low), float(high)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    import torch

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=SHAPES, default="135m", help="shape, dummy weights")
    parser.add_argument("--rho", type=float, default=0.5)
    parser.add_argument("--k", type=int, nargs="+", default=[3])
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="requests at once")
    parser.add_argument("--prompt", type=int, default=64, help="prompt tokens")
    parser.add_argument("--tokens", type=int, default=49, help="generated tokens per measurement")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="auto", help="as for vLLM; auto is bfloat16 (default)")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=torch.cuda.is_available(),
        help="compiled instead of eager",
    )
    return parser.parse_args(argv)


def main() -> None:
    """Measure every k and batch, print, record."""
    given = parse()
    layers = SHAPES[given.model]["num_hidden_layers"]
    with tempfile.TemporaryDirectory() as scratch:
        engines = start(given, Path(scratch))
        for batch, k in itertools.product(given.batch, given.k):
            rounds, held = measure(engines, given, batch, k)
            metrics = metrics_of(rounds, layers, drop_layers(given), k) | {"gpu_bytes": held}
            settings = {"batch": batch, "k": k}
            print(json.dumps(settings | metrics, indent=2))
            record.write("decode_latency", vars(given) | settings, metrics)
        for engine in engines.values():
            engine.close()


if __name__ == "__main__":
    main()

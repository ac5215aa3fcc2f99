"""Time per output token with LoRA-Drop, with k = 0 and with stock vLLM, beside the ideal.

One engine per variant lives in a process of its own. They take turns, so that the machine's drift
hits all of them alike. Ratios are taken round by round; their median is the result. On a GPU the
engines are compiled and use CUDA graphs, on a CPU they are eager unless `--compile` is given.

    python benchmarks/decode_latency.py
    python benchmarks/decode_latency.py --model 1b --rounds 5 --tokens 33
    python benchmarks/decode_latency.py --model llama-3-8b --rho 0.25 --k 1 3 5 --batch 1 8
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

from support import record
from support.decode_figures import Times, metrics_of
from support.engines import SHAPES, Engine, make_shape
from tqdm import tqdm

from lora_drop_vllm.method.layers import choose_layers, eligible_layers, num_drop_layers


def engine_arguments(given: argparse.Namespace) -> dict[str, Any]:
    """Arguments of every engine, sized for the largest `--batch`."""
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
    """Engines of all variants, running and warm."""
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
    """Drop layers D: the middle run for `--rho`."""
    layers = SHAPES[given.model]["num_hidden_layers"]
    count = num_drop_layers(given.rho, layers)
    return choose_layers("contiguous", count, eligible_layers(layers))


def measure(
    engines: dict[str, Engine], given: argparse.Namespace, batch: int, k: int
) -> tuple[Times, dict[str, int]]:
    """Times of all variants, which take turns in each round; the first round warms up.

    Returns the times, and the most GPU memory held by each variant.

    Raises:
        RuntimeError: the LoRA steps did not run as scheduled.
    """
    rounds: Times = {name: [] for name in engines}
    held = {}
    for n in tqdm(range(given.rounds + 1), desc=f"batch {batch}, k {k}"):
        names = list(engines)
        for name in names[n % len(names) :] + names[: n % len(names)]:  # no variant is always last
            own_k = k if name == "lora_drop" else None
            found = engines[name].decode(batch, given.prompt, given.tokens, own_k)
            # after the prompts' step, one step in k + 1 is full
            wanted = (given.tokens - 1) - (given.tokens - 1) // (k + 1)
            if name == "lora_drop" and abs(found["lora_steps"] - wanted) > 1:
                raise RuntimeError(f"{found['lora_steps']} LoRA steps instead of {wanted}")
            held[name] = found["gpu_bytes"]
            if n:
                rounds[name].append(found["times"])
    return rounds, held


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
    parser.add_argument("--dtype", default="auto", help="as in vLLM; auto (default) is bfloat16")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=torch.cuda.is_available(),
        help="compiled instead of eager",
    )
    return parser.parse_args(argv)


def main() -> None:
    """Measures every k and batch, prints and records."""
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

"""Time per output token with LoRA-Drop, with k = 0 and with stock vLLM, beside the ideal.

One engine per variant, all alive at once in processes of their own, measured in turn: the machine's
drift then hits all of them alike. Ratios are taken round by round, and their median is the result.

    python benchmarks/decode_latency.py
    python benchmarks/decode_latency.py --model 1b --rho 0.5 --k 3 --rounds 9
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import record
from tqdm import tqdm

from lora_drop_vllm.method.cost import ideal_speed
from lora_drop_vllm.method.layers import choose_layers, eligible_layers, num_drop_layers

SHAPES = {
    "1b": dict(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32000,
    ),
    "135m": dict(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    ),
}


def make_shape(folder: Path, name: str, num_layers: int) -> Path:
    """A folder with nothing but a config, for dummy weights."""
    from transformers import LlamaConfig

    shape = SHAPES[name] | {"num_hidden_layers": num_layers}
    LlamaConfig(
        architectures=["LlamaForCausalLM"], max_position_embeddings=2048, dtype="bfloat16", **shape
    ).save_pretrained(folder)
    return folder


def serve(pipe: Any, model: str, settings: dict[str, Any] | None, arguments: Any) -> None:
    """A process with one engine: for each token count asked for, the times of the steps."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        HF_HUB_OFFLINE="1",
        VLLM_NO_USAGE_STATS="1",
        VLLM_LOGGING_LEVEL="ERROR",
    )
    from vllm import LLM, SamplingParams

    extra: dict[str, Any] = {}
    if settings is not None:
        extra = dict(model_impl="lora_drop", additional_config={"lora_drop": settings})
    llm = LLM(
        model,
        load_format="dummy",
        skip_tokenizer_init=True,
        enforce_eager=not arguments.compile,
        max_model_len=1024,
        kv_cache_memory_bytes=1 << 28,
        enable_prefix_caching=False,
        seed=0,
        **extra,
    )
    core = llm.llm_engine
    pipe.send("ready")
    while (count := pipe.recv()) is not None:
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        prompt = [7 + n % 500 for n in range(arguments.prompt)]
        core.add_request("r", {"prompt_token_ids": prompt}, params)
        times = []
        while core.has_unfinished_requests():
            start = time.perf_counter()
            core.step()
            times.append(1000 * (time.perf_counter() - start))
        pipe.send(times[1:])  # without the prompt


class Engine:
    """The other end of `serve`."""

    def __init__(self, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, *arguments), daemon=True)
        self.process.start()
        other.close()
        assert self.pipe.recv() == "ready"

    def decode(self, count: int) -> list[float]:
        """Milliseconds of each decode step of one request."""
        self.pipe.send(count)
        times: list[float] = self.pipe.recv()
        return times

    def close(self) -> None:
        """Stop the process."""
        self.pipe.send(None)
        self.process.join(20)
        self.process.kill()


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run all variants in turn; returns settings and metrics of the record."""
    num_layers = SHAPES[arguments.model]["num_hidden_layers"]
    fewer = num_layers // 2
    drop = choose_layers(
        "contiguous", num_drop_layers(arguments.rho, num_layers), eligible_layers(num_layers)
    )
    given = {"untrained": True, "drop_layers": drop}
    with tempfile.TemporaryDirectory() as scratch:
        model = str(make_shape(Path(scratch) / "full", arguments.model, num_layers))
        half = str(make_shape(Path(scratch) / "half", arguments.model, fewer))
        variants = {
            "stock": (model, None),
            "k0": (model, given | {"k": 0}),
            "lora_drop": (model, given | {"k": arguments.k}),
            "fewer_layers": (half, None),
        }
        engines = {}
        for name, (folder, settings) in tqdm(variants.items(), desc="Starting engines"):
            engines[name] = Engine(folder, settings, arguments)
        rounds: dict[str, list[list[float]]] = {name: [] for name in engines}
        for n in tqdm(range(arguments.rounds + 1), desc="Measuring"):
            for name, engine in engines.items():
                times = engine.decode(arguments.tokens)
                if n:  # the first round warms up
                    rounds[name].append(times)
        for engine in engines.values():
            engine.close()
    return _metrics(rounds, num_layers, fewer, drop, arguments.k)


def _metrics(
    rounds: dict[str, list[list[float]]], num_layers: int, fewer: int, drop: list[int], k: int
) -> dict[str, Any]:
    typical = {
        name: [statistics.median(t) for t in times]
        for name, times in rounds.items()
        if name != "lora_drop"
    }
    typical["lora_drop"] = [_cycle_median(times, k + 1) for times in rounds["lora_drop"]]

    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(typical[a], typical[b], strict=True))

    step = statistics.median(typical["k0"])
    layer = (step - statistics.median(typical["fewer_layers"])) / (num_layers - fewer)
    rest = step - num_layers * layer
    ideal = ideal_speed([layer] * num_layers, drop, k, rest)
    speed = ratio("k0", "lora_drop")
    everything = {name: [t for times in runs for t in times] for name, runs in rounds.items()}
    return {
        "speed_up_over_k0": round(speed, 3),
        "ideal_speed_up": round(ideal, 3),
        "share_of_ideal": round(speed / ideal, 3),
        "k0_over_stock": round(ratio("k0", "stock"), 3),
        "layer_ms": round(layer, 3),
        "rest_ms": round(rest, 3),
        "ms_per_token": {name: round(statistics.median(t), 2) for name, t in typical.items()},
        "p50_ms": {name: round(statistics.median(t), 2) for name, t in everything.items()},
        "p95_ms": {
            name: round(statistics.quantiles(t, n=20)[-1], 2) for name, t in everything.items()
        },
    }


def _cycle_median(times: list[float], period: int) -> float:
    """Median over all windows of one cycle of the mean time of a token."""
    windows = range(len(times) - period + 1)
    return statistics.median(statistics.fmean(times[i : i + period]) for i in windows)


def main() -> None:
    """Parse, measure, print, record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=SHAPES, default="135m", help="shape, dummy weights")
    parser.add_argument("--rho", type=float, default=0.5)
    parser.add_argument("--k", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=64, help="prompt tokens")
    parser.add_argument("--tokens", type=int, default=49, help="generated tokens per measurement")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="compiled instead of eager")
    arguments = parser.parse_args()
    metrics = measure(arguments)
    print(json.dumps(metrics, indent=2))
    record.write("decode_latency", vars(arguments), metrics)


if __name__ == "__main__":
    main()

r"""Time per output token with LoRA-Drop, with k = 0 and with stock vLLM, beside the ideal.

Each engine lives in a process of its own. They take turns, so that the machine's drift hits all of
them alike. The LoRA-Drop engine also runs k = 0, request by request. Ratios are taken round by
round; their median is the result. On a GPU the engines are compiled and use CUDA graphs, and they
run one after the other if they do not fit side by side. On a CPU they are eager unless `--compile`
is given.

    python benchmarks/decode_latency.py
    python benchmarks/decode_latency.py --model 1b --rounds 5 --tokens 33
    python benchmarks/decode_latency.py --model llama-3-8b --rho 0.25 --k 1 3 5 --batch 1 8
    for injection in block attn; do python benchmarks/decode_latency.py --model 1b --batch 1 8 \\
        --prompt 128 1024 4096 8192 --filled --tokens 13 --injection $injection; done
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from support import gpu_memory, record
from support.decode_figures import Times, metrics_of
from support.engines import SHAPES, Engine, check_steps, make_shape
from tqdm import tqdm

from lora_drop_vllm.method.cost import LayerReads
from lora_drop_vllm.method.layers import choose_layers, eligible_layers, num_drop_layers
from lora_drop_vllm.method.reuse import SITES
from lora_drop_vllm.method.sites import AdapterSites

ENGINES = ("stock", "fewer_layers", "lora_drop")
VARIANTS = {name: name for name in ENGINES} | {"k0": "lora_drop"}  # and whose engine runs them


def num_size(given: argparse.Namespace) -> int:
    """Bytes of a number."""
    return 4 if given.dtype == "float32" else 2


def half_of(shape: dict[str, Any]) -> dict[str, Any]:
    """The shape with half of its layers."""
    return shape | {"num_hidden_layers": shape["num_hidden_layers"] // 2}


def kv_pool(given: argparse.Namespace, unit: int) -> int:
    """Bytes of every engine's KV pool, enough for the largest batch asked for."""
    return max(
        gpu_memory.pool_bytes(
            SHAPES[given.model],
            num_size(given),
            max(given.batch),
            max(given.prompt) + given.tokens,
            len(drop_layers(given)),
            unit,
        ),
        1 << 28,
    )


def needs(given: argparse.Namespace) -> dict[str, int]:
    """GPU memory of each engine, in bytes."""
    shape, size, pool = SHAPES[given.model], num_size(given), kv_pool(given, gpu_memory.UNIT)
    whole = gpu_memory.engine_bytes(shape, size, pool)
    half = gpu_memory.engine_bytes(half_of(shape), size, pool)
    return {name: half if name == "fewer_layers" else whole for name in ENGINES}


def engine_arguments(given: argparse.Namespace, name: str) -> dict[str, Any]:
    """Arguments of an engine, sized for the largest batch asked for."""
    card = gpu_memory.card_bytes()
    arguments = dict(
        enforce_eager=not given.compile,
        dtype=given.dtype,
        max_model_len=max(given.prompt) + given.tokens + 64,
        max_num_seqs=max(given.batch),
        kv_cache_memory_bytes=kv_pool(given, gpu_memory.UNIT if card else gpu_memory.CPU_UNIT),
        compilation_config={"cudagraph_capture_sizes": sorted(given.batch)},
    )
    if card:
        arguments["gpu_memory_utilization"] = gpu_memory.utilization(needs(given)[name], card)
    return arguments


def start(given: argparse.Namespace, scratch: Path, names: Sequence[str]) -> dict[str, Engine]:
    """These engines, running and warm.

    On a GPU one starts after the other: while it starts, each measures the memory that is
    free.
    """
    engines = {}
    for name in tqdm(names, desc="Starting engines"):
        layers = SHAPES[given.model]["num_hidden_layers"] // (2 if name == "fewer_layers" else 1)
        folder = make_shape(scratch / str(layers), given.model, layers)
        ours = {"untrained": True, "drop_layers": drop_layers(given), "k": max(given.k)}
        ours |= {"injection": given.injection}
        settings = ours if name == "lora_drop" else None
        engines[name] = Engine(str(folder), settings, engine_arguments(given, name), given.filled)
        if gpu_memory.card_bytes():
            engines[name].wait()
    if not gpu_memory.card_bytes():
        for engine in engines.values():
            engine.wait()
    return engines


def drop_layers(given: argparse.Namespace) -> list[int]:
    """Drop layers D: the middle run for `--rho`."""
    layers = SHAPES[given.model]["num_hidden_layers"]
    count = num_drop_layers(given.rho, layers)
    return choose_layers("contiguous", count, eligible_layers(layers))


def measure(
    engines: Mapping[str, Engine], given: argparse.Namespace, batch: int, k: int, prompt: int
) -> tuple[Times, dict[str, int]]:
    """Times of all variants, which take turns in each round; the first round warms up.

    Returns the times, and the most GPU memory held by each variant.

    Raises:
        RuntimeError: the LoRA steps did not run as scheduled.
    """
    asked = {"lora_drop": k, "k0": 0}  # of stock nothing
    names = [name for name, engine in VARIANTS.items() if engine in engines]
    rounds: Times = {name: [] for name in names}
    held = {}
    for n in tqdm(range(given.rounds + 1), desc=f"batch {batch}, k {k}, prompt {prompt}"):
        turn = n % len(names)
        for name in names[turn:] + names[:turn]:  # no variant is always last
            own_k = asked.get(name)
            found = engines[VARIANTS[name]].decode(batch, prompt, given.tokens, own_k)
            if own_k is not None:
                check_steps(found["lora_steps"], given.tokens, own_k)
            held[name] = found["gpu_bytes"]
            if n:
                rounds[name].append(found["times"])
    return rounds, held


def run(given: argparse.Namespace, scratch: Path) -> None:
    """Measure every k and batch, print, record.

    Raises:
        ValueError: an engine needs more than the card has.
    """
    together = True
    if card := gpu_memory.card_bytes():
        how = gpu_memory.plan(list(needs(given).values()), card, take_turns=True)
        if how.startswith("refused"):
            raise ValueError(
                f"--model {given.model} --batch {max(given.batch)}: {how}; lower --batch, or take "
                "a smaller model"
            )
        together = how == "together"
    rounds: dict[tuple[int, ...], Times] = defaultdict(dict)
    held: dict[tuple[int, ...], dict[str, int]] = defaultdict(dict)
    for names in [ENGINES] if together else [[name] for name in ENGINES]:
        engines = start(given, scratch, names)
        for setting in itertools.product(given.batch, given.k, given.prompt):
            times, used = measure(engines, given, *setting)
            rounds[setting] |= times
            held[setting] |= used
            if rounds[setting].keys() == VARIANTS.keys():
                settings = dict(zip(("batch", "k", "prompt"), setting)) | {"together": together}
                write(given, settings, rounds[setting], held[setting])
        for engine in engines.values():
            engine.close()


def write(
    given: argparse.Namespace, settings: dict[str, Any], rounds: Times, held: dict[str, int]
) -> None:
    """Print and record one measurement."""
    shape, drop = SHAPES[given.model], drop_layers(given)
    sites = AdapterSites.of(drop, given.injection, "update", shape["hidden_size"], 1)
    reads = LayerReads.of(SimpleNamespace(**shape))
    share = reads.share(settings["batch"] * (settings["prompt"] + given.tokens // 2))
    metrics = metrics_of(
        rounds,
        shape["num_hidden_layers"],
        sites.whole,
        settings["k"],
        sites.attention_only,
        share,
    )
    print(json.dumps(settings | metrics, indent=2))
    kept = vars(given) | settings
    for name, plain in (("injection", "block"), ("filled", False)):
        if kept[name] == plain:  # as in the records from before there was a choice
            del kept[name]
    record.write("decode_latency", kept, metrics | {"gpu_bytes": held})


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
    parser.add_argument("--prompt", type=int, nargs="+", default=[64], help="prompt tokens")
    parser.add_argument(
        "--injection", choices=SITES, default="block", help="what drops; attn: only the attention"
    )
    parser.add_argument(
        "--filled",
        action="store_true",
        help="a constant as the prompts' KV instead of computing it, for long contexts",
    )
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
    with tempfile.TemporaryDirectory() as scratch:
        try:
            run(given, Path(scratch))
        except ValueError as error:  # what cannot be run
            raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()

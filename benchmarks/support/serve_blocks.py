"""Bursts of requests at servers, variant after variant, and their counts at `/metrics`."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from support.serve_figures import COUNTERS, Block, check_steps
from support.stream_client import burst, read_metrics, settled_metrics
from support.variants import Variant, awake, standing_still

# of a round, a number of prompts and their length
Prompts = Callable[[int, int, int], list[list[int]]]


def random_prompts(vocab_size: int) -> Prompts:
    """Prompts of random tokens, the same for the same round and sizes."""

    def prompts(n: int, count: int, length: int) -> list[list[int]]:
        rng = random.Random(f"{n} {count} {length}")
        return [[rng.randrange(3, vocab_size) for _ in range(length)] for _ in range(count)]

    return prompts


def run_block(variant: Variant, prompts: list[list[int]], tokens: int, salt: str) -> Block:
    """One burst, and the steps that the server counted for it.

    Raises:
        RunFailedError: the drop path did not run as it should have.
    """
    bodies = variant.bodies(prompts, tokens, salt)
    if variant.k is None:
        return Block(burst(variant.url, bodies), None)
    before = settled_metrics(variant.url)
    full, lora = (before[name] for name in COUNTERS)
    answers = burst(variant.url, bodies)
    after = settled_metrics(variant.url)
    block = Block(answers, (int(after[COUNTERS[0]] - full), int(after[COUNTERS[1]] - lora)))
    check_steps(block, variant.k)
    return block


def measure(
    variants: dict[str, Variant],
    prompts: Prompts,
    *,
    requests: int,
    context: int,
    tokens: int,
    rounds: int,
) -> dict[str, list[Block]]:
    """Blocks of all variants, which take turns in each round; the first round is left out.

    While one variant is measured, the servers of the others stand still.

    Args:
        requests: requests at once
        context: prompt tokens of each
        tokens: generated tokens of each
    """
    blocks: dict[str, list[Block]] = {name: [] for name in variants}
    with standing_still(variants.values()):
        for n in tqdm(range(rounds + 1), desc=f"{requests} at once, context {context}"):
            asked = prompts(n, requests, context)
            # no variant always follows the same one
            for name in random.Random(n).sample(list(variants), len(variants)):
                with awake(variants[name]):
                    block = run_block(variants[name], asked, tokens, f"{name} {n} {context}")
                if n:
                    blocks[name].append(block)
    return blocks


def kv_held(variant: Variant, context: int, tokens: int) -> dict[str, int]:
    """The most KV blocks, and bytes where known, that one request holds while it runs."""
    used = 0.0

    def watch() -> None:
        nonlocal used
        used = max(used, read_metrics(variant.url)["kv_cache_usage_perc"])

    cache = settled_metrics(variant.url).cache
    burst(variant.url, variant.bodies([[7] * context], tokens, "kv"), watch)
    blocks = round(used * (int(cache["num_gpu_blocks"]) - 1))  # vLLM keeps one for itself
    pool = cache["kv_cache_memory_bytes"]  # "None" unless the server was told
    if not pool.isdigit():
        return {"blocks": blocks}
    return {"blocks": blocks, "bytes": blocks * (int(pool) // int(cache["num_gpu_blocks"]))}


def kv_metrics(
    stock: Variant, ours: Variant, context: int, tokens: int, equation_15: float
) -> dict[str, Any]:
    """KV of a lone request with LoRA-Drop and without, beside Eq. 15.

    Eq. 15 counts decoded tokens only; `kv_saved_ideal` also counts the prompt.
    """
    held = {"stock": kv_held(stock, context, tokens), "lora_drop": kv_held(ours, context, tokens)}
    found: dict[str, Any] = {
        "kv_held": held,
        "kv_equation_15": round(equation_15, 4),
        "kv_saved_ideal": round(equation_15 * tokens / (context + tokens), 4),
    }
    if all("bytes" in h for h in held.values()):
        found["kv_saved"] = round(1 - held["lora_drop"]["bytes"] / held["stock"]["bytes"], 4)
    return found

"""`vllm bench serve` against one variant, with the server's own counts beside its figures.

The client runs in this process: one start serves all runs, where each start of the command would
keep the machine busy for ten seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.stream_client import Metrics, RunFailedError, burst, read_metrics, settled_metrics
from support.variants import Variant

POLL_SECONDS = 1.0
COUNTS = {  # at /metrics; the last three are LoRA-Drop's
    "steps": "iteration_tokens_total_count",
    "preemptions": "num_preemptions_total",
    "full": "lora_drop_full_steps_total",
    "lora": "lora_drop_lora_steps_total",
    "prompt": "lora_drop_prompt_steps_total",
}


@dataclass(frozen=True)
class Shape:
    """Tokens of every prompt and of every answer."""

    prompt: int
    tokens: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """The shape that `32+64` names.

        Raises:
            ValueError: it names none.
        """
        prompt, _, tokens = text.partition("+")
        if not (prompt.isdigit() and tokens.isdigit() and int(prompt) and int(tokens) > 1):
            raise ValueError(
                f"{text}: expected PROMPT+TOKENS, such as 32+64, with 2 tokens or more"
            )
        return cls(int(prompt), int(tokens))

    def __str__(self) -> str:
        return f"{self.prompt} + {self.tokens}"


def shape_argument(text: str) -> Shape:
    """`Shape.parse` for argparse, which shows the message of this error only."""
    try:
        return Shape.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


@dataclass(frozen=True)
class Offer:
    """What the client offers.

    Attributes:
        requests: their number
        rate: requests per second, arriving at random (Poisson); None: all at once
        at_once: most requests under way; None: no limit
        seed: of arrivals and prompts
    """

    requests: int
    rate: float | None = None
    at_once: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Run:
    """One run of the client.

    Attributes:
        ttft_ms, tpot_ms: of each request: time to first token, and mean time of the others
        gaps_ms: between the tokens of each request
        seconds: from the first request to the last token
        tokens_per_s: vLLM's `output_throughput`
        counts: by `COUNTS`, what the server counted meanwhile
        kv_used: shares of the KV pool in use, sampled while the run lasted
    """

    ttft_ms: list[float]
    tpot_ms: list[float]
    gaps_ms: list[list[float]]
    seconds: float
    tokens_per_s: float
    counts: dict[str, int]
    kv_used: list[float]


def bench(folder: Path, variant: Variant, shape: Shape, offer: Offer) -> Run:
    """Runs the client; a short request before it wakes the server up.

    Raises:
        RunFailedError: a request failed or ended early.
    """
    burst(variant.url, variant.bodies([[7] * 8], 4, f"wake {offer.seed}"))
    before = settled_metrics(variant.url)
    with _kv_watched(variant) as kv_used:
        raw = _serve(_arguments(folder, variant, shape, offer))
    after = settled_metrics(variant.url)
    if raw["failed"] or any(n != shape.tokens for n in raw["output_lens"]):
        raise RunFailedError(
            f"vllm bench serve: {raw['failed']} of {offer.requests} requests failed, or ended "
            f"before {shape.tokens} tokens: {next(filter(None, raw['errors']), '')[-500:]}"
        )
    return Run(
        [1000 * t for t in raw["ttfts"]],
        [
            1000 * (whole - first) / (shape.tokens - 1)
            for whole, first in zip(raw["latencies"], raw["ttfts"], strict=True)
        ],
        [[1000 * gap for gap in gaps] for gaps in raw["itls"]],
        raw["duration"],
        raw["output_throughput"],
        _counted(before, after),
        kv_used,
    )


def _arguments(folder: Path, variant: Variant, shape: Shape, offer: Offer) -> list[str]:
    """The command line of `vllm bench serve`."""
    given = {
        "backend": "openai",
        "base-url": variant.url,
        "model": folder,
        "served-model-name": variant.name,
        "dataset-name": "random",
        "random-input-len": shape.prompt,
        "random-output-len": shape.tokens,
        "num-prompts": offer.requests,
        "request-rate": offer.rate or "inf",
        "seed": offer.seed,
        "temperature": 0,
    }
    if offer.at_once:
        given["max-concurrency"] = offer.at_once
    flags = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return [*flags, "--ignore-eos", "--disable-tqdm", "--save-detailed"]


def _serve(arguments: list[str]) -> dict[str, Any]:
    from vllm.benchmarks.serve import add_cli_args, main_async
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            return asyncio.run(main_async(parser.parse_args(arguments)))
    except Exception as error:
        raise RunFailedError(f"vllm bench serve: {error}\n{printed.getvalue()[-2000:]}") from error


def _counted(before: Metrics, after: Metrics) -> dict[str, int]:
    """Differences of the counters; a stock server lacks LoRA-Drop's."""
    return {
        name: int(after[metric] - before[metric])
        for name, metric in COUNTS.items()
        if f"vllm:{metric}" in after.values
    }


@contextlib.contextmanager
def _kv_watched(variant: Variant) -> Iterator[list[float]]:
    """Samples of the share of the KV pool in use, while the context lasts."""
    found: list[float] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(POLL_SECONDS):
            found.append(read_metrics(variant.url)["kv_cache_usage_perc"])

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()

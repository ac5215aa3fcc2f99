"""A server under mixed traffic for a while: what grows, leaks, fails or slows down.

python benchmarks/soak.py                  30 minutes on the real 135M model
python benchmarks/soak.py --minutes 2

Clients ask for streams and whole answers to random prompts, some with a shared beginning, of random
length and k, sampled or greedy; some hang up in mid-answer. Prompts are short beside answers, so
that fewer than one gap in twenty holds another request's prompt: p95 is then that of a decoding
step and does not measure how many prompts coincide. After a warm-up of a sixth of the time, and
again at the end, the traffic pauses: every KV block must be back, and the memory of all processes
of the server is read. The exit status is 1 if a bound is broken.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support import record
from tqdm import tqdm

from lora_drop_vllm.cli.demo import BUNDLED_ADAPTER
from lora_drop_vllm.cli.gguf_model import real_model
from lora_drop_vllm.server_process import Server

PARTS = 6  # the first is the warm-up for memory; the first and the last are compared for latency
BOUNDS = {"rss_growth": 0.02, "p95_growth": 0.10, "errors": 0, "blocks_left": 0}
SHARED = [7 + n % 900 for n in range(200)]


@dataclass
class Traffic:
    """Observations of the clients, from all of their threads.

    Attributes:
        gaps: when a streamed token came (s since the start), and ms since the one before it
        errors: what went wrong, as text
    """

    began: float = field(default_factory=time.monotonic)
    gaps: list[tuple[float, float]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    requests: int = 0
    dropped: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.began


def body_of(rng: random.Random, k: int) -> dict[str, Any]:
    """A random request, for the client's `completions.create`."""
    shared = SHARED[: rng.choice((0, 0, 100, 200))]
    prompt = shared + [rng.randrange(3, 40_000) for _ in range(rng.randint(1, 40))]
    extra = {"ignore_eos": True, "vllm_xargs": {"lora_drop_k": rng.randint(0, k)}}
    return {
        "prompt": prompt,
        "max_tokens": rng.randint(4, 400),
        "temperature": rng.choice((0.0, 0.8)),
        "extra_body": extra if rng.random() < 0.3 else {"ignore_eos": True},
    }


def ask(api: Any, name: str, rng: random.Random, k: int, traffic: Traffic) -> None:
    """Sends one request: read whole, as a stream, or as a stream dropped halfway."""
    body = body_of(rng, k)
    how = rng.choice(("whole", "stream", "stream", "stream", "drop"))
    answer = api.completions.create(model=name, stream=how != "whole", **body)
    if how == "whole":
        if (got := answer.usage.completion_tokens) != body["max_tokens"]:
            raise RuntimeError(f"{got} tokens of {body['max_tokens']}")
    else:
        follow(answer, body["max_tokens"] // 2 if how == "drop" else None, traffic)
    with traffic.lock:
        traffic.requests += 1
        traffic.dropped += how == "drop"


def follow(stream: Any, chunks: int | None, traffic: Traffic) -> None:
    """Reads a stream to its end, or hangs up after so many chunks."""
    last, reason = None, None
    for n, chunk in enumerate(stream):
        now = traffic.elapsed()
        if last is not None and chunk.choices:
            traffic.gaps.append((now, 1000 * (now - last)))
        last = now
        reason = chunk.choices[0].finish_reason if chunk.choices else reason
        if n == chunks:
            stream.close()
            return
    if reason != "length":
        raise RuntimeError(f"a stream ended with {reason}")


def client(server: Server, seed: int, k: int, traffic: Traffic, until: float) -> None:
    """Sends one request after the other until that time (s since the start)."""
    rng, api = random.Random(seed), server.client()
    while traffic.elapsed() < until:
        try:
            ask(api, server.name, rng, k, traffic)
        except Exception as error:  # any error is what the soak looks for
            traffic.errors.append(f"{type(error).__name__}: {error}")
            time.sleep(1)


def rss(server: Server) -> int:
    """Resident bytes of all processes of the server, added up."""
    assert server.process is not None
    total = 0
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and _session(entry) == server.process.pid:
                total += int((entry / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            continue  # it has ended meanwhile
    return total


def _session(entry: Path) -> int:
    return int((entry / "stat").read_text().rpartition(")")[2].split()[3])


def blocks_left(server: Server) -> int:
    """KV blocks of the drop layers that are still held after time to return them."""
    for _ in range(100):
        if not (blocks := server.metrics()["kv_blocks"]):
            return 0
        time.sleep(0.1)
    return blocks


def soak(server: Server, given: argparse.Namespace, k: int) -> dict[str, Any]:
    """Runs the traffic and measures."""
    ask(server.client(), server.name, random.Random(0), k, Traffic())  # what happens only once
    traffic, length = Traffic(), 60 * given.minutes
    memory, left = [], 0
    with tqdm(total=round(length), unit="s", desc="Soak") as bar:
        for n, part in enumerate((length / PARTS, length)):
            with ThreadPoolExecutor(given.clients) as threads:
                for c in range(given.clients):
                    threads.submit(client, server, n * given.clients + c, k, traffic, part)
                while traffic.elapsed() < part:
                    time.sleep(1)
                    bar.update(min(round(length), round(traffic.elapsed())) - bar.n)
                    bar.set_postfix(requests=traffic.requests, errors=len(traffic.errors))
            left += blocks_left(server)
            memory.append(rss(server))
    return metrics_of(traffic, length, memory, left, server.metrics())


def metrics_of(
    traffic: Traffic, length: float, memory: list[int], left: int, counted: dict[str, int]
) -> dict[str, Any]:
    """Figures that `BOUNDS` limits, and what they come from.

    Raises:
        RuntimeError: no LoRA step ran, or hardly a token was streamed: nothing was tested.
    """
    if not counted["lora_steps"]:
        raise RuntimeError("not one LoRA step ran: nothing was tested")
    part = length / PARTS
    first = [gap for at, gap in traffic.gaps if at < part]
    last = [gap for at, gap in traffic.gaps if length - part <= at < length]
    if min(len(first), len(last)) < 2:
        raise RuntimeError("hardly a token was streamed in a sixth of the time: use more --minutes")
    p95 = [statistics.quantiles(gaps, n=20)[-1] for gaps in (first, last)]
    return {
        "requests": traffic.requests,
        "dropped": traffic.dropped,
        "errors": len(traffic.errors),
        "first_errors": traffic.errors[:3],
        "rss_mb": [round(m / 2**20) for m in memory],
        "rss_growth": round(memory[-1] / memory[0] - 1, 4),
        "blocks_left": left,
        "p95_ms": [round(p, 2) for p in p95],
        "p95_growth": round(p95[1] / p95[0] - 1, 4),
        "full_steps": counted["full_steps"],
        "lora_steps": counted["lora_steps"],
    }


def broken(metrics: dict[str, Any]) -> list[str]:
    """Names of the bounds that the figures break."""
    return [name for name, most in BOUNDS.items() if metrics[name] > most]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=4, help="requests at a time")
    given = parser.parse_args(argv)
    if given.minutes < 1:
        parser.error(f"--minutes {given.minutes}: expected 1 or more")
    return given


def main() -> None:
    """Serves, soaks, prints and records."""
    given = parse()
    settings = {"lora_drop": {"adapter": str(BUNDLED_ADAPTER)}}
    k = json.loads((BUNDLED_ADAPTER / "adapter_config.json").read_text())["k"]
    arguments = ["--model-impl", "lora_drop", "--additional-config", json.dumps(settings)]
    with Server(real_model(), arguments) as server:
        metrics = soak(server, given, k)
    found = broken(metrics)
    print(json.dumps(metrics, indent=2))
    record.write("soak", vars(given), metrics | {"broken": found})
    if found:
        sys.exit(f"soak: out of bounds: {', '.join(found)} (server's log: {server.log})")


if __name__ == "__main__":
    main()

"""Serving under load: stock vLLM, and LoRA-Drop with `prompts: now` and `prompts: wait`.

vLLM's own client (`vllm bench serve`, Poisson arrivals) offers the same requests to each of the
three, in turns and in a new order each round, while the other servers stand still. A first pass
of bursts finds the rate at which stock vLLM is saturated; --rates are shares of it, and 0 is one
request at a time. Intervals are over rounds. If no LoRA step ran, the run is recorded as failed.

    python benchmarks/load.py
    python benchmarks/load.py --shapes 256+128 --rates 0 1 2 --rounds 5
    python benchmarks/load.py --shapes 256+128 --rates 2 --pool-requests 12       a tight KV pool
    python benchmarks/load.py --model 1b --rho 0.5 --max-requests 16
"""

from __future__ import annotations

import argparse
import contextlib
import math
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from support import record, tables
from support.gpu_memory import CPU_UNIT, UNIT, layer_token_bytes
from support.load.client import Offer, Run, Shape, bench, shape_argument
from support.load.figures import (
    VARIANTS,
    Rounds,
    burst_figures,
    check,
    rate_figures,
    saturation,
)
from support.servers import (
    DEMO,
    Subject,
    lora_drop_flags,
    num_size,
    open_subject,
    server,
)
from support.stream_client import RunFailedError
from support.variants import Variant, awake, standing_still, started
from tqdm import tqdm

ADAPTER = Path(__file__).parents[1] / "adapters" / "smollm2-135m-instruct" / "rho50-skip"
IDLE_REQUESTS = 3  # of a run at rate 0


def pool_bytes(subject: Subject, given: argparse.Namespace) -> int:
    """KV pool that holds `--pool-requests` of the longest requests in stock vLLM."""
    import torch

    unit = UNIT if torch.cuda.is_available() else CPU_UNIT
    longest = max(shape.prompt + shape.tokens for shape in given.shapes)
    blocks = given.pool_requests * math.ceil(longest / unit) + 1  # vLLM keeps one
    layer = layer_token_bytes(subject.config, num_size(given))
    return blocks * unit * subject.num_layers * layer


def start(
    subject: Subject, given: argparse.Namespace, running: contextlib.ExitStack
) -> dict[str, Variant]:
    """The three servers, running."""
    sized = argparse.Namespace(
        context=[max(shape.prompt for shape in given.shapes)],
        tokens=max(shape.tokens for shape in given.shapes),
        kv_tokens=0,
        concurrency=[given.max_requests],
        dtype=given.dtype,
        compile=given.compile,
    )
    pool = ["--kv-cache-memory-bytes", str(pool_bytes(subject, given))]
    served = {"stock": server(subject, sized, *pool)}
    for prompts in VARIANTS[1:]:
        settings = subject.settings(given.rho, given.k) | {"prompts": prompts}
        served[prompts] = server(subject, sized, *pool, *lora_drop_flags(settings))
    return started(served, running)


class Turns:
    """Runs of the client at variants of which one is awake at a time."""

    def __init__(self, subject: Subject, up: dict[str, Variant], shape: Shape) -> None:
        self.subject, self.up, self.shape = subject, up, shape

    def run(self, name: str, offer: Offer) -> Run:
        """One run at one variant."""
        with awake(self.up[name]):
            return bench(self.subject.folder, self.up[name], self.shape, offer)

    def bursts(self, most: int) -> tuple[float, dict[str, list[dict[str, float]]]]:
        """The first pass: stock vLLM's saturation in requests/s, and the figures of all bursts.

        LoRA-Drop answers the same bursts, from which a cost model is fitted. A request to each
        server comes before, to warm up.
        """
        for name in self.up:
            self.run(name, Offer(1))
        found: dict[str, list[dict[str, float]]] = {"stock": [], "now": []}

        def seconds(size: int) -> float:
            for name, bursts in found.items():
                bursts.append(burst_figures(self.run(name, Offer(size, seed=size))))
            print(f"{self.shape}: {size} at once take {found['stock'][-1]['seconds']:.1f} s")
            return found["stock"][-1]["seconds"]

        return saturation(seconds, most), found

    def rates(self, offers: list[Offer], rounds: int) -> list[Rounds]:
        """The runs of all rates, round by round."""
        found: list[Rounds] = [{name: [] for name in VARIANTS} for _ in offers]
        with tqdm(total=rounds * len(offers) * len(VARIANTS), desc=f"{self.shape} tokens") as bar:
            for n in range(rounds):
                for at, offer in enumerate(offers):
                    order = random.Random(f"{n} {at}").sample(VARIANTS, len(VARIANTS))
                    seeded = Offer(offer.requests, offer.rate, offer.at_once, 100 * n + at)
                    for name in order:
                        bar.set_postfix_str(f"{name}, {offer.requests} requests")
                        found[at][name].append(self.run(name, seeded))
                        bar.update()
        return found


def offers_of(given: argparse.Namespace, saturated: float) -> list[Offer]:
    """What each of `--rates` offers."""
    found = []
    for share in given.rates:
        rate = share * saturated
        requests = max(math.ceil(rate * given.seconds), IDLE_REQUESTS)
        found.append(Offer(requests, rate) if share else Offer(requests, at_once=1))
    return found


def measure(subject: Subject, given: argparse.Namespace, turns: Turns, k: int) -> dict[str, Any]:
    """The metrics of one shape.

    Raises:
        RunFailedError: the drop path did not run, or a client failed.
    """
    with standing_still(turns.up.values()):
        saturated, bursts = turns.bursts(given.max_requests)
        print(f"{turns.shape}: stock vLLM is saturated at {saturated:.2f} requests/s", flush=True)
        offers = offers_of(given, saturated)
        found = turns.rates(offers, given.rounds)
    for rounds in found:
        check(rounds, k)
    rates = [
        {
            "share_of_saturation": share,
            "requests_per_s": round(offer.rate or 0.0, 4),
            "requests": offer.requests,
        }
        | rate_figures(rounds)
        for share, offer, rounds in zip(given.rates, offers, found, strict=True)
    ]
    return {
        "saturation": round(saturated, 4),
        "pool_mb": round(pool_bytes(subject, given) / 2**20, 1),
        "bursts": bursts,
        "rates": rates,
    }


def run(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Starts the servers and measures every shape; returns the records."""
    records = []
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as running:
        subject = open_subject(given.model, given.adapter, Path(scratch))
        config = subject.resolved(subject.settings(given.rho, given.k))
        up = start(subject, given, running)
        for shape in given.shapes:
            names = ("compile", "dtype", "max_requests", "pool_requests", "seconds", "rounds")
            settings = {
                "model": subject.name,
                "adapter": Path(subject.adapter).name if subject.adapter else None,
                "rho": round(config.rho, 4),
                "drop_layers": list(config.drop_layers),
                "reuse": config.reuse,
                "kv": config.kv,
                "k": config.k,
                "prompt": shape.prompt,
                "tokens": shape.tokens,
            } | {name: getattr(given, name) for name in names}
            if config.drop_attention:
                settings["drop_attention"] = list(config.drop_attention)
            try:
                metrics = measure(subject, given, Turns(subject, up, shape), config.k)
                records.append(record.write("load", settings, metrics))
            except RunFailedError as error:
                print(f"FAILED: {error}", file=sys.stderr)
                records.append(record.write("load", settings, {}, str(error)))
    return records


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    import torch

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=DEMO, help="folder, shape with dummy weights, or demo (default)")
    add("--adapter", help=f"adapter folder; of demo: {ADAPTER.name} by default; else untrained")
    add("--rho", type=float, help="drop ratio; the adapter's or 0.5 by default")
    add("--k", type=int, help="the adapter's or 3 by default")
    shapes = [Shape(32, 64), Shape(256, 128)]
    add(
        "--shapes", type=shape_argument, nargs="+", default=shapes, help="PROMPT+TOKENS of requests"
    )
    add("--rates", type=float, nargs="+", default=[0, 0.5, 1, 2], help="shares of saturation")
    add("--seconds", type=float, default=20, help="time over which a run's requests arrive")
    add("--rounds", type=int, default=3, help="runs of each variant at each rate")
    add("--max-requests", type=int, default=64, help="most requests that run at once")
    add("--pool-requests", type=int, help="requests that fill stock vLLM's KV pool (default: all)")
    compiled = torch.cuda.is_available()
    add("--dtype", default="float32", help="as in vLLM")
    add("--compile", action=argparse.BooleanOptionalAction, default=compiled, help="compile")
    given = parser.parse_args(argv)
    if min(given.rates) < 0:
        parser.error(f"--rates {given.rates}: expected shares of the saturation rate, 0 or more")
    if given.rounds < 1:
        parser.error(f"--rounds {given.rounds}: expected 1 or more; 3 or more for intervals")
    if given.model == DEMO and not given.adapter:
        given.adapter = str(ADAPTER)
    given.pool_requests = given.pool_requests or given.max_requests
    return given


def main(argv: list[str] | None = None) -> int:
    """Measures, records and prints tables; returns 1 if a run failed."""
    try:
        records = run(parse(argv))
    except ValueError as error:  # settings that cannot be served
        raise SystemExit(str(error)) from error
    good = [r for r in records if "failed" not in r]
    print(tables.of(good))
    return int(len(good) < len(records))


if __name__ == "__main__":
    sys.exit(main())

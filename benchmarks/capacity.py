"""Long generations that a fixed KV pool holds before the first preemption, and tokens/s beyond.

Stock vLLM and LoRA-Drop get pools of the same bytes. `fit` is the largest number of requests that
run at once and to their end without a preemption, found by trying. Then both are offered the same
number, more than either holds; tokens per second include waiting, preemption and recomputation.

    python benchmarks/capacity.py
    python benchmarks/capacity.py --model 1b --pool-mb 256 --prompt 64 --tokens 1024
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support import record, tables
from support.engines import SHAPES, Engine, make_shape

from lora_drop_vllm.method.reuse import SITES

OFFERED = 2  # times as many as the larger of the two pools holds


def most_that_fit(fits: Callable[[int], bool], guess: int) -> int:
    """The largest number for which `fits` holds, tried upwards or downwards from a guess.

    More requests never need less room, so a number that does not fit bounds the search.
    """
    found = max(guess, 1)
    if fits(found):
        while fits(found + 1):
            found += 1
        return found
    while found > 1 and not fits(found - 1):
        found -= 1
    return found - 1


def start(model: Path, settings: dict[str, Any] | None, given: argparse.Namespace) -> Engine:
    """An engine with a pool of `--pool-mb`."""
    engine = Engine(
        str(model),
        settings,
        dict(
            enforce_eager=not given.compile,
            max_model_len=given.prompt + given.tokens,
            max_num_seqs=given.max_requests,
            kv_cache_memory_bytes=given.pool_mb << 20,
        ),
    )
    engine.wait()
    return engine


def fit(engine: Engine, given: argparse.Namespace) -> int:
    """Number of requests that run at once and to their end without a preemption."""

    def fits(count: int) -> bool:
        if count > given.max_requests:
            raise SystemExit(
                f"--max-requests {given.max_requests}: so many fit without a preemption; lower "
                "--pool-mb or raise it"
            )
        found = engine.fill(count, given.prompt, given.tokens, stop_at_preemption=True)
        print(
            f"  {count} requests: {found['most_running']} at once, "
            f"{found['preemptions']} preemptions",
            flush=True,
        )
        return not found["preemptions"] and found["most_running"] == count

    alone = engine.fill(1, given.prompt, given.tokens, stop_at_preemption=True)
    return most_that_fit(fits, alone["blocks"] // alone["most_blocks"])


def run(given: argparse.Namespace) -> dict[str, Any]:
    """The metrics of the record."""
    ours = {"untrained": True, "rho": given.rho, "k": given.k, "injection": given.injection}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        model = make_shape(Path(scratch) / "model", given.model)
        engines = {}
        for name, settings in (("stock", None), ("lora_drop", ours)):
            engines[name] = start(model, settings, given)
            print(f"{name}: long generations in {given.pool_mb} MB", flush=True)
            found[name] = {"fit": fit(engines[name], given)}
        offered = min(OFFERED * max(f["fit"] for f in found.values()), given.max_requests)
        for name, engine in engines.items():
            full = engine.fill(offered, given.prompt, given.tokens)
            found[name]["tokens_per_s"] = round(offered * given.tokens / full["seconds"], 2)
            found[name]["preemptions"] = full["preemptions"]
            found[name]["lora_steps"] = full["lora_steps"]
            engine.close()
    if not found["lora_drop"]["lora_steps"]:
        raise RuntimeError("no LoRA step ran: the drop path was not executed")
    return found | {"offered": offered}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    import torch

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", choices=SHAPES, default="135m", help="shape, dummy weights")
    add("--rho", type=float, default=0.5)
    add("--k", type=int, default=3)
    add("--injection", choices=SITES, default="block", help="what drops; attn: only the attention")
    add("--prompt", type=int, default=32, help="prompt tokens of each request")
    add("--tokens", type=int, default=512, help="generated tokens of each request")
    add("--pool-mb", type=int, default=64, help="MiB of KV cache")
    add("--max-requests", type=int, default=64, help="most requests that may run at once")
    compiled = torch.cuda.is_available()
    add("--compile", action=argparse.BooleanOptionalAction, default=compiled, help="compile")
    return parser.parse_args(argv)


def main() -> int:
    """Searches, offers more, prints and records."""
    given = parse()
    settings = vars(given)
    if given.injection == "block":  # as in the records from before there was a choice
        settings = {name: value for name, value in settings.items() if name != "injection"}
    try:
        written = record.write("capacity", settings, run(given))
    except RuntimeError as error:
        record.write("capacity", settings, {}, str(error))
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    print(json.dumps(written["metrics"], indent=2))
    print(tables.of([written]))
    return 0


if __name__ == "__main__":
    sys.exit(main())

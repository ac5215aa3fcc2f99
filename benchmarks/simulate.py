"""Serving under load at a larger scale, simulated: vLLM's real scheduler, and no model.

Stock vLLM, `prompts: now` and `prompts: wait` answer the same requests. A cost model gives the time
of each step: weights and KV read over the bandwidth, plus operations over the flops, both from the
datasheet of an H100; prompts count by their operations. Nothing else takes time, so absolute
figures are better than a real GPU's; the comparison is what counts. Lengths are drawn evenly from
half to one and a half times the shape's. --calibrate fits the constants to the newest CPU records
of load.py instead, simulates the same runs, and records how far off that is.

    python benchmarks/simulate.py
    python benchmarks/simulate.py --models llama-3-8b --shapes 128+512 --requests 100000 --rates 0.9
    python benchmarks/simulate.py --calibrate
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from support import record, tables
from support.engines import SHAPES, make_shape
from support.gpu_memory import CPU_UNIT, weight_bytes
from support.load.client import Offer, Shape, shape_argument
from support.load.cost_model import H100
from support.load.figures import rate_figures
from tqdm import tqdm

from lora_drop_vllm.method.layers import num_drop_layers

CARD_BYTES, USED = 80e9, 0.9  # an H100's memory, and vLLM's default share of it
BATCHED_TOKENS = 8192  # vLLM's default for a server on an H100
CPU_OUR_UNIT = 32  # tokens; what our KV blocks on a CPU are multiples of
BFLOAT16, FLOAT32 = 2, 4  # bytes


def scenario(prepared: Any, model: str, given: argparse.Namespace) -> Any:
    """A model on an H100."""
    from support.load.scenario import Scenario

    config = SHAPES[model]
    return Scenario(
        prepared=prepared,
        machine=H100,
        config=config,
        size=BFLOAT16,
        num_drop=num_drop_layers(given.rho, config["num_hidden_layers"]),
        k=given.k,
        pool=int(USED * CARD_BYTES) - weight_bytes(config, BFLOAT16),
        max_requests=given.max_requests,
        max_batched_tokens=BATCHED_TOKENS,
        async_scheduling=True,
        spread=0.5,
    )


def simulate(prepared: Any, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Simulates all models, shapes and rates; returns the records."""
    records = []
    cells = [(model, shape) for model in given.models for shape in given.shapes]
    with tqdm(total=len(cells) * (1 + len(given.rates)), desc="Simulations") as bar:
        for model, shape in cells:
            bar.set_postfix_str(f"{model}, {shape}")
            simulated = scenario(prepared, model, given)
            saturated = simulated.saturation(shape)
            bar.update()
            rates = []
            for share in given.rates:
                offer = Offer(given.requests, share * saturated)
                figures = rate_figures(simulated.rounds(shape, [offer]))
                rates.append(
                    {
                        "share_of_saturation": share,
                        "requests_per_s": round(share * saturated, 3),
                        "requests": given.requests,
                    }
                    | figures
                )
                bar.update()
            names = ("rho", "k", "max_requests", "requests")
            settings = {"model": model, "machine": H100.name}
            settings |= {"prompt": shape.prompt, "tokens": shape.tokens}
            settings |= {name: getattr(given, name) for name in names}
            metrics = {"saturation": round(saturated, 3)}
            metrics |= {"pool_mb": round(simulated.pool / 2**20), "rates": rates}
            records.append(record.write("simulate", settings, metrics))
    return records


def calibrate(prepared: Any) -> list[dict[str, Any]]:
    """Fits the constants of the CPU and records the simulation's error.

    Raises:
        ValueError: there is no record of load.py to compare with.
    """
    from support.load import calibration
    from support.load.scenario import Scenario

    measured = [r for r in record.newest("load") if r["settings"]["model"].startswith("SmolLM2")]
    if not measured:
        raise ValueError("--calibrate: no record of load.py; run python benchmarks/load.py first")
    config = SHAPES["135m"]
    fitted = calibration.machine(measured, config, FLOAT32)
    constants = {
        "bandwidth_gb_s": round(fitted.bandwidth / 1e9, 2),
        "gflops": round(fitted.flops / 1e9, 2),
        "step_ms": round(1000 * fitted.step_s, 3),
        "row_ms": round(1000 * fitted.row_s, 3),
    }
    records = []
    for r in measured:
        s = r["settings"]
        simulated = Scenario(
            prepared=prepared,
            machine=fitted,
            config=config,
            size=FLOAT32,
            num_drop=len(s["drop_layers"]),
            k=s["k"],
            pool=math.floor(r["metrics"]["pool_mb"] * 2**20),
            max_requests=s["max_requests"],
            max_batched_tokens=prepared.scheduler_config.max_num_batched_tokens,
            async_scheduling=bool(prepared.scheduler_config.async_scheduling),
            units=(CPU_UNIT, CPU_OUR_UNIT),
        )
        metrics = {"constants": constants, "errors": calibration.errors(r, simulated)}
        settings = {name: s[name] for name in ("model", "prompt", "tokens", "pool_requests")}
        records.append(record.write("calibration", settings, metrics))
    return records


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    models = ["llama-3-8b", "qwen2.5-14b"]
    shapes = [Shape(128, 256), Shape(512, 128), Shape(2048, 128), Shape(4096, 64)]
    add("--models", choices=SHAPES, nargs="+", default=models)
    add("--shapes", type=shape_argument, nargs="+", default=shapes, help="PROMPT+TOKENS, in means")
    add("--rates", type=float, nargs="+", default=[0.25, 0.5, 0.8, 1.2], help="of saturation")
    add("--requests", type=int, default=700, help="requests of each run")
    add("--max-requests", type=int, default=512, help="most requests that run at once")
    add("--rho", type=float, default=0.5)
    add("--k", type=int, default=3)
    add("--calibrate", action="store_true", help="compare with load.py's CPU records instead")
    given = parser.parse_args(argv)
    if min(given.rates) <= 0:
        parser.error(f"--rates {given.rates}: expected shares of the saturation rate above 0")
    return given


def main(argv: list[str] | None = None) -> None:
    """Simulates or calibrates, records, and prints tables."""
    given = parse(argv)
    os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR")
    from support.load.dry_core import prepare

    with tempfile.TemporaryDirectory() as scratch:
        prepared = prepare(make_shape(Path(scratch) / "model", "135m"))
        try:
            records = calibrate(prepared) if given.calibrate else simulate(prepared, given)
        except ValueError as error:
            raise SystemExit(str(error)) from error
    print(tables.of(records))


if __name__ == "__main__":
    sys.exit(main())

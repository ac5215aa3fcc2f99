"""Token latency, throughput and KV of a served model: stock vLLM, k = 0 and LoRA-Drop in turn.

Starts `vllm serve` for each variant, all alive at once, and streams from one after the other in
short blocks while the others stand still, so that the machine's drift hits all alike. Each token is
stamped on arrival. A further server with half of the layers tells what a LoRA step costs at best
(the ideal). Counts at /metrics must show the expected LoRA steps; otherwise the run is recorded as
failed.

    python benchmarks/serve_latency.py
    python benchmarks/serve_latency.py --model 1b --concurrency 1 4 16 --context 128 1024
    python benchmarks/serve_latency.py --model DIR --adapter DIR --compile --plots DIR
    python benchmarks/serve_latency.py --grid --model qwen2.5-7b --compile --plots DIR
    python benchmarks/serve_latency.py --peers --vllm-bench
    python benchmarks/serve_latency.py --model DIR --adapter DIR --url URL --stock-url URL
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from support import peers, plots, record, tables, vllm_bench
from support.engines import SHAPES
from support.serve_blocks import kv_metrics, measure, random_prompts
from support.serve_figures import figures
from support.servers import (
    DEMO,
    Subject,
    check_memory,
    fewer_layers_flags,
    lora_drop_flags,
    open_subject,
    server,
)
from support.stream_client import RunFailedError
from support.variants import Variant, started

from lora_drop_vllm.config import LoRADropConfig
from lora_drop_vllm.method.cost import LayerReads, kv_saving

GRID_RHO, GRID_K = [0.25, 0.5, 0.75], [1, 2, 3, 5]  # the paper's Tables III and IV


def at_urls(given: argparse.Namespace) -> dict[str, Variant]:
    """Servers that somebody else started."""
    urls = {
        "stock": given.stock_url,
        "fewer_layers": given.fewer_layers_url,
        "lora_drop": given.url,
    }
    return {name: Variant.at(url) for name, url in urls.items() if url}


def settings_of(
    subject: Subject, given: argparse.Namespace, config: LoRADropConfig, k: int
) -> dict[str, Any]:
    """Settings of a record."""
    names = ("tokens", "rounds", "kv_tokens", "compile", "dtype")
    attention = config.sites.attention_only
    return {
        "model": subject.name,
        "adapter": Path(subject.adapter).name if subject.adapter else None,
        "rho": round(config.rho, 4),
        "drop_layers": config.sites.whole,
        **({"attention_only": attention} if attention else {}),
        "reuse": config.reuse,
        "kv": config.kv,
        "k": k,
    } | {name: getattr(given, name) for name in names}


def run_rho(
    subject: Subject, given: argparse.Namespace, served: dict[str, Any], up: dict[str, Variant]
) -> list[dict[str, Any]]:
    """Measures every context, concurrency and k of one drop ratio; returns the records.

    Args:
        served: settings of LoRA-Drop
        up: servers: `stock`, `lora_drop` and, for the ideal, `fewer_layers`
    """
    config = subject.resolved(served)
    records = []
    sizes = itertools.product(given.context, given.concurrency, given.k or [config.k])
    for context, requests, k in sizes:
        ours = {
            name: replace(up["lora_drop"], k=own) for name, own in (("k0", 0), ("lora_drop", k))
        }
        variants = up | ours
        settings = settings_of(subject, given, config, k)
        settings |= {"context": context, "concurrency": requests}
        try:
            metrics = run_setting(subject, given, variants, settings)
            if given.vllm_bench:
                metrics["vllm_bench"] = vllm_bench.compare(
                    subject, given, variants, served | {"k": k}, settings
                )
            records.append(record.write("serve_latency", settings, metrics))
        except RunFailedError as error:
            print(f"FAILED: {error}", file=sys.stderr)
            records.append(record.write("serve_latency", settings, {}, str(error)))
    return records


def run_setting(
    subject: Subject,
    given: argparse.Namespace,
    variants: dict[str, Variant],
    settings: dict[str, Any],
) -> dict[str, Any]:
    """The metrics of one record.

    Raises:
        RunFailedError: the drop path did not run as it should have.
    """
    context, requests, k = (settings[name] for name in ("context", "concurrency", "k"))
    drop, layers = settings["drop_layers"], subject.num_layers
    attention = settings.get("attention_only", [])
    share = LayerReads.of(SimpleNamespace(**subject.config)).share(context * requests)
    blocks = measure(
        variants,
        random_prompts(subject.config["vocab_size"]),
        requests=requests,
        context=context,
        tokens=given.tokens,
        rounds=given.rounds,
    )
    metrics = figures(blocks, layers, drop, k, attention_only=attention, share=share)
    if requests == 1 and given.kv_tokens and settings["kv"] == "skip":
        pair = variants["stock"], variants["lora_drop"]
        formula = kv_saving(layers, len(drop) + len(attention), k)
        metrics |= kv_metrics(*pair, context, given.kv_tokens, formula)
    return metrics


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    import torch

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=DEMO, help="folder, shape with dummy weights, or demo (default)")
    add("--adapter", help="adapter folder; without one B = 0 and g = 1 (demo has its own)")
    add("--rho", type=float, nargs="+", help="drop ratios; the adapter's or 0.5 by default")
    add("--k", type=int, nargs="+", help="the adapter's or 3 by default")
    add("--grid", action="store_true", help=f"rho {GRID_RHO} by k {GRID_K}")
    add("--concurrency", type=int, nargs="+", default=[1, 4], help="requests at once")
    add("--context", type=int, nargs="+", default=[128], help="prompt tokens")
    add("--tokens", type=int, default=33, help="generated tokens of each request")
    add("--kv-tokens", type=int, default=512, help="length of the answer whose KV is read; 0: none")
    add("--rounds", type=int, default=15, help="blocks of each variant, after one to warm up")
    add("--url", help="a running LoRA-Drop server, instead of starting any")
    add("--stock-url", help="with --url: stock vLLM with the same model and flags")
    add("--fewer-layers-url", help="with --url: stock vLLM with half of the layers, for the ideal")
    add("--peers", action="store_true", help="Unified Layer Skipping and n-gram speculation too")
    add("--text", type=Path, help="text of the peers (default: Python's manual)")
    add("--vllm-bench", action="store_true", help="vllm bench serve and latency beside ours")
    add("--plots", type=Path, help="folder for figures (needs matplotlib)")
    compiled = torch.cuda.is_available()
    add("--dtype", default="auto", help="as in vLLM; auto (default) is the model's")
    add("--compile", action=argparse.BooleanOptionalAction, default=compiled, help="compile")
    given = parser.parse_args(argv)
    if bool(given.url) != bool(given.stock_url):
        parser.error("--url and --stock-url: give both, the baseline is part of every figure")
    if given.url and (given.peers or len(given.rho or []) > 1 or given.grid):
        parser.error("--url: a running server has one rho; leave out --grid, --peers, more --rho")
    if given.grid:
        given.rho, given.k = given.rho or GRID_RHO, given.k or GRID_K
    if given.peers and given.model in SHAPES:
        parser.error(
            "--peers: needs real weights, because quality is measured beside speed and n-gram "
            "speculation needs real text; give --model demo or a folder"
        )
    if given.plots:
        plots.require_matplotlib()
        given.plots.mkdir(parents=True, exist_ok=True)
    return given


def main(argv: list[str] | None = None) -> int:
    """Measures, records, prints tables, draws; returns 1 if a run failed."""
    given = parse(argv)
    try:
        records = run(given)
    except ValueError as error:  # settings that cannot be served
        raise SystemExit(str(error)) from error
    good = [r for r in records if "failed" not in r]
    print(tables.of(good))
    if given.plots:
        for path in plots.draw(good, given.plots):
            print(path)
    return int(len(good) < len(records))


def run(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Starts the servers and measures them; returns the records."""
    records = []
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as running:
        subject = open_subject(given.model, given.adapter, Path(scratch))
        k = max(given.k) if given.k else None
        settings = [subject.settings(rho, k) for rho in given.rho or [None]]
        for served in settings:
            subject.resolved(served)  # what cannot be served is refused before anything starts
        if given.url:
            return run_rho(subject, given, settings[0], at_urls(given))
        check_memory(subject, given)
        base = {
            "stock": server(subject, given),
            "fewer_layers": server(subject, given, *fewer_layers_flags(subject)),
        }
        for served in settings:
            ours = server(subject, given, *lora_drop_flags(served))
            up = started(base | {"lora_drop": ours}, running)
            records += run_rho(subject, given, served, up)
            ours.stop()
        if given.peers:
            records += peers.run(subject, given, up["stock"])
    return records


if __name__ == "__main__":
    sys.exit(main())

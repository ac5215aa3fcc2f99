"""`lora-drop demo`: a real model, a real server, one streamed answer, one table."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lora_drop_vllm.cli.check import BLOCK_UNITS
from lora_drop_vllm.cli.gguf_model import real_model
from lora_drop_vllm.config import LoRADropConfig, resolve
from lora_drop_vllm.method.adapter import BaseModel
from lora_drop_vllm.method.cost import LayerReads, ideal_speed, packed_block_sizes
from lora_drop_vllm.server_process import Server

PROMPT = "Explain what a computer program is."
ROUNDS = 3
BUNDLED_ADAPTER = (
    Path(str(files("lora_drop_vllm.adapters"))) / "smollm2-135m-instruct" / "rho25-skip"
)


@dataclass
class Report:
    """What the demo measured; printed as JSON in its last line."""

    text: str
    tokens: int
    full_steps: int
    lora_steps: int
    kv_slots_written: int
    kv_slots_stock: int
    kv_blocks_held: int
    kv_blocks_stock: int
    p50_ms: float
    p95_ms: float
    p50_ms_k0: float
    p95_ms_k0: float
    speedup: float
    ideal_speedup: float


def settings(
    adapter: Path | None = None, untrained: bool = False, rho: float | None = None, k: int = 3
) -> dict[str, Any]:
    """Value of `lora_drop` for the demo's flags."""
    given: dict[str, Any] = {"k": k}
    if rho is not None:
        given["rho"] = rho
    if untrained or not (adapter or BUNDLED_ADAPTER.is_dir()):
        return {"untrained": True, **given}
    return {"adapter": str(adapter or BUNDLED_ADAPTER), **given}


def run(settings: dict[str, Any], tokens: int = 64, port: int | None = None) -> Report:
    """Serves the real model under `settings`, streams one answer, measures, prints a table.

    Args:
        settings: value of `lora_drop` in `--additional-config`
        tokens: length of the answer and of each measured request
        port: port of the server; a free one by default

    Raises:
        ValueError: settings that cannot be served.
        RuntimeError: the model could not be fetched, or the server did not start.
    """
    model = real_model()
    model_config = json.loads((model / "config.json").read_text())
    config = resolve(settings, BaseModel.of(model_config))
    print(f"Model:    {model}\nSettings: {json.dumps(settings)}", flush=True)
    arguments = ["--model-impl", "lora_drop"]
    arguments += ["--additional-config", json.dumps({"lora_drop": settings})]
    with Server(model, arguments, port) as server:
        print(f"Server:   {server.url} (log: {server.log})\n\n> {PROMPT}\n", flush=True)
        before = server.metrics()
        text, blocks = _stream_aloud(server, tokens)
        used = {name: value - before[name] for name, value in server.metrics().items()}
        times = _alternate(server, tokens, config)
    layers, rest = _step_costs(model, config, statistics.median(times[0]), port)
    share = LayerReads.of(SimpleNamespace(**model_config)).share()
    sites, k = config.sites, config.k
    ideal = ideal_speed(layers, sites.whole, k, rest, sites.attention_only, share)
    report = _report(text, used, blocks, times, config, ideal)
    _print_table(report, config)
    print(json.dumps(asdict(report)), flush=True)
    return report


def _stream_aloud(server: Server, tokens: int) -> tuple[str, int]:
    """Prints the answer as it comes; returns it, and the most KV blocks that drop layers held."""
    pieces, blocks = [], 0
    for n, piece in enumerate(_stream(server, tokens, None, ignore_eos=False)):
        print(piece, end="", flush=True)
        pieces.append(piece)
        if n % 8 == 0:
            blocks = max(blocks, server.metrics()["kv_blocks"])
    print("\n", flush=True)
    return "".join(pieces), blocks


def _stream(server: Server, tokens: int, k: int | None, ignore_eos: bool) -> Iterator[str]:
    body: dict[str, Any] = {"ignore_eos": ignore_eos}
    if k is not None:
        body["vllm_xargs"] = {"lora_drop_k": k}
    answer = server.client().chat.completions.create(
        model=server.name,
        messages=[{"role": "user", "content": PROMPT}],
        max_tokens=tokens,
        temperature=0,
        stream=True,
        extra_body=body,
    )
    for chunk in answer:
        if chunk.choices and (piece := chunk.choices[0].delta.content) is not None:
            yield piece


def _latencies(server: Server, tokens: int, k: int) -> list[float]:
    """Milliseconds between the streamed tokens of one answer of exactly `tokens` tokens."""
    stamps = [time.perf_counter() for _ in _stream(server, tokens, k, ignore_eos=True)]
    gaps = [1000 * (b - a) for a, b in zip(stamps, stamps[1:])]
    return gaps[4:]  # the first chunk and the cold start of a request do not count as decoding


def _alternate(server: Server, tokens: int, config: LoRADropConfig) -> dict[int, list[float]]:
    times: dict[int, list[float]] = {0: [], config.k: []}
    for n in range(ROUNDS):
        for k in times:
            print(f"\rMeasuring: round {n + 1} of {ROUNDS}, k={k} ", end="", flush=True)
            times[k] += _latencies(server, tokens, k)
    print("\r" + " " * 40 + "\r", end="")
    return times


def _step_costs(
    model: Path, config: LoRADropConfig, full_step: float, port: int | None
) -> tuple[list[float], float]:
    """Cost c_i of each layer and c_h of the rest, from the same server with half the layers."""
    half = config.num_layers // 2
    overrides = json.dumps({"num_hidden_layers": half})
    print(f"Measuring the cost outside the layers, on a server with {half} of them", flush=True)
    arguments = ["--load-format", "dummy", "--hf-overrides", overrides]
    with Server(model, arguments, port) as server:
        half_step = statistics.median(_latencies(server, 64, 0))
    layer = max(full_step - half_step, 0.0) / (config.num_layers - half)
    return [layer] * config.num_layers, max(full_step - layer * config.num_layers, 0.0)


def _report(
    text: str,
    used: dict[str, int],
    blocks: int,
    times: dict[int, list[float]],
    config: LoRADropConfig,
    ideal: float,
) -> Report:
    slots_stock = used["kv_slots_written"] + used["kv_slots_skipped"]
    num_drop = len(config.sites.layers)
    _, block = packed_block_sizes(config.num_layers - num_drop, num_drop, BLOCK_UNITS["cpu"])
    ours, stock = times[config.k], times[0]
    period = config.k + 1
    return Report(
        text=text,
        tokens=used["full_steps"] + used["lora_steps"],
        full_steps=used["full_steps"],
        lora_steps=used["lora_steps"],
        kv_slots_written=used["kv_slots_written"],
        kv_slots_stock=slots_stock,
        kv_blocks_held=blocks,
        kv_blocks_stock=-(-slots_stock // block),
        p50_ms=_percentile(ours, 50),
        p95_ms=_percentile(ours, 95),
        p50_ms_k0=_percentile(stock, 50),
        p95_ms_k0=_percentile(stock, 95),
        speedup=round(
            statistics.median(_per_cycle(stock, period))
            / statistics.median(_per_cycle(ours, period)),
            3,
        ),
        ideal_speedup=round(ideal, 3),
    )


def _per_cycle(gaps: list[float], period: int) -> list[float]:
    """Mean time per token in each window of one cycle."""
    return [statistics.fmean(gaps[i : i + period]) for i in range(0, len(gaps) - period + 1)]


def _percentile(values: list[float], percent: int) -> float:
    return round(statistics.quantiles(values, n=100, method="inclusive")[percent - 1], 2)


def _print_table(r: Report, config: LoRADropConfig) -> None:
    rows = [
        ("", f"LoRA-Drop k={config.k}", "all layers k=0"),
        ("tokens", r.tokens, r.tokens),
        ("full / LoRA steps", f"{r.full_steps} / {r.lora_steps}", f"{r.tokens} / 0"),
        ("KV slots, each drop layer", r.kv_slots_written, r.kv_slots_stock),
        ("KV blocks, drop layers", r.kv_blocks_held, r.kv_blocks_stock),
        ("inter-token p50, ms", r.p50_ms, r.p50_ms_k0),
        ("inter-token p95, ms", r.p95_ms, r.p95_ms_k0),
        ("speed-up over a cycle", f"{r.speedup:.2f}x", "1.00x"),
        ("ideal (what drops is free)", f"{r.ideal_speedup:.2f}x", ""),
    ]
    for name, ours, stock in rows:
        print(f"{name:<30}{ours!s:>18}{stock!s:>18}")
    print(flush=True)

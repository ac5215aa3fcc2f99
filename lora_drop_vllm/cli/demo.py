"""`lora-drop demo`: a real model, a real server, one streamed answer, one table."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lora_drop_vllm.cli.check import BLOCK_UNITS
from lora_drop_vllm.cli.gguf_model import real_model
from lora_drop_vllm.config import LoRADropConfig, resolve
from lora_drop_vllm.method.adapter import BaseModel
from lora_drop_vllm.method.cost import LayerReads, ideal_speed, packed_block_sizes
from lora_drop_vllm.opinions import Scores, score
from lora_drop_vllm.server_process import Endpoint, Server

PROMPT = "Explain what a computer program is."
ROUNDS = 3
BUNDLED_ADAPTER = (
    Path(str(files("lora_drop_vllm.adapters"))) / "smollm2-135m-instruct" / "rho25-skip"
)


@dataclass
class Told:
    """The answer that the demo prints.

    Attributes:
        pieces: its text
        prompt_ids, ids: tokens of the prompt and of the answer
        blocks: most KV blocks that the drop layers held meanwhile
    """

    pieces: list[str] = field(default_factory=list)
    prompt_ids: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    blocks: int = 0


@dataclass
class Report:
    """What the demo measured; printed as JSON in its last line.

    `agreement` is the share of the answer's tokens that the base model would have chosen too.
    """

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
    agreement: float


def settings(
    adapter: Path | None = None, untrained: bool = False, rho: float | None = None, k: int = 3
) -> dict[str, Any]:
    """Value of `lora_drop` for the demo's flags."""
    given: dict[str, Any] = {"k": k}
    if rho is not None:
        given["rho"] = rho
    if untrained and adapter:
        raise ValueError(f"--untrained: --adapter {adapter} would not be used; leave one out")
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
        told = tell(server, tokens)
        used = {name: value - before[name] for name, value in server.metrics().items()}
        scores = judge(server, told)
        times = _alternate(server, tokens, config)
    layers, rest = _step_costs(model, config, statistics.median(times[0]), port)
    share = LayerReads.of(SimpleNamespace(**model_config)).share()
    sites, k = config.sites, config.k
    ideal = ideal_speed(layers, sites.whole, k, rest, sites.attention_only, share)
    report = _report(told, scores, used, times, config, ideal)
    _print_table(report, config)
    print(f"{in_words(scores)}\n")
    print(json.dumps(asdict(report)), flush=True)
    return report


def tell(server: Endpoint, tokens: int) -> Told:
    """Prints the answer as it comes, and returns it."""
    told = Told()
    for n, chunk in enumerate(_chunks(server, tokens, {"return_token_ids": True})):
        choice = chunk.choices[0]
        told.prompt_ids += chunk.model_extra.get("prompt_token_ids") or ()
        told.ids += choice.model_extra.get("token_ids") or ()
        if piece := choice.delta.content:
            print(piece, end="", flush=True)
            told.pieces.append(piece)
        if n % 8 == 0:
            told.blocks = max(told.blocks, server.metrics()["kv_blocks"])
    print("\n", flush=True)
    return told


def judge(server: Endpoint, told: Told) -> Scores:
    """The base model's opinion of the answer, from one full step."""

    async def ask() -> Scores:
        async with server.async_client() as client:
            return await score(client, server.name, told.prompt_ids, told.ids, server.max_len())

    return asyncio.run(ask())


def in_words(scores: Scores) -> str:
    """One line that says how far the base model agrees with an answer."""
    number = len(scores.opinions)
    same = round(scores.agreement * number)
    return (
        f"Agreement: {same} of the {number} tokens of this answer ({scores.agreement:.0%}) are "
        "what the base model would have chosen at that place."
    )


def _chunks(server: Endpoint, tokens: int, extra: dict[str, Any]) -> Iterator[Any]:
    """Chunks of the streamed answer that bring text."""
    answer = server.client().chat.completions.create(
        model=server.name,
        messages=[{"role": "user", "content": PROMPT}],
        max_tokens=tokens,
        temperature=0,
        stream=True,
        extra_body=extra,
    )
    for chunk in answer:
        if chunk.choices and chunk.choices[0].delta.content is not None:
            yield chunk


def _latencies(server: Server, tokens: int, k: int) -> list[float]:
    """Milliseconds between the streamed tokens of one answer of exactly `tokens` tokens."""
    extra = {"ignore_eos": True, "vllm_xargs": {"lora_drop_k": k}}
    stamps = [time.perf_counter() for _ in _chunks(server, tokens, extra)]
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
    told: Told,
    scores: Scores,
    used: dict[str, int],
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
        text="".join(told.pieces),
        tokens=used["full_steps"] + used["lora_steps"],
        full_steps=used["full_steps"],
        lora_steps=used["lora_steps"],
        kv_slots_written=used["kv_slots_written"],
        kv_slots_stock=slots_stock,
        kv_blocks_held=told.blocks,
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
        agreement=round(scores.agreement, 4),
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

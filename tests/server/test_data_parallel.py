"""Two engines behind one server, each with its own batch and its own phases."""

from __future__ import annotations

import json
import re
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from environment import V2
from oracle import Oracle
from serving import PROMPT, settings_of
from tiny import load_model, make_adapter

from lora_drop_vllm.engine import metrics
from lora_drop_vllm.method.schedule import StepTotals
from lora_drop_vllm.server_process import Server

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(V2, reason="the interpreter needs a stand-in backend in every process"),
]

TOKENS = 24


def test_the_reports_of_an_engine_add_up_whoever_gets_them() -> None:
    """Each goes to one of the API servers, and Prometheus adds up what those counted."""
    from vllm.v1.metrics.stats import SchedulerStats

    reported, servers = StepTotals(), (Counter[str](), Counter[str]())
    for n in range(1, 6):
        totals, stats = StepTotals(n, 2 * n, 3 * n, 4 * n, 5 * n), SchedulerStats()
        metrics.attach(stats, totals, reported, num_blocks=n)
        servers[n % 2].update(metrics.read(stats))
        reported = totals
    added = servers[0] + servers[1]
    assert {name: added[name] for name in metrics.COUNTERS} == asdict(totals)


@pytest.mark.matrix
def test_two_engines_give_the_oracles_tokens(
    smooth_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config, tensors = make_adapter(tmp_path, smooth_model, drop_layers=[3, 4, 6])
    settings = json.dumps({"lora_drop": {"adapter": str(tmp_path)}})
    arguments = ["--model-impl", "lora_drop", "--additional-config", settings]
    arguments += ["--data-parallel-size", "2", "--dtype", "float32"]
    with Server(smooth_model, arguments) as server, ThreadPoolExecutor() as threads:
        prompts = [PROMPT, PROMPT[::-1]]
        answers = list(threads.map(lambda rank: _tokens(server, prompts[rank], rank), (0, 1)))
        with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        sums = server.metrics()
    model = load_model(smooth_model)
    for prompt, got in zip(prompts, answers):
        assert got == Oracle(model, settings_of(config, tensors)).decode(prompt, TOKENS)
    for kind, count in (("full", TOKENS // 4), ("lora", TOKENS - TOKENS // 4)):
        found = re.findall(rf'lora_drop_{kind}_steps_total{{engine="(\d)".*}} (\S+)', text)
        assert {engine: float(steps) for engine, steps in found} == {"0": count, "1": count}
        assert sums[f"{kind}_steps"] == 2 * count
    assert sums["kv_blocks"] == 0


def _tokens(server: Server, prompt: list[int], rank: int) -> list[int]:
    body: dict[str, Any] = {"model": server.name, "prompt": prompt, "max_tokens": TOKENS}
    body |= {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
    request = urllib.request.Request(
        f"{server.url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "X-data-parallel-rank": str(rank)},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        tokens: list[int] = json.load(answer)["choices"][0]["token_ids"]
    return tokens

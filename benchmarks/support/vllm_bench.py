"""vLLM's own benchmark clients on the same model, to check our figures by theirs."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from support.serve_figures import COUNTERS
from support.servers import Subject, engine_flags, lora_drop_flags
from support.stream_client import RunFailedError, settled_metrics
from support.variants import Variant

SERVE_FIGURES = (
    *(f"{of}_{what}_ms" for what in ("itl", "tpot", "ttft") for of in ("mean", "median", "p95")),
    "output_throughput",
    "completed",
)
WARM_UPS = 2
LORA_STEPS = COUNTERS[1]


def compare(
    subject: Subject,
    given: argparse.Namespace,
    variants: dict[str, Variant],
    served: dict[str, Any],
    sizes: dict[str, Any],
) -> dict[str, Any]:
    """Figures of `vllm bench serve` on each running server, and of `vllm bench latency`.

    `vllm bench latency` starts engines of its own and is left out with `--url`.

    Args:
        served: settings of LoRA-Drop
        sizes: `concurrency`, `context` and `tokens`, as in our own blocks

    Raises:
        RunFailedError: one of the clients failed.
    """
    requests, context, tokens = (sizes[name] for name in ("concurrency", "context", "tokens"))
    flags = ["--random-input-len", str(context), "--random-output-len", str(tokens)]
    flags += ["--num-prompts", str(requests * given.rounds), "--max-concurrency", str(requests)]
    found: dict[str, Any] = {"serve": {}, "latency": {}}
    for name in ("stock", "k0", "lora_drop"):
        found["serve"][name] = _serve(subject, variants[name], flags)
    if given.url:
        return found
    flags = ["--input-len", str(context), "--output-len", str(tokens)]
    flags += ["--batch-size", str(requests), "--num-iters", str(given.rounds)]
    for name, own in (("stock", []), ("lora_drop", lora_drop_flags(served))):
        found["latency"][name] = _latency(subject, given, [*flags, *own])
    return found


def _serve(subject: Subject, variant: Variant, sizes: list[str]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        command = ["serve", "--backend", "openai", "--base-url", variant.url]
        command += ["--model", str(subject.folder), "--served-model-name", variant.name]
        command += ["--dataset-name", "random", *sizes, "--num-warmups", str(WARM_UPS)]
        command += ["--percentile-metrics", "ttft,tpot,itl", "--metric-percentiles", "95"]
        command += ["--ignore-eos", "--temperature", "0", "--disable-tqdm"]
        command += ["--save-result", "--result-dir", folder, "--result-filename", "found.json"]
        if variant.k is None:
            _run(command)
        else:
            extra = {"vllm_xargs": {"lora_drop_k": variant.k}}
            before = settled_metrics(variant.url)[LORA_STEPS]
            _run([*command, "--extra-body", json.dumps(extra)])
            lora = settled_metrics(variant.url)[LORA_STEPS] - before
            if bool(lora) != bool(variant.k):
                raise RunFailedError(f"vllm bench serve: {lora:.0f} LoRA steps at k = {variant.k}")
        raw = json.loads((Path(folder) / "found.json").read_text())
    return {name: round(raw[name], 3) for name in SERVE_FIGURES}


def _latency(subject: Subject, given: argparse.Namespace, flags: list[str]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "found.json"
        command = ["latency", "--model", str(subject.folder), *engine_flags(subject, given)]
        command += [] if given.compile else ["--enforce-eager"]
        command += ["--num-iters-warmup", "1", "--output-json", str(result), *flags]
        _run(command)
        raw = json.loads(result.read_text())
    return {
        "mean_s": round(raw["avg_latency"], 3),
        "median_s": round(raw["percentiles"]["50"], 3),
    }


def _run(command: list[str]) -> None:
    vllm = str(Path(sys.executable).with_name("vllm"))
    print(f"vllm bench {command[0]}", flush=True)
    done = subprocess.run(
        [vllm, "bench", *command],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise RunFailedError(f"vllm bench {command[0]} failed:\n{done.stdout[-2000:]}")

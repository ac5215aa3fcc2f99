"""Other ways to serve the same model: speed and quality in one session, on one text.

Unified Layer Skipping is `reuse: none` on evenly spaced layers with a k beyond the output; n-gram
speculation is vLLM's own. Quality is measured offline, teacher-forced on the same text under the
served schedule.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lora_drop_vllm.config import LoRADropConfig
from lora_drop_vllm.decode.decoder import ForcedDecoder
from lora_drop_vllm.decode.pretrained import open_model
from lora_drop_vllm.decode.trainable import Adapter
from lora_drop_vllm.evaluation.divergence import perplexity
from lora_drop_vllm.evaluation.evaluate import PROMPT, WINDOW
from lora_drop_vllm.method.adapter import AdapterConfig, load_tensors, read_config
from support import record, texts
from support.quality_records import WINDOWS
from support.serve_blocks import Prompts, measure
from support.serve_figures import Block
from support.servers import Subject, lora_drop_flags, server
from support.stream_client import Answer, RunFailedError, read_metrics
from support.variants import Variant, started

NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4}
DRAFTS = "spec_decode_num_drafts_total"
FLEXIDEPTH = {
    "what": "FlexiDepth",
    "why_not": "needs a trained router, whose weights are not available for this model",
}
Blocks = dict[str, list[Block]]


def run(subject: Subject, given: argparse.Namespace, stock: Variant) -> list[dict[str, Any]]:
    """Measures all peers for every context and concurrency; returns the records.

    Raises:
        ValueError: the text is too short.
    """
    never = max(given.context) + given.tokens
    own = subject.settings(given.rho and given.rho[0], given.k and given.k[0])
    config = subject.resolved(own)
    skipping = {"untrained": True, "reuse": "none", "layers": "uniform"}
    skipping |= {"rho": config.rho, "k": never}
    ids, quality = _text_and_quality(subject, given, [config, subject.resolved(skipping)])
    settings = {
        "model": subject.name,
        "adapter": Path(subject.adapter).name if subject.adapter else None,
        "rho": round(config.rho, 4),
        "k": config.k,
        "text": texts.read(given.text)[0],
    } | {name: getattr(given, name) for name in ("tokens", "rounds", "compile", "dtype")}
    records = []
    flags = {
        "lora_drop": lora_drop_flags(own),
        "skipping": lora_drop_flags(skipping),
        "ngram": ["--speculative-config", json.dumps(NGRAM)],
    }
    with ExitStack() as running:
        up = started({name: server(subject, given, *of) for name, of in flags.items()}, running)
        variants = {"stock": stock} | up
        for name, k in (("lora_drop", config.k), ("skipping", never)):
            variants[name] = replace(up[name], k=k)
        ngram = up["ngram"]
        for context, requests in itertools.product(given.context, given.concurrency):
            sizes = dict(requests=requests, context=context, tokens=given.tokens)
            at = settings | {"context": context, "concurrency": requests}
            try:
                before = read_metrics(ngram.url)[DRAFTS]
                blocks = measure(variants, text_prompts(ids), rounds=given.rounds, **sizes)
                if read_metrics(ngram.url)[DRAFTS] == before:
                    raise RunFailedError("n-gram speculation drafted nothing; try another --text")
                metrics = {"peers": rows(blocks, quality, config)}
                records.append(record.write("peers", at, metrics))
            except RunFailedError as error:
                records.append(record.write("peers", at, {}, str(error)))
    return records


def rows(
    blocks: Blocks, quality: dict[str, dict[str, float]], config: LoRADropConfig
) -> list[dict[str, Any]]:
    """One entry per peer: time per token, speed-up over stock, quality."""
    count = len(config.sites.layers)
    names = {
        "stock": "stock vLLM",
        "lora_drop": f"LoRA-Drop, {count} layers, k = {config.k}",
        "skipping": f"Unified Layer Skipping, {count} layers, never refreshed",
        "ngram": "n-gram speculation of stock vLLM (lossless by construction)",
    }
    times = {name: [_ms_per_token(b.answers) for b in found] for name, found in blocks.items()}
    lossless = {"kl": 0.0, "agreement": 1.0}
    found: list[dict[str, Any]] = []
    for name, what in names.items():
        ratios = [a / b for a, b in zip(times["stock"], times[name], strict=True)]
        entry = {
            "what": what,
            "ms_per_token": round(statistics.median(times[name]), 3),
            "speed_up": round(statistics.median(ratios), 3),
            "tokens_as_stock": round(_same(blocks["stock"], blocks[name]), 4),
        }
        found.append(entry | quality.get(name, lossless))
    return [*found, FLEXIDEPTH]


def text_prompts(ids: Sequence[int]) -> Prompts:
    """Prompts cut out of a text, the same for the same round and sizes."""

    def prompts(n: int, count: int, length: int) -> list[list[int]]:
        rng = random.Random(f"{n} {count} {length}")
        starts = [rng.randrange(len(ids) - length) for _ in range(count)]
        return [list(ids[start : start + length]) for start in starts]

    return prompts


def _ms_per_token(answers: list[Answer]) -> float:
    """Mean time of a token after the first; speculation brings several at once."""
    return statistics.fmean(
        1000 * (a.stamps[-1] - a.stamps[0]) / (len(a.stamps) - 1) for a in answers
    )


def _same(stock: list[Block], other: list[Block]) -> float:
    """Share of generated tokens that stock vLLM has in the same place."""
    pairs = [
        x == y
        for mine, theirs in zip(stock, other, strict=True)
        for a, b in zip(mine.answers, theirs.answers, strict=True)
        for x, y in zip(a.tokens, b.tokens, strict=True)
    ]
    return statistics.fmean(pairs)


def _text_and_quality(
    subject: Subject, given: argparse.Namespace, configs: list[LoRADropConfig]
) -> tuple[list[int], dict[str, dict[str, float]]]:
    """Token ids of the text, and the quality of LoRA-Drop and layer skipping on it."""
    base, tokenizer = open_model(str(subject.folder))
    ids = tokenizer(texts.read(given.text)[1]).input_ids
    if len(ids) <= max(max(given.context), WINDOW * WINDOWS):
        raise ValueError(f"--text {given.text}: {len(ids)} tokens are too few; give a longer one")
    windows = torch.tensor(ids[: WINDOW * WINDOWS]).view(WINDOWS, WINDOW).to(base.device)
    quality = {}
    for name, config in zip(("lora_drop", "skipping"), configs, strict=True):
        decoder = ForcedDecoder(base, offline_adapter(subject, config).to(base.device))
        found = perplexity(decoder, windows, PROMPT, config.k)["all"]
        quality[name] = {"kl": round(found.kl, 4), "agreement": round(found.agreement, 4)}
        quality[name]["perplexity"] = round(found.perplexity, 3)
        quality[name]["base_perplexity"] = round(found.base_perplexity, 3)
    return ids, quality


def offline_adapter(subject: Subject, config: LoRADropConfig) -> Adapter:
    """Adapter of a served config, for the decode of all positions."""
    described = AdapterConfig(
        base_model_name_or_path=subject.name,
        base_model=subject.shape,
        r=config.rank,
        lora_alpha=config.scale * config.rank,
        rho=config.rho,
        k=config.k,
        drop_layers=list(config.drop_layers),
        reuse=config.reuse,
        kv=config.kv,
        injection=config.injection,
        drop_attention=list(config.drop_attention),
    )
    tensors = described.sites.start()
    if config.adapter:
        trained = load_tensors(Path(config.adapter), read_config(Path(config.adapter)))
        tensors = {name: trained[name] for name in tensors}
    return Adapter(described, tensors)

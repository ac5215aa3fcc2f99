r"""A model and its quantized copies under one adapter: quality and decode speed, beside each other.

Speed is that of the engine alone. Every model runs stock, with k = 0 and with LoRA-Drop; all of
them take turns. Quality is that of the offline decode on the rounded weights, which also rounds
what W8A8 layers read. Of some served answers, it must give the log-probabilities twice as well as
the decode on the weights as they were, or as well as it gives its own after a change by a
millionth; else there is no record. With `--corpus` two further adapters, in closed form, say what
fitting on the rounded weights themselves would change.

    python benchmarks/quantized.py MODEL --quantized DIR DIR --adapter DIR --text test.txt
    python benchmarks/quantized.py MODEL --quantized DIR --adapter DIR --text test.txt \
        --corpus web.jsonl.gz
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from support import record, tables
from support.decode_figures import Times, cycle_mean, interval_95, metrics_of
from support.engines import Engine, check_steps
from support.quality_records import adapter_name
from support.quantized_models import kind_of, open_offline
from tqdm import tqdm
from transformers import AutoTokenizer

from lora_drop_vllm.decode.decoder import ForcedDecoder
from lora_drop_vllm.decode.positions import Schedule, rows
from lora_drop_vllm.decode.pretrained import model_name
from lora_drop_vllm.decode.trainable import Adapter
from lora_drop_vllm.evaluation.divergence import perplexity
from lora_drop_vllm.evaluation.evaluate import PROMPT, WINDOW, text_windows
from lora_drop_vllm.evaluation.tasks import read_text
from lora_drop_vllm.method.adapter import AdapterConfig, load_tensors, read_config
from lora_drop_vllm.training.corpus import read_corpus
from lora_drop_vllm.training.fit import new_config
from lora_drop_vllm.training.layerwise import fit_tensors
from lora_drop_vllm.training.samples import sample
from lora_drop_vllm.training.settings import Settings

VARIANTS = {"stock": "stock", "k0": "lora_drop", "lora_drop": "lora_drop"}  # whose engine runs them
MORE = 1.25  # a served distance over the decode's own noise, at most, where that noise decides
ANSWERS, ANSWER = 4, 64  # served answers whose log-probabilities are compared, and their tokens
Served = list[dict[str, Any]]


def main() -> None:
    """Measures, prints and records."""
    given = parse()
    config = read_config(given.adapter)
    folders = {kind_of(folder): folder for folder in (given.model, *given.quantized)}
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    windows = text_windows(tokenizer, read_text(given.text), given.limit)
    rounds, served = run_engines(given, folders, config.k, windows[:ANSWERS, :PROMPT].tolist())
    quality = measure_quality(given, folders, config, windows, served)
    layers, drop = config.base_model.num_hidden_layers, config.sites.whole
    speed = speeds(rounds, layers, drop, config.k)
    models = [
        {"model": kind, "folder": folder.name} | quality[kind] | speed[kind]
        for kind, folder in folders.items()
    ]
    settings = {"model": model_name(str(given.model)), "adapter": adapter_name(given.adapter)}
    settings |= {"k": config.k, "rho": config.rho, "text": given.text.name, "windows": len(windows)}
    settings |= {"window": WINDOW, "corpus": given.corpus and given.corpus.name}
    settings |= {name: getattr(given, name) for name in ("prompt", "tokens", "rounds")}
    print(tables.of([record.write("quantized", settings, {"models": models})]))


def run_engines(
    given: argparse.Namespace, folders: Mapping[str, Path], k: int, prompts: list[list[int]]
) -> tuple[dict[str, Times], dict[str, Served]]:
    """Times of all models and variants, and each model's served answers to the prompts."""
    arguments = dict(
        load_format="auto",
        enforce_eager=True,
        dtype="bfloat16",  # the INT4 kernels take nothing else
        max_model_len=max(given.prompt + given.tokens, PROMPT + ANSWER) + 64,
        max_num_seqs=1,
        kv_cache_memory_bytes=1 << 28,
    )
    settings = {"stock": None, "lora_drop": {"adapter": str(given.adapter)}}
    engines = {
        (kind, name): Engine(str(folder), settings[name], arguments)
        for kind, folder in folders.items()
        for name in settings
    }
    for engine in tqdm(engines.values(), desc="Starting engines"):
        engine.wait()
    served = {
        kind: [engines[kind, "lora_drop"].answer(ids, ANSWER, k) for ids in prompts]
        for kind in folders
    }
    rounds: dict[str, Times] = {kind: {name: [] for name in VARIANTS} for kind in folders}
    turns = [(kind, name) for kind in folders for name in VARIANTS]
    asked = {"k0": 0, "lora_drop": k}
    for n in tqdm(range(given.rounds + 1), desc="Rounds"):
        for kind, name in random.Random(n).sample(turns, len(turns)):
            engine = engines[kind, VARIANTS[name]]
            found = engine.decode(1, given.prompt, given.tokens, asked.get(name))
            if name in asked:
                check_steps(found["lora_steps"], given.tokens, asked[name])
            if n:  # the first round warms up
                rounds[kind][name].append(found["times"])
    for engine in engines.values():
        engine.close()
    return rounds, served


def speeds(
    rounds: Mapping[str, Times], layers: int, drop: Sequence[int], k: int
) -> dict[str, dict[str, Any]]:
    """Figures of every model's times: over its own stock engine, and over that of the first."""
    plain = [cycle_mean(times, k + 1) for times in next(iter(rounds.values()))["stock"]]
    found = {}
    for kind, own in rounds.items():
        over: dict[str, Any] = {}
        for name in ("stock", "lora_drop"):
            ratios = [a / cycle_mean(b, k + 1) for a, b in zip(plain, own[name], strict=True)]
            interval = [round(end, 3) for end in interval_95(ratios)]
            over[name] = {"speed_up": round(statistics.median(ratios), 3), "speed_up_95": interval}
        found[kind] = metrics_of(own, layers, drop, k) | {"over_plain": over}
    return found


def measure_quality(
    given: argparse.Namespace,
    folders: Mapping[str, Path],
    config: AdapterConfig,
    windows: torch.Tensor,
    served: Mapping[str, Served],
) -> dict[str, dict[str, Any]]:
    """Quality of every model, the first of which is the one that the adapter was made for.

    Raises:
        RuntimeError: an engine serves another model than the one that is measured.
    """
    adapter = Adapter(config, load_tensors(given.adapter, config))
    corpus = read_corpus([given.corpus]) if given.corpus else None
    found: dict[str, dict[str, Any]] = {}
    plain = fitted = None
    for kind, folder in folders.items():
        model = open_offline(folder)
        decoder = ForcedDecoder(model, adapter)
        plain = plain or decoder
        found[kind] = {"quality": divergences(decoder, windows)}
        near, far = (distance(one, served[kind], config.k) for one in (decoder, plain))
        found[kind] |= {"served_distance": near, "served_distance_plain": far}
        if decoder is not plain:
            found[kind] |= {"noise": noise(decoder, served[kind], config.k)}
            check_served(folder, near, far, found[kind]["noise"])
        if corpus:
            settings = Settings(rho=config.rho, k=config.k, rank=config.r, tokens=8192)
            samples = sample(model, AutoTokenizer.from_pretrained(folder), corpus, settings)
            new = new_config(str(given.model), model, settings, samples, None)
            own = Adapter(new, fit_tensors(model, samples, new))
            fitted = fitted or own
            for name, one in (("fitted_plain", fitted), ("fitted_own", own)):
                found[kind][name] = divergences(ForcedDecoder(model, one), windows)
    return found


def check_served(folder: Path, near: float, far: float, noise: float) -> None:
    """Raises RuntimeError unless an engine served the model in a folder.

    Args:
        near, far: distances of its answers from the decodes on that model and on the plain one
        noise: distance that the decode on that model has from itself
    """
    if near > max(far / 2, MORE * noise) or far < near / 2:
        raise RuntimeError(
            f"{folder}: served log-probabilities are {near:.4f} nats from those of the decode on "
            f"its weights, {far:.4f} from those of the plain model, and that decode moves by "
            f"{noise:.4f} by itself: the engine serves another model"
        )


def divergences(decoder: ForcedDecoder, windows: torch.Tensor) -> dict[str, Any]:
    """Divergence from the same model without LoRA-Drop, by kind of step."""
    steps = perplexity(decoder, windows, PROMPT, decoder.adapter.config.k)
    return {kind: asdict(one) for kind, one in steps.items()}


def distance(decoder: ForcedDecoder, served: Served, k: int) -> float:
    """Mean absolute difference of served log-probabilities from the offline decode's, in nats."""
    differences = [
        (log_probabilities(decoder, answer, k) - torch.tensor(answer["logprobs"])).abs()
        for answer in served
    ]
    return round(float(torch.cat(differences).mean()), 5)


@torch.no_grad()
def noise(decoder: ForcedDecoder, served: Served, k: int) -> float:
    """Distance of the decode from itself after a change of its embeddings by a millionth, in nats.

    W8A8 rounds inputs: some cross the edge of a step, which moves more of them in the next layer.
    """
    found = [log_probabilities(decoder, answer, k) for answer in served]
    weight = decoder.model.get_input_embeddings().weight
    before = weight.clone()
    generator = torch.Generator().manual_seed(0)
    weight.mul_(1 + 1e-6 * torch.randn(weight.shape, generator=generator))
    pairs = zip(found, served, strict=True)
    moved = [(a - log_probabilities(decoder, answer, k)).abs() for a, answer in pairs]
    weight.copy_(before)
    return round(float(torch.cat(moved).mean()), 5)


@torch.no_grad()
def log_probabilities(decoder: ForcedDecoder, answer: dict[str, Any], k: int) -> torch.Tensor:
    """Log-probabilities of an answer's tokens under the served schedule, one per token."""
    tokens = torch.tensor([answer["prompt"] + answer["tokens"]])
    start, length = len(answer["prompt"]), tokens.shape[1]
    hidden = decoder.hidden(tokens, Schedule.of(rows([length]), torch.tensor([start]), k))
    log_p = decoder.logits(hidden[0, start - 1 : -1]).log_softmax(-1)
    return log_p.gather(1, tokens[0, start:, None])[:, 0]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", type=Path, help="folder of the model that the adapter was made for")
    add("--quantized", nargs="+", required=True, type=Path, help="folders of quantized copies")
    add("--adapter", required=True, type=Path, help="adapter folder")
    add("--text", required=True, type=Path, help="plain text to measure on")
    add("--limit", type=int, default=16, help="windows of the text (default: 16)")
    add("--corpus", type=Path, help="text to fit two further adapters on")
    add("--prompt", type=int, default=64, help="prompt tokens of a measured decode")
    add("--tokens", type=int, default=33, help="generated tokens of a measured decode")
    add("--rounds", type=int, default=15, help="decodes of each variant, after one to warm up")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()

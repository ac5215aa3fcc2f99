r"""Quality of adapters that differ in rho, k, rank, text and whatever else is listed.

Each combination of the lists is fitted in closed form, measured under the served schedule beside
the base model, and recorded. `--adapter` measures finished adapters instead.

    python benchmarks/quality.py MODEL --corpus web.jsonl.gz --text test.txt --limit 16
    python benchmarks/quality.py MODEL --corpus web.jsonl.gz --text test.txt --rho 0.5 --k 2 \
        --injection block attn_mlp
    python benchmarks/quality.py MODEL --corpus web.jsonl.gz --text test.txt --k 3 \
        --injection block attn          for the figure of KL over KV saved; with the numbers of a
                                        mix of `lora-drop profile`: --layers … --drop-attention …
    python benchmarks/quality.py MODEL --text test.txt --adapter adapters/*/* --tasks piqa.jsonl
    python benchmarks/quality.py MODEL --adapter adapters/*/*      on Python's own manual
    python benchmarks/quality_tables.py      renders the newest records
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from support import record, texts
from support.exact_steps import ExactLoraSteps
from support.quality_records import adapter_name
from tqdm import tqdm

from lora_drop_vllm.cli.values import layer_numbers
from lora_drop_vllm.decode.decoder import ForcedDecoder
from lora_drop_vllm.decode.pretrained import model_name, open_model
from lora_drop_vllm.decode.trainable import Adapter
from lora_drop_vllm.evaluation.divergence import perplexity
from lora_drop_vllm.evaluation.evaluate import PROMPT, WINDOW, text_windows
from lora_drop_vllm.evaluation.scoring import run_task
from lora_drop_vllm.evaluation.tasks import read_task
from lora_drop_vllm.method.adapter import AdapterConfig, load_tensors, read_config
from lora_drop_vllm.training.corpus import read_corpus
from lora_drop_vllm.training.fit import new_config
from lora_drop_vllm.training.layerwise import fit_tensors
from lora_drop_vllm.training.samples import sample
from lora_drop_vllm.training.settings import Settings

LISTS = ("layers", "rho", "k", "rank", "reuse", "kv", "injection", "drop_attention")
LISTS += ("tokens", "seed")


def main() -> None:
    """Fits or loads, measures, records and prints."""
    given = _arguments()
    model, tokenizer = open_model(given.model)
    name, text = texts.read(given.text)
    windows = text_windows(tokenizer, text, given.limit).to(model.device)
    tasks = [read_task(path, given.limit_tasks) for path in given.tasks]
    for settings, config, tensors in _adapters(given, model, tokenizer):
        adapter = Adapter(config, tensors).to(model.device)
        decoder = ForcedDecoder(model, adapter)
        steps = perplexity(decoder, windows, PROMPT, config.k)
        metrics: dict[str, Any] = {kind: asdict(found) for kind, found in steps.items()}
        metrics |= {"drop_layers": config.drop_layers, "injection": config.injection}
        if config.drop_attention:
            metrics |= {"drop_attention": config.drop_attention}
        if "adapter" in settings and config.kv == "skip":
            exact = perplexity(ExactLoraSteps(model, adapter), windows, PROMPT, config.k)
            metrics |= {"exact_lora_steps": {kind: asdict(of) for kind, of in exact.items()}}
        metrics |= {"tasks": [asdict(run_task(decoder, tokenizer, task)) for task in tasks]}
        about = {"text": name, "windows": len(windows), "window": WINDOW}
        about |= {"model": model_name(given.model), "prompt": PROMPT, "limit": given.limit_tasks}
        record.write("quality", settings | about, metrics)
        shown = {key: settings[key] for key in settings if key in LISTS or key == "adapter"}
        print(
            " ".join(f"{key}={value}" for key, value in shown.items()),
            *(f"{kind} {found.perplexity:.2f}" for kind, found in steps.items()),
            f"(base {steps['all'].base_perplexity:.2f}) KL {steps['all'].kl:.3f}",
            f"agreement {steps['all'].agreement:.3f}",
            flush=True,
        )


def _adapters(
    given: argparse.Namespace, model: Any, tokenizer: Any
) -> Iterator[tuple[dict[str, Any], AdapterConfig, dict[str, Any]]]:
    """Adapters to measure: settings for the record, config and tensors."""
    for folder in given.adapter:
        config = read_config(folder)
        yield (
            {"adapter": adapter_name(folder)},
            config,
            load_tensors(folder, config),
        )
    if not given.corpus:
        return
    texts = read_corpus(given.corpus)
    cells = list(itertools.product(*(getattr(given, name) for name in LISTS)))
    for cell in tqdm(cells, desc="Adapters", unit="adapter"):
        settings = Settings(**dict(zip(LISTS, cell)))
        if settings.drop_attention or not isinstance(settings.layers, str):
            settings = replace(settings, rho=None)
        samples = sample(model, tokenizer, texts, settings)
        config = new_config(given.model, model, settings, samples, given.profile)
        kept = asdict(settings) | {"corpus": [path.name for path in given.corpus]}
        if not settings.drop_attention:  # as in the records from before there was a choice
            del kept["drop_attention"]
        yield kept, config, fit_tensors(model, samples, config)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="model folder, or a name in the local Hugging Face cache")
    parser.add_argument("--corpus", nargs="*", type=Path, default=[], help="text to fit on")
    parser.add_argument("--adapter", nargs="*", type=Path, default=[], help="folders to measure")
    parser.add_argument("--text", type=Path, help="plain text (default: Python's manual)")
    parser.add_argument("--limit", type=int, default=16, help="windows of the text (default: 16)")
    parser.add_argument("--tasks", nargs="*", type=Path, default=[], help="JSONL files")
    parser.add_argument("--limit-tasks", type=int, help="questions of each (default: all)")
    parser.add_argument("--profile", type=Path, help="profile.json that scores the layers")
    parser.add_argument("--layers", nargs="+", type=layer_numbers, default=["contiguous"])
    parser.add_argument("--rho", nargs="+", type=float, default=[0.25, 0.5, 0.75])
    parser.add_argument("--k", nargs="+", type=int, default=[1, 2, 3, 5])
    for name, default in (("rank", 16), ("tokens", 8192), ("seed", 0)):
        parser.add_argument(f"--{name}", nargs="+", type=int, default=[default])
    parser.add_argument("--reuse", nargs="+", default=["update"])
    parser.add_argument("--kv", nargs="+", default=["skip"])
    parser.add_argument("--injection", nargs="+", default=["block"])
    parser.add_argument(
        "--drop-attention",
        nargs="+",
        type=layer_numbers,
        default=[()],
        help="layers of which only the attention drops, beside the numbers in --layers",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""How much accuracy does a KL cost? Questions that change sides, over the KL on their choices.

Adapters answer the questions that the base model answers. Under `kv: skip` so does the base model
with exact LoRA steps, where only the holes in the KV are left.

    python benchmarks/accuracy_over_kl.py MODEL --adapter adapters/smollm2-135m-instruct/rho* \
        --tasks piqa.jsonl arc_easy.jsonl --limit 1000
    python benchmarks/quality_tables.py      renders the newest records
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from support import record
from support.exact_steps import ExactLoraSteps
from support.quality_records import adapter_name

from lora_drop_vllm.decode.decoder import ForcedDecoder
from lora_drop_vllm.decode.pretrained import model_name, open_model
from lora_drop_vllm.decode.trainable import Adapter
from lora_drop_vllm.evaluation.scoring import run_task
from lora_drop_vllm.evaluation.tasks import read_task
from lora_drop_vllm.method.adapter import load_tensors, read_config


def main() -> None:
    """Asks, records and prints."""
    given = _arguments()
    model, tokenizer = open_model(given.model)
    tasks = [read_task(path, given.limit) for path in given.tasks]
    for folder in given.adapter:
        found: dict[str, Any] = {}
        for steps, decoder in decoders(model, folder):
            found[steps] = [asdict(run_task(decoder, tokenizer, task)) for task in tasks]
            for task in found[steps]:
                marks, kl = task["accuracy"], f"KL {task['kl']:.3f}"
                accuracy = f"accuracy {marks['share']:.3f} (base {marks['base']:.3f})"
                print(folder.name, steps, task["task"], kl, accuracy, flush=True)
        about = {"model": model_name(given.model), "adapter": adapter_name(folder)}
        record.write("accuracy_over_kl", about | {"limit": given.limit}, found)


def decoders(model: Any, folder: Path) -> Iterator[tuple[str, ForcedDecoder]]:
    """The served adapter; under `kv: skip` also exact LoRA steps with its layers."""
    config = read_config(folder)
    adapter = Adapter(config, load_tensors(folder, config)).to(model.device)
    yield "served", ForcedDecoder(model, adapter)
    if config.kv == "skip":
        yield "exact", ExactLoraSteps(model, adapter)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", help="model folder, or a name in the local Hugging Face cache")
    add("--adapter", nargs="+", required=True, type=Path, help="adapter folders")
    add("--tasks", nargs="+", required=True, type=Path, help="multiple choice, JSONL files")
    add("--limit", type=int, help="questions of each (default: all)")
    return parser.parse_args()


if __name__ == "__main__":
    main()

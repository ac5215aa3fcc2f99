"""How much accuracy does a KL cost? Questions that change sides if LoRA steps were exact.

Only the holes that `kv: skip` leaves in the KV are left then, a far smaller disturbance than the
served adapter's. The questions are those of `quality.py`, with which they make one table.

    python benchmarks/accuracy_over_kl.py MODEL --tasks piqa.jsonl arc_easy.jsonl --limit 1000 \
        --adapter adapters/smollm2-135m-instruct/rho25-skip
    python benchmarks/quality_tables.py      renders the newest records
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from support import record
from support.exact_steps import ExactLoraSteps
from support.quality_records import adapter_name

from lora_drop_vllm.decode.pretrained import model_name, open_model
from lora_drop_vllm.decode.trainable import Adapter
from lora_drop_vllm.evaluation.scoring import run_task
from lora_drop_vllm.evaluation.tasks import read_task
from lora_drop_vllm.method.adapter import load_tensors, read_config


def main() -> None:
    """Asks, records and prints.

    Raises:
        ValueError: an adapter whose LoRA steps write KV.
    """
    given = _arguments()
    adapters = {}
    for folder in given.adapter:
        config = read_config(folder)
        if config.kv != "skip":
            raise ValueError(f"--adapter {folder}: kv {config.kv} leaves no holes; give kv skip")
        adapters[folder] = Adapter(config, load_tensors(folder, config))
    model, tokenizer = open_model(given.model)
    tasks = [read_task(path, given.limit) for path in given.tasks]
    for folder, adapter in adapters.items():
        decoder = ExactLoraSteps(model, adapter.to(model.device))
        found = [run_task(decoder, tokenizer, task) for task in tasks]
        for task in found:
            accuracy = f"accuracy {task.accuracy.share:.3f} (base {task.accuracy.base:.3f})"
            print(folder.name, task.task, f"KL {task.kl:.3f}", accuracy, flush=True)
        about = {"model": model_name(given.model), "adapter": adapter_name(folder)}
        metrics = {"exact": [asdict(task) for task in found]}
        record.write("accuracy_over_kl", about | {"limit": given.limit}, metrics)


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

"""Questions that the served model answers freely: LoRA-Drop beside k = 0, the base model.

Each task gives one record, with the counts of both kinds of step but without the answers
themselves; `lora-drop evaluate --json` keeps those.

    python benchmarks/answers.py MODEL --adapter DIR --tasks gsm8k.jsonl --limit 100
    python benchmarks/answers.py MODEL --adapter DIR --tasks human_eval.jsonl --run-code
    python benchmarks/quality_tables.py      renders the newest records
"""

from __future__ import annotations

import argparse
from pathlib import Path

from support import record
from support.quality_records import adapter_name

from lora_drop_vllm.decode.pretrained import model_name
from lora_drop_vllm.evaluation.evaluate import evaluate
from lora_drop_vllm.evaluation.served_answers import Decoding


def main() -> None:
    """Asks, prints and records."""
    given = _arguments()
    decoding = Decoding(
        dtype=given.dtype,
        num_fewshot=given.num_fewshot,
        max_tokens=given.max_tokens,
        concurrency=given.concurrency,
        run_code=given.run_code,
    )
    result = evaluate(
        given.model, given.adapter, tasks=given.tasks, limit=given.limit, decoding=decoding
    )
    print(result)
    about = {
        "model": model_name(given.model),
        "adapter": adapter_name(given.adapter),
        **{name: getattr(given, name) for name in ("dtype", "limit", "num_fewshot", "max_tokens")},
        "concurrency": given.concurrency,
    }
    for found in result.report()["decoded"]:
        del found["answers"]
        record.write("answers", about | {"task": found.pop("task")}, found)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="model folder, or a name in the local Hugging Face cache")
    parser.add_argument("--adapter", required=True, type=Path, help="adapter folder")
    parser.add_argument("--tasks", required=True, nargs="+", type=Path, help="JSONL files")
    parser.add_argument("--dtype", default=Decoding.dtype, help="as for vLLM")
    parser.add_argument("--limit", type=int, help="questions of each (default: all)")
    parser.add_argument(
        "--num-fewshot",
        type=int,
        default=Decoding.num_fewshot,
        help="worked examples before a question of GSM8K",
    )
    parser.add_argument(
        "--max-tokens", type=int, default=Decoding.max_tokens, help="length limit of an answer"
    )
    parser.add_argument(
        "--concurrency", type=int, default=Decoding.concurrency, help="requests at a time"
    )
    parser.add_argument(
        "--run-code", action="store_true", help="run the programs that it writes on this machine"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""Answers to chat prompts: LoRA-Drop beside the base model, as a whole and token by token.

A server answers the prompts with both. KL and agreement are then measured on the base model's own
answers, but for those with a loop. Each adapter gives one record, without the answers themselves;
`--answers` keeps those.

    python benchmarks/chat.py MODEL --adapter adapters/smollm2-135m-instruct/rho25-skip
    python benchmarks/chat.py MODEL --adapter DIR --limit 10 --answers answers.json
    python benchmarks/quality_tables.py      renders the newest records without --limit
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from support import exact_steps, record
from support.quality_records import adapter_name

from lora_drop_vllm.decode.pretrained import model_name
from lora_drop_vllm.evaluation.divergence import Divergence
from lora_drop_vllm.evaluation.evaluate import evaluate
from lora_drop_vllm.evaluation.rollouts import CHAT_PROMPTS
from lora_drop_vllm.evaluation.served_answers import Decoding


def main() -> None:
    """Asks, measures, prints and records."""
    given = _arguments()
    how = {name: getattr(given, name) for name in ("dtype", "max_tokens", "concurrency")}
    result = evaluate(
        given.model,
        given.adapter,
        rollouts=given.prompts,
        limit=given.limit,
        decoding=Decoding(**how),
        out=given.answers,
    )
    print(result, flush=True)
    found = result.report()["rollouts"]
    forced = on_replies(given.model, given.adapter, found.pop("answers"))
    about = {"model": model_name(given.model), "adapter": adapter_name(given.adapter), **how}
    about |= {"prompts": found.pop("prompts"), "limit": given.limit}
    record.write("chat", about, forced | {"rollouts": found})


def on_replies(model: str, adapter: Path, answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Divergence on the base model's own answers, but for those with a loop or without a word."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "replies.jsonl"
        file.write_text("".join(json.dumps(_conversation(a)) + "\n" for a in usable(answers)))
        chat = evaluate(model, adapter, chat=file).chat
        assert chat is not None
        print(*chat.lines(), sep="\n", flush=True)
        exact = exact_steps.on_chat(model, adapter, file)
    steps = {"steps": _by_kind(chat.steps), "exact_lora_steps": _by_kind(exact)}
    return {"replies": chat.replies, **steps}


def _by_kind(steps: Mapping[str, Divergence]) -> dict[str, Any]:
    return {kind: asdict(divergence) for kind, divergence in steps.items()}


def usable(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Answers whose base model's side can serve as a reply."""
    return [a for a in answers if a["base"]["text"].strip() and not a["base"]["loops"]]


def _conversation(answer: dict[str, Any]) -> dict[str, Any]:
    base = answer["base"]
    reply = {"role": "assistant", "content": base["text"], "cut": base["cut_off"]}
    return {"messages": [*answer["messages"], reply]}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", help="model folder, or a name in the local Hugging Face cache")
    add("--adapter", required=True, type=Path, help="adapter folder")
    add("--prompts", type=Path, default=CHAT_PROMPTS, help="default: those of the package")
    add("--limit", type=int, help="prompts, at most (default: all)")
    add("--dtype", default=Decoding.dtype, help="as for vLLM")
    add("--max-tokens", type=int, default=Decoding.max_tokens, help="length limit of an answer")
    add("--concurrency", type=int, default=Decoding.concurrency, help="requests at a time")
    add("--answers", type=Path, help="also write the report with all answers there, as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()

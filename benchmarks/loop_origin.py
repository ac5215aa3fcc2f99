"""Whose loops are they? The base model continues answers that LoRA-Drop began and then looped in.

Each answer that loops under LoRA-Drop, and not from the base model, is cut where its loop begins.
The stock base model continues it greedily. As a control it also continues its own answer, cut at
the same token. Loops that the base model enters from there are not undone by being more like it.

    python benchmarks/chat.py MODEL --adapter DIR --answers answers.json
    python benchmarks/loop_origin.py MODEL --adapter DIR --answers answers.json
    python benchmarks/quality_tables.py      renders the newest records
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support import record
from support.quality_records import adapter_name
from transformers import AutoTokenizer

from lora_drop_vllm.decode.pretrained import model_name
from lora_drop_vllm.engine.offline_generation import Generator, Request, start_engine
from lora_drop_vllm.evaluation.rollout_report import loop_start, loops
from lora_drop_vllm.evaluation.served_answers import Decoding

BATCH = 16


@dataclass(frozen=True)
class Begun:
    """A prompt and the first tokens of the answers to it, of both as many."""

    prompt: list[int]
    ours: list[int]
    base: list[int]


def main() -> None:
    """Continues, prints and records."""
    given = _arguments()
    answers = json.loads(given.answers.read_text())["rollouts"]["answers"]
    begun = beginnings(AutoTokenizer.from_pretrained(given.model), answers)
    context = given.max_tokens + max((len(each.prompt) for each in begun), default=0)
    engine = start_engine(given.model, BATCH, context)
    found = {"answers": len(answers)} | continued(engine, begun, given.max_tokens)
    print(json.dumps(found, indent=2))
    about = {"model": model_name(given.model), "adapter": adapter_name(given.adapter)}
    record.write("loop_origin", about | {"max_tokens": given.max_tokens} | engine.facts, found)


def beginnings(tokenizer: Any, answers: Sequence[dict[str, Any]]) -> list[Begun]:
    """The answers in which only LoRA-Drop loops, both cut where its loop begins."""
    found = []
    for answer in answers:
        ours, base = (
            tokenizer.encode(answer[who]["text"], add_special_tokens=False)
            for who in ("lora_drop", "base")
        )
        start = loop_start(ours)
        if start is None or loops(base):
            continue
        prompt = tokenizer.apply_chat_template(
            answer["messages"], add_generation_prompt=True, return_dict=False
        )
        found.append(Begun(list(prompt), ours[:start], base[:start]))
    return found


def continued(base_model: Generator, begun: Sequence[Begun], most: int) -> dict[str, Any]:
    """How many of the beginnings end in a loop when the base model goes on, ours and its own.

    Args:
        most: tokens of an answer, those of the beginning included
    """
    looped = {}
    for who in ("ours", "base"):
        firsts = [getattr(each, who) for each in begun]
        asked = [
            Request(each.prompt + first, most - len(first), seed=0)
            for each, first in zip(begun, firsts)
        ]
        rests = base_model(asked) if asked else []
        looped[who] = sum(
            rest.end == "repetition" or loops(first + rest.tokens)
            for first, rest in zip(firsts, rests)
        )
    starts = sorted(len(each.ours) for each in begun)
    return {
        "only_ours_loop": len(begun),
        "median_start": starts[len(starts) // 2] if starts else None,
        "base_loops_from_ours": looped["ours"],
        "base_loops_from_own": looped["base"],
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", help="model folder, or a name in the local Hugging Face cache")
    add("--adapter", required=True, type=Path, help="adapter folder that gave the answers")
    add("--answers", required=True, type=Path, help="what `chat.py --answers` wrote")
    add("--max-tokens", type=int, default=Decoding.max_tokens, help="length limit of an answer")
    return parser.parse_args()


if __name__ == "__main__":
    main()

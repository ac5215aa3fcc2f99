"""GSM8K, decoded by a server: worked examples, then a question whose answer is a number."""

from __future__ import annotations

import re
from decimal import Decimal

from lora_drop_vllm.evaluation.served_answers import DecodedTask, Mark
from lora_drop_vllm.evaluation.tasks import Task, WordProblem, number

STOP = ("Question:", "</s>", "<|im_end|>")
STRICT, FLEXIBLE = "strict-match", "flexible-extract"  # lm-eval's names
_MARKED = re.compile(r"#### *([-$\d.,]+)")
_NUMBER = re.compile(r"-?\$?(?:\d[\d,]*)?\.?\d+")


def gsm8k(task: Task, shots: int) -> DecodedTask:
    """Questions of a task; its first `shots` ones become worked examples and are not asked.

    Raises:
        ValueError: no question is left to ask.
    """
    shown, asked = task.examples[:shots], task.examples[shots:]
    if not asked:
        raise ValueError(
            f"--num-fewshot {shots}: {task.name} has {len(shown)} questions, so none is left to "
            "ask; lower --num-fewshot"
        )
    examples = "".join(f"{_ask(p)} {p.reasoning}\n#### {p.answer:f}\n\n" for p in shown)

    def mark(row: int, text: str) -> Mark:
        marked = _MARKED.search(text)
        numbers = _NUMBER.findall(text)
        found = {
            STRICT: number(marked[1]) if marked else None,
            FLEXIBLE: number(numbers[-1]) if numbers else None,
        }
        right = {measure: value == asked[row].answer for measure, value in found.items()}
        return Mark(right, ", ".join(_show(value) for value in found.values()))

    return DecodedTask(
        name=task.name,
        questions=[str(shots + row) for row in range(len(asked))],
        prompts=[examples + _ask(problem) for problem in asked],
        stop=STOP,
        mark=mark,
        skipped=task.skipped,
    )


def _ask(problem: WordProblem) -> str:
    return f"Question: {problem.question}\nAnswer:"


def _show(value: Decimal | None) -> str:
    return "none" if value is None else f"{value:f}"

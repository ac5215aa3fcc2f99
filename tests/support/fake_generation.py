"""A fake engine for `lora-drop generate`, and runs with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tiny import make_tokenizer

from lora_drop_vllm.engine.offline_generation import Completion, Request
from lora_drop_vllm.training.conversations import USER_TOKENS, Generation
from lora_drop_vllm.training.generate import generate

PLAIN = Generation(max_tokens=64)


def answer(text: str, end: str = "stop") -> Completion:
    return Completion(text, make_tokenizer()(text).input_ids, end)


def is_user(request: Request) -> bool:
    return request.max_tokens == USER_TOKENS


def said(request: Request) -> str:
    """The fake model's answer to a prompt; it differs for each seed."""
    if is_user(request):
        return f"Tell me about number {request.seed % 10**6}, please."
    return f"Number {request.seed % 10**6} is large, and then {len(request.tokens)} came."


class FakeEngine:
    """Answers by a rule; the call numbered `dies` is interrupted."""

    facts = {"vllm": "fake"}

    def __init__(
        self,
        rule: Callable[[Request], Completion] = lambda request: answer(said(request)),
        dies: int | None = None,
    ) -> None:
        self.rule, self.dies, self.asked = rule, dies, list[Request]()
        self.calls = 0

    def start(self, model: str, batch: int, context: int) -> FakeEngine:
        self.batch, self.context = batch, context
        return self

    def __call__(self, requests: Sequence[Request]) -> list[Completion]:
        if self.calls == self.dies:
            raise KeyboardInterrupt
        self.calls += 1
        self.asked += requests
        return [self.rule(request) for request in requests]


def made(
    model: str,
    out: Path,
    settings: Generation = PLAIN,
    engine: FakeEngine | None = None,
    **more: Any,
) -> list[dict[str, Any]]:
    """Lines of the file after a run."""
    given = {"count": 40, "batch": 16} | more
    generate(model, out, settings, start=(engine or FakeEngine()).start, **given)
    return [json.loads(line) for line in out.read_text().splitlines()]


FAMILIES = {
    "smollm2": (
        "<|im_start|>system\nYou are SmolLM.<|im_end|>\n<|im_start|>user\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "qwen2": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "llama3": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
}

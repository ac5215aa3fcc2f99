"""A generator without a model: it answers by a rule, and can be interrupted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from tiny import make_tokenizer

from lora_drop_vllm.engine.offline_generation import Completion, Request
from lora_drop_vllm.generation.conversations import USER_TOKENS


def answer(text: str, end: str = "stop") -> Completion:
    return Completion(text, make_tokenizer()(text).input_ids, end)


def is_user(request: Request) -> bool:
    return request.max_tokens == USER_TOKENS


def said(request: Request) -> str:
    """What the fake model says to a prompt: another thing for every seed."""
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

    def start(self, model: str, batch: int, context: int, adapter: Path | None) -> FakeEngine:
        self.batch, self.context, self.adapter = batch, context, adapter
        return self

    def __call__(self, requests: Sequence[Request]) -> list[Completion]:
        if self.calls == self.dies:
            raise KeyboardInterrupt
        self.calls += 1
        self.asked += requests
        return [self.rule(request) for request in requests]

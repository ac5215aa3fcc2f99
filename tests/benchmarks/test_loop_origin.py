"""Whose loops they are, with answers and a base model made up here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loop_origin import beginnings, continued

from lora_drop_vllm.engine.offline_generation import Completion, Request

START = [90, 91]  # an answer's first tokens, before its loop
PHRASE = list(range(8))


class Numbers:
    """A tokenizer whose texts are numbers."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [int(word) for word in text.split()]

    def apply_chat_template(self, messages: Any, **how: bool) -> list[int]:
        assert how["add_generation_prompt"]
        return [int(messages[0]["content"])]


def answer(prompt: int, ours: list[int], base: list[int]) -> dict[str, Any]:
    texts = {"lora_drop": ours, "base": base}
    return {"messages": [{"role": "user", "content": str(prompt)}]} | {
        who: {"text": " ".join(map(str, ids))} for who, ids in texts.items()
    }


def test_only_loops_that_the_base_model_does_not_have_are_cut_where_they_begin() -> None:
    loop, plain = [*START, *PHRASE * 3], [*range(60, 90)]
    answers = [answer(1, loop, plain), answer(2, loop, loop), answer(3, plain, plain)]
    (found,) = beginnings(Numbers(), [*answers, answer(4, plain, loop)])
    assert (found.prompt, found.ours, found.base) == ([1], START, plain[:2])


def test_loops_are_counted_over_the_beginning_and_what_follows() -> None:
    """Each beginning may become as long as an answer, and no longer."""
    rests = {90: Completion("", PHRASE * 3, "length"), 60: Completion("", [5, 6], "stop")}

    def base_model(requests: Sequence[Request]) -> list[Completion]:
        assert all(len(request.tokens) - 1 + request.max_tokens == 40 for request in requests)
        return [rests[request.tokens[1]] for request in requests]

    begun = beginnings(Numbers(), [answer(1, [*START, *PHRASE * 3], [*range(60, 90)])])
    expected = {"only_ours_loop": 1, "median_start": 2, "base_loops_from_own": 0}
    assert continued(base_model, begun, 40) == expected | {"base_loops_from_ours": 1}
    rests[90] = Completion("", [5], "repetition")
    assert continued(base_model, begun, 40)["base_loops_from_ours"] == 1
    rests[90] = Completion("", [5], "stop")
    assert continued(base_model, begun, 40)["base_loops_from_ours"] == 0
    assert continued(base_model, [], 40)["median_start"] is None

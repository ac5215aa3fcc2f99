"""Texts of a model without a chat template: it continues openings, or begins on its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from lora_drop_vllm.generation.conversations import LEAST, Generation, Run, distinct
from lora_drop_vllm.generation.turns import loops

OPENING = 32  # tokens of an opening


class Continuations:
    """Texts by attempt: a model without a chat template continues openings, or begins on its own.

    Args:
        openings: texts; the model continues their first tokens
        student: as for `Conversations`

    Attributes:
        context: tokens of the longest text, at most
    """

    def __init__(
        self,
        tokenizer: Any,
        settings: Generation,
        openings: Sequence[str],
        student: bool = False,
    ) -> None:
        self._tokenizer, self._settings, self._openings = tokenizer, settings, openings
        self._student = student
        self.context = OPENING + settings.max_tokens

    def write(
        self,
        numbers: Sequence[int],
        run: Run,
    ) -> tuple[list[dict[str, Any]], Counter[str]]:
        """Records of the usable attempts, and the numbers of texts left out, by reason."""
        prompts = [self._opening(number) for number in numbers]
        greedy = [
            bool(self._openings) and self._settings.random(number).random() < self._settings.greedy
            for number in numbers
        ]  # without openings there is only one greedy text
        requests = [
            self._settings.request(prompt, is_greedy, number)
            for prompt, is_greedy, number in zip(prompts, greedy, numbers)
        ]
        run.say("continuations")
        records, left_out = [], Counter[str]()
        for number, prompt, is_greedy, answer in zip(
            numbers, prompts, greedy, run.engine(requests)
        ):
            short = len(answer.tokens) < LEAST
            if short or (loops(answer) and not self._student):
                left_out["too short" if short else "repetition"] += 1
                continue
            text = self._tokenizer.decode(prompt, skip_special_tokens=True) + answer.text
            record = {"text": text, "number": number, "greedy": is_greedy}
            records.append(record | {"tokens": len(answer.tokens)})
        return distinct(records, run.known, left_out), left_out

    def _opening(self, number: int) -> list[int]:
        """Tokens to continue: those of an opening, or the token that begins a text."""
        if not self._openings:
            tokenizer = self._tokenizer
            begin = tokenizer.bos_token_id
            return [tokenizer.eos_token_id if begin is None else begin]
        text = self._openings[number % len(self._openings)]
        tokens: list[int] = self._tokenizer(text[: 16 * OPENING]).input_ids[:OPENING]
        return tokens

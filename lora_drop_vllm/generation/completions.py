"""Completions of plain prompts, which a model continues as they stand, as at `/v1/completions`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_drop_vllm.generation.continuations import Continuations
from lora_drop_vllm.generation.conversations import Conversations, Generation, Run
from lora_drop_vllm.generation.turns import loops


@dataclass(frozen=True)
class Plain:
    """A prompt without a chat template, and the strings that end its completion."""

    text: str
    stop: tuple[str, ...] = ()

    @classmethod
    def of(cls, raw: dict[str, Any]) -> Plain:
        """The prompt in the fields `text` and `stop`; the latter may be missing.

        Raises:
            ValueError: `text` is empty, or `stop` is no list of strings.
        """
        stop = raw.get("stop", [])
        if not isinstance(stop, list) or not all(isinstance(end, str) and end for end in stop):
            raise ValueError(f"stop {stop!r}: expected a list of strings")
        if not raw["text"].strip():
            raise ValueError("an empty `text`")
        return cls(raw["text"], tuple(stop))


class Completions:
    """Completions of the plain prompts of a file; `others` answers the other prompts.

    Args:
        plain: the plain prompts, by attempt; at least one
        others: takes the other attempts
        student: as for `Conversations`

    Attributes:
        context: tokens of the longest prompt and its completion, at most
    """

    def __init__(
        self,
        tokenizer: Any,
        settings: Generation,
        plain: Mapping[int, Plain],
        others: Conversations | Continuations,
        student: bool = False,
    ) -> None:
        self._tokenizer, self._settings, self._others = tokenizer, settings, others
        self._plain, self._student = plain, student
        longest = max(len(tokenizer(prompt.text).input_ids) for prompt in plain.values())
        self.context = max(longest + settings.max_tokens, others.context)

    def write(
        self,
        numbers: Sequence[int],
        run: Run,
    ) -> tuple[list[dict[str, Any]], Counter[str]]:
        """As `Conversations.write`; a repeated prompt is asked again, as in a conversation."""
        left_out: Counter[str] = Counter()
        records: list[dict[str, Any]] = []
        if other := [number for number in numbers if number not in self._plain]:
            records, left_out = self._others.write(other, run)
        run.say("completions")
        plain = [number for number in numbers if number in self._plain]
        records += self._complete(plain, run, left_out)
        return sorted(records, key=lambda record: record["number"]), left_out

    def _complete(
        self, numbers: Sequence[int], run: Run, left_out: Counter[str]
    ) -> list[dict[str, Any]]:
        requests, records = [], []
        for number in numbers:
            prompt = self._plain[number]
            greedy = self._settings.random(number).random() < self._settings.greedy
            tokens = self._tokenizer(prompt.text).input_ids
            if len(tokens) + self._settings.max_tokens > run.context:
                left_out["too long"] += 1
                continue
            record = {"prompt": prompt.text, "stop": list(prompt.stop), "number": number}
            records.append(record | {"greedy": greedy})
            requests.append(self._settings.request(tokens, greedy, number, stop_text=prompt.stop))
        found = []
        for record, answer in zip(records, run.engine(requests) if requests else ()):
            text = self._tokenizer.decode(answer.tokens)  # with the string that ended it
            if not text.strip() or (loops(answer) and not self._student):
                left_out["repetition" if text.strip() else "too short"] += 1
                continue
            cut = answer.end != "stop" or any(end in text for end in record["stop"])
            found.append(record | {"completion": text, "cut": cut, "tokens": len(answer.tokens)})
        return found

"""The places of a chat template where turns go, and which sampled turns are sound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_drop_vllm.engine.offline_generation import Completion

MARK = "lora-drop-was-here"  # stands where a message goes when the template is read
LEAST_CHARACTERS = 8  # of a user's turn
LEAST_TOKENS = {"user": 3, "assistant": 4}
DISTINCT = 0.5  # of the runs of four tokens, at least
LONG = 64  # tokens from which that is asked

Message = dict[str, Any]


@dataclass(frozen=True)
class Ending:
    """What ends a turn: ids of tokens, or text where the template has no token for it."""

    tokens: tuple[int, ...]
    text: tuple[str, ...]


class Turns:
    """Prompts behind which a model writes the user's or the assistant's turn.

    The header of a turn is what the template puts before a marked message, its ending what follows
    the mark; so it works for any template that keeps messages as they are.

    Attributes:
        user: ending of a user's turn
        assistant: ending of a reply
        system: the template takes system messages

    Raises:
        ValueError: the template loses a message.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._special = {
            number for number, token in tokenizer.added_tokens_decoder.items() if token.special
        } | set(tokenizer.all_special_ids)
        asked = {"role": "user", "content": "Hello"}
        self.user = self._ending(self._cut([], "user")[1])
        self.assistant = self._ending(self._cut([asked], "assistant")[1])
        self.system = self._takes_system()

    def user_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Tokens up to and with the header of the user's next turn."""
        return self._tokens(self._cut(messages, "user")[0])

    def reply_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Tokens up to and with the header of the reply, as a server makes them."""
        return self._tokens(
            self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        )

    def fault(self, turn: Completion, role: str) -> str | None:
        """Why a turn cannot be used, or None; a reply may be cut off, a user's turn may not."""
        if turn.end == "repetition" or repeats(turn.tokens):
            return "repetition"
        if turn.end == "length" and role == "user":
            return "no end"
        text = turn.text.strip()
        short = role == "user" and len(text) < LEAST_CHARACTERS
        if short or not text or len(turn.tokens) < LEAST_TOKENS[role]:
            return "too short"
        if "\N{REPLACEMENT CHARACTER}" in text or self._special & set(turn.tokens):
            return "stray tokens"
        return None

    def _cut(self, messages: Sequence[Message], role: str) -> tuple[str, str]:
        """What the template puts before and behind a message."""
        given = [*messages, {"role": role, "content": MARK}]
        whole = self.tokenizer.apply_chat_template(given, tokenize=False)
        before, mark, behind = whole.rpartition(MARK)
        if not mark:
            raise ValueError(f"the chat template leaves out a message of role {role}")
        return before, behind

    def _tokens(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return found

    def _ending(self, behind: str) -> Ending:
        first = self._tokens(behind)[:1]
        if first and first[0] in self._special:
            return Ending((first[0],), ())
        return Ending((), (behind.strip(),) if behind.strip() else ())

    def _takes_system(self) -> bool:
        from jinja2 import TemplateError

        try:
            before, _ = self._cut([{"role": "system", "content": "Be brief."}], "user")
        except TemplateError:
            return False
        return "Be brief." in before


def repeats(tokens: Sequence[int]) -> bool:
    """True for a long text most of whose runs of four tokens are repetitions."""
    runs = [tuple(tokens[n : n + 4]) for n in range(len(tokens) - 3)]
    return len(tokens) >= LONG and len(set(runs)) < DISTINCT * len(runs)
